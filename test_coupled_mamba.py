"""The properties of Coupled Mamba, and the proof that its modes agree: pytest -q

Three references in NumPy are written from the paper and not from the code: Eq. 6, the
model for one sample (Figure 1 with Algorithm 1), and what a data file means. Nearly
every test is agreement with one of them; the rest is what no reference can say.
Hypothesis draws the problems. The environment variable PROFILE says how many for each
property: `dev` 5; `ci`, the default, 25, always the same; `thorough` 10,000.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
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

settings.register_profile("dev", max_examples=5, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("PROFILE", "ci"))
EXAMPLES = settings.default.max_examples
pytestmark = pytest.mark.filterwarnings("error")
HERE = Path(__file__).parent

# The largest error over the largest value. float64: rounding over 300 steps. float32:
# 2^-24 times the some 100 terms that a decay of 0.99 sums, and more for gradients, that
# sum over time again. 16 bit: y and gradients are rounded to 8 or 11 bits.
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


@given(problems)
def test_recurrence_is_equation_6(p):
    expected = reference(*(v.numpy() for v in p.values()))
    assert_close(coupled_scan(**p, mode="recurrence"), expected, 1e-12)


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
                 tile=st.sampled_from([8, 64, 512]), segments=st.booleans())
AS_SHIPPED = dict(chunk=coupled_mamba.CHUNK, cached=coupled_mamba.CACHED, tile=512,
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
# samples, blocks of e and segments at once, and a tile of e n > 128 in `_reduce`.
@triton_only
@settings(max_examples=max(1, EXAMPLES // 5), phases=[Phase.explicit, Phase.generate])
@given(problems_up_to(3, 2, 9, 6, st.sampled_from([1, 2, 4, 8])), CUTS, READ, FROZEN)
@example(problem(2, 2, 5, 6, 4), dict(chunk=2, cached=1, tile=8, segments=True), "all",
         set())
@example(problem(2, 2, 5, 6, 64), dict(chunk=2, cached=1, tile=512, segments=True),
         "last", {"x"})
@example(problem(5, 1, 3, 2, 2), dict(chunk=1, cached=1, tile=8, segments=True), "all",
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
    with torch.autocast("cpu", torch.bfloat16):
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


@given(problems)
def test_the_fft_is_the_recurrence_for_parameters_constant_in_time(p):
    w = torch.softmax(torch.arange(len(p["x"]), dtype=torch.float64), 0)
    long = {**p, "w": w, "D": None, "H0": None}
    for name in ("delta", "B", "C"):
        long[name] = p[name][:, :, :1].expand_as(p[name])
    short = [p[name][:, :, 0] for name in ("B", "C")]
    y = coupled_mamba.fft_convolution(p["x"], p["delta"][:, :, 0], p["A"], *short, w)
    assert_close(y, coupled_scan(**long, mode="recurrence")[0])


def test_defaults_are_no_skip_the_mean_and_a_zero_state():
    p = problem()
    given_ones = {name: p[name] for name in ("x", "delta", "A", "B", "C")}
    full = {**p, "D": torch.zeros_like(p["D"]), "w": torch.full_like(p["w"], 1 / 3),
            "H0": torch.zeros_like(p["H0"])}
    expected = coupled_scan(**full, mode="recurrence")
    for mode in ("recurrence", "convolution", "scan", "auto"):
        assert_close(coupled_scan(**given_ones, mode=mode), expected, 1e-12)


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
    work = 2 * 4 * 2 * 32 * 32                   # S and g of 4 steps of 2 samples
    assert work <= seen.size <= max(work, p["x"].numel()) == p["x"].numel()


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


@pytest.mark.parametrize("name, wrong, message", [
    ("mode", "fft", "mode is 'fft', expected one of .'auto', 'recurrence'"),
    ("delta", torch.ones(3, 2, 5, 4), "shape .3, 2, 5, 4. on cpu, .*l 11, e 4. on cpu"),
    ("delta", torch.ones(3, 2, 1, 4), "delta is a tensor of torch.float32 and shape"),
    ("w", torch.eye(3), "w is a tensor"), ("w", torch.ones(2), "m 3, b 2, l 11"),
    ("w", torch.ones(3, 1, 11), "w is a tensor"), ("w", [1, 1, 1], "w is a list"),
    ("H0", torch.ones(1, 4, 3), "H0 is a tensor"), ("D", torch.ones(4), "D is a "),
    ("D", torch.ones(1, 4), "D is a tensor"), ("D", torch.ones(3, 1), "D is a tensor"),
    ("x", torch.ones(3, 2, 11, 4, dtype=torch.int64), "int64.*floating-point numbers"),
    ("x", np.ones((3, 2, 11, 4)), "x is a ndarray, expected a tensor"),
    ("x", torch.ones(3, 2, 0, 4), "l >= 1"), ("A", torch.ones(3, 4), "A is a tensor"),
    ("C", torch.ones(3, 2, 11, 1), "C is a tensor"),
    ("B", torch.ones(3, 2, 11, 3, device="meta"), "on meta, expected .* on cpu"),
    ("mode", "convolution", "negative weights w: use mode='recurrence'")])
def test_wrong_arguments_of_the_scan_are_named_and_not_broadcast(name, wrong, message):
    p = {**problem(), "w": -torch.ones(3), name: wrong}
    with pytest.raises(ValueError, match=message):
        coupled_scan(**p)


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
def test_the_model_is_figure_1_with_algorithm_1(drawn):
    model, xs, mask = drawn
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
        drawn, garbage, data):
    model, xs, mask = drawn
    l = mask.shape[2]
    dirty = [torch.where(here[..., None], x, garbage) for x, here in zip(xs, mask)]
    state = model.init_state(2)
    first = 0
    while first < l:
        stop = data.draw(st.integers(first + 1, l))
        piece = [x[:, first:stop] for x in dirty]
        out, state = model.advance(piece, state, mask[:, :, first:stop])
        whole = model([x[:, :stop] for x in xs], mask[:, :, :stop])
        assert_close(out, whole)
        first = stop
    assert_close(gradients(out, model), gradients(whole, model))
    assert all(v.isfinite().all() for v in gradients(model(dirty, mask), model))


# ------------------------------------------------------------ what no reference can say
def test_4096_steps_stay_finite_but_the_plain_sum_of_the_paper_overflows():
    torch.manual_seed(0)
    xs = [torch.randn(1, 4096, 4) for _ in range(3)]
    for coupling in ("mean", "learned"):
        model = CoupledMamba((4, 4, 4), d_model=16, n_layers=2, d_state=16,
                             coupling=coupling)
        out = model(xs)
        assert all(v.isfinite().all() for v in [out, *gradients(out, model)])
    block = Block(3, 128, coupling="sum")
    largest = [block(torch.randn(3, 1, l, 128))[1]["H"].abs().max().item()
               for l in (50, 80, 110)]
    assert 1e15 < largest[0] < largest[1] < math.inf
    assert not math.isfinite(largest[2])


def test_every_parameter_starts_where_the_paper_says():
    torch.manual_seed(0)
    model = CoupledMamba((768, 33, 709), coupling="learned")
    assert_close(model.mix[0].weight.std(), 256 ** -0.5, 0.02)
    assert (model.modality_logits == 0).all()
    for block in model.blocks:
        step = F.softplus(block.dt_bias)
        assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 1.01e-1
        A = -torch.arange(1., 65).expand(3, 256, 64)
        assert_close(-torch.exp(block.A_log), A, 1e-6)
        assert block.dt_proj.weight.shape == (3, 8, 256)
        assert_close(block.weights(None), torch.full((3,), 1 / 3), 1e-6)
        for name, fan_in in (("in_proj", 128), ("x_proj", 256), ("out_proj", 256)):
            assert_close(getattr(block, name).weight.std(), fan_in ** -0.5, 0.02)
        assert_close(block.conv_weight.std(), 0.5, 0.05)
        for name in ("norm_bias", "conv_bias", "coupling_logits"):
            assert (getattr(block, name) == 0).all()
        assert (block.D == 1).all() and (block.norm_weight == 1).all()


@pytest.mark.parametrize("part", ["block", "head"])
def test_dropout_drops_outputs_of_a_block_and_of_the_hidden_layer(part):
    torch.manual_seed(0)
    model = CoupledMamba((3, 3), 8, d_model=8, n_layers=1, d_state=4, dropout=0.5)
    model.head[3].weight.data = torch.eye(8)
    model.head[3].bias.data.zero_()
    f = torch.randn(2, 4, 6, 8)
    call = model.head if part == "head" else lambda f: model.blocks[0](f)[0] - f
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
    seen = []

    def note(x, delta, A, B, C, D, w, H, mode):
        seen.append((A.dtype, w.dtype, H.dtype))
        return coupled_scan(x, delta, A, B, C, D, w, H, mode)

    monkeypatch.setattr(coupled_mamba, "coupled_scan", note)
    Block(2, 8, d_state=4).bfloat16()(torch.randn(2, 1, 3, 8).bfloat16())
    assert seen == [(torch.float32,) * 3]


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


def test_a_block_alone_reads_nothing_that_is_missing():
    torch.manual_seed(0)
    block, f = Block(2, 8, d_state=4), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 3, 5) < 0.6
    clean, dirty = (torch.where(mask[..., None], f, v) for v in (0, math.nan))
    out, state = block(dirty, mask)
    assert_close([out, state], block(clean, mask))
    assert (out[~mask] == 0).all()
    assert all(d.isfinite().all() for d in gradients(out, block))


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
        model.advance([x.float() for x in xs], state, mask)
    assert_close(out, expected[0], 0.1)


def test_torch_compile_calls_the_scan_and_gives_the_same():
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
@pytest.mark.parametrize("change, message", [
    (dict(coupling="max"), "coupling is 'max', expected one of .'mean'"),
    (dict(pooling="sum"), "pooling is 'sum'"), (dict(mode="x"), "mode is 'x'"),
    (dict(d_inputs=6), "d_inputs is 6, expected a list or tuple"),
    (dict(d_inputs=()), r"d_inputs is \(\)")])
def test_wrong_arguments_of_the_model_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        CoupledMamba(**{"d_inputs": (3, 4), **change})


STREAMS = r"expected a list of 3 tensors \(b, l, width\) with the widths \(5, 3, 4\)"
MASK = "torch.bool and shape .m 3, b 2, l 7"
MISTAKES = {                     # of xs or of the mask, and what is said
    "float32 features": ("xs", lambda xs: [x.float() for x in xs],
                         r"xs\[0\] .*torch.float32 .*expected .*torch.float64"),
    "integer features": ("xs", lambda xs: [x.long() for x in xs], "torch.int64"),
    "NumPy features": ("xs", lambda xs: [x.numpy() for x in xs], "is a ndarray"),
    "one tensor": ("xs", lambda xs: xs[0], "xs is a tensor of .*" + STREAMS),
    "a dict": ("xs", lambda xs: dict(enumerate(xs)), "xs is a dict, " + STREAMS),
    "two streams": ("xs", lambda xs: xs[:2], STREAMS),
    "four streams": ("xs", lambda xs: [*xs, xs[0]], STREAMS),
    "None for a stream": ("xs", lambda xs: [None, *xs[1:]], "is a NoneType"),
    "other lengths": ("xs", lambda xs: [*xs[:2], xs[2][:, :5]], "l 7, width 4"),
    "other batches": ("xs", lambda xs: [*xs[:2], xs[2][:1]], "b 2, l 7, width"),
    "other order": ("xs", lambda xs: [xs[1], xs[0], xs[2]], "width 5"),
    "no axis of time": ("xs", lambda xs: [x[:, 0] for x in xs], "l >= 1"),
    "no steps": ("xs", lambda xs: [x[:, :0] for x in xs], "l >= 1"),
    "NumPy mask": ("mask", lambda mask: mask.numpy(), "mask is a ndarray, .*" + MASK),
    "list as mask": ("mask", lambda mask: mask.tolist(), "mask is a list, .*" + MASK),
    "float mask": ("mask", lambda mask: mask.double(), "mask .*float64 .*" + MASK),
    "short mask": ("mask", lambda mask: mask[..., 1:], "mask .*" + MASK),
    "mask of one step": ("mask", lambda mask: mask[..., :1], "mask .*" + MASK),
    "mask of one sample": ("mask", lambda mask: mask[:, :1], "mask .*" + MASK)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_input_of_the_model_gets_a_sentence(mistake):
    model, xs = model_and_input()
    given_ones = {"xs": xs, "mask": torch.ones(3, 2, 7, dtype=torch.bool)}
    name, change, message = MISTAKES[mistake]
    given_ones[name] = change(given_ones[name])
    for call in (model, model.features, functools.partial(model.advance, state={})):
        with pytest.raises(ValueError, match=message):
            call(**given_ones)


def test_a_mistake_in_the_input_of_a_block_or_in_a_state_gets_a_sentence():
    block = Block(3, 8, d_state=4)
    f, mask = torch.randn(3, 2, 7, 8), torch.ones(3, 2, 7, dtype=torch.bool)
    for wrong, message in (
            (dict(f=f.double()), "f is a tensor of torch.float64"),
            (dict(f=f[:, :, 0]), "l >= 1, d 8"), (dict(f=f[:2]), "m 3, b >= 1"),
            (dict(f=[*f]), "f is a list"), (dict(f=f, mask=mask[:, :, :1]), "mask is"),
            (dict(f=f, state=(1, 2)), "state is a tuple, begin with"),
            (dict(f=f, state=block.init_state(1)), r"state\['conv'\] .*3, 2, 3, 16")):
        with pytest.raises(ValueError, match=message):
            block(**wrong)

    model, xs = model_and_input()
    with pytest.raises(ValueError, match=r"state is a NoneType.*init_state\("):
        model.advance(xs, None)
    others = [model.init_state(3), {**model.init_state(2), "more": xs[0]}]
    for options in (dict(m=2), dict(coupling="none"), dict(pooling="last")):
        others.append(model_and_input(**options)[0].init_state(2))
    others.append({name: v.float() for name, v in model.init_state(2).items()})
    for state in others:
        with pytest.raises(ValueError, match=r"state\['.*'\] is .*keep to one model"):
            model.advance(xs, state)


# ------------------------------------------------------------ which mode runs
def copy_to(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(HERE / name, folder / name)


def run_python(code, folder, **environment):
    """Run code in a process of its own; returns what it printed."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder,
                          env={**os.environ, **environment}, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# All of a tensor on a GPU that the choice of a mode asks for.
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
    assert "less than 2^31 elements" in reason(l=2 ** 28)
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


# The file alone, as others use it: a block between someone's own encoders and head.
ALONE = '''
import sys
sys.modules["numpy"] = sys.modules["triton"] = sys.modules["kernel"] = None
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
before = set(sys.modules)
from coupled_mamba import Block, kernel_problem
assert set(sys.modules) - before == {"coupled_mamba"}
torch.manual_seed(0)
encoders = torch.nn.ModuleList(torch.nn.Linear(width, 16) for width in (5, 3))
blocks = torch.nn.ModuleList(Block(2, 16, d_state=8, coupling="learned") for _ in "12")
head = torch.nn.Linear(32, 1)
parts = torch.nn.ModuleList([encoders, blocks, head])
optimizer = torch.optim.AdamW(parts.parameters(), 2e-2)
xs = [torch.randn(8, 12, width) for width in (5, 3)]
target = xs[0][:, 2, 0] * xs[1][:, 5, 0]

def features(steps, states):
    f = torch.stack([encoder(x[:, steps]) for encoder, x in zip(encoders, xs)])
    for i, block in enumerate(blocks):
        f, states[i] = block(f, state=states[i])
    return f

losses = []
for _ in range(30):
    f = features(slice(None), [None, None])
    out = head(torch.cat([*f.mean(2)], -1))[:, 0]
    loss = (out - target).square().mean()
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses[-1] < 0.2 * losses[0], losses
states = [None, None]
pieces = torch.cat([features(slice(t, t + 5), states) for t in (0, 5, 10)], 2)
assert torch.allclose(pieces, features(slice(None), [None, None]), atol=1e-5)
print(kernel_problem(torch.ones(1), torch.ones(1)))
'''


def test_the_file_alone_without_numpy_triton_and_kernel_py(tmp_path):
    copy_to(tmp_path, "coupled_mamba.py")
    assert "kernel.py must lie beside" in run_python(ALONE, tmp_path)


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
# GPU is needed. What runs at once has 164 KiB of shared memory on the smaller GPU.
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
    assert int(registers) <= 255 and stack == "0", (name, arch, registers, stack)
    assert re.search(r"[.]reqntid 32\\b", made.asm["ptx"])       # one warp
    assert made.metadata.shared <= 164 * 1024 // kernel.RESIDENT - 1024
'''


@triton_only
def test_the_compiled_kernel_spills_no_register_and_sums_within_one_warp(tmp_path):
    copy_to(tmp_path, "kernel.py")
    run_python(COMPILE, tmp_path, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


# ------------------------------------------------------------ data: files of the tools
FRAMES = (6, 40, 25)


def drawn_mmsa(seed=0, samples=(12, 6, 6), says="both", frames=FRAMES, front=False,
               silent=False, store=np.asarray, dtype=np.float32):
    """A small MMSA pickle; by split, the real frames of each stream, None if not told.

    Text is padded in front, the other streams at the end, or if `front` in front. One
    sample has no audio, and single values are missing. says: by what the file tells
    which frames are real: "no", "bert", "lengths" or "both". silent: some real frames
    are zero. store: brings an array into another memory layout.
    """
    rng = np.random.default_rng(seed)
    content, told = {"config": {"not": "a split"}}, {}
    for s, count in zip(data.SPLITS, samples):
        labels = rng.uniform(-3, 3, count).astype(np.float32).tolist()
        split = {"regression_labels": labels, "raw_text": np.array(["a b"] * count),
                 "annotations": np.array(["Positive"] * count, dtype=object)}
        content[s], told[s] = split, []
        for m, number, width in zip(data.MODALITIES, frames, (8, 3, 5)):
            by_bert = m == "text" and says in ("bert", "both")
            by_lengths = not by_bert and says in ("lengths", "both")
            lengths = rng.integers(1, number + 1, count)
            if m == "audio":
                lengths[2] = 0
            there = np.arange(number) < lengths[:, None]
            if front or m == "text":
                there = there[:, ::-1]
            x = 50 * rng.standard_normal((count, number, width)) + 3
            if silent and m == "audio":
                x[0, lengths[0] // 2] = x[1, 0] = 0
            x[~there] = 7 if by_bert else 0
            with np.errstate(over="ignore"):
                x[3:6, 0, 0] = -np.inf, np.nan, np.finfo(np.float32).min
                split[m] = store(x.astype(dtype))
            if by_bert:                         # some tools turn it round
                axis = 2 if silent else 1
                split["text_bert"] = np.stack([there * 0, there, there], axis)
            if by_lengths:
                lengths[lengths == number] += 100           # cut off by the tool
                split[f"{m}_lengths"] = lengths.tolist() if m == "audio" else lengths
            told[s].append(there if by_bert or by_lengths else None)
    return content, told


def mmsa(**options):
    return drawn_mmsa(**options)[0]


def mogonet(rows=(20, 7)):
    """The tables of a small MOGONET folder: two classes, one constant feature."""
    rng = np.random.default_rng(0)
    tables = {}
    for part, count in zip(("tr", "te"), rows):
        for view, width in zip("123", (7, 5, 4)):
            tables[f"{view}_{part}"] = rng.random((count, width))
            tables[f"{view}_{part}"][:, 0] = 0.5
        tables[f"labels_{part}"] = (np.arange(count) % 2)[:, None].astype(float)
    return tables


def mmimdb():
    """The tables of an MM-IMDB file of 6, 3 and 4 rows, see `small_mmimdb`."""
    rng = np.random.default_rng(0)
    return {"features": rng.standard_normal((13, 10)).astype(np.float32),
            "vgg_features": rng.standard_normal((13, 16)).astype(np.float32),
            "genres": (rng.random((13, 23)) < 0.3).astype(np.int32)}


def own(seed=0, samples=(12, 6, 7), frames=(9, 9), told=False, labels="classes"):
    """The arrays of an own file of two streams."""
    rng = np.random.default_rng(seed)
    tables = {}
    for s, count in zip(data.SPLITS, samples):
        for name, number, width in zip(("arm", "leg"), frames, (3, 2)):
            x = 2 * rng.standard_normal((count, number, width)) + 1
            if told:
                lengths = rng.integers(0, number + 1, count)
                x[np.arange(number) >= lengths[:, None]] = 0
                tables[f"{s}/{name}_lengths"] = lengths
            tables[f"{s}/{name}"] = x.astype(np.float16)
        y = {"classes": np.arange(count) % 3, "numbers": rng.standard_normal(count),
             "several": rng.integers(0, 2, (count, 4))}
        tables[f"{s}/y"] = y[labels]
    return tables


NAMES = {mmsa: "mosi", mogonet: "rosmap", mmimdb: "mmimdb", own: "own"}


@pytest.fixture(autouse=True)
def small_mmimdb(monkeypatch):
    small = data.SPECS["mmimdb"]._replace(samples=(6, 3, 4))
    monkeypatch.setitem(data.SPECS, "mmimdb", small)


def write(path, make=mmsa, change=None, protocol=4, **options):
    """Write what `make` returns, after `change`, in its layout, and return it."""
    content = make(**options)
    if change is not None:
        change(content)
    if make is mmsa:
        path.write_bytes(pickle.dumps(content, protocol))
    elif make is own:
        with open(path, "wb") as file:
            np.savez(file, **content)
    elif make is mmimdb:
        with h5py.File(path, "w") as file:
            for name, table in content.items():
                file[name] = table
    else:
        path.mkdir()
        for name, table in content.items():
            file = path / f"{name}.csv"
            if isinstance(table, np.ndarray) and table.ndim < 3:
                np.savetxt(file, table, "%s", delimiter=",")
            else:
                file.write_text(str(table))
    return content


def wrong(split, key, value):
    """A change for `write`: sets an entry of a split, or of the content itself."""
    def change(content):
        part = content[split] if split else content
        part[key] = value
        if value is None:
            del part[key]
    return change


# ------------------------------------------------------------ the reader in NumPy
def steps_by_definition(streams, told, length, clock):
    """What the streams of a split become, NaN where a step has no real frame.

    The frames from the first to the last real one are cut into segments, and a step is
    the mean of the real frames of its segment. told: the real frames (N, frames) of
    each stream; None: those that are not zero, and all between them. clock: "own"; or
    "one", from the first to the last that is real in any stream; or "all" frames.
    """
    streams = [np.where(np.abs(x) < np.float64(1e30), x, 0.0) for x in streams]
    real = [x.any(2) if frames is None else frames for x, frames in zip(streams, told)]
    clocks = real
    if clock == "one":
        clocks = [np.any(real, 0)] * len(real)
    elif clock == "all":
        clocks = [np.ones_like(frames) for frames in real]
    found = []
    for x, frames, now in zip(streams, told, clocks):
        if frames is None:
            frames = np.ones_like(now) & x.any((1, 2))[:, None]
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


def assert_read_as_defined(dataset, parts, length, clock, lengths):
    """parts: streams and `told` of each split. lengths: of test, as for `prepare`."""
    means = {s: steps_by_definition(*parts[s], length, clock) for s in data.SPLITS}
    for i in range(len(dataset.spec.modalities)):
        center = np.nanmean(means["train"][i], (0, 1))
        scale = np.nanstd(means["train"][i], (0, 1))
        for s, split in dataset.splits.items():
            expected = np.nan_to_num((means[s][i] - center) / scale)
            np.testing.assert_allclose(split.xs[i], expected, rtol=0, atol=1e-4)
            assert (split.mask[i] == ~np.isnan(means[s][i]).any(2)).all()
    xs, mask = data.prepare(parts["test"][0], dataset.preparation, lengths)
    assert_close(xs, dataset.splits["test"].xs, 1e-6)
    assert (mask == dataset.splits["test"].mask).all()


STORES = {"C": np.ascontiguousarray, "F": np.asfortranarray,
          "permuted": lambda x: x.transpose(1, 0, 2).copy().transpose(1, 0, 2),
          "sliced": lambda x: x.repeat(2, 1)[:, ::2],
          "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">"))}


@given(st.integers(0, 99), st.sampled_from(["no", "bert", "lengths", "both"]),
       st.sampled_from([FRAMES, (12, 12, 12), (60, 9, 9)]), st.booleans(),
       st.booleans(), st.sampled_from(list(STORES)),
       st.sampled_from(["f2", "f4", "f8"]), st.integers(0, 5),
       st.sampled_from([None, 1, 9, 50]), st.sampled_from([1, 1 << 22]))
@example(0, "no", (12, 12, 12), False, True, "permuted", "f4", 5, 7, 1)
@example(1, "lengths", FRAMES, True, True, "F", "f8", 0, None, 1)
def test_a_pickle_is_read_as_its_definition_says(
        seed, says, frames, front, silent, store, dtype, protocol, length, block):
    content, told = drawn_mmsa(seed, says=says, frames=frames, front=front,
                               silent=silent, store=STORES[store], dtype=dtype)
    parts = {s: ([content[s][m] for m in data.MODALITIES], told[s]) for s in told}
    one_clock = len(set(frames)) == 1 and says in ("no", "bert")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BLOCK_ELEMENTS", block)
        path = Path(folder) / "a.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        dataset = data.load("mosi", path, length)
    lengths = [content["test"].get(f"{m}_lengths") for m in data.MODALITIES]
    lengths[0] = content["test"].get("text_bert", lengths[0])
    assert_read_as_defined(dataset, parts, length or min(50, max(frames)),
                           "one" if one_clock else "own", lengths)
    for s, split in dataset.splits.items():
        assert split.y.tolist() == content[s]["regression_labels"]


@given(st.integers(0, 99), st.sampled_from([(9, 9), (9, 60)]), st.booleans(),
       st.sampled_from([None, 4, 9]))
def test_an_own_file_is_read_as_its_definition_says(seed, frames, told, length):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        tables = write(path, own, seed=seed, frames=frames, told=told)
        dataset = data.load("own", path, length)
    parts, names = {}, ("arm", "leg")
    for s in data.SPLITS:
        streams = [tables[f"{s}/{name}"] for name in names]
        ends = [tables.get(f"{s}/{name}_lengths", np.full(len(x), x.shape[1]))
                for name, x in zip(names, streams)]
        parts[s] = streams, [np.arange(number) < end[:, None]
                             for number, end in zip(frames, ends)]
    clock = "own"
    if frames == (9, 9):
        clock = "one" if length == 4 else "all"
    lengths = [tables.get(f"test/{name}_lengths") for name in names]
    assert_read_as_defined(dataset, parts, length or min(50, max(frames)), clock,
                           lengths)
    assert dataset.spec.modalities == names and dataset.spec.widths == (3, 2)
    assert dataset.spec.samples == (12, 6, 7)


# ------------------------------------------------------------ the rules of each format
@pytest.mark.parametrize("given_classes", [False, True])
def test_classes_are_those_of_the_file_or_the_signs_of_labels(given_classes, tmp_path):
    def label(content):
        content["valid"]["regression_labels"] = [-1, 0, 2, 3, 0.5, -3]
        for s in data.SPLITS:
            if given_classes:
                count = len(content[s]["regression_labels"])
                content[s]["classification_labels"] = list(np.arange(count) * 5 % 3)

    content = write(tmp_path / "a.pkl", mmsa, label)
    splits = data.load("mosi", tmp_path / "a.pkl", task="classification").splits
    for s, split in splits.items():
        labels = np.sign(content[s]["regression_labels"]) + 1
        labels = content[s].get("classification_labels", labels)
        assert split.y.dtype == np.int64 and split.y.tolist() == list(labels)


@pytest.mark.parametrize("labels, task, classes, dtype", [
    ("classes", "classification", 3, np.int64),
    ("numbers", "regression", 0, np.float32),
    ("several", "classification", 4, np.float32)])
def test_labels_of_an_own_file_tell_its_task(labels, task, classes, dtype, tmp_path):
    tables = write(tmp_path / "a.npz", own, labels=labels)
    dataset = data.load("own", tmp_path / "a.npz", task=task)
    assert dataset.spec.tasks == (task,) and dataset.spec.classes == classes
    for s, split in dataset.splits.items():
        assert split.y.dtype == dtype
        assert (split.y == tables[f"{s}/y"].astype(dtype)).all()


def test_what_differs_from_the_published_set_or_is_not_used_is_said(tmp_path):
    def add(content):
        content["train_mix"] = {}
        content["train"]["depth"] = np.ones((12, 3, 4))
        for s in data.SPLITS:
            content[s]["regression_labels"] = [1.0] * len(content[s]["audio"])

    write(tmp_path / "a.pkl", mmsa, add)
    assert data.load("mosi", tmp_path / "a.pkl").notes == [
        "not used: train_mix", "not used: train/depth",
        "labels: at most 1 in size, published 3", "text: 8 features, published 768",
        "audio: 3 features, published 5", "vision: 5 features, published 20",
        "(12, 6, 6) samples, published (1284, 229, 686)"]
    write(tmp_path / "b", mogonet, wrong(None, "4_tr", np.ones((20, 2))))
    assert "not used: 4_tr.csv" in data.load("rosmap", tmp_path / "b").notes
    write(tmp_path / "c.npz", own, wrong(None, "train/z_lengths", np.ones(12)))
    assert data.load("own", tmp_path / "c.npz").notes == ["not used: train/z_lengths"]
    write(tmp_path / "d.npz", own, wrong(None, "test/leg", np.ones((7, 8, 2))))
    note, = data.load("own", tmp_path / "d.npz").notes
    assert note == "streams of different numbers of frames are stretched to one"


@pytest.mark.parametrize("streams, lengths", [
    ([(4, 9, 3)], None), ([(4, 9, 3), (4, 9, 5)], None), ([(4, 9, 3), (4, 8, 2)], None),
    ([(4, 9, 3), (3, 9, 2)], None), ([(4, 3), (4, 2)], None),
    ([(4, 8, 3), (4, 8, 2)], None), ([(4, 9, 3), (4, 9, 2)], [None]),
    ([(4, 9, 3), (4, 9, 2)], [[1], None])])
def test_new_samples_of_other_shapes_are_refused(streams, lengths, tmp_path):
    write(tmp_path / "a.npz", own)
    preparation = data.load("own", tmp_path / "a.npz").preparation
    with pytest.raises(data.DataError, match="expected"):
        data.prepare([np.ones(shape) for shape in streams], preparation, lengths)


@pytest.mark.parametrize("length", [1, 3, 9, None])
@pytest.mark.parametrize("make", [mogonet, mmimdb])
def test_vectors_are_standardised_by_train_and_cut_into_steps(make, length, tmp_path):
    tables = write(tmp_path / "a", make)
    dataset = data.load(NAMES[make], tmp_path / "a", length)
    if make is mogonet:
        valid = data._stratified(tables["labels_tr"][:, 0])
        train, test = ([tables[f"{view}_{part}"] for view in ("1", "2", "3", "labels")]
                       for part in ("tr", "te"))
        parts = [[x[~valid] for x in train], [x[valid] for x in train], test]
    else:
        parts = [[x[rows] for x in tables.values()]
                 for rows in (slice(0, 6), slice(6, 9), slice(9, 13))]
    for (*vectors, y), split in zip(parts, dataset.splits.values()):
        assert (split.y == y.reshape(split.y.shape)).all()
        assert split.y.dtype == (np.int64 if make is mogonet else np.float32)
        for x, vector, of_train in zip(split.xs, vectors, parts[0]):
            scale = of_train.std(0)
            scale[scale < 1e-6] = 1
            vector = (vector - of_train.mean(0)) / scale
            width = -(-vector.shape[1] // (length or 20))
            expected = np.zeros((len(vector), length or 20, width))
            for j in range(vector.shape[1]):
                expected[:, j // width, j % width] = vector[:, j]
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)
        assert split.mask.shape == (len(vectors), len(y), length or 20)
        assert split.mask.all()
    xs, mask = data.prepare(vectors, dataset.preparation)
    assert all((x == y).all() for x, y in zip(xs, split.xs)) and mask.all()


@pytest.mark.parametrize("zeros, ones", [(15, 5), (30, 70), (90, 10)])
def test_valid_is_a_random_fifth_of_each_class_always_the_same(zeros, ones, tmp_path):
    y = np.repeat([0, 1], [zeros, ones])
    write(tmp_path / "a", mogonet, wrong(None, "labels_tr", y), rows=(zeros + ones, 7))
    splits = data.load("rosmap", tmp_path / "a" / "labels_tr.csv").splits
    assert np.bincount(splits["valid"].y).tolist() == [zeros // 5, ones // 5]
    assert np.bincount(splits["train"].y).tolist() == [zeros * 4 // 5, ones * 4 // 5]
    valid = data._stratified(y)
    assert (valid == data._stratified(y)).all() and not valid[:zeros // 5].all()


# ------------------------------------------------------------ damaged and hostile files
class Calls:
    """An object whose pickle is a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# A scalar whose dtype says that it is an object and whose flags deny it: eight bytes of
# the file would be used as a pointer.
FORGED = (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n(U\x02O8I00\nI01\ntR"
          b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
          b"U\x08AAAAAAAA\x86R")
FORGED_TEXT = (b"\x80\x02}U\x05train}U\x04text" + FORGED
               + b"ssU\x05valid}sU\x04test}s.")
DEEP_KEY = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."
BOMB = []           # 60 levels, each twice the one below: 2^60 elements in a few bytes
for _ in range(60):
    BOMB = [BOMB, BOMB]


def index(first):
    def change(content):
        for part in ("tr", "te"):
            table = content[f"1_{part}"]
            content[f"1_{part}"] = np.c_[np.arange(len(table)) + first, table]
    return change


def lengths_of(values):
    return wrong("test", "audio_lengths", values)


def fill_ends(content):
    content["test"]["vision"][:, [0, -1]] = 7
    content["test"]["vision_lengths"] = np.full(6, 3)


HOSTILE = [
    (mmsa, pickle.dumps(Calls(os.system, "touch hacked")), "posix.system"),
    (mmsa, pickle.dumps(Calls(np.load, "hacked.npy", None, True)), "numpy"),
    (mmsa, wrong("train", "text", Calls(eval, "open('hacked', 'w')")), "eval"),
    (mmsa, wrong("train", "text", BOMB), "ragged"),
    (mmsa, FORGED_TEXT, "train/text is of type O8"),
    (mmsa, DEEP_KEY, "not a complete MMSA pickle"),
    (mmsa, b"", "empty file"),
    (mmsa, b"hello", "not a complete MMSA pickle"),
    (mmsa, b"PK\x03\x04...", "zip archive"),
    (mmsa, b"\x1f\x8b...", "gzip"),
    (mmsa, b"\n<!DOCTYPE html>", "HTML page"),
    (mmsa, b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (mmsa, None, "there is no MMSA pickle here"),
    (mmsa, pickle.dumps([1, 2]), "expected a dict"),
    (mmsa, wrong("valid", "text", None), "has no valid/text"),
    (mmsa, wrong("test", "audio", np.ones((4, 40, 3))), "6 samples"),
    (mmsa, wrong("valid", "audio", np.ones((6, 40, 2))), "shape (6, 40, 2)"),
    (mmsa, wrong("train", "regression_labels", [np.nan] * 12), "[nan]"),
    (mmsa, wrong("test", "regression_labels", [3.5] * 6), "at most 3"),
    (mmsa, wrong("test", "text_bert", np.ones((6, 3, 7))), "attention mask (6, 3, 6)"),
    (mmsa, lengths_of([-1] * 6), "whole numbers"),
    (mmsa, lengths_of([0.5] * 6), "whole numbers"),
    (mmsa, lengths_of([np.nan] * 6), "whole numbers"),
    (mmsa, lengths_of([1.0] * 5), "whole numbers"),
    (mmsa, fill_ends, "not zero outside the frames"),
    (mogonet, None, "there is no MOGONET folder here"),
    (mogonet, wrong(None, "2_te", None), "has no 2_te.csv"),
    (mogonet, wrong(None, "1_tr", "1,2\n1\n"), "1_tr.csv"),
    (mogonet, wrong(None, "1_tr", ""), "1_tr.csv"),
    (mogonet, wrong(None, "1_tr", np.full((20, 7), np.nan)), "NaN"),
    (mogonet, wrong(None, "labels_te", np.arange(7)), "from 0 to 1"),
    (mogonet, wrong(None, "labels_te", np.ones(2)), "2 samples"),
    (mogonet, index(0), "index"),
    (mogonet, index(1), "index"),
    (mmimdb, b"hello", "not a complete HDF5"),
    (mmimdb, wrong(None, "genres", np.ones((13, 3))), "23 columns"),
    (mmimdb, wrong(None, "features", np.ones((5, 9))), "13"),
    (own, b"hello", "not a complete NumPy file"),
    (own, wrong(None, "valid/leg", None), "has no valid/leg"),
    (own, wrong(None, "test/y", np.full(7, -1)), "from 0 to 2"),
    (own, wrong(None, "test/y", np.full(7, 10 ** 17)), "values like [100000000000"),
    (own, wrong(None, "train/arm", np.array([None])), "allow_pickle=False"),
]


@pytest.mark.parametrize("make, damage, message", HOSTILE, ids=[
    f"{NAMES[make]}: {message}" for make, _, message in HOSTILE])
def test_a_damaged_or_hostile_file_is_one_line_and_exit_code_2(
        make, damage, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if callable(damage):
        write(Path("a"), make, damage)
    elif damage is not None:
        Path("a").write_bytes(damage)
    before = os.listdir()

    assert train.main(["--dataset", NAMES[make], "--data", "a"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and message in printed.err
    assert os.listdir() == before               # nothing in the file was executed


@pytest.mark.parametrize("error, place, name", [
    (MemoryError, data, "_resample"), (NameError, data, "_resample"),
    (MemoryError, data._Reader, "load")])
def test_only_what_reading_itself_raises_is_called_a_damaged_file(
        error, place, name, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    write(tmp_path / "a.pkl")
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(error):
        data.load("mosi", tmp_path / "a.pkl")


def spoil(content, rng):
    """Delete one entry of nested dicts, or give it another shape or type."""
    key = rng.choice(list(content))
    value = content[key]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        spoil(value, rng)
        return
    others = ["a", 7, [1.0], {}, [[1.0], 2], np.ones((2, 3)), np.ones((0, 3, 4)),
              np.array([b"a"]), np.float32(2)]
    array = np.asarray(value)
    if array.ndim:
        others += [array[:-1], array[None], array.T, array.astype("S9"),
                   array.astype(bool)]
    content[key] = others[rng.integers(len(others))]
    if rng.random() < 0.1:
        del content[key]


def overwrite_bytes(file, rng):
    """Overwrite a few bytes, mostly near the start, and perhaps cut off the end."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.integers(1, 8)):
        reach = min(len(content), 10 ** int(rng.integers(2, 5)))
        content[rng.integers(reach)] = rng.integers(256)
    if rng.random() < 0.2:
        content = content[:rng.integers(len(content))]
    file.write_bytes(content)


@settings(max_examples=2 * EXAMPLES)
@given(st.sampled_from(list(NAMES)), st.integers(0, 5), st.booleans(),
       st.integers(0, 10 ** 6))
def test_a_file_with_wrong_entries_or_bytes_is_read_or_refused(
        make, protocol, entries, seed):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        change = (lambda content: spoil(content, rng)) if entries else None
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            write(path, make, change, protocol)     # HDF5 cannot store every entry
        if not entries:
            view = f"{rng.integers(1, 4)}_tr.csv"
            overwrite_bytes(path / view if make is mogonet else path, rng)
        try:
            splits = data.load(NAMES[make], path).splits
        except data.DataError as error:
            assert str(error).startswith(folder) and "\n" not in str(error)
        else:
            assert all(np.isfinite(x).all() for split in splits.values()
                       for x in split.xs)


def test_reading_takes_little_more_memory_than_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_ELEMENTS", 1 << 18)
    content = {}
    for s, count in zip(data.SPLITS, (200, 25, 50)):
        content[s] = {"regression_labels": np.zeros(count, np.float32)}
        for m, *shape in (("text", 50, 768), ("audio", 500, 74), ("vision", 500, 35)):
            content[s][m] = np.ones((count, *shape), np.float32)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    del content

    tracemalloc.start()
    splits = data.load("mosei", tmp_path / "a.pkl", 50).splits
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = sum(x.nbytes for split in splits.values() for x in split.xs)
    assert kept == 275 * 50 * 877 * 4
    assert kept < peak < 1.5 * kept             # the pickle has 2.1 times the result


# ------------------------------------------------------------ the stand-in
def assert_same(one, other):
    """Two datasets are equal to the bit."""
    for s in data.SPLITS:
        a, b = one.splits[s], other.splits[s]
        assert all((x == y).all() for x, y in zip(a.xs, b.xs, strict=True))
        assert (a.mask == b.mask).all() and (a.y == b.y).all()


@pytest.mark.parametrize("rate", [0, 0.3, 0.8])
def test_missing_elements_are_zero_and_of_the_rate_and_the_seed_asked_for(rate):
    whole, holes, same, other = (data.synthetic("sims", samples=(20, 10, 10))
                                 for _ in range(4))
    for dataset, seed in ((holes, 0), (same, 0), (other, 1)):
        data.with_missing(dataset, rate, seed)
    assert_same(holes, same)
    for s in data.SPLITS:
        for x, y, z in zip(*(d.splits[s].xs for d in (whole, holes, other))):
            assert ((y == 0) | (y == x)).all()
            assert abs((y == 0).mean() - rate) < 0.01
            assert rate == 0 or (y != z).any()


TASKS = [(name, task) for name, spec in data.SPECS.items() for task in spec.tasks]


@pytest.mark.parametrize("name, task", TASKS)
def test_the_stand_in_has_the_shapes_and_the_labels_of_the_published_set(name, task):
    spec = data.SPECS[name]
    dataset = data.synthetic(name, samples=(30, 20, 10), task=task)
    assert dataset.synthetic and dataset.name == name and dataset.notes == []
    assert dataset.spec == spec._replace(samples=(30, 20, 10))
    length, widths = 50, spec.widths
    if spec.layout != "mmsa":
        length, widths = 20, [-(-width // 20) for width in spec.widths]
    for split, count in zip(dataset.splits.values(), (30, 20, 10), strict=True):
        for x, width in zip(split.xs, widths, strict=True):
            assert x.shape == (count, length, width) and x.dtype == np.float32
        assert split.mask.shape == (len(widths), count, length) and split.mask.all()
        if name == "mmimdb":
            assert split.y.shape == (count, 23) and set(np.unique(split.y)) == {0, 1}
        elif task == "regression":
            assert set(np.round(3 * split.y / spec.scale)) <= {-3, -1, 1, 3}
        else:
            assert set(split.y) <= set(range(spec.classes))


def test_the_stand_in_is_of_the_published_size_and_the_same_for_the_same_seed():
    one, again, other = (data.synthetic("rosmap", seed=seed) for seed in (3, 3, 4))
    sizes = tuple(len(one.splits[s].y) for s in data.SPLITS)
    assert sizes == data.SPECS["rosmap"].samples
    assert_same(one, again)
    assert (one.splits["test"].xs[0] != other.splits["test"].xs[0]).any()


# Widths, samples, classes, range of labels; of the stand-in for 40 training samples the
# mean sizes of the features, and the sum of the labels. Results depend on all of them.
RECORDED = {
    "mosi": (793, 2199, 3, 3.0), "mosei": (877, 22856, 3, 3.0),
    "sims": (1510, 2281, 3, 1.0, 0.72236, 0.72305, 0.77932, 4.66667),
    "simsv2": (970, 4403, 3, 1.0), "rosmap": (600, 351, 2, 0.0),
    "brca": (2503, 875, 5, 0.0, 0.71171, 0.77406, 0.78246, 79.0)}


@pytest.mark.parametrize("name", RECORDED)
def test_published_numbers_and_the_stand_in_are_the_recorded_ones(name):
    spec = data.SPECS[name]
    found = [sum(spec.widths), sum(spec.samples), spec.classes, spec.scale]
    if len(RECORDED[name]) > 4:
        split = data.synthetic(name, samples=(40, 5, 5)).splits["train"]
        found += [np.abs(x).mean() for x in split.xs] + [split.y.sum()]
    assert found == pytest.approx(list(RECORDED[name]), rel=1e-4)


def main_directions(x):
    """(width, 8): the directions in which the features of a stream vary most."""
    frames = x.reshape(-1, x.shape[2])[:1500]
    return np.linalg.eigh(frames.T @ frames)[1][:, :-9:-1]


def correlation(predictions, labels):
    """The largest |Corr| of any column of predictions (N, ...) with a label (N, k)."""
    predictions = predictions.reshape(len(labels), -1)
    k = labels.shape[1]
    return np.abs(np.corrcoef(predictions, labels, rowvar=False)[:-k, -k:]).max()


def label_columns(y):
    """(N, k): the numbers, a column of 0 and 1 for each class, or three labels."""
    if y.dtype == np.int64:
        return (y[:, None] == np.unique(y)).astype(float)
    return y.reshape(len(y), -1)[:, :3].astype(float)


def ridge_regression(xs, y, new, penalty=0.01):
    """The label columns of `new` streams, by ridge regression on all features."""
    flat = [x.reshape(len(x), -1) for x in xs]
    gram = sum(a @ a.T for a in flat)
    cross = sum(b.reshape(len(b), -1) @ a.T for a, b in zip(flat, new))
    gram += penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
    return cross @ np.linalg.solve(gram, y - y.mean(0))


@pytest.mark.parametrize("name, task", [
    ("mosi", "regression"), ("mosi", "classification"), ("rosmap", "classification"),
    ("brca", "classification"), ("mmimdb", "classification")])
def test_only_products_of_two_streams_a_few_frames_apart_tell_the_label(name, task):
    splits = data.synthetic(name, samples=(600, 400, 5), task=task).splits
    xs, _, y = splits["train"]
    labels, new = label_columns(y), splits["valid"]
    directions = [main_directions(x) for x in xs]
    for x, found in zip(new.xs, directions):     # the same eight in every split
        assert np.sum((x @ found) ** 2) > 0.95 * np.sum(x ** 2)
    streams = [x @ found for x, found in zip(xs, directions)]
    reply, sign = streams[:2]
    for x in streams:
        for statistic in (x.sum(1), x.max(1), x.min(1), x.std(1)):
            assert correlation(statistic, labels) < 0.15
    for one, other in itertools.combinations_with_replacement([reply, sign], 2):
        products = one.sum(1)[:, :, None] * other.sum(1)[:, None]       # (N, 8, 8)
        assert correlation(products, labels) < 0.2
    for k, predicted in enumerate(ridge_regression(xs, labels, new.xs).T):
        assert correlation(predicted, label_columns(new.y)[:, k:k + 1]) < 0.15
    linear, new_linear = (x[0][:, 7, 3:4] + x[1][:, 12, :1] for x in (xs, new.xs))
    assert correlation(ridge_regression(xs, linear, new.xs), new_linear) > 0.5
    if task == "regression":
        pairs = sum((reply[:, lag:, 0] * sign[:, :-lag, 0]).sum(1)
                    for lag in range(3, 8))
        assert correlation(pairs, labels) > 0.85


# ------------------------------------------------------------ metrics
def by_counting(pairs):
    """Accuracy, F1 weighted by true classes and mean F1, of pairs (true, predicted)."""
    if not pairs:
        return math.nan, math.nan, math.nan
    true, pred = zip(*pairs)
    f1 = {c: 2 * pairs.count((c, c)) / (true.count(c) + pred.count(c))
          for c in {*true, *pred}}
    right = np.mean([t == p for t, p in pairs])
    return right, np.mean([f1[c] for c in true]), np.mean(list(f1.values()))


NUMBERS = [-3., -2., -1., -0.8, -0.7, -0.12, -0.1, -0.05, 0., 0.05, 0.1, 0.12, 0.3, 0.7,
           0.8, 1.4, 1.6, 2.6, 4.]


@given(st.lists(st.tuples(*[st.sampled_from(NUMBERS)] * 2), min_size=1, max_size=9),
       st.sampled_from([0, 1, 3]))
@example([(0., 0.)] * 5, 3)
@example(list(itertools.product(NUMBERS, NUMBERS)), 1)
@example(list(itertools.product(NUMBERS, NUMBERS)), 3)
def test_metrics_of_numbers_are_those_of_mmsa(pairs, scale):
    if scale == 1:
        pairs = [tuple(np.clip(pair, -1, 1)) for pair in pairs]
    true, pred = np.array(pairs).T
    expected = {"MAE": np.mean(np.abs(pred - true)), "Corr": math.nan}
    if len(set(true)) > 1 and len(set(pred)) > 1:
        expected["Corr"] = np.corrcoef(pred, true)[0, 1]
    if scale == 3:
        some = [(t > 0, p > 0) for t, p in pairs if t != 0]
        expected["Acc-2"], expected["F1"], _ = by_counting(some)
        expected["Acc-2 with 0"], expected["F1 with 0"], _ = by_counting(
            [(t >= 0, p >= 0) for t, p in pairs])
        for k in (1, 2, 3):
            same = [round(max(-k, min(k, t))) == round(max(-k, min(k, p)))
                    for t, p in pairs]
            expected[f"Acc-{2 * k + 1}"] = np.mean(same)
    if scale == 1:
        expected["Acc-2"], expected["F1"], _ = by_counting(
            [(t > 0, p > 0) for t, p in pairs])
        for cuts in ((-0.1, 0.1), (-0.7, -0.1, 0.1, 0.7)):       # on a cut: below it
            same = [sum(t > c for c in cuts) == sum(p > c for c in cuts)
                    for t, p in pairs]
            expected[f"Acc-{len(cuts) + 1}"] = np.mean(same)
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
    names = ("Acc", "weighted F1", "macro F1")
    assert train.class_metrics(logits, true) == pytest.approx(
        dict(zip(names, by_counting(both))))

    expected = {}
    signs = [(t, x[2] > x[0]) for t, x in zip(true.tolist(), logits)]
    for suffix, pairs in {"": [(t == 2, p) for t, p in signs if t != 1],
                          " with 0": [(t == 2, p) for t, p in signs],
                          " MMSA": [(t, int(p)) for t, p in signs if t != 1]}.items():
        expected["Acc-2" + suffix], expected["F1" + suffix], _ = by_counting(pairs)
    expected["Acc-3"], expected["F1-3"], _ = by_counting(both)
    got = train.sentiment_metrics(logits, true)
    assert got == pytest.approx(expected, nan_ok=True)

    labels = rng.integers(0, 2, logits.shape)
    hits, named = labels * (logits > 0), labels + (logits > 0)
    f1 = [2 * h / max(1, n) for h, n in zip(hits.sum(0), named.sum(0))]
    assert train.label_metrics(logits, labels.astype(np.float32)) == pytest.approx({
        "micro F1": 2 * hits.sum() / max(1, named.sum()), "macro F1": np.mean(f1)})


def test_the_loss_is_that_of_the_task():
    out = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]])
    classes = torch.tensor([2, 0])
    chosen = out.log_softmax(1)[[0, 1], classes]
    assert_close(train.sample_losses(out, classes), -chosen, 1e-6)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    p = out.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)
    assert_close(train.sample_losses(out, labels), expected, 1e-6)
    losses = train.sample_losses(out[:, :1], torch.tensor([1.5, -1.0]))
    assert_close(losses, torch.tensor([1.0, 1.0]), 1e-6)


# ------------------------------------------------------------ fusions
SMALL = ["--d-model", "8", "--layers", "2", "--d-state", "4", "--batch-size", "4"]
WIDTHS = (5, 3, 4)


def config_of(*argv):
    """The settings that this command line gives on a dataset that is there."""
    args = ["--dataset", "mosi", "--data", "a.pkl", "--device", "cpu", *argv]
    return {**train.settings(train.parse(args)), "task": "regression"}


def model_of(*argv):
    torch.manual_seed(0)
    model = train.make_model(config_of(*SMALL, *argv), WIDTHS, 1).double()
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
    alone = CoupledMamba((width,), 1, d_model=width, n_layers=2, d_state=4)
    alone.double().load_state_dict(model.mamba.state_dict())
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


@pytest.mark.parametrize("d_model", ["8", "7"])         # 4 heads, 1 head
def test_attention_is_its_definition(d_model):
    model = model_of("--fusion", "attention", "--d-model", d_model)
    xs, mask = streams_and_mask()
    features = model.features(xs, mask)
    for j in range(4):
        f = np.stack([e(x[j]).detach().numpy() for e, x in zip(model.encoders, xs)])
        f[~mask[:, j].numpy()] = 0
        for block in model.blocks:
            f = attention_by_hand(block, f, mask[:, j].numpy())
        assert_close(features[:, j], f, 1e-6)    # the sines are float32
    _, state = model.advance(xs, model.init_state(4), mask)
    with pytest.raises(ValueError, match="cannot continue"):
        model.advance(xs, state, mask)


@pytest.mark.parametrize("argv, reads", [
    (["--fusion", "mamba"], [True, False, False]),
    (["--coupling", "none", "--no-mix"], [True, False, False]),
    (["--coupling", "none"], [True] * 3), (["--no-mix"], [True] * 3)])
def test_without_coupling_and_cat_a_modality_reads_itself_alone(argv, reads):
    xs = [x.requires_grad_() for x in streams_and_mask()[0]]
    model_of(*argv).features(xs)[0].sum().backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in xs] == reads
    assert config_of("--fusion", "mamba")["coupling"] == "none"  # so says results.json


# ------------------------------------------------------------ training
@pytest.fixture
def run(tmp_path):
    """A small run. Audio ends after step 4 of 6 in sample 1; sample 2 has text only."""
    dataset = data.synthetic("mosi", length=6, samples=(12, 6, 6))
    for split in dataset.splits.values():
        split.mask[1, 1, 4:] = split.mask[1:, 2] = False
    config = config_of(*SMALL, "--epochs", "3", "--lr", "0.01", "--seeds", "1")
    return train.Run(config, dataset, tmp_path, torch.device("cpu"), 0, 1)


class Recorder(nn.Module):
    """Stands in for a model: predicts a number and remembers what dropout left."""

    def __init__(self):
        super().__init__()
        self.out = nn.Parameter(torch.zeros(1))
        self.dropped = []

    def forward(self, xs, mask=None):
        self.dropped.append(F.dropout(torch.ones(9), 0.5, self.training).tolist())
        return self.out.expand(len(xs[0]), 1)


def test_dropout_depends_on_seed_epoch_step_and_process_and_ends_with_training(
        run, monkeypatch):
    monkeypatch.setattr(train.dist, "all_reduce", lambda total: None)

    def dropped(seed=0, epoch=1, **process):
        recorder = Recorder()
        optimizer = torch.optim.SGD(recorder.parameters(), 0.1)
        train.train_epoch(run._replace(**process), recorder, optimizer, seed, epoch)
        return recorder.dropped

    found = [dropped(), dropped(epoch=2), dropped(seed=1)]
    different = [first for first, *_ in found] + found[0][1:]
    assert len({tuple(values) for values in different}) == 5
    assert dropped(world=2)[0] != dropped(world=2, rank=1)[0]
    torch.randn(3)
    assert dropped() == found[0]
    recorder = Recorder()
    train.predict(recorder, run.dataset.splits["test"], run.config, run.device)
    assert recorder.dropped == [[1.0] * 9] * 2   # 6 samples in batches of 4


def epochs_by_hand(run, seed, optimizer_class):
    """What a run must do: losses; least MAE on valid, its epoch and its weights."""
    torch.manual_seed(seed)
    model = CoupledMamba((768, 5, 20), 1, d_model=8, n_layers=2, d_state=4)
    plain = ("bias", "norm_weight", "A_log", "D", "logits")
    maps = [p for name, p in model.named_parameters() if not name.endswith(plain)]
    rest = [p for name, p in model.named_parameters() if name.endswith(plain)]
    optimizer = optimizer_class([
        {"params": maps, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    split, valid = run.dataset.splits["train"], run.dataset.splits["valid"]
    losses, best = [], (math.inf,)
    for epoch in range(1, run.config["epochs"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / 2 ** ((epoch - 1) // 50)
        order = np.random.default_rng((seed, epoch)).permutation(12)
        total = 0.0
        for rows in (order[:5], order[5:10], order[10:]):
            xs = [torch.tensor(x[rows]) for x in split.xs]
            out = model(xs, torch.tensor(split.mask[:, rows]))
            errors = (out[:, 0] - torch.tensor(split.y[rows])).abs()
            optimizer.zero_grad()
            errors.mean().backward()
            optimizer.step()
            total += errors.sum().item()
        losses.append(total / 12)
        with torch.no_grad():
            out = model([torch.tensor(x) for x in valid.xs], torch.tensor(valid.mask))
        mae = (out[:, 0] - torch.tensor(valid.y)).abs().mean().item()
        if mae < best[0]:
            best = mae, epoch, {k: v.clone() for k, v in model.state_dict().items()}
    return losses, best


@pytest.mark.parametrize("optimizer, kind, epochs", [
    ("adamw", torch.optim.AdamW, 51), ("adam", torch.optim.Adam, 4)])
def test_a_run_is_a_plain_loop_with_masks_and_the_best_epoch_on_valid(
        optimizer, kind, epochs, run):
    run.config.update(weight_decay=0.1, batch_size=5, epochs=epochs,
                      optimizer=optimizer)
    result = train.train_seed(run, 3, False)
    losses, (mae, epoch, weights) = epochs_by_hand(run, 3, kind)
    saved = torch.load(run.out / "seed3.pt", weights_only=True)
    assert [row["loss"] for row in result["log"]] == pytest.approx(losses, rel=1e-4)
    assert [row["epoch"] for row in result["log"]] == list(range(1, epochs + 1))
    assert result["epoch"] == saved["epoch"] == epoch
    assert result["valid"]["MAE"] == pytest.approx(mae, rel=1e-4)
    assert_close(saved["weights"], weights, 1e-3)

    model = CoupledMamba(**saved["model"])
    model.load_state_dict(saved["weights"])
    test = run.dataset.splits["test"]
    out = train.predict(model, test, run.config, run.device)
    assert_close([saved["prediction"], saved["target"]], [out, test.y], 1e-6)
    assert result["test"] == train.regression_metrics(out[:, 0], test.y, 3)


@pytest.mark.parametrize("maes, options, best, why", [
    ([3, 2, 2.5, 1, 1.5, 1], dict(epochs=6), 4, "all epochs are done"),
    ([3, 2, 2.5, 1, 1.5, 1, 7], dict(patience=3), 4, "last 3 epochs were no better"),
    ([3, math.nan], {}, 1, "training has diverged; try a smaller --lr")])
def test_where_training_ends_and_which_epoch_is_the_best(
        maes, options, best, why, run, monkeypatch, capsys):
    coming = iter([*maes, *[0.5] * 9])           # then valid and test of the best
    run.config.update({"epochs": 9, **options})
    with monkeypatch.context() as patch:
        patch.setattr(train, "measure", lambda *_: {"MAE": float(next(coming))})
        result = train.train_seed(run, 0, False)
    assert result["epoch"] == best and len(result["log"]) == len(maes)
    assert why in capsys.readouterr().out
    run.dataset.splits["train"].y[3] = math.nan  # of the loss, too
    assert len(train.train_seed(run, 1, False)["log"]) == 1


# ------------------------------------------------------------ the command line
TINY = ["--d-model", "8", "--layers", "1", "--d-state", "4", "--batch-size", "4"]
RUN = ["--dataset", "mosi", "--data", "a.pkl", "--epochs", "5", "--dropout", "0.2",
       "--lr", "0.05", *TINY, "--seeds"]


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
    if "results.json" in found:
        found["results.json"] = results(out)
    return found


MODEL_OPTIONS = [
    "--d-model 64", "--layers 2", "--d-state 32", "--expand 3", "--d-conv 2",
    "--dt-rank 5", "--dropout 0.3", "--pooling last", "--pooling mean", "--no-mix",
    "--coupling sum", "--coupling learned", "--coupling none", "--mode recurrence",
    "--mode convolution", "--mode scan"]
RUN_OPTIONS = [
    "--length 7", "--missing-rate 0.25", "--epochs 7", "--batch-size 9", "--lr 0.1",
    "--optimizer adam", "--weight-decay 0.1", "--patience 4", "--seeds 2", "--seed 11",
    "--amp"]


def differences(config, base):
    assert config.keys() == base.keys()
    return {name: config[name] for name in config if config[name] != base[name]}


@pytest.mark.parametrize("words", MODEL_OPTIONS + RUN_OPTIONS)
def test_an_option_changes_what_it_names_and_nothing_else(words):
    option, value = [*words.split(), "True"][:2]
    name = option[2:].replace("-", "_")
    changed = differences(config_of(*words.split()), config_of())
    assert {name: str(v) for name, v in changed.items()} == {name: value}
    fusions = ["coupled"]
    if name not in ("coupling", "no_mix", "d_model"):
        fusions += ["average", "concat"]
    for fusion in fusions:
        models = [train.make_model(config_of(*argv, "--fusion", fusion), WIDTHS, 1)
                  for argv in (words.split(), [])]
        models = [getattr(model, "mamba", model) for model in models]
        expected = {}
        if words in MODEL_OPTIONS:
            expected = {"layers": {"n_layers": changed[name]},
                        "no_mix": {"mix": False}}.get(name, changed)
        assert differences(*(model.config for model in models)) == expected


def test_the_defaults_are_those_of_the_paper_of_the_dataset_and_of_the_stand_in(folder):
    model = train.make_model(config_of(), WIDTHS, 1)
    assert model.config == CoupledMamba(WIDTHS).config

    def parsed(*argv):
        return vars(train.parse(["--dataset", *argv]))

    paper = dict(epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5)
    small = dict(d_model=32, d_state=16, pooling="mean")
    stand_in = dict(small, epochs=12, lr=3e-3, seeds=1, batch_size=32)
    for argv, expected in [
            (["mosi", "--data", "a"], paper),
            (["mosei", "--data", "a"], dict(batch_size=1024)),
            (["sims", "--data", "a"], dict(batch_size=128)),
            (["simsv2", "--data", "a"], dict(batch_size=256)),
            (["sims"], {**stand_in, "layers": 1}),
            (["sims", "--layers", "4"], {**stand_in, "layers": 4}),
            (["own", "--data", "a"], {**paper, **small, "layers": 1}),
            (["sims", "--benchmark"], dict(batch_size=16, d_model=128))]:
        assert parsed(*argv).items() >= expected.items()


def test_a_real_file_at_its_default_place_is_used_with_the_papers_settings(
        folder, capsys, monkeypatch):
    path = data.default_path("mosi")
    path.parent.mkdir(parents=True)
    write(path)
    small = ["--epochs", "1", "--seeds", "1", "--d-model", "8", "--d-state", "4"]
    assert train.main(["--dataset", "mosi", *small]) == 0
    config = results("runs/mosi-coupled")["config"]
    assert (config["layers"], config["lr"], config["batch_size"]) == (3, 5e-4, 128)
    out = capsys.readouterr().out
    assert "synthetic" not in out and "published" in out         # the widths are others

    seen = []
    monkeypatch.setattr(train, "train_seeds", lambda run, resume: seen.append(run))
    assert train.main(["--dataset", "mosi", *small, "--missing-rate", "0.4"]) == 0
    dataset = data.load("mosi", path)
    data.with_missing(dataset, 0.4)
    assert_same(seen[0].dataset, dataset)


def test_a_run_leaves_its_files_whole_and_other_options_are_refused(folder, capsys):
    assert train.main([*RUN, "2", "--out", "o"]) == 0
    assert sorted(os.listdir("o")) == ["results.json", "seed0.pt", "seed1.pt"]
    report = results("o")
    assert list(report) == ["dataset", "synthetic", "task", "config", "environment",
                            "seeds", "mean", "std"]
    assert report["synthetic"] is False
    for k, result in enumerate(report["seeds"]):
        assert result["seed"] == k and len(result["log"]) == 5
        best = min(result["log"], key=lambda row: row["valid"]["MAE"])
        assert result["epoch"] == best["epoch"] and result["valid"] == best["valid"]
    maes = [result["test"]["MAE"] for result in report["seeds"]]
    assert report["mean"]["MAE"] == pytest.approx(np.mean(maes))
    assert report["std"]["MAE"] == pytest.approx(np.std(maes))

    before = files_in("o")
    for options in (["--layers", "2"], ["--epochs", "4"], ["--seed", "1"]):
        assert train.main([*RUN, "2", "--out", "o", *options]) == 2
        assert "give the same options, or another --out" in capsys.readouterr().err
    assert train.main([*RUN, "1", "--out", "o"]) == 0            # the first seed again
    after = files_in("o")
    assert after["seed1.pt"] == before["seed1.pt"]
    assert after["results.json"]["seeds"] == report["seeds"]


FUSIONS = {"coupled": CoupledMamba, "mamba": CoupledMamba, "average": train.OneMamba,
           "concat": train.OneMamba, "attention": train.CrossAttention}


@pytest.mark.parametrize("name, task", TASKS)
def test_every_fusion_runs_on_every_stand_in_in_every_task(name, task, folder, capsys):
    first = "Acc-2" if data.SPECS[name].scale else "Acc"
    for fusion in FUSIONS:
        assert train.main(["--dataset", name, "--task", task, "--fusion", fusion,
                           "--epochs", "1", "--length", "5", *TINY]) == 0
        result = results(f"runs/{name}-{fusion}")
        assert result["synthetic"] is True and result["config"]["fusion"] == fusion
        assert list(result["mean"])[0] == ("micro F1" if name == "mmimdb" else first)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("synthetic | ") for line in lines)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_saved_seed_predicts_the_test_split_from_its_raw_arrays(fusion, folder):
    options = ["--epochs", "1", "--fusion", fusion, "--out", "o"]
    assert train.main([*RUN, "1", *options]) == 0
    saved = torch.load("o/seed0.pt", weights_only=True)
    model = FUSIONS[fusion](**saved["model"]).eval()
    model.load_state_dict(saved["weights"])
    raw = mmsa()["test"]
    streams = [raw[name] for name in data.MODALITIES]
    lengths = [raw["text_bert"], raw["audio_lengths"], raw["vision_lengths"]]
    xs, mask = data.prepare(streams, saved["preparation"], lengths)
    with torch.no_grad():
        out = model([torch.from_numpy(x) for x in xs], torch.from_numpy(mask))
    assert_close(saved["prediction"], out, 1e-5)


# ------------------------------------------------------------ interrupted and continued
def interrupted(argv, monkeypatch, steps):
    """Run until Ctrl-C comes in this step. There are 3 steps in an epoch."""
    step = torch.optim.AdamW.step
    left = iter(range(steps - 1))

    def stop(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        assert train.main(argv) == 130


@pytest.fixture
def stopped(folder, monkeypatch):
    """A run of two seeds in the folder `stopped`, which ended in epoch 4 of seed 1."""
    interrupted([*RUN, "2", "--out", "stopped"], monkeypatch, 27)
    return folder / "stopped"


def test_an_interrupted_run_keeps_what_it_has_and_resumes_to_the_bit(stopped):
    assert set(files_in(stopped)) == {"results.json", "seed0.pt", "seed1.resume"}
    assert train.main([*RUN, "2", "--out", "stopped", "--resume"]) == 0
    assert train.main([*RUN, "2", "--out", "whole"]) == 0
    assert files_in("whole") == files_in("stopped")


def test_a_repetition_that_is_interrupted_loses_nothing(folder, monkeypatch):
    assert train.main([*RUN, "2", "--out", "o"]) == 0
    before = {p.name: p.read_bytes() for p in Path("o").iterdir()}
    interrupted([*RUN, "2", "--out", "o"], monkeypatch, 5)       # in its second epoch
    Path("o/seed0.resume").unlink()
    assert {p.name: p.read_bytes() for p in Path("o").iterdir()} == before


def test_resume_may_ask_for_more_epochs_and_more_seeds(stopped, capsys):
    more = [*RUN, "3", "--epochs", "7", "--out"]
    assert train.main([*more, "stopped", "--resume"]) == 0
    assert "seed 1  resumed after epoch 3" in capsys.readouterr().out
    assert train.main([*more, "whole"]) == 0
    assert files_in("stopped") == files_in("whole")
    assert train.main([*more, "stopped", "--resume"]) == 0
    assert capsys.readouterr().out.count("was finished before") == 3
    assert train.main([*RUN, "3", "--epochs", "6", "--out", "stopped", "--resume"]) == 2


def test_resume_goes_on_to_stop_where_patience_ends(folder, monkeypatch):
    argv = [*RUN, "1", "--epochs", "30", "--patience", "2", "--out"]
    assert train.main([*argv, "whole"]) == 0
    seeds = results("whole")["seeds"]
    assert len(seeds[0]["log"]) < 30
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*argv, "o"])             # all epochs are done, and nothing more
    assert train.main([*argv, "o", "--resume"]) == 0
    assert files_in("o") == files_in("whole")
    assert train.main([*argv, "o", "--resume", "--epochs", "40"]) == 0
    assert results("o")["seeds"] == seeds


def test_files_of_another_run_or_damaged_ones_are_not_resumed(stopped, capsys):
    def refused(message, *options):
        before = files_in(stopped) if not message.startswith("no ") else None
        assert train.main([*RUN, "2", "--out", "stopped", "--resume", *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert before is None or files_in(stopped) == before

    for options in ("--lr 0.02", "--layers 2", "--length 9", "--optimizer adam"):
        refused("give the same options", *options.split())
    whole = Path("stopped/seed1.resume").read_bytes()
    for damaged in (b"", whole[:500], b"hello"):
        Path("stopped/seed1.resume").write_bytes(damaged)
        refused("seed1.resume is damaged")
    no_seeds = '{"config": {}, "seeds": [{"seed": 0}]}'
    for damaged in ("", "[]", '{"config": 0}', no_seeds):
        Path("stopped/results.json").write_text(damaged)
        refused("no result of this program")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "seed0.pt"
    path.write_text("old")
    with pytest.raises(Exception, match="pickle"):
        train.save(path, [torch.ones(3), lambda: None])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["seed0.pt"]


def test_metrics_that_are_nan_survive_results_json(folder):
    def level(content):
        for s, count in zip(data.SPLITS, (12, 6, 6)):
            content[s]["regression_labels"] = [1.0] * count

    write(folder / "a.pkl", change=level)
    assert train.main([*RUN, "1", "--epochs", "1", "--out", "o"]) == 0
    assert results("o")["mean"]["Corr"] is None
    assert train.main([*RUN, "2", "--epochs", "1", "--out", "o", "--resume"]) == 0


# Each of two processes does all of this: a run, one that is stopped, and its end.
TWO = '''
import functools, sys, train
train.dist.init_process_group = functools.cache(train.dist.init_process_group)
train.dist.destroy_process_group = lambda: None          # gloo begins only once
options = sys.argv[1:]
assert train.main([*options, "two"]) == 0
train_epoch = train.train_epoch

def stop(run, model, optimizer, seed, epoch):
    if epoch == 3:
        train.dist.barrier()                     # the other has saved epoch 2
        raise KeyboardInterrupt
    return train_epoch(run, model, optimizer, seed, epoch)

train.train_epoch = stop
assert train.main([*options, "cut"]) == 130
train.train_epoch = train_epoch
assert train.main([*options, "cut", "--resume"]) == 0
'''


def test_two_processes_train_as_one_with_the_doubled_batch_and_resume(folder):
    write(folder / "a.pkl", samples=(9, 6, 6))   # the last step: one sample for two
    options = [*RUN, "1", "--dropout", "0", "--epochs", "3", "--out"]
    Path("two.py").write_text(TWO)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "two.py", *options], check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(HERE)})
    assert files_in("cut") == files_in("two")
    assert train.main([*options, "one", "--batch-size", "8"]) == 0
    assert results("two")["config"]["processes"] == 2
    logs = [results(out)["seeds"][0]["log"] for out in ("one", "two")]
    for row, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["valid"]["MAE"] == pytest.approx(row["valid"]["MAE"], rel=1e-3)


# ------------------------------------------------------------ messages
def test_autocast_changes_how_and_hardly_what(folder):
    for option in ([], ["--amp"]):
        out = "o" + "".join(option)
        assert train.main([*RUN, "1", "--epochs", "2", "--out", out, *option]) == 0
    plain, amp = results("o")["mean"]["MAE"], results("o--amp")["mean"]["MAE"]
    assert amp != plain and amp == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("words", [
    "--data nowhere.pkl", "--epochs 0", "--epochs x", "--lr -1", "--lr nan",
    "--fusion x", "--dropout 1", "--out a.pkl", "--device cuda", "--mode kernel",
    "--fusion mamba --coupling learned", "--fusion attention --no-mix",
    "--optimizer sgd", "--dataset brca --task regression", "--workers 2",
    "--dataset own", "--dataset own --data a.pkl", "--benchmark --mode kernel"])
def test_a_wrong_command_is_one_sentence_and_code_2(words, folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "in_own_process", lambda function, *v: function(*v))
    if kernel:
        monkeypatch.setattr(kernel.knobs.runtime, "interpret", False)
    try:
        code = train.main(["--dataset", "sims", *TINY, *words.split()])
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and message.count("error: ") == 1 and message.count("\n") <= 2
    assert not list(folder.rglob("results.json"))


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("a mistake in the program")])
def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden(
        error, folder, capsys, monkeypatch):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(train, "train_epoch", fail)
    if "mistake" in str(error):
        with pytest.raises(RuntimeError, match="a mistake"):
            train.main([*RUN, "1"])
        return
    assert train.main([*RUN, "1"]) == 2
    message = capsys.readouterr().err
    assert "try a smaller --batch-size" in message and message.count("\n") == 1


def test_a_run_on_the_stand_in_says_what_it_is_and_where_results_go(folder, capsys):
    assert train.main(["--dataset", "sims", "--epochs", "1", *TINY]) == 0
    out = capsys.readouterr().out
    for words in ("There are no data at data/sims", "12 samples", "outputs 1, ",
                  "Results go to runs/sims-coupled", "'text': 768"):
        assert words in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_character_does_not_end_a_run(
        encoding, folder, monkeypatch):
    folder = folder / "中文"                        # results go to it
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train.main([*RUN, "2", "--epochs", "1", "--out", str(folder)]) == 0
    terminal.flush()
    assert b"2 seeds" in terminal.buffer.getvalue()


def test_help_shows_every_option_and_the_default_of_those_that_have_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(shown) == 31
    flags = ("--dataset", "--no-mix", "--amp", "--resume", "--benchmark")
    for entry in shown:
        assert ("(default:" in entry) != entry.startswith(flags), entry


# ------------------------------------------------------------ the benchmark
BENCHMARK = ["--dataset", "mosi", "--device", "cpu", "--benchmark", *TINY]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(train, "in_own_process", lambda function, *v: function(*v))


def rows_of(out):
    """The cells of the table's rows: length, case, seconds, MB."""
    return re.findall(r"(?m)^ *(\d+)  (\S.*?)  +(\S+) +(\S+)$", out)


@linux_only
@pytest.mark.parametrize("fusion, cases", [
    ("coupled", ["inference", "inference in pieces of 64", "training step"]),
    ("concat", ["inference", "training step"]),
    ("attention", ["inference", "training step", "inference, explicit",
                   "training step, explicit"])])
def test_the_benchmark_prints_a_row_per_case(
        fusion, cases, in_this_process, capsys, monkeypatch):
    argv = [*BENCHMARK, "--lengths", "3", "5", "--fusion", fusion]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "synthetic" in out and "threads" in out
    rows = rows_of(out)
    assert [row[:2] for row in rows] == [(l, case) for l in "35" for case in cases]
    assert all(float(row[2]) > 0 and float(row[3]) >= 0 for row in rows)

    def fail(*arguments):
        raise MemoryError
    monkeypatch.setattr(train, "in_own_process", fail)
    assert train.main(argv) == 0
    assert {row[2:] for row in rows_of(capsys.readouterr().out)} == {("-", "-")}


@pytest.mark.parametrize("fusion, case", [
    (fusion, case) for fusion in ("coupled", "attention") for case in train.CASES
    if fusion in case.fusions])
def test_a_case_of_the_benchmark_does_what_its_label_says(fusion, case, monkeypatch):
    made, lengths = [], []
    make, advance = train.make_model, CoupledMamba.advance

    def note_model(*arguments):
        made.append(make(*arguments))
        return made[0]

    def note_length(model, xs, *arguments):
        lengths.append(xs[0].shape[1])
        return advance(model, xs, *arguments)

    monkeypatch.setattr(train, "make_model", note_model)
    monkeypatch.setattr(CoupledMamba, "advance", note_length)
    config = config_of(*TINY, "--fusion", fusion)
    work = train.make_work(config, data.SPECS["mosi"], 300, case)
    before = made[0].modality_logits.clone()
    with Largest() as seen:
        work()
    assert lengths == ([64] * 4 + [44] if "pieces" in case.label else [300])
    assert made[0].training is ("training" in case.label)
    assert torch.equal(made[0].modality_logits, before) is not made[0].training
    scores = 4 * 4 * 300 * 600                   # samples, heads, steps, keys
    assert (seen.size >= scores) is ("explicit" in case.label)


@linux_only
def test_a_case_has_a_process_of_its_own_and_the_memory_of_the_work_alone():
    assert train.in_own_process(os.getpid) not in (os.getpid(), None)
    big = torch.ones(20 << 20)
    del big
    before = train.memory("cpu", restart=True)
    work = torch.ones(10 << 20)                  # 40 MB
    del work
    assert 39e6 < train.memory("cpu") - before < 45e6


# ------------------------------------------------------------ README
README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
INDENTED = re.findall(r"(?m)^    (\S(?:[^\\\n]|\\\n)*)", README)
COMMANDS = [c.replace("\\\n", " ") for c in INDENTED if re.search("python|torchrun", c)]
COMMANDS = {*COMMANDS, *re.findall(r"`(python train.py[^`]*)`", README)}
TRAINING = sorted(c for c in COMMANDS if "train.py" in c)


def test_the_snippets_of_the_readme_need_torch_and_one_file(tmp_path):
    copy_to(tmp_path, "coupled_mamba.py")
    snippets = [s for s in SNIPPETS if "numpy" not in s]
    assert len(snippets) == 4
    code = "import sys\nsys.modules['numpy'] = sys.modules['triton'] = None\n"
    for snippet in snippets:
        code += f"exec({snippet!r}, {{}})\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path,
                   check=True)


def test_the_snippets_of_own_data_write_a_file_train_on_it_and_predict(folder):
    before, after = [s for s in SNIPPETS if "numpy" in s]
    exec(before, {})
    command, = [c for c in TRAINING if "own.npz" in c]
    words = shlex.split(command)[2:]
    assert train.main([*words, *TINY, "--epochs", "1", "--seeds", "1"]) == 0
    found = {}
    exec(after, found)
    saved = torch.load("runs/own-coupled/seed0.pt", weights_only=True)
    assert_close(found["prediction"], saved["prediction"], 1e-5)


@pytest.mark.parametrize("command", [c for c in TRAINING if "--help" not in c])
def test_the_training_commands_of_the_readme_run(command, folder, in_this_process):
    """With the smallest settings; the files that they name are made here."""
    write(folder / "a", mogonet)
    write(folder / "a.npz", own)
    words = shlex.split(command.split("&&")[-1])
    words = words[words.index("train.py") + 1:]
    made = {"mosi": "a.pkl", "rosmap": "a", "own": "a.npz"}
    for place, word in enumerate(words):
        if words[place - 1] == "--data":
            words[place] = made[words[words.index("--dataset") + 1]]
    smallest = ["--epochs", "1", "--seeds", "1"]
    if "--benchmark" in words:
        smallest = ["--lengths", "4"]
    assert train.main([*words, *TINY, *smallest]) == 0


@pytest.mark.parametrize("command", sorted(COMMANDS - {*TRAINING}))
def test_the_other_commands_of_the_readme_name_files_that_exist(command):
    words = shlex.split(command.split("&&")[-1])
    assert words[0] == "python", command
    assert (HERE / words[1]).exists() or words[1:] == ["-m", "pytest", "-q"], command
