"""The properties of Coupled Mamba, and the proof that its modes agree: pytest -q

Three references in NumPy are written from the paper and not from the code: Eq. 6, the
model for one sample (Figure 1 with Algorithm 1), and what a data file means. Nearly
every test is agreement with one of them; the rest is what no reference can say.
Hypothesis draws the problems, 25 for most properties and always the same; with the
environment variable PROFILE=thorough 10,000.
"""
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"         # Triton reads it when it is imported
import coupled_mamba
import data
import train
from coupled_mamba import Block, CoupledMamba, coupled_scan

try:
    kernel = coupled_mamba.load_kernel()
except ImportError:
    kernel = None
triton_only = pytest.mark.skipif(
    kernel is None, reason="Triton is published for Linux only")
KERNEL = pytest.param("kernel", marks=triton_only)

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("PROFILE", "ci"))
EXAMPLES = settings.default.max_examples
pytestmark = pytest.mark.filterwarnings("error")
HERE = Path(__file__).parent

# The largest error over the largest value. float64: rounding over 300 steps. float32:
# 2^-24 times the 100 terms or so that a decay of 0.99 sums, and more for gradients,
# which sum over time again. 16 bit: y and gradients are rounded to 8 or 11 bits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2,
             torch.float16: 3e-3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)                     # the tensors are small


# ------------------------------------------------------------ Eq. 6 in NumPy
def reference(x, delta, A, B, C, D, w, H0):
    """Eq. 6, written from the paper and not from the code: y and the last H."""
    m, b, l, e = x.shape
    if w.ndim == 1:
        w = np.broadcast_to(w[:, None, None], (m, b, l))
    y = np.empty_like(x)
    h = np.empty((m, *H0.shape))
    H = H0
    for t in range(l):
        for k in range(m):
            step = delta[k, :, t, :, None]                                 # (b, e, 1)
            V = step * x[k, :, t, :, None] * B[k, :, t, None, :]
            h[k] = np.exp(step * A[k]) * H + V
            y[k, :, t] = (h[k] @ C[k, :, t, :, None])[..., 0] + D[k] * x[k, :, t]
        H = (w[:, :, t, None, None] * h).sum(0)
    return y, H


def problem(m=3, b=2, l=11, e=4, n=3, seed=1, w="time", masked=False, slow=True,
            dtype=torch.float64):
    """Arguments of `coupled_scan` by name.

    slow: S is mostly between 0.9 and 0.999, since gates drawn from U(0, 1) forget too
    fast to show that a state was lost between two chunks. Else much of S is 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = 1.5 if slow else -1.5
    p = {"x": randn(m, b, l, e), "delta": 10 ** (randn(m, b, l, e) / 2 - scale),
         "A": -torch.exp(randn(m, e, n) / 2), "B": randn(m, b, l, n),
         "C": randn(m, b, l, n), "D": randn(m, e),
         "w": torch.softmax(randn(m, b, l), 0), "H0": randn(b, e, n)}
    if w == "vector":
        p["w"] = torch.softmax(randn(m), 0)
    if masked:                                   # as `Block` treats missing steps
        mask = torch.rand(m, b, l, generator=generator) < 0.6
        weight = torch.where(mask, p["w"] if w == "time" else p["w"][:, None, None], 0)
        weight = weight / weight.sum(0).clamp(min=1e-9)
        p["w"] = torch.where(mask.any(0), weight, 1 / m)
        p["delta"] = torch.where(mask[..., None], p["delta"], 0)
    return {name: v.to(dtype) for name, v in p.items()}


def problems_up_to(m, b, l, e, n):
    sizes = [st.integers(1, most) for most in (m, b, l, e)]
    return st.builds(problem, *sizes, n, seed=st.integers(0, 10 ** 6),
                     w=st.sampled_from(["time", "vector"]), masked=st.booleans(),
                     slow=st.sampled_from([True, True, False]))


problems = problems_up_to(4, 3, 14, 5, st.integers(1, 5))


def assert_close(got, expected, tolerance=1e-9):
    """Tensors, or dicts or lists of them, agree to `tolerance` of the largest value."""
    if isinstance(expected, (dict, list, tuple)):
        assert len(got) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_close(got[key], expected[key], tolerance)
        return
    got = torch.as_tensor(got).detach().cpu().double()
    expected = torch.as_tensor(expected).detach().cpu().double()
    assert got.shape == expected.shape
    error = (got - expected).abs().max().item()
    size = expected.abs().max().item()
    assert error <= tolerance * max(size, 1e-3), f"error {error:.1e} at size {size:.1e}"


@given(problems, st.sets(st.sampled_from(["D", "w", "H0"])))
def test_recurrence_is_equation_6(p, left_out):
    m, b, _, e = p["x"].shape
    defaults = {"D": torch.zeros(m, e), "w": torch.ones(m).double() / m,
                "H0": torch.zeros(b, e, p["A"].shape[2])}
    full = {name: defaults[name] if name in left_out else v for name, v in p.items()}
    expected = reference(*(v.numpy() for v in full.values()))
    short = {name: v for name, v in p.items() if name not in left_out}
    assert_close(coupled_scan(**short, mode="recurrence"), expected, 1e-12)


# ------------------------------------------------------------ the modes agree
def outcome(p, mode, read="all", frozen=()):
    """y, H_last and every gradient under random cotangents.

    read: what the loss reads: "all", "y", "H", or "last", y at the last step. frozen:
    arguments that ask for no gradient. The kernel gets an unusual memory layout.
    """
    if mode == "kernel":
        p = {name: v.mT.contiguous().mT if v.dim() > 1 else v for name, v in p.items()}
        if GPU:
            p = {name: v.cuda() for name, v in p.items()}
    p = {name: v.clone().requires_grad_(name not in frozen) for name, v in p.items()}
    y, H = coupled_scan(**p, mode=mode)
    generator = torch.Generator().manual_seed(0)
    dy, dH = (torch.randn(v.shape, generator=generator).bfloat16().to(v)
              for v in (y, H))
    if read == "last":
        dy[:, :, :-1] = 0
    seen = {"y": [(y, dy)], "H": [(H, dH)]}.get(read, [(y, dy), (H, dH)])
    asking = {name: v for name, v in p.items() if v.requires_grad}
    found = torch.autograd.grad([v for v, _ in seen], list(asking.values()),
                                [d for _, d in seen], materialize_grads=True)
    return {"y": y, "H": H, **dict(zip(asking, found))}


@contextlib.contextmanager
def cut(chunk, cached, tile, segments):
    """How a mode cuts its work: steps of a chunk, numbers to work on at once; for the
    kernel: numbers in a tile, and whether time is cut into segments.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupled_mamba, "CHUNK", chunk)
        patch.setattr(coupled_mamba, "CACHED", cached)
        if kernel:
            fewest = 1 if segments else 99
            for name, value in dict(CHUNK=chunk, TILE=tile, SEGMENT=chunk,
                                    FORWARD=fewest, BACKWARD=fewest).items():
                patch.setattr(kernel, name, value)
        yield


CUTS = st.builds(dict, chunk=st.sampled_from([1, 4, 16]),
                 cached=st.sampled_from([1, 300, 2 ** 20]),
                 tile=st.sampled_from([16, 128, 1024]), segments=st.booleans())
AS_SHIPPED = dict(chunk=coupled_mamba.CHUNK, cached=coupled_mamba.CACHED, tile=1024,
                  segments=False)
READ = st.sampled_from(["all", "y", "H", "last"])
FROZEN = st.sets(st.sampled_from(["delta", "A", "B", "C", "D", "w", "H0"]), max_size=3)
underflowing = problem(m=1)
underflowing["delta"] *= 1e5                     # P is 0 at many steps
small_beside_large = problem(2, 1, 3, 1, 1, seed=0, masked=True, slow=False)


def assert_agrees(mode, p, cuts, read, frozen):
    expected = outcome(p, "recurrence", read, frozen)
    with cut(**cuts):
        assert_close(outcome(p, mode, read, frozen), expected, TOLERANCE[torch.float64])


@given(st.sampled_from(["convolution", "scan"]), problems, CUTS, READ, FROZEN)
@example("convolution", problem(l=100), AS_SHIPPED, "last", set())
@example("convolution", underflowing, AS_SHIPPED, "all", set())
@example("convolution", small_beside_large, AS_SHIPPED, "all", set())
@example("scan", problem(l=300), AS_SHIPPED, "last", set())
@example("scan", problem(l=301, masked=True), AS_SHIPPED, "all", set())
def test_the_modes_agree_in_values_and_every_gradient(mode, p, cuts, read, frozen):
    assert_agrees(mode, p, cuts, read, frozen)


# The interpreter is slow, and shrinking would take minutes. The examples have several
# samples, blocks of e and segments at once, and one a tile of e n = 128 in `_reduce`.
@triton_only
@settings(max_examples=max(1, EXAMPLES // 5), phases=[Phase.explicit, Phase.generate])
@given(problems_up_to(3, 2, 9, 6, st.sampled_from([1, 2, 4, 8])), CUTS, READ, FROZEN)
@example(problem(2, 2, 5, 6, 4), dict(chunk=2, cached=1, tile=32, segments=True), "all",
         set())
@example(problem(2, 2, 5, 6, 64), dict(chunk=2, cached=1, tile=512, segments=True),
         "last", {"x"})
@example(problem(5, 1, 3, 2, 2), dict(chunk=1, cached=1, tile=32, segments=True), "all",
         {"w", "H0"})
def test_the_kernel_agrees_in_values_and_every_gradient(p, cuts, read, frozen):
    assert_agrees("kernel", p, cuts, read, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["recurrence", "convolution", "scan", KERNEL])
def test_narrow_inputs_have_a_float32_state_and_their_own_dtype_out(mode, dtype):
    p = problem(l=9, n=4, dtype=dtype, masked=dtype == torch.float32)
    expected = outcome({name: v.double() for name, v in p.items()}, "recurrence")
    with cut(**{**AS_SHIPPED, "chunk": 4}):
        got = outcome(p, mode)
    assert got["y"].dtype == got["x"].dtype == got["D"].dtype == dtype
    assert got["H"].dtype == torch.float32
    assert_close(got["H"], expected["H"], TOLERANCE[torch.float32])
    assert_close(got, expected, TOLERANCE[dtype])
    for name in ("D", "w", "H0"):                # one float64 argument is enough
        y, H = coupled_scan(**{**p, name: p[name].double()})
        assert y.dtype == dtype and H.dtype == torch.float64


@pytest.mark.parametrize("mode", ["scan", KERNEL])
def test_the_scan_is_exact_under_autocast_and_refuses_second_derivatives(mode):
    p = problem(l=5, n=4, dtype=torch.float32)
    expected = outcome(p, mode)
    with torch.autocast("cuda" if GPU else "cpu", torch.bfloat16):
        assert_close(outcome(p, mode), expected, 1e-6)
    p = {name: v.cuda() if GPU else v for name, v in p.items()}
    y, _ = coupled_scan(**{**p, "x": p["x"].requires_grad_()}, mode=mode)
    dx, = torch.autograd.grad((y ** 2).sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    p = problem(2, 1, 3, 2, 2)
    assert torch.autograd.gradgradcheck(         # which only `recurrence` has
        lambda *values: coupled_scan(**dict(zip(p, values)), mode="recurrence"),
        [v.requires_grad_() for v in p.values()], atol=1e-6, fast_mode=True)
    two = torch.vmap(lambda D: coupled_scan(**{**p, "D": D}, mode="recurrence")[0])(
        torch.stack([p["D"], 2 * p["D"]]))
    assert_close(two[1] - two[0], p["D"][:, None, None] * p["x"])


@given(problems)
def test_the_fft_is_the_recurrence_for_parameters_constant_in_time(p):
    w = torch.softmax(torch.arange(len(p["x"]), dtype=torch.float64), 0)
    long = {**p, "w": w, "D": None, "H0": None}
    for name in ("delta", "B", "C"):
        long[name] = p[name][:, :, :1].expand_as(p[name])
    short = [p[name][:, :, 0] for name in ("B", "C")]
    y = coupled_mamba.fft_convolution(p["x"], p["delta"][:, :, 0], p["A"], *short, w)
    assert_close(y, coupled_scan(**long, mode="recurrence")[0])


class Largest(TorchDispatchMode):
    """`size` of the largest tensor that an operation returned, in float32 numbers."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // 4)
        return out


def test_scan_works_on_some_steps_of_some_samples_at_once():
    p = problem(m=2, b=40, l=60, e=32, n=32, dtype=torch.float32)
    with Largest() as seen, cut(chunk=4, cached=2 ** 14, tile=8, segments=False):
        outcome(p, "scan")
    assert seen.size == p["x"].numel()           # S of 4 steps of all is twice as large


@pytest.mark.parametrize("mode", ["scan", KERNEL])
def test_what_is_kept_for_backward_is_the_inputs_and_a_state_per_chunk(mode):
    p = problem(m=2, b=1, l=12, e=2, n=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda v: kept.append(v.numel()) or v, lambda v: v):
        with cut(chunk=4, cached=2 ** 20, tile=8, segments=True):
            outcome(p, mode)
    names = ["x", "delta", "A", "B", "C", "w", "x", "D"]         # x, D: for the skip
    assert sum(kept) == sum(p[name].numel() for name in names) + 3 * p["H0"].numel()


# ------------------------------------------------------------ the model in NumPy
def silu(x):
    return x / (1 + np.exp(-x))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def weights_in_H(block, here):
    """The weights of the chains that are there, as `coupling` says."""
    if block.coupling == "sum":
        return np.ones(here.sum())
    logits = np.zeros(len(here))
    if block.coupling == "learned":
        logits = block.coupling_logits.detach().numpy()
    return softmax(logits[here])


def layer_norm(f, p):
    f = (f - f.mean(2, keepdims=True)) / np.sqrt(f.var(2, keepdims=True) + 1e-5)
    return f * p["norm_weight"][:, None] + p["norm_bias"][:, None]


def algorithm_1(block, f, mask):
    """Algorithm 1 for one sample: f (m, l, d), mask (m, l) -> f, and H at the end."""
    p = {name: v.detach().numpy() for name, v in block.named_parameters()}
    m, l, _ = f.shape
    e, n = p["A_log"].shape[1:]
    rank, taps = p["dt_proj.weight"].shape[1], p["conv_weight"].shape[2]
    normed = layer_norm(f, p)
    H = np.zeros((m, e, n))                      # what each chain reads
    u = np.zeros((m, l + taps - 1, e))
    out = f.copy()
    for t in range(l):
        h = H.copy()
        for k in np.flatnonzero(mask[:, t]):
            u[k, t + taps - 1], z = np.split(normed[k, t] @ p["in_proj.weight"][k], 2)
            window = u[k, t:t + taps].T                                    # (e, taps)
            x = silu((window * p["conv_weight"][k]).sum(1) + p["conv_bias"][k])
            low, B, C = np.split(x @ p["x_proj.weight"][k], [rank, rank + n])
            delta = np.logaddexp(0, low @ p["dt_proj.weight"][k] + p["dt_bias"][k])
            S = np.exp(-delta[:, None] * np.exp(p["A_log"][k]))
            h[k] = S * H[k] + np.outer(delta * x, B)
            y = (h[k] @ C + p["D"][k] * x) * silu(z)
            out[k, t] += y @ p["out_proj.weight"][k]
        here = mask[:, t]
        if block.coupling == "none":
            H = h
        elif here.any():
            H[:] = np.tensordot(weights_in_H(block, here), h[here], 1)
    return out, H if block.coupling == "none" else H[0]


def figure_1(model, xs, mask):
    """For a sample xs (l, width), mask (m, l): features, prediction, H of blocks."""
    f = np.stack([e(x).detach().numpy() for e, x in zip(model.encoders, xs)])
    f[~mask] = 0
    m = len(f)
    states = []
    for i, block in enumerate(model.blocks):
        f, H = algorithm_1(block, f, mask)
        states.append(H)
        if i < len(model.blocks) - 1 and model.config["mix"] and m > 1:
            maps = model.mix[i].weight.detach().numpy()
            others = [np.concatenate(np.delete(f, k, 0), 1) for k in range(m)]
            f = np.where(mask[..., None], f + others @ maps, 0)

    seen = np.flatnonzero(mask.any(1))
    pooled = np.zeros(f.shape[2])
    if len(seen):
        pool = {"max": lambda v: v.max(0), "mean": lambda v: v.mean(0),
                "last": lambda v: v[-1]}[model.config["pooling"]]
        weights = softmax(model.modality_logits.detach().numpy()[seen])
        pooled = weights @ np.stack([pool(f[k][mask[k]]) for k in seen])
    return f, model.head(torch.from_numpy(pooled)), states


def model_and_input(seed=0, m=3, b=2, l=7, **options):
    """A small model in float64, none of whose parameters is neutral, and streams."""
    torch.manual_seed(seed)
    widths = (5, 3, 4, 2)[:m]
    model = CoupledMamba(widths, 2, d_model=8, n_layers=2, d_state=8, **options)
    model = model.double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model, [torch.randn(b, l, width, dtype=torch.float64) for width in widths]


@st.composite
def models(draw):
    """A model, streams, and a mask, in which all may be missing at a step or always."""
    options = draw(st.fixed_dictionaries(dict(
        coupling=st.sampled_from(["mean", "learned", "sum", "none"]), mix=st.booleans(),
        m=st.integers(1, 4), pooling=st.sampled_from(["max", "mean", "last"]),
        seed=st.integers(0, 999), l=st.integers(1, 9))))
    model, xs = model_and_input(**options)
    mask = torch.rand(len(xs), 2, options["l"]) < draw(st.sampled_from([0.2, 0.6, 1.1]))
    return model, xs, mask


def gradients(out, model):
    """The gradient of sum(out) for every parameter, zero for those not used."""
    return torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True,
                               materialize_grads=True)


@given(models())
def test_the_model_is_figure_1_with_algorithm_1(case):
    model, xs, mask = case
    out, features = model(xs, mask), model.features(xs, mask)
    _, state = model.advance(xs, model.init_state(2), mask)
    for j in range(2):
        expected = figure_1(model, [x[j] for x in xs], mask[:, j].numpy())
        H = [state[f"{i}.H"].movedim(-3, 0)[j] for i in range(2)]
        assert_close([features[:, j], out[j], H], expected)
    if mask.all():
        assert_close([model(xs), model.features(xs)], [out, features])


@given(models(), st.sampled_from([7., math.inf, math.nan]), st.data())
def test_a_stream_in_pieces_is_the_whole_and_reads_nothing_that_is_missing(
        case, garbage, draws):
    model, xs, mask = case
    l = mask.shape[2]
    dirty = [torch.where(here[..., None], x, garbage) for x, here in zip(xs, mask)]
    state = model.init_state(2)
    first = 0
    while first < l:
        stop = draws.draw(st.integers(first + 1, l))
        piece = [x[:, first:stop] for x in dirty]
        out, state = model.advance(piece, state, mask[:, :, first:stop])
        whole = model([x[:, :stop] for x in xs], mask[:, :, :stop])
        assert_close(out, whole)
        first = stop
    assert_close(gradients(out, model), gradients(whole, model))
    assert all(v.isfinite().all() for v in gradients(model(dirty, mask), model))

    block, f = model.blocks[0], torch.randn(*mask.shape, 8, dtype=torch.float64)
    clean, dirty = (torch.where(mask[..., None], f, v) for v in (0, garbage))
    out, state = block(dirty, mask)
    assert_close([out, state], block(clean, mask))
    assert (out[~mask] == 0).all()
    assert all(v.isfinite().all() for v in gradients(out, block))


# ------------------------------------------------------------ what no reference can say
def test_4096_steps_stay_finite_but_the_plain_sum_of_the_paper_overflows():
    for coupling in ("mean", "learned"):
        model, xs = model_and_input(l=4096, b=1, coupling=coupling)
        out = model(xs)
        assert all(v.isfinite().all() for v in [out, *gradients(out, model)])
    _, state = Block(3, 128, coupling="sum")(torch.randn(3, 1, 110, 128))
    assert not state["H"].isfinite().all()


def test_every_parameter_starts_where_its_docstring_says():
    torch.manual_seed(0)
    model = CoupledMamba((768, 33, 709), coupling="learned")
    assert (model.modality_logits == 0).all()
    for block in model.blocks:
        step = F.softplus(block.dt_bias)
        assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 1.01e-1
        A = -torch.arange(1., 65).expand(3, 256, 64)
        assert_close(-torch.exp(block.A_log), A, 1e-6)
        assert block.dt_proj.weight.shape == (3, 8, 256)         # the rank is n / 8
        for weight, fan_in in (
                (block.in_proj.weight, 128), (block.x_proj.weight, 256),
                (block.dt_proj.weight, 8), (block.out_proj.weight, 256),
                (block.conv_weight, 4), (model.mix[0].weight, 256)):
            assert_close(weight.std(), fan_in ** -0.5, 0.04)
        for name in ("norm_bias", "conv_bias", "coupling_logits"):
            assert (getattr(block, name) == 0).all()
        assert (block.D == 1).all() and (block.norm_weight == 1).all()
    assert Block(2, 8, d_state=4).dt_proj.weight.shape == (2, 1, 16)


def test_dropout_drops_outputs_of_a_block_and_of_the_hidden_layer():
    torch.manual_seed(0)
    model = CoupledMamba((3, 3), 8, d_model=8, n_layers=1, d_state=4, dropout=0.5)
    model.head[3].weight.data, model.head[3].bias.data = torch.eye(8), torch.zeros(8)
    f = torch.randn(2, 4, 6, 8)
    for call in (model.head, lambda f: model.blocks[0](f)[0] - f):
        model.eval()
        whole = call(f)
        model.train()
        ratio = call(f) / whole
        kept = ratio.abs() > 1e-3
        assert 0.4 < kept.float().mean() < 0.6
        assert_close(ratio[kept], torch.full_like(ratio[kept], 2.), 1e-3)


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("coupling", ["mean", "learned", "sum", "none"])
def test_the_state_stays_as_it_is_over_a_gap_of_1000_steps(coupling, dtype):
    model, xs = model_and_input(l=1, coupling=coupling, pooling="mean")
    model = model.to(dtype)
    xs = [x.to(dtype).expand(-1, 1001, -1) for x in xs]
    mask = F.pad(torch.ones(3, 2, 1, dtype=torch.bool), (0, 1000))
    _, one_step = model.advance([x[:, :1] for x in xs], model.init_state(2))
    out, silent = model.advance(xs, model.init_state(2), mask)
    assert out.dtype == dtype and silent["0.H"].dtype == torch.float32
    assert_close(silent["0.H"], one_step["0.H"], 1e-6)
    assert_close(silent["1.H"], one_step["1.H"], 1e-6)


def test_a_narrow_block_computes_with_A_and_weights_in_float32(monkeypatch):
    scan = Mock(wraps=coupled_scan)
    monkeypatch.setattr(coupled_mamba, "coupled_scan", scan)
    Block(2, 8, d_state=4).bfloat16()(torch.randn(2, 1, 3, 8).bfloat16())
    _, _, A, _, _, _, w, H, _ = scan.call_args.args
    assert A.dtype == w.dtype == H.dtype == torch.float32


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_model_pools_6000_steps_as_a_float32_model_does(dtype):
    model, xs = model_and_input(b=1, l=300, pooling="mean", coupling="learned")
    model = model.to(dtype)
    xs = [x.to(dtype) for x in xs]
    state = model.init_state(1)
    with torch.no_grad():
        for _ in range(20):
            out, state = model.advance(xs, state)
        model = model.float()
        whole = [x.float().repeat(1, 20, 1) for x in xs]
        exact, exact_state = model.advance(whole, model.init_state(1))
    assert (state["count"] == 6000).all() and out.isfinite().all()
    assert_close(out, exact, 0.02)
    assert_close(state["mean"], exact_state["mean"], 0.01)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_absent_samples_and_extreme_logits_leave_all_finite(dtype):
    model, xs = model_and_input(coupling="learned")
    mask = torch.rand(3, 2, 7) < 0.6
    mask[:, 1] = False                           # no real step at all
    if dtype == torch.float32:
        mask[0] = False
        for logits in (model.modality_logits, model.blocks[0].coupling_logits):
            logits.data[0] = 2000
    model = model.to(dtype)
    out = model([x.to(dtype) for x in xs], mask)
    assert out.isfinite().all()
    assert all(d.isfinite().all() for d in gradients(out, model))


def test_memory_of_a_stream_in_pieces_does_not_grow_with_its_length():
    model, xs = model_and_input(l=640, b=1)
    sizes = []
    for l in (64, 640):
        state = model.init_state(1)
        with Largest() as seen, torch.no_grad():
            for piece in zip(*(x[:, :l].split(64, 1) for x in xs)):
                out, state = model.advance(piece, state)
        sizes.append(seen.size)
        assert sum(v.untyped_storage().nbytes() for v in state.values()) < 10_000
    with Largest() as whole, torch.no_grad():
        assert_close(model(xs), out)
    assert sizes[0] == sizes[1] < whole.size / 5


@triton_only
def test_the_model_is_the_same_by_the_kernel_and_nearly_so_in_bfloat16():
    plain, xs = model_and_input(l=4, coupling="learned", mode="recurrence")
    model = CoupledMamba(**{**plain.config, "mode": "kernel"}).double()
    model.load_state_dict(plain.state_dict())
    mask = torch.rand(3, 2, 4) < 0.6
    out = plain(xs, mask)
    expected = [out, *gradients(out, plain)]
    device = "cuda" if GPU else "cpu"
    model, xs, mask = model.to(device), [x.to(device) for x in xs], mask.to(device)
    out = model(xs, mask)
    assert_close([out, *gradients(out, model)], expected)
    with torch.autocast(device, torch.bfloat16):
        out, state = model.float().advance([x.float() for x in xs], model.init_state(2),
                                           mask)
        model.advance([x.float() for x in xs], state, mask)      # accepts that state
    assert_close(out, expected[0], 0.1)


def test_torch_compile_gives_the_same():
    model, xs = model_and_input()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # torch warns of its own internals
        assert_close(compiled(xs), model(xs))


def test_a_checkpoint_is_rebuilt_from_its_config_and_holds_a_state(tmp_path):
    model, xs = model_and_input(coupling="none", pooling="last", mix=False)
    _, state = model.advance(xs, model.init_state(2))
    torch.save([model.config, model.state_dict(), state], tmp_path / "a.pt")
    config, weights, state = torch.load(tmp_path / "a.pt", weights_only=True)
    again = CoupledMamba(**config).double()
    again.load_state_dict(weights)
    assert torch.equal(again(xs), model(xs)) and again.config == model.config
    assert_close(again.advance(xs, state)[0], model([x.repeat(1, 2, 1) for x in xs]))
    assert "coupling='none'" in repr(again) and "coupling='none'" in repr(again.blocks)

    sizes = dict(d_model=8, n_layers=1, d_state=4, expand=1, d_conv=2, dt_rank=1)
    sizes = {name: np.int64(size) for name, size in sizes.items()}
    model = CoupledMamba([np.int64(3), 4], np.int64(2), dropout=np.float64(0), **sizes)
    torch.save(model.config, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["d_inputs"] == (3, 4)


# ------------------------------------------------------------ what a user gets wrong
STREAMS = r"expected a list of 3 tensors \(b, l, width\) with the widths \(5, 3, 4\)"
MASK = "torch.bool and shape .m 3, b 2, l 7"
FOREIGN = r"state\['.*'\] is .*keep to one model"
MISTAKES = {                     # what is written, and what is said
    "scan(mode='fft')": "mode is 'fft', expected one of .'auto', 'recurrence'",
    "scan(mode='convolution', w=-ones(3))": "negative weights w: use mode='recurrence'",
    "scan(x=ones(3, 2, 11, 4).long())": "int64.*floating-point numbers",
    "scan(x=ones(3, 2, 0, 4))": "l >= 1",
    "scan(delta=ones(3, 2, 1, 4))": "delta is .*float32 .*3, 2, 1, 4. on cpu, .*l 11",
    "scan(A=ones(3, 4))": "A is a tensor",
    "scan(B=ones(3, 2, 11, 3, device='meta'))": "on meta, expected .* on cpu",
    "scan(C=ones(3, 2, 11, 1))": "C is a tensor",
    "scan(D=ones(1, 4))": "D is a tensor",
    "scan(H0=ones(1, 4, 3))": "H0 is a tensor",
    "scan(w=ones(2))": "m 3, b 2, l 11",
    "scan(w=ones(3, 1, 11))": "w is a tensor",
    "scan(w=[1, 1, 1])": "w is a list",
    "CoupledMamba((3, 4), coupling='max')": "coupling is 'max', expected .*'mean'",
    "CoupledMamba((3, 4), pooling='sum')": "pooling is 'sum'",
    "CoupledMamba((3, 4), mode='x')": "mode is 'x'",
    "CoupledMamba(6)": "d_inputs is 6, expected a list or tuple",
    "CoupledMamba(())": r"d_inputs is \(\)",
    "model([x.float() for x in xs])": "0. .*torch.float32 .*expected .*torch.float64",
    "model([x.long() for x in xs])": "torch.int64",
    "model([x.numpy() for x in xs])": "is a ndarray",
    "model(xs[0])": "xs is a tensor of .*" + STREAMS,
    "model(dict(enumerate(xs)))": "xs is a dict, " + STREAMS,
    "model(xs + xs[:1])": STREAMS,
    "model([*xs[:2], xs[2][:, :5]])": "l 7, width 4",
    "model([*xs[:2], xs[2][:1]])": "b 2, l 7, width",
    "model(xs[::-1])": "width 5",
    "model([x[:, 0] for x in xs])": "l >= 1",
    "model(xs, mask.numpy())": "mask is a ndarray, .*" + MASK,
    "model(xs, mask.tolist())": "mask is a list, .*" + MASK,
    "model(xs, mask.double())": "mask .*float64 .*" + MASK,
    "model(xs, mask[..., :1])": "mask .*" + MASK,
    "model.features(xs, mask[:, :1])": "mask .*" + MASK,
    "block(f.double())": "f is a tensor of torch.float64",
    "block(f[:, :, 0])": "l >= 1, d 8",
    "block(f[:2])": "m 3, b >= 1",
    "block([*f])": "f is a list",
    "block(f, mask[:, :, :1])": "mask is",
    "block(f, state=(1, 2))": "state is a tuple, begin with",
    "block(f, state=block.init_state(1))": r"state\['conv'\] .*3, 2, 3, 16",
    "model.advance(xs, state, mask[:, :1])": MASK,
    "model.advance(xs, None)": r"state is a NoneType.*init_state\(",
    "model.advance(xs, model.init_state(3))": FOREIGN,
    "model.advance(xs, {**state, 'more': xs[0]})": FOREIGN,
    "model.advance(xs, other(m=2))": FOREIGN,
    "model.advance(xs, other(pooling='last'))": FOREIGN,
    "model.advance(xs, {name: v.float() for name, v in state.items()})": FOREIGN}


@pytest.mark.parametrize("written", MISTAKES)
def test_a_mistake_gets_a_sentence_and_nothing_is_broadcast_in_silence(written):
    model, xs = model_and_input()
    names = dict(
        CoupledMamba=CoupledMamba, ones=torch.ones, model=model, xs=xs,
        scan=lambda **wrong: coupled_scan(**{**problem(), **wrong}),
        mask=torch.ones(3, 2, 7, dtype=torch.bool), state=model.init_state(2),
        other=lambda **options: model_and_input(**options)[0].init_state(2),
        block=Block(3, 8, d_state=4), f=torch.randn(3, 2, 7, 8))
    with pytest.raises(ValueError, match=MISTAKES[written]):
        eval(written, names)


# ------------------------------------------------------------ which mode runs
def copy_to(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(HERE / name, folder / name)


def run_python(code, folder, **environment):
    """Run code in a process of its own; returns what it printed."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder,
                          env={**os.environ, **environment}, text=True, check=True,
                          stdout=subprocess.PIPE).stdout


# The attributes of a tensor on a GPU that the choice of a mode reads.
ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=(3, 2, 11, 4))


def test_auto_is_the_kernel_on_a_gpu_that_can_run_it_and_else_scan(monkeypatch):
    A = torch.ones(3, 4, 4)
    assert coupled_mamba.choose_mode(torch.ones(3, 2, 11, 4), A) == "scan"
    monkeypatch.setattr(coupled_mamba, "kernel_problem", lambda x, A: None)
    assert coupled_mamba.choose_mode(ON_GPU, A) == "kernel"
    monkeypatch.setattr(coupled_mamba, "kernel_problem", lambda x, A: "it is too old")
    with pytest.warns(UserWarning, match="goes on in PyTorch.*it is too old"):
        assert coupled_mamba.choose_mode(ON_GPU, A) == "scan"
    with pytest.raises(ValueError, match="mode='kernel' cannot run: it is too old"):
        coupled_scan(**problem(), mode="kernel")


@triton_only
def test_the_kernel_says_why_it_cannot_run(monkeypatch):
    def reason(m=3, n=4, l=11):
        x = torch.empty(m, 2, l, 4, device="meta")
        return kernel.unavailable(x, torch.empty(m, 4, n, device="meta"))

    monkeypatch.setattr(kernel.knobs.runtime, "interpret", True)
    assert reason() is None
    assert "up to 8 modalities and got 9" in reason(m=9)
    assert "power of two and got 3" in reason(n=3)
    assert "less than 2^31 elements" in reason(l=2 ** 27)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert "deterministic algorithms" in reason()
    monkeypatch.setattr(kernel.knobs.runtime, "interpret", False)
    assert "needs an NVIDIA GPU, or TRITON_INTERPRET=1" in reason()

    A = torch.ones(3, 4, 4)
    monkeypatch.setattr(torch.version, "hip", None)
    for found, launcher, message in (
            ((7, 5), {}, "8.0 and got 7.5"), ((8, 0), {"utils": "built"}, None),
            ((8, 0), {}, "cannot build its launcher (AttributeError: ")):
        driver = SimpleNamespace(active=SimpleNamespace(**launcher))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(kernel.triton.runtime, "driver", driver)
        said = kernel.unavailable(ON_GPU, A)
        assert said is message or message in said


@triton_only
def test_the_kernel_is_found_by_its_path_also_inside_a_package(tmp_path):
    copy_to(tmp_path / "mypkg", "coupled_mamba.py", "kernel.py")
    (tmp_path / "kernel.py").write_text("raise SystemExit('this must not be imported')")
    run_python("import sys, mypkg.coupled_mamba as cm\n"
               "assert cm.load_kernel().__file__.endswith('mypkg/kernel.py')\n"
               "assert 'kernel' not in sys.modules\n", tmp_path)


# ------------------------------------------------------------ plan and machine code
@triton_only
@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 5000),
       st.integers(1, 300), st.sampled_from([1, 2, 8, 64, 256]), st.booleans())
@example(3, 128, 50, 256, 64, True)
@example(3, 16, 500, 256, 64, True)
@example(3, 1, 65536, 256, 64, True)
def test_the_programs_cover_the_problem_without_more_segments_than_run_at_once(
        m, b, l, e, n, backward):
    x = torch.empty(m, b, l, e, device="meta")
    A = torch.empty(m, e, n, device="meta")
    grid, sizes, constants = kernel.plan(x, A, backward)
    segments, length = sizes[3:]
    assert grid == (b * segments, e // constants["BE"]) and e % constants["BE"] == 0
    assert (segments - 1) * length < l <= segments * length
    if segments > 1:
        assert length % kernel.CHUNK == 0 and length >= kernel.SEGMENT
        assert grid[0] * grid[1] <= 132 * kernel.RESIDENT
    if (m, e, n, backward) == (3, 256, 64, True):        # the sizes of the paper
        assert grid[0] * grid[1] >= 0.9 * 132 * kernel.RESIDENT


# Nothing is compiled with TRITON_INTERPRET, so this runs in a process without it. No
# GPU is needed. All that runs at once shares 164 KiB of memory on the smaller GPU.
COMPILE = '''
import re, subprocess
from pathlib import Path
import kernel, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name, b, arch in (("_reduce", 16, 90), ("_forward", 128, 80), ("_backward", 16, 90),
                      ("_backward", 128, 90)):
    function = getattr(kernel, name)
    x, A = torch.empty(3, b, 500, 256), torch.empty(3, 256, 64)
    _, sizes, values = kernel.plan(x, A, name == "_backward")
    values |= {"K": kernel.CHUNK, "KEEP": True, "DW": True, "REVERSE": True}
    if sizes[3] == 1:
        values["segments"] = 1                   # Triton compiles a 1 as a constant
    names = function.arg_names
    signature = {k: "constexpr" if k in values else "*fp32" for k in names}
    for k in {"b", "l", "e", "segments", "length"} - {*values}:
        signature[k] = "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(names)
               if signature[k] != "constexpr" and k not in ("l", "segments")}
    values = {k: v for k, v in values.items() if k in names}
    source = ASTSource(function, signature, values, aligned)
    made = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": 1})
    Path("cubin").write_bytes(made.asm["cubin"])
    said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", "cubin"],
                          stdout=-1, stderr=subprocess.STDOUT, text=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", said).groups()
    assert int(registers) <= 255 and stack == "0", (name, b, arch, registers)
    assert re.search(r"[.]reqntid 32\\b", made.asm["ptx"])       # one warp
    assert made.metadata.shared <= 164 * 1024 // kernel.RESIDENT - 1024
'''


@triton_only
def test_the_compiled_kernel_spills_no_register_and_sums_within_one_warp(tmp_path):
    copy_to(tmp_path, "kernel.py")
    run_python(COMPILE, tmp_path, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


# ------------------------------------------------------------ data: files of the tools
def drawn(seed=0, samples=(12, 6, 6), says="both", frames=(6, 40, 25), front=False,
          silent=False, store=np.asarray, dtype="f4"):
    """Streams, lengths and labels; by split, the real frames of each stream or None.

    Text is padded in front, the other streams at the end, or if `front` in front. One
    sample has no audio, and single values are missing. says: how the file marks the
    real frames: "no", "mask" (of text only), "lengths" or "both". silent: some real
    frames are zero. store: brings an array into another memory layout.
    """
    rng = np.random.default_rng(seed)
    content, told = {}, {}
    for s, count in zip(data.SPLITS, samples):
        content[s] = {"regression_labels": list(rng.integers(-24, 25, count) / 8)}
        told[s] = []
        for m, number, width in zip(data.MODALITIES, frames, (8, 5, 3)):
            by_mask = m == "text" and says in ("mask", "both")
            by_lengths = not by_mask and says in ("lengths", "both")
            lengths = rng.integers(1, number + 1, count)
            if m == "audio":
                lengths[2] = 0
            there = np.arange(number) < lengths[:, None]
            if front or m == "text":
                there = there[:, ::-1]
            x = 50 * rng.standard_normal((count, number, width)) + 3
            if silent and m == "audio":
                x[0, lengths[0] // 2] = x[1, 0] = 0
            x[~there] = 7 if by_mask else 0
            with np.errstate(over="ignore"):
                x[3:6, 0, 0] = -np.inf, np.nan, np.finfo(np.float32).min
                content[s][m] = store(x.astype(dtype))
            lengths[lengths == number] += 100                # cut off by the tool
            if by_mask:                          # (N, 3, frames), or (N, frames, 3)
                lengths = np.stack([there * 0, there, there], 2 if silent else 1)
            if by_mask or by_lengths:
                content[s][f"{m}_lengths"] = lengths
            told[s].append(there if by_mask or by_lengths else None)
    return content, told


def mmsa(**options):
    """The content of an MMSA pickle, with entries that are no numbers."""
    content = drawn(**options)[0]
    for split in content.values():
        split["annotations"] = np.array(["Positive"], dtype=object)
        if np.ndim(split.get("text_lengths")) == 3:
            split["text_bert"] = split["text_lengths"]
            split["text_lengths"] = np.ones(len(split["text"]))  # text_bert counts
    return {"config": {"not": "a split"}, **content}


def own(**options):
    """The arrays of an own file with the same streams, and three classes."""
    arrays = {}
    for s, split in drawn(**options)[0].items():
        arrays[f"{s}/y"] = np.arange(len(split.pop("regression_labels"))) % 3
        arrays |= {f"{s}/{key}": array for key, array in split.items()}
    return arrays


def mogonet():
    """The tables of a MOGONET folder: two classes, one feature constant."""
    rng = np.random.default_rng(0)
    tables = {"labels_tr": np.repeat([0, 1], (40, 15)), "labels_te": np.arange(7) % 2}
    for part, count in (("tr", 55), ("te", 7)):
        for view, width in zip("123", (7, 5, 4)):
            tables[f"{view}_{part}"] = rng.random((count, width))
            tables[f"{view}_{part}"][:, 0] = 0.5
    return tables


def mmimdb():
    """The tables of an MM-IMDB file, with few features and one missing value."""
    rng = np.random.default_rng(0)
    x = rng.random((25959, 49))
    x[3, 3] = np.nan
    return {"features": x[:, :10], "vgg_features": x[:, 10:26],
            "genres": (x[:, 26:] < 0.3).astype(int)}


NAMES = {mmsa: "mosi", mogonet: "rosmap", mmimdb: "mmimdb", own: "own"}


def write(path, make=mmsa, entries={}, protocol=4, **options):
    """Write what `make` returns in its layout, with some other entries.

    entries: for "key" or "split/key" a value, a function of what is there, or None:
    there is no such entry.
    """
    content = make(**options)
    for place, value in entries.items():
        split, _, key = place.rpartition("/")
        part = content.get(split, content)       # flat in an own file
        key = place if part is content else key
        part[key] = value(np.asarray(part[key])) if callable(value) else value
        if value is None:
            del part[key]
    if make is mmsa:
        path.write_bytes(pickle.dumps(content, protocol))
    elif make is own:
        with open(path, "wb") as file:
            np.savez(file, **content)
    elif make is mmimdb:
        with h5py.File(path, "w") as file:
            file.update(content)
    else:
        path.mkdir()
        for name, table in content.items():
            np.savetxt(path / f"{name}.csv", table, "%s", ",", encoding="utf-8-sig")


# ------------------------------------------------------------ the reader in NumPy
def steps_by_definition(streams, told, length, clock, zeros_too):
    """What the streams of a split become, NaN where a step has no real frame.

    The frames from the first to the last real one are cut into segments, and a step is
    the mean of the real frames of its segment. told: the real frames (N, frames) of
    each stream; None: those that are not zero, and all between them; or, zeros_too,
    all. clock: "own"; "one", from the first to the last that is real in any stream;
    "all" frames.
    """
    streams = [np.where(np.abs(x) < np.float64(1e30), x, 0.0) for x in streams]
    real = [x.any(2) | zeros_too if frames is None else frames
            for x, frames in zip(streams, told)]
    found = []
    for x, frames, now in zip(streams, told, real):
        if frames is None:
            frames = np.repeat(now.any(1, keepdims=True), now.shape[1], 1)
        if clock != "own":
            now = np.any(real, 0) | (clock == "all")
        means = np.full((len(x), length, x.shape[2]), np.nan)
        for i in np.flatnonzero(now.any(1)):
            seen = np.arange(now[i].argmax(), 1 + np.flatnonzero(now[i])[-1])
            for j in range(length):
                first = j * len(seen) // length
                last = max(first + 1, (j + 1) * len(seen) // length)
                segment = [t for t in seen[first:last] if frames[i, t]]
                if segment:
                    means[i, j] = x[i, segment].mean(0, dtype=float)
        found.append(means)
    return found


STORES = [np.ascontiguousarray, np.asfortranarray, lambda x: x.repeat(2, 1)[:, ::2],
          lambda x: x.transpose(1, 0, 2).copy().transpose(1, 0, 2),
          lambda x: x.astype(x.dtype.newbyteorder(">"))]
DRAWN = st.fixed_dictionaries(dict(
    seed=st.integers(0, 99), says=st.sampled_from(["no", "mask", "lengths", "both"]),
    frames=st.sampled_from([(6, 40, 25), (52, 52, 52), (60, 9, 9)]),
    front=st.booleans(), silent=st.booleans(), store=st.sampled_from(STORES),
    dtype=st.sampled_from(["f2", "f4", "f8"])))
EQUAL = dict(frames=(52, 52, 52), says="no", silent=True)


@settings(max_examples=2 * EXAMPLES)
@given(st.sampled_from([mmsa, own]), DRAWN, st.integers(0, 5),
       st.sampled_from([None, 1, 9, 50, 52]), st.sampled_from([1, 1 << 22]))
@example(mmsa, {**EQUAL, "store": STORES[3]}, 5, 7, 1)
@example(mmsa, dict(frames=(6, 40, 25), says="lengths", front=True), 0, None, 1)
@example(own, EQUAL, 4, None, 1 << 22)
@example(own, {**EQUAL, "says": "both"}, 4, 5, 1 << 22)
def test_a_file_is_read_as_its_definition_says(
        tmp_path_factory, make, options, protocol, length, block):
    path = tmp_path_factory.mktemp("a") / "a"
    write(path, make, protocol=protocol, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BLOCK_ELEMENTS", block)
        dataset = data.load(NAMES[make], path, length)

    content, told = drawn(**options)
    streams = {s: [content[s][m] for m in data.MODALITIES] for s in data.SPLITS}
    steps = length or min(50, max(options["frames"]))
    clock, zeros_too = "own", False
    if options["frames"] == (52, 52, 52):
        if make is own:                          # zeros are data
            steps = length or 52
            clock, zeros_too = "all" if steps == 52 else "one", True
        elif options["says"] in ("no", "mask"):
            clock = "one"
    means = {s: steps_by_definition(streams[s], told[s], steps, clock, zeros_too)
             for s in data.SPLITS}
    for i in range(3):
        center = np.nanmean(means["train"][i], (0, 1))
        scale = np.nanstd(means["train"][i], (0, 1))
        for s, split in dataset.splits.items():
            expected = np.nan_to_num((means[s][i] - center) / scale)
            np.testing.assert_allclose(split.xs[i], expected, rtol=0, atol=1e-4)
            assert (split.mask[i] == ~np.isnan(means[s][i]).any(2)).all()

    lengths = [content["test"].get(f"{m}_lengths") for m in data.MODALITIES]
    xs, mask = data.prepare(streams["test"], dataset.preparation, lengths)
    assert_close(xs, dataset.splits["test"].xs, 1e-6)
    assert (mask == dataset.splits["test"].mask).all()
    assert (dataset.spec.modalities, dataset.spec.widths, dataset.spec.samples) == (
        data.MODALITIES, (8, 5, 3), (12, 6, 6))


# ------------------------------------------------------------ the rules of each format
CLASSES = np.array([1, 0, 2] * 4)
SIZES = np.array([-1, 0, 2, 3 + 2 ** -10, 0.5, -3] * 2)      # 3, but for rounding


@pytest.mark.parametrize("make, key, y, task, classes", [
    (mmsa, "regression_labels", SIZES, "regression", 3),
    (mmsa, "regression_labels", SIZES, "classification", 3),
    (mmsa, "classification_labels", CLASSES, "classification", 3),
    (own, "y", SIZES, "regression", 0), (own, "y", CLASSES, "classification", 3),
    (own, "y", CLASSES[:, None] == range(4), "classification", 4)])
def test_labels_are_numbers_or_their_signs_or_classes(
        make, key, y, task, classes, tmp_path):
    write(tmp_path / "a", make, {f"train/{key}": y, f"valid/{key}": y[:6],
                                 f"test/{key}": y[:6]})
    dataset = data.load(NAMES[make], tmp_path / "a", task=task)
    if task == "classification" and y is SIZES:
        y = np.sign(y) + 1
    whole = task == "classification" and y.ndim == 1
    for split in dataset.splits.values():
        assert (split.y == y[:len(split.y)]).all()
        assert split.y.dtype == (np.int64 if whole else np.float32)
    assert dataset.spec.classes == classes and task in dataset.spec.tasks
    assert "labels" not in "".join(dataset.notes)
    if make is own:
        other, = {"regression", "classification"} - {task}
        with pytest.raises(data.DataError, match="has no labels for"):
            data.load("own", tmp_path / "a", task=other)


def test_what_differs_from_the_published_set_or_is_not_used_is_said(tmp_path):
    added = {"train_mix": {}, "train/depth": np.ones((12, 3, 4)),    # audio is absent
             "train/audio": np.zeros((12, 40, 5)), "train/audio_lengths": [0] * 12}
    for s, count in zip(data.SPLITS, (12, 6, 6)):
        added[f"{s}/regression_labels"] = [1.0] * count
    for make, entries, notes in (
            (mmsa, added, "not used: train_mix; not used: train/depth; "
             "labels: at most 1 in size, published 3; text: 8 features, published 768; "
             "vision: 3 features, published 20; "
             "(12, 6, 6) samples, published (1284, 229, 686)"),
            (mogonet, {"4_tr": np.ones((20, 2))}, "not used: 4_tr.csv; "
             "mrna: 7 features, published 200; methylation: 5 features, published 200; "
             "mirna: 4 features, published 200; "
             "(44, 11, 7) samples, published (196, 49, 106)"),
            (own, {"train/z_lengths": np.ones(12)}, "not used: train/z_lengths; "
             "streams of different numbers of frames are stretched to one")):
        write(tmp_path / NAMES[make], make, entries)
        found = data.load(NAMES[make], tmp_path / NAMES[make]).notes
        assert "; ".join(found) == notes


def test_new_samples_of_other_shapes_are_refused(tmp_path):
    write(tmp_path / "a", own, frames=(9, 9, 9), says="no")
    dataset = data.load("own", tmp_path / "a")
    assert dataset.notes == []
    resampled = data.load("own", tmp_path / "a", 4).preparation
    xs = [np.ones((6, 9, width)) for width in (8, 5, 3)]
    for preparation, streams, lengths in (
            (dataset.preparation, [x[:, 1:] for x in xs], None),
            (resampled, [xs[0][:, 1:], *xs[1:]], None), (resampled, xs[:2], None),
            (resampled, xs[::-1], None), (resampled, [xs[0][1:], *xs[1:]], None),
            (resampled, [x[:, 0] for x in xs], None), (resampled, xs, [None]),
            (resampled, xs, [[1], None, None])):
        with pytest.raises(data.DataError, match="expected"):
            data.prepare(streams, preparation, lengths)


@pytest.mark.parametrize("length", [1, 3, 9, None])
@pytest.mark.parametrize("make", [mogonet, mmimdb])
def test_vectors_are_standardised_by_train_and_cut_into_steps(make, length, tmp_path):
    tables = make()
    path = tmp_path / "a"
    write(path, make)
    if make is mogonet and length:               # where `default_path` looks
        path /= "labels_tr.csv"
    dataset = data.load(NAMES[make], path, length)
    rows = np.split(np.arange(25959), [15552, 18160])
    if make is mogonet:
        tables = {view: np.concatenate([tables[f"{view}_tr"], tables[f"{view}_te"]])
                  for view in ("1", "2", "3", "labels")}
        valid = [2, 3, 4, 11, 23, 24, 27, 34, 44, 46, 47]    # a fifth of each class
        rows = [np.setdiff1d(np.arange(55), valid), valid, np.arange(55, 62)]
    *vectors, y = tables.values()
    steps = length or 20
    for split, of_split in zip(dataset.splits.values(), rows, strict=True):
        assert (split.y == y[of_split]).all() and split.mask.all()
        assert split.y.dtype == (np.int64 if make is mogonet else np.float32)
        assert split.mask.shape == (len(vectors), len(of_split), steps)
        for x, vector in zip(split.xs, vectors, strict=True):
            vector = np.nan_to_num(vector)
            known = vector[rows[0]]
            scale = known.std(0)
            scale[scale < 1e-6] = 1
            width = -(-vector.shape[1] // steps)
            flat = np.zeros((len(of_split), steps * width))
            flat[:, :vector.shape[1]] = (vector[of_split] - known.mean(0)) / scale
            assert_close(x, flat.reshape(len(of_split), steps, width), 1e-5)
    xs, _ = data.prepare([v[rows[2]] for v in vectors], dataset.preparation)
    assert_close(xs, dataset.splits["test"].xs, 0)


# ------------------------------------------------------------ damaged and hostile files
# A scalar whose dtype says that it is an object and whose flags deny it: eight bytes of
# the file would be used as a pointer.
FORGED = (b"\x80\x02}U\x05train}U\x04textcnumpy.core.multiarray\nscalar\n"
          b"cnumpy\ndtype\n(U\x02O8I00\nI01\ntR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
          b"J\xff\xff\xff\xffK\x00tbU\x08AAAAAAAA\x86RssU\x05valid}sU\x04test}s.")
DEEP_KEY = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."
HOSTILE = {mmsa: [
    (b"cposix\nsystem\n(S'touch hacked'\ntR.", "posix.system"),
    (b"cnumpy\nsave\n(S'hacked'\nI1\ntR.", "numpy.save"),
    (FORGED, "train/text is of type O8"), (DEEP_KEY, "not a complete MMSA pickle"),
    (b"", "empty file"), (b"hello", "not a complete MMSA pickle"),
    (b"PK\x03\x04...", "zip archive"), (b"\x1f\x8b...", "gzip"),
    (b"\n<!DOCTYPE html>", "HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (None, "there is no MMSA pickle here"), (pickle.dumps([1, 2]), "expected a dict"),
    ({"train/text": [[1.0], 2.0]}, "ragged"),
    ({"valid/text": None}, "has no valid/text"),
    ({"test/audio": np.ones((4, 40, 3))}, "6 samples"),
    ({"valid/audio": np.ones((6, 40, 2))}, "shape (6, 40, 2)"),
    ({"train/regression_labels": [np.nan] * 12}, "[nan]"),
    ({"test/regression_labels": [3.5] * 6}, "at most 3"),
    ({"test/text_bert": np.ones((6, 3, 7))}, "attention mask (6, 3, 6)"),
    ({"test/audio_lengths": [-1] * 6}, "whole numbers"),
    ({"test/audio_lengths": [0.5] * 6}, "whole numbers"),
    ({"test/audio_lengths": [np.nan] * 6}, "whole numbers"),
    ({"test/audio_lengths": [1.0] * 5}, "whole numbers"),
    ({"test/vision": np.ones((6, 25, 3))}, "not zero outside the frames"),
], mogonet: [
    (None, "there is no MOGONET folder here"),
    ({"2_te": None}, "has no 2_te.csv"),
    ({"1_tr": []}, "1_tr.csv"),
    ({"1_tr": ["1,2", "1"]}, "1_tr.csv"),
    ({"1_tr": np.full((55, 7), np.nan)}, "NaN"),
    ({"1_tr": lambda x: np.c_[:55, x]}, "index"),
    ({"labels_te": np.arange(7) % 3}, "from 0 to 1"),
    ({"labels_te": np.ones(2)}, "2 samples"),
], mmimdb: [
    (b"hello", "not a complete HDF5"),
    ({"genres": np.ones((25959, 3))}, "23 columns"),
    ({"features": np.ones((5, 9))}, "25959"),
], own: [
    (b"hello", "not a complete NumPy file"),
    ({"valid/audio": None}, "has no valid/audio"),
    ({"test/y": np.full(6, 10 ** 17)}, "values like [100000000000"),
    ({"train/text": np.array([None])}, "allow_pickle=False")]}


def refused(argv, capsys):
    """The sentence with which this command ends, and exit code 2."""
    try:
        code = train.main(argv)
    except SystemExit as error:                  # of argparse, which adds the usage
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1 + ("usage:" in message)
    return message


@pytest.mark.parametrize("make, damage, message", [
    (make, *case) for make, cases in HOSTILE.items() for case in cases])
def test_a_damaged_or_hostile_file_is_one_line_and_exit_code_2(
        make, damage, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if isinstance(damage, dict):
        write(Path("a"), make, damage)
    elif damage is not None:
        Path("a").write_bytes(damage)
    before = os.listdir()
    assert message in refused(["--dataset", NAMES[make], "--data", "a"], capsys)
    assert os.listdir() == before                # nothing in the file was executed


PLACES = {mmsa: ["train", "train/text", "test/audio", "test/text_bert",
                 "train/vision_lengths", "valid/regression_labels"],
          own: ["train/text", "test/text_lengths", "valid/y", "test/audio"],
          mogonet: ["1_tr", "labels_tr", "3_te"], mmimdb: ["features", "genres"]}
VALUES = [None, "a", 7, [1.0], {}, [[1.0], 2], np.ones((0, 3, 4)), np.array([b"a"]),
          np.float32(2), lambda x: x[:-1], lambda x: x[None], lambda x: x.T,
          np.zeros_like, lambda x: x.astype("S9"), lambda x: x.astype(bool)]


def assert_read_or_refused(path, make):
    try:
        splits = data.load(NAMES[make], path).splits
    except data.DataError as error:
        assert str(error).startswith(str(path.parent)) and "\n" not in str(error)
    else:
        assert all(np.isfinite(x).all() for split in splits.values() for x in split.xs)


@pytest.mark.parametrize("make, place", [(make, place) for make in NAMES
                                         for place in PLACES[make]])
def test_a_file_with_a_wrong_entry_is_read_or_refused(make, place, tmp_path):
    for i, value in enumerate(VALUES):
        path = tmp_path / str(i)
        try:
            write(path, make, {place: value})
        except (TypeError, ValueError, AttributeError, IndexError):
            continue                             # no such file can be written
        assert_read_or_refused(path, make)


@given(st.sampled_from([*NAMES]), st.integers(0, 5), st.integers(0, 200), st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1))
def test_a_file_with_wrong_bytes_or_without_its_end_is_read_or_refused(
        tmp_path_factory, make, protocol, end, changes):
    path = tmp_path_factory.mktemp("a") / "a"
    write(path, make, protocol=protocol)
    file = path / "1_tr.csv" if make is mogonet else path
    content = bytearray(file.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    file.write_bytes(content[:-end or None])
    assert_read_or_refused(path, make)


def test_reading_takes_little_more_memory_than_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_ELEMENTS", 1 << 18)
    shapes = {"text": (50, 768), "audio": (500, 74), "vision": (500, 35)}
    content = {s: {m: np.ones((count, *shape), "f4") for m, shape in shapes.items()}
               for s, count in zip(data.SPLITS, (200, 25, 50))}
    for split in content.values():
        split["regression_labels"] = np.zeros(len(split["text"]))
    (tmp_path / "a").write_bytes(pickle.dumps(content, 4))

    tracemalloc.start()                          # what there is already does not count
    splits = data.load("mosei", tmp_path / "a", 50).splits
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = sum(x.nbytes for split in splits.values() for x in split.xs)
    assert kept == 275 * 50 * 877 * 4
    assert kept < peak < 1.5 * kept              # the pickle has 2.1 times the result


# ------------------------------------------------------------ the stand-in
TASKS = [(name, task) for name, spec in data.SPECS.items() for task in spec.tasks]
# Published: features, samples, classes, range of labels. Then, for each task, what a
# small stand-in adds up to: streams of the usual length and of 4 steps, masks, labels.
RECORDED = {
    "mosi": (793, 2199, 3, 3, 1381.23945, 3171.37521),
    "mosei": (877, 22856, 3, 3, 2580.10286, 3405.59055),
    "sims": (1510, 2281, 3, 1, 3297.52018, 4442.62357),
    "simsv2": (970, 4403, 3, 1, 1960.19037, 3531.36147),
    "brca": (2503, 875, 5, 0, 3402.70240), "rosmap": (600, 351, 2, 0, 857.94451),
    "mmimdb": (4396, 25959, 23, 0, 18099.79841)}


@pytest.mark.parametrize("name, task", TASKS)
def test_the_stand_in_has_published_shapes_and_the_recorded_numbers(name, task):
    spec, total = data.SPECS[name], 0
    for length in (None, 4):
        dataset = data.synthetic(name, length, (40, 5, 6), task=task)
        assert dataset.synthetic and dataset.spec == spec._replace(samples=(40, 5, 6))
        for xs, mask, y in dataset.splits.values():
            total += sum(np.abs(v).sum(dtype=float) for v in [*xs, mask]) / 1000
            total += (y.T * range(len(y))).sum()
    found = [sum(spec.widths), sum(spec.samples), spec.classes, spec.scale, total]
    recorded = RECORDED[name]
    number = recorded[4 + spec.tasks.index(task)]
    assert found == [*recorded[:4], pytest.approx(number, abs=1e-3)]


def test_missing_elements_are_zero_at_the_rate_and_by_the_seed_asked_for():
    whole, holes, same, other = (data.synthetic("rosmap") for _ in range(4))
    for dataset, seed in ((holes, 0), (same, 0), (other, 1)):
        data.with_missing(dataset, 0.3, seed)
    for s, count in zip(data.SPLITS, data.SPECS["rosmap"].samples):
        assert len(whole.splits[s].y) == count
        for a, b, c, d in zip(*(v.splits[s].xs for v in (whole, holes, same, other))):
            assert ((b == 0) | (b == a)).all() and (b == c).all() and (b != d).any()
            assert abs((b == 0).mean() - 0.3) < 0.01
    other = data.synthetic("rosmap", seed=1)
    assert (other.splits["test"].xs[0] != whole.splits["test"].xs[0]).any()


# ------------------------------------------------------------ metrics
def counted(pairs, *names):
    """As many as there are names of: accuracy, F1 weighted by true classes, mean F1.

    pairs: (true, predicted).
    """
    if not pairs:
        return dict.fromkeys(names, math.nan)
    true, pred = zip(*pairs)
    f1 = {c: 2 * pairs.count((c, c)) / (true.count(c) + pred.count(c))
          for c in {*true, *pred}}
    right = np.mean([t == p for t, p in pairs])
    return dict(zip(names, (right, np.mean([f1[c] for c in true]),
                            np.mean(list(f1.values())))))


NUMBERS = [-3., -2., -1., -0.8, -0.7, -0.12, -0.1, -0.05, 0., 0.05, 0.1, 0.12, 0.3, 0.7,
           0.8, 1.4, 1.6, 2.6, 4.]
PAIRS = list(itertools.product(NUMBERS, NUMBERS))


@given(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=9),
       st.sampled_from([0, 1, 3]))
@example([(0., 0.)] * 5, 3)
@example(PAIRS, 1)
@example(PAIRS, 3)
def test_metrics_of_numbers_are_those_of_mmsa(pairs, scale):
    def judged(judge, *names):
        return counted([(judge(t), judge(p)) for t, p in pairs], *names)

    expected = {}
    if scale == 3:
        some = [(t > 0, p > 0) for t, p in pairs if t != 0]
        expected |= counted(some, "Acc-2", "F1")
        expected |= judged(lambda v: v >= 0, "Acc-2 with 0", "F1 with 0")
        for k in (1, 2, 3):
            expected |= judged(lambda v: round(max(-k, min(k, v))), f"Acc-{2 * k + 1}")
    if scale == 1:
        expected |= judged(lambda v: v > 0, "Acc-2", "F1")
        for cuts in ((-0.1, 0.1), (-0.7, -0.1, 0.1, 0.7)):       # on a cut: below it
            expected |= judged(lambda v: sum(v > cut for cut in cuts),
                               f"Acc-{len(cuts) + 1}")
    true, pred = np.array(pairs).T
    t, p = (v.clip(-1, 1) if scale == 1 else v for v in (true, pred))
    varies = np.ptp(t) > 0 and np.ptp(p) > 0
    expected["MAE"] = np.mean(np.abs(p - t))
    expected["Corr"] = np.corrcoef(p, t)[0, 1] if varies else math.nan
    for dtype in (np.float32, np.float64):
        got = train.regression_metrics(pred.astype(dtype), true.astype(dtype), scale)
        assert got == pytest.approx(expected, rel=1e-4, nan_ok=True)


@given(st.integers(0, 9999), st.integers(1, 12))
@example(0, 0)
def test_metrics_of_classes_and_labels_are_those_of_their_definitions(seed, samples):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, samples) if samples else np.ones(5, int)
    logits = rng.integers(-3, 4, (len(true), 3)) + np.array([0.1, 0, 0.2])
    both = list(zip(true.tolist(), logits.argmax(1).tolist()))
    signs = [(t, int(x[2] > x[0])) for t, x in zip(true.tolist(), logits)]
    expected = counted(both, "Acc", "weighted F1", "macro F1")
    assert train.class_metrics(logits, true) == pytest.approx(expected)

    some = [(t, p) for t, p in signs if t != 1]
    expected = {**counted([(t == 2, p) for t, p in some], "Acc-2", "F1"),
                **counted([(t == 2, p) for t, p in signs], "Acc-2 with 0", "F1 with 0"),
                **counted(some, "Acc-2 MMSA", "F1 MMSA"),
                **counted(both, "Acc-3", "F1-3")}
    got = train.sentiment_metrics(logits, true)
    assert got == pytest.approx(expected, nan_ok=True)

    labels = rng.integers(0, 2, logits.shape)
    hits, named = labels * (logits > 0), labels + (logits > 0)
    f1 = [2 * h / max(1, n) for h, n in zip(hits.sum(0), named.sum(0))]
    assert train.label_metrics(logits, labels.astype(np.float32)) == pytest.approx({
        "micro F1": 2 * hits.sum() / max(1, named.sum()), "macro F1": np.mean(f1)})


def test_the_loss_is_that_of_the_task():
    out = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]])
    p, labels = out.sigmoid(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    for y, expected in (
            (torch.tensor([2, 0]), -out.log_softmax(1)[[0, 1], [2, 0]]),
            (labels, -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)),
            (torch.tensor([1.5, -1.0]), torch.ones(2))):
        assert_close(train.sample_losses(out, y), expected, 1e-6)
        metrics = train.measure(out.numpy(), y.numpy(), data.SPECS["brca"])
        assert train.score(metrics) == pytest.approx(expected.mean().item())


# ------------------------------------------------------------ fusions
TINY = ["--d-model", "8", "--layers", "1", "--d-state", "4", "--batch-size", "4"]
WIDTHS = (8, 5, 3)                               # as in `drawn`


def config_of(*argv):
    """The settings that this command line gives on a dataset that is there."""
    args = ["--dataset", "mosi", "--data", "a.pkl", "--device", "cpu", *argv]
    return {**train.settings(train.parse(args)), "task": "regression"}


def model_of(*argv):
    torch.manual_seed(0)
    config = config_of(*TINY, "--layers", "2", *argv)
    model = train.make_model(config, WIDTHS, 1).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def streams_and_mask():
    torch.manual_seed(1)
    xs = [torch.randn(4, 6, width, dtype=torch.float64) for width in WIDTHS]
    mask = torch.rand(3, 4, 6) < 0.6
    mask[:, 1] = False                           # a sample without any real step
    return xs, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fusion", ["average", "concat"])
def test_average_and_concat_are_one_mamba_on_the_encoded_streams(fusion, masked):
    model = model_of("--fusion", fusion)
    xs, mask = streams_and_mask()
    if not masked:
        mask = torch.ones_like(mask)
    f = torch.stack([encoder(x) for encoder, x in zip(model.encoders, xs)])
    f = f * mask[..., None]
    one = torch.cat([*f], -1)
    if fusion == "average":
        one = f.sum(0) / mask.sum(0).clamp(min=1)[..., None]
    width = one.shape[2]
    alone = CoupledMamba((width,), 1, d_model=width, n_layers=2, d_state=4).double()
    alone.load_state_dict(model.mamba.state_dict())
    expected = alone([one], mask.any(0)[None])
    assert_close(model(xs, mask if masked else None), expected)


def attention_by_hand(block, f, mask):
    """A block of cross attention for a sample f (m, l, d), mask (m, l), in NumPy."""
    p = {name: v.detach().numpy() for name, v in block.named_parameters()}
    m, l, d = f.shape
    angle = np.arange(l)[:, None] / 10000 ** (np.arange(0, d, 2) / d)
    x = layer_norm(f, p) + np.concatenate([np.sin(angle), np.cos(angle)], 1)[:, :d]
    q, k, v = (x @ p[f"{name}.weight"] for name in "qkv")
    out = np.zeros_like(f)
    for i in range(m):
        seen = [(j, t) for j in range(m) if j != i for t in np.flatnonzero(mask[j])]
        for t in np.flatnonzero(mask[i]):
            y = np.zeros(q.shape[2])
            for head in np.split(np.arange(q.shape[2]), block.heads):
                if seen:
                    keys = np.stack([k[s][head] for s in seen])
                    weights = softmax(keys @ q[i, t, head] / len(head) ** 0.5)
                    y[head] = weights @ np.stack([v[s][head] for s in seen])
            out[i, t] = f[i, t] + y @ p["out.weight"][i]
    return out


@pytest.mark.parametrize("d_model, expand", ["82", "71"])        # 4 heads, 1 head
def test_attention_is_its_definition(d_model, expand):
    model = model_of("--fusion", "attention", "--d-model", d_model, "--expand", expand)
    xs, mask = streams_and_mask()
    features = model.features(xs, mask)
    for j in range(4):
        f = np.stack([e(x[j]).detach().numpy() for e, x in zip(model.encoders, xs)])
        f[~mask[:, j].numpy()] = 0
        for block in model.blocks:
            f = attention_by_hand(block, f, mask[:, j].numpy())
        assert_close(features[:, j], f, 1e-6)    # the sines are float32
    one = train.make_model(config_of(*TINY, "--fusion", "attention"), WIDTHS[:1], 1)
    assert one([xs[0].float()]).shape == (4, 1)
    _, state = model.advance(xs, model.init_state(4), mask)
    with pytest.raises(ValueError, match="cannot continue"):
        model.advance(xs, state, mask)


# ------------------------------------------------------------ training
@pytest.fixture
def run(tmp_path):
    """A small run. Audio ends after step 4 of 6 in sample 1; sample 2 has text only."""
    dataset = data.synthetic("mosi", length=6, samples=(12, 6, 6))
    for split in dataset.splits.values():
        split.mask[1, 1, 4:] = split.mask[1:, 2] = False
    config = config_of(*TINY, "--epochs", "3", "--lr", "0.01", "--dropout", "0.2")
    return train.Run(config, dataset, tmp_path, 0, 1)


def epochs_by_hand(run, seed, optimizer_class):
    """What a process must do: losses; least MAE on valid, its epoch, its weights."""
    torch.manual_seed(seed)
    model = CoupledMamba((768, 5, 20), 1, d_model=8, n_layers=1, d_state=4, dropout=0.2)
    plain = ("bias", "norm_weight", "A_log", "D", "logits")
    maps = [p for name, p in model.named_parameters() if not name.endswith(plain)]
    rest = [p for name, p in model.named_parameters() if name.endswith(plain)]
    optimizer = optimizer_class([
        {"params": maps, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    split, valid = run.dataset.splits["train"], run.dataset.splits["valid"]
    losses, best = [], (math.inf, 0)
    for epoch in range(1, run.config["epochs"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / 2 ** ((epoch - 1) // 50)
        order = np.random.default_rng((seed, epoch)).permutation(12)
        torch.manual_seed((seed * 10 ** 5 + epoch) * run.world + run.rank)   # dropout
        total = 0.0
        for of_all in np.split(order, range(5 * run.world, 12, 5 * run.world)):
            rows = of_all[run.rank::run.world]
            xs = [torch.tensor(x[rows]) for x in split.xs]
            out = model.train()(xs, torch.tensor(split.mask[:, rows]))
            errors = (out[:, 0] - torch.tensor(split.y[rows])).abs()
            optimizer.zero_grad()
            (errors.sum() / len(of_all) * run.world).backward()
            optimizer.step()
            total += errors.sum().item()
        losses.append(total / 12)
        xs = [torch.tensor(x) for x in valid.xs]
        out = model.eval()(xs, torch.tensor(valid.mask)).detach()
        mae = (out[:, 0] - torch.tensor(valid.y)).abs().mean().item()
        if mae < best[0]:
            best = mae, epoch, {k: v.clone() for k, v in model.state_dict().items()}
        if epoch - best[1] == run.config["patience"] > 0:
            break
    return losses, best


@pytest.mark.parametrize("optimizer, kind, epochs, patience, world", [
    ("adamw", torch.optim.AdamW, 51, 0, 1), ("adam", torch.optim.Adam, 40, 2, 1),
    ("adam", torch.optim.Adam, 3, 0, 2)])
def test_a_run_is_a_plain_loop_with_masks_and_the_best_epoch_on_valid(
        optimizer, kind, epochs, patience, world, run, monkeypatch, capsys):
    run.config.update(weight_decay=0.1, batch_size=5, epochs=epochs, patience=patience,
                      optimizer=optimizer)
    run = run._replace(rank=world - 1, world=world)
    for name in ("all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(train.dist, name, lambda _: None)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda m: m)
    result = train.train_seed(run, 3, False)
    losses, (mae, epoch, weights) = epochs_by_hand(run, 3, kind)
    assert [row["loss"] for row in result["log"]] == pytest.approx(losses, rel=1e-4)
    assert [row["epoch"] for row in result["log"]] == [*range(1, len(losses) + 1)]
    assert result["epoch"] == epoch
    assert 0 <= sum(row["seconds"] for row in result["log"]) < 60
    assert result["valid"]["MAE"] == pytest.approx(mae, rel=1e-4)
    said = capsys.readouterr().out
    if world == 2:                               # the first process speaks and writes
        assert said == "" and not [*run.out.iterdir()]
        return
    assert (len(losses) < epochs) == (patience > 0)
    why = "last 2 epochs were no better" if patience else "all epochs are done"
    assert why in said

    saved = torch.load(run.out / "seed3.pt", weights_only=True)
    assert saved["epoch"] == epoch
    assert_close(saved["weights"], weights, 1e-3)
    model = CoupledMamba(**saved["model"])
    model.load_state_dict(saved["weights"])
    test = run.dataset.splits["test"]
    out = train.predict(model, test, run.config)
    assert_close([saved["prediction"], saved["target"]], [out, test.y], 1e-6)
    assert result["test"] == train.regression_metrics(out[:, 0], test.y, 3)
    assert (train.predict(model, test, {**run.config, "amp": True}) != out).any()


def test_training_that_diverges_ends_and_the_best_epoch_before_counts(
        run, monkeypatch, capsys):
    with monkeypatch.context() as patch:         # epochs 1 and 2, test, and no more
        metrics = [{"MAE": 3.0}, {"MAE": math.nan}, {"MAE": 0.5}, {"MAE": 0.1}]
        patch.setattr(train, "measure", Mock(side_effect=metrics))
        result = train.train_seed(run, 0, False)
    assert result["epoch"] == 1 and result["test"]["MAE"] == 0.5
    assert "training has diverged; try a smaller --lr" in capsys.readouterr().out
    run.dataset.splits["train"].y[3] = math.nan  # a NaN loss ends training, too
    row, = train.train_seed(run, 1, False)["log"]
    assert train.why_stop([{**row, "loss": None}], None, run.config)


# ------------------------------------------------------------ the command line
RUN = ["--dataset", "mosi", "--data", "a.pkl", "--device", "cpu", "--epochs", "5",
       "--dropout", "0.2", "--lr", "0.05", *TINY, "--seeds"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """To work in, with a small a.pkl. Stand-ins are tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "STAND_IN_SAMPLES", (12, 6, 6))
    write(tmp_path / "a.pkl")
    return tmp_path


def results(out):
    """results.json without the seconds, which differ from run to run."""
    text = (Path(out) / "results.json").read_text()
    return json.loads(re.sub(r'(?m),\s*"seconds": .*$', "", text))


def files_in(out):
    """The content of all files; of results.json without the seconds."""
    found = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    return {**found, "results.json": results(out)}


def interrupted(argv, name, count):
    """A run of this command, with Ctrl-C at this call of a function of train."""
    function, calls = getattr(train, name), itertools.count(1)

    def stop(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, stop)
        assert train.main(argv) == 130


MODEL_OPTIONS = [
    "--d-model 64", "--layers 2", "--d-state 32", "--expand 3", "--d-conv 2",
    "--dt-rank 5", "--dropout 0.3", "--pooling last", "--pooling mean", "--no-mix",
    "--coupling sum", "--coupling learned", "--coupling none", "--mode recurrence",
    "--mode convolution", "--mode scan"]
RUN_OPTIONS = [
    "--length 7", "--missing-rate 0.25", "--epochs 7", "--batch-size 9", "--lr 0.1",
    "--optimizer adam", "--weight-decay 0.1", "--patience 4", "--seeds 2", "--seed 11",
    "--amp"]


@pytest.mark.parametrize("words", MODEL_OPTIONS + RUN_OPTIONS)
def test_an_option_changes_what_it_names_and_nothing_else(words):
    option, value = [*words.split(), "True"][:2]
    name = option[2:].replace("-", "_")
    new, old = config_of(*words.split()), config_of()
    assert [key for key in old if new[key] != old[key]] == [name]
    assert str(new[name]) == value
    of_model = {"layers": "n_layers", "no_mix": "mix"}.get(name, name)
    new, old = (train.make_model(config, WIDTHS, 1).config for config in (new, old))
    changed = [key for key in old if new[key] != old[key]]
    assert changed == ([of_model] if words in MODEL_OPTIONS else [])


def test_the_defaults_are_those_of_the_paper_of_the_dataset_and_of_the_stand_in(
        folder, monkeypatch):
    model = train.make_model(config_of(), WIDTHS, 1)
    assert model.config == CoupledMamba(WIDTHS).config
    paper = dict(epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5)
    small = dict(d_model=32, d_state=16, pooling="mean")
    stand_in = dict(small, epochs=12, lr=3e-3, seeds=1, batch_size=32)
    for words, expected in (
            ("mosi --data a", {**paper, "batch_size": 128}),
            ("mosei --data a", dict(batch_size=1024)),
            ("simsv2 --data a", dict(batch_size=256)),
            ("brca --data a", dict(batch_size=64)),
            ("rosmap --data a", dict(batch_size=32)),
            ("mmimdb --data a", dict(batch_size=512)),
            ("mosi --data a --fusion mamba", dict(coupling="none", no_mix=True)),
            ("sims --layers 4", {**stand_in, "layers": 4}),
            ("sims", {**stand_in, "layers": 1}),
            ("own --data a", {**paper, **small, "layers": 1}),
            ("sims --benchmark", dict(batch_size=16, d_model=128,
                                      lengths=[100, 200, 300, 400, 500]))):
        args = train.parse(["--dataset", *words.split()])
        assert vars(args).items() >= expected.items()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.parse(["--dataset", "sims"]).device == "cuda"


def test_a_real_file_at_its_default_place_is_used_with_the_papers_settings(
        folder, capsys):
    data.default_path("mosi").parent.mkdir(parents=True)
    shutil.copy("a.pkl", data.default_path("mosi"))
    small = "--dataset mosi --epochs 1 --seeds 1 --d-model 8 --d-state 4".split()
    assert train.main(small) == 0
    found = results("runs/mosi-coupled")
    config = found["config"]
    assert (config["layers"], config["lr"], config["batch_size"]) == (3, 5e-4, 128)
    out = capsys.readouterr().out
    assert "synthetic" not in out and "published" in out         # the widths are others
    loss = found["seeds"][0]["log"][0]["loss"]
    for options in (["--missing-rate", "0.4"], ["--amp"], ["--task", "classification"]):
        out = options[0][2:]
        assert train.main([*small, *options, "--out", out]) == 0
        assert results(out)["seeds"][0]["log"][0]["loss"] != loss
    assert "F1-3" in results("task")["mean"]


def test_a_run_leaves_its_files_whole_and_no_other_run_loses_them(
        folder, capsys, monkeypatch):
    argv = [*RUN, "2", "--out", "o"]
    assert train.main(argv) == 0
    before = files_in("o")
    report = before["results.json"]
    assert sorted(before) == ["results.json", "seed0.pt", "seed1.pt"]
    assert list(report) == ["dataset", "synthetic", "task", "config", "environment",
                            "seeds", "mean", "std"]
    assert [*report.values()][:3] == ["mosi", False, "regression"]
    assert [result["seed"] for result in report["seeds"]] == [0, 1]
    maes = [result["test"]["MAE"] for result in report["seeds"]]
    assert report["mean"]["MAE"] == pytest.approx(np.mean(maes))
    assert report["std"]["MAE"] == pytest.approx(np.std(maes))
    write(folder / "b.pkl", samples=(11, 6, 6))
    for options in (["--layers", "2"], ["--epochs", "4"], ["--seed", "1"],
                    ["--data", "b.pkl"]):
        message = refused([*argv, *options], capsys)
        assert "give the same options, or another --out" in message

    def write_half(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        assert "No space left" in refused(argv, capsys)
    assert files_in("o") == before               # and nothing else
    interrupted(argv, "train_epoch", 2)          # the same once more
    Path("o/seed0.resume").unlink()
    assert files_in("o") == before
    assert train.main([*argv, "--seeds", "1"]) == 0              # the first seed again
    after = files_in("o")
    assert after["seed1.pt"] == before["seed1.pt"]
    assert after["results.json"]["seeds"] == report["seeds"]


FUSIONS = {"coupled": CoupledMamba, "mamba": CoupledMamba, "average": train.OneMamba,
           "concat": train.OneMamba, "attention": train.CrossAttention}


@pytest.mark.parametrize("name, task", TASKS)
def test_every_fusion_trains_on_every_stand_in_and_predicts_again(
        name, task, folder, capsys):
    first = "Acc-2" if data.SPECS[name].scale else "Acc"
    test = data.synthetic(name, 5, (12, 6, 6), task=task).splits["test"]
    for fusion, kind in FUSIONS.items():
        assert train.main(["--dataset", name, "--task", task, "--fusion", fusion, *TINY,
                           "--epochs", "1", "--length", "5", "--seed", "3",
                           "--out", fusion]) == 0
        result = results(fusion)
        assert result["synthetic"] is True and result["config"]["fusion"] == fusion
        assert list(result["mean"])[0] == ("micro F1" if name == "mmimdb" else first)
        saved = torch.load(f"{fusion}/seed3.pt", weights_only=True)
        assert saved["synthetic"] and saved["config"] == result["config"]
        model = kind(**saved["model"]).eval()
        model.load_state_dict(saved["weights"])
        out = model([torch.tensor(x) for x in test.xs])
        assert_close([saved["prediction"], saved["target"]], [out, test.y], 1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("synthetic | ") for line in lines)


# ------------------------------------------------------------ interrupted and continued
@pytest.fixture
def stopped(folder):
    """A run of two seeds in the folder `stopped`, which ended in epoch 4 of seed 1."""
    interrupted([*RUN, "2", "--out", "stopped"], "train_epoch", 9)
    return folder / "stopped"


@pytest.mark.parametrize("more", [["2"], ["3", "--epochs", "7"]])
def test_an_interrupted_run_resumes_to_the_bit_also_to_more(more, stopped, capsys):
    assert set(files_in(stopped)) == {"results.json", "seed0.pt", "seed1.resume"}
    assert train.main([*RUN, *more, "--out", "stopped", "--resume"]) == 0
    assert "seed 1  resumed after epoch 3" in capsys.readouterr().out
    assert train.main([*RUN, *more, "--out", "whole"]) == 0
    assert files_in("stopped") == files_in("whole")
    assert train.main([*RUN, *more, "--out", "stopped", "--resume"]) == 0
    assert capsys.readouterr().out.count("was finished before") == int(more[0])
    refused([*RUN, *more, "--epochs", "4", "--out", "stopped", "--resume"], capsys)


def test_resume_stops_where_patience_ends(folder):
    argv = [*RUN, "1", "--epochs", "30", "--patience", "2", "--out"]
    assert train.main([*argv, "whole"]) == 0
    interrupted([*argv, "o"], "evaluate", 1)     # before test is looked at
    assert train.main([*argv, "o", "--resume"]) == 0
    assert files_in("o") == files_in("whole")
    assert train.main([*argv, "o", "--resume", "--epochs", "40"]) == 0
    assert results("o")["seeds"] == results("whole")["seeds"]
    assert len(results("o")["seeds"][0]["log"]) < 30


def test_files_of_another_run_or_damaged_ones_are_not_resumed(stopped, capsys):
    whole = (stopped / "seed1.resume").read_bytes()
    os.replace(stopped / "seed1.resume", stopped / "seed0.resume")
    foreign = '{"config": {}, "seeds": [{"seed": 0}]}'
    no_seeds = json.dumps({"config": results("stopped")["config"]})
    (stopped / "results.json").unlink()
    for name, content, options, message in [
            *[("seed0.resume", whole, options, "give the same options") for options in (
                "--lr 0.02", "--layers 2", "--length 9", "--optimizer adam")],
            *[("seed0.resume", damaged, "", "seed0.resume is damaged")
              for damaged in (b"", whole[:500], b"hello")],
            *[("results.json", damaged.encode(), "", "no result of this program")
              for damaged in ("", "[]", '{"config": 0}', foreign, no_seeds)]]:
        (stopped / name).write_bytes(content)
        before = {p.name: p.read_bytes() for p in stopped.iterdir()}
        argv = [*RUN, "2", "--out", "stopped", "--resume", *options.split()]
        assert message in refused(argv, capsys)
        assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_metrics_that_are_nan_survive_results_json(folder):
    write(folder / "a.pkl", entries={"test/regression_labels": [1.0] * 6})
    for options in (["1"], ["2", "--resume"]):
        assert train.main([*RUN, *options, "--epochs", "1", "--out", "o"]) == 0
        assert results("o")["mean"]["Corr"] is None


# Each of two processes does all of this: a run, one that is stopped, and its end.
TWO = '''
import functools, sys, train
from test_coupled_mamba import interrupted
train.dist.init_process_group = functools.cache(train.dist.init_process_group)
train.dist.destroy_process_group = lambda: None          # gloo begins only once
options = sys.argv[1:]
assert train.main([*options, "two"]) == 0
interrupted([*options, "cut"], "train_epoch", 3)
assert train.main([*options, "cut", "--resume"]) == 0
'''


def test_two_processes_train_as_one_with_the_doubled_batch_and_resume(folder):
    write(folder / "a.pkl", samples=(9, 6, 6))   # the last step: one sample for two
    options = [*RUN, "1", "--dropout", "0", "--epochs", "3",
               "--optimizer", "adam", "--weight-decay", "0.1", "--out"]
    Path("two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "two.py", *options], check=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, text=True)
    assert done.stdout.count("Results go to") == 3           # one process speaks
    assert files_in("cut") == files_in("two")
    assert train.main([*options, "one", "--batch-size", "8"]) == 0
    assert results("two")["config"]["processes"] == 2
    logs = [results(out)["seeds"][0]["log"] for out in ("one", "two")]
    for row, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["valid"]["MAE"] == pytest.approx(row["valid"]["MAE"], rel=1e-3)


# ------------------------------------------------------------ messages
@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(train, "in_own_process", lambda function, *v: function(*v))


@pytest.mark.parametrize("words", [
    "--data nowhere.pkl", "--epochs 0", "--epochs x", "--lr -1", "--lr nan",
    "--fusion x", "--dropout 1", "--out a.pkl", "--device cuda", "--mode kernel",
    "--fusion mamba --coupling learned", "--fusion attention --no-mix",
    "--optimizer sgd", "--dataset brca --task regression", "--workers 2",
    "--benchmark --mode kernel", "--dataset own",
    "--dataset own --data a.pkl --benchmark"])
def test_a_wrong_command_is_one_sentence_and_code_2(
        words, folder, capsys, monkeypatch, in_this_process):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kernel:
        monkeypatch.setattr(kernel.knobs.runtime, "interpret", False)
    message = refused(["--dataset", "sims", *TINY, *words.split()], capsys)
    assert message.count("error: ") == 1 and not list(folder.rglob("results.json"))
    assert "--dataset" in refused([], capsys)    # which one is required


@pytest.mark.parametrize("error, place, name", [
    (MemoryError(), data._Reader, "load"), (MemoryError(), data, "_resample"),
    (BrokenProcessPool(), train, "train_epoch"),
    (torch.OutOfMemoryError("CUDA out of memory"), train, "train_epoch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), train, "predict"),
    (NameError("a bug"), data, "_resample"), (RuntimeError("a bug"), train, "predict")])
def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden(
        error, place, name, folder, capsys, monkeypatch):
    monkeypatch.setattr(place, name, Mock(side_effect=error))
    if str(error) == "a bug":
        with pytest.raises(type(error)):
            train.main([*RUN, "1"])
    else:
        assert "try a smaller --batch-size" in refused([*RUN, "1"], capsys)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_run_says_what_it_is_on_any_terminal(encoding, folder, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train.main(["--dataset", "sims", "--epochs", "1", "--seeds", "2", *TINY,
                       "--out", "中文"]) == 0
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    shown = "中文" if encoding == "utf-8" else "??"
    for words in ("There are no data at data/sims/unaligned_39.pkl", "12 samples",
                  "Get unaligned_39.pkl from the links on https://github.com/thuiar/",
                  "'text': 768", "14,396 parameters, outputs 1, ", "2 seeds",
                  f"Results go to {shown}"):
        assert words in said
    assert "\r" not in said                      # progress is for terminals only


def test_help_shows_the_default_of_every_option_that_has_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = re.split(r"\n  --", capsys.readouterr().out)[1:]
    without = [entry.split()[0] for entry in shown if "(default:" not in entry]
    assert without == ["dataset", "no-mix", "amp", "resume", "benchmark"]


# ------------------------------------------------------------ the benchmark
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


@linux_only
@pytest.mark.parametrize("fusion, labels", [
    ("coupled", ["inference", "inference in pieces of 64", "training step"]),
    ("attention", ["inference", "training step", "inference, explicit",
                   "training step, explicit"])])
def test_the_benchmark_prints_a_row_per_case(
        fusion, labels, in_this_process, capsys, monkeypatch):
    for numbers in (r"\d[\d.]+ +\d[\d.]+", "- +-"):
        argv = ["--dataset", "mosi", "--device", "cpu", "--fusion", fusion, *TINY]
        assert train.main([*argv, "--benchmark", "--lengths", "3", "5"]) == 0
        out = capsys.readouterr().out
        rows = re.findall(rf"(?m)^ +(\d)  (\S.*?)  +{numbers}$", out)
        assert rows == [*itertools.product("35", labels)] and "length  case" in out
        monkeypatch.setattr(train, "in_own_process", lambda *v: bytearray(2 ** 60))


@pytest.mark.parametrize("case", train.CASES)
def test_a_case_of_the_benchmark_does_what_its_label_says(case, monkeypatch):
    lengths, advance = [], CoupledMamba.advance

    def note_length(model, xs, *arguments):
        lengths.append(xs[0].shape[1])
        return advance(model, xs, *arguments)

    monkeypatch.setattr(CoupledMamba, "advance", note_length)
    fusion = case.fusions[0]                     # coupled, or attention for explicit
    config = config_of(*TINY, "--fusion", fusion)
    work = train.make_work(config, data.SPECS["mosi"], 300, case)
    model = inspect.getclosurevars(work).nonlocals["model"]
    with Largest() as seen:
        work()
    assert lengths == ([64] * 4 + [44] if "pieces" in case.label else [300])
    assert model.training == model.modality_logits.any() == ("training" in case.label)
    scores = 4 * 4 * 300 * 600                   # samples, heads, steps, keys
    assert (seen.size >= scores) is ("explicit" in case.label)
    monkeypatch.setattr(train, "memory", lambda _, restart=False: 107 - 7 * restart)
    assert train.measure_case(config, data.SPECS["mosi"], 3, case)[1] == 7


def memory_of_40_megabytes():
    torch.ones(20 << 20)                         # given back at once
    before = train.memory("cpu", restart=True)
    torch.ones(10 << 20)
    return os.getpid(), train.memory("cpu") - before


@linux_only
def test_a_case_has_a_process_of_its_own_and_the_memory_of_the_work_alone():
    process, size = train.in_own_process(memory_of_40_megabytes)
    assert process != os.getpid() and 39e6 < size < 45e6


# ------------------------------------------------------------ README
README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TRAINING = re.findall(r"(?m)train\.py (--dataset .*?)(?:`|$)", README)


def test_the_snippets_of_the_readme_need_torch_and_one_file(tmp_path):
    snippets = [snippet for snippet in SNIPPETS if "numpy" not in snippet]
    assert len(snippets) == 4
    copy_to(tmp_path, "coupled_mamba.py")
    code = "import sys; sys.modules['numpy'] = sys.modules['triton'] = None\n"
    code += "\n".join(snippets) + "import coupled_mamba\n"
    code += "print(coupled_mamba.kernel_problem(text, text))"
    assert "kernel.py must lie beside" in run_python(code, tmp_path)


def test_the_snippets_of_own_data_write_a_file_train_on_it_and_predict(folder):
    before, after = [snippet for snippet in SNIPPETS if "numpy" in snippet]
    exec(before, {})
    command, = [words for words in TRAINING if "own.npz" in words]
    assert train.main([*command.split(), *TINY, "--epochs", "1", "--seeds", "1"]) == 0
    found = {}
    exec(after, found)
    saved = torch.load("runs/own-coupled/seed0.pt", weights_only=True)
    assert_close(found["prediction"], saved["prediction"], 1e-5)


@pytest.mark.parametrize("words", TRAINING)
def test_the_training_commands_of_the_readme_run(words, folder, in_this_process):
    """With the smallest settings; the files that they name are made here."""
    for name, make in (("FILE", mmsa), ("FOLDER", mogonet), ("FILE.npz", own),
                       ("own.npz", own)):
        write(folder / name, make)
    smallest = ["--epochs", "1", "--seeds", "1", "--lengths", "4"]
    assert train.main([*words.split(), *TINY, *smallest]) == 0
