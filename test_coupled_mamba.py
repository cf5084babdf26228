"""The properties of Coupled Mamba, and the proof that its modes agree: pytest -q

References are written from the definitions and not from the code: Eq. 6, the model for
one sample (Figure 1 with Algorithm 1), attention, what a data file means, metrics, a
training loop. The other tests check what has no reference: memory, messages, files.
Hypothesis draws the problems, 25 for most properties and always the same; with the
environment variable PROFILE=thorough 10,000.
"""
import contextlib
import functools
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
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
import coupled_mamba
import data
import train
from coupled_mamba import Block, CoupledMamba, coupled_scan

kernel = coupled_mamba.load_kernel() if find_spec("triton") else None
triton_only = pytest.mark.skipif(
    kernel is None, reason="Triton is published for Linux only")
KERNEL = pytest.param("kernel", marks=triton_only)
parametrize = pytest.mark.parametrize

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("PROFILE", "ci"))
pytestmark = pytest.mark.filterwarnings("error")
HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tensors are small

# The largest error over the largest value. float32: 2^-24 times the 100 terms that a
# decay of 0.99 sums, and gradients sum again. 16 bit: rounding to 8 or 11 bits.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


# ------------------------------------------------------------ Eq. 6 in NumPy
def reference(x, delta, A, B, C, D, w, H0):
    """Eq. 6: y and the last H."""
    m, b, l, e = x.shape
    w = np.broadcast_to(w.reshape(m, *w.shape[1:] or (1, 1)), (m, b, l))
    y = np.empty_like(x)
    h = np.empty((m, *H0.shape))
    H = H0
    for t in range(l):
        for k in range(m):
            step = delta[k, :, t, :, None]
            V = step * x[k, :, t, :, None] * B[k, :, t, None, :]
            h[k] = np.exp(step * A[k]) * H + V
            y[k, :, t] = (h[k] @ C[k, :, t, :, None])[..., 0] + D[k] * x[k, :, t]
        H = (w[:, :, t, None, None] * h).sum(0)
    return y, H


def problem(m=3, b=2, l=11, e=4, n=3, seed=1, constant=False, masked=False,
            step=-1.5, dtype=torch.float64):
    """Arguments of `coupled_scan` by name. constant: w is the same at all steps.

    step: log10 of a typical delta. With -1.5, S is mostly between 0.9 and 0.999: small
    gates would hide that a state was lost. With 1.5, most of S is nearly 0.
    masked: some steps are as `Block` treats missing ones.
    """
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    p = {"x": randn(m, b, l, e), "delta": 10 ** (randn(m, b, l, e) / 2 + step),
         "A": -torch.exp(randn(m, e, n) / 2), "B": randn(m, b, l, n),
         "C": randn(m, b, l, n), "D": randn(m, e), "w": randn(m, b, l),
         "H0": randn(b, e, n)}
    if masked:
        missing = torch.rand(m, b, l, generator=generator) > 0.6
        p["delta"][missing] = 0
        p["w"][missing] = -1e9
    p["w"] = torch.softmax(p["w"], 0)
    if constant:
        p["w"] = p["w"][:, 0, 0]
    return {name: v.to(dtype) for name, v in p.items()}


def problems_up_to(m, b, l, e, n):
    sizes = [st.integers(1, most) for most in (m, b, l, e)]
    return st.builds(problem, *sizes, n, st.integers(0, 10 ** 6), st.booleans(),
                     st.booleans(), step=st.sampled_from([-1.5, -1.5, 1.5]))


problems = problems_up_to(4, 3, 14, 5, st.integers(1, 5))


def assert_close(got, expected, tolerance=1e-9):
    """Tensors, dicts or lists: errors at most tolerance * max(largest value, 1e-3)."""
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
    assert error <= tolerance * max(size, 1e-3)


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

    read: what the loss reads: "all", "y", "H", or "last", H and the last step of y.
    frozen: arguments that ask for no gradient.
    """
    if mode == "kernel":  # an unusual layout
        p = {name: v.to(DEVICE).movedim(0, -1).contiguous().movedim(-1, 0)
             for name, v in p.items()}
    p = {name: v.clone().requires_grad_(name not in frozen) for name, v in p.items()}
    out = coupled_scan(**p, mode=mode)
    generator = torch.Generator().manual_seed(0)
    d = [torch.randn(v.shape, generator=generator).bfloat16().to(v) for v in out]
    if read == "last":
        d[0][:, :, :-1] = 0
    seen = {"y": slice(1), "H": slice(1, 2)}.get(read, slice(2))
    asking = [name for name in p if name not in frozen]
    found = torch.autograd.grad(out[seen], [p[name] for name in asking], d[seen],
                                materialize_grads=True)
    return {"y": out[0], "H": out[1], **dict(zip(asking, found))}


@contextlib.contextmanager
def cut(chunk=coupled_mamba.CHUNK, cached=2 ** 20, tile=1024, fewest=99):
    """Let the modes cut their work. chunk: steps of one. cached: numbers that `scan`
    works on at once. Of the kernel, tile: numbers in one, fewest: segments of time.
    """
    sizes = dict(CHUNK=chunk, TILE=tile, SEGMENT=chunk, FORWARD=fewest, BACKWARD=fewest)
    with patch.multiple(coupled_mamba, CHUNK=chunk, CACHED=cached):
        with patch.multiple(kernel, **sizes) if kernel else contextlib.nullcontext():
            yield


CUTS = st.builds(dict, chunk=st.sampled_from([1, 4, 16]),
                 cached=st.sampled_from([1, 300, 2 ** 20]),
                 tile=st.sampled_from([16, 128, 1024]), fewest=st.sampled_from([1, 99]))
READ = st.sampled_from(["all", "y", "H", "last"])
FROZEN = st.sets(st.sampled_from(["delta", "A", "B", "C", "D", "w", "H0"]), max_size=3)


@given(st.sampled_from(["convolution", "scan"]), problems, CUTS, READ, FROZEN)
@example("convolution", problem(l=100), {}, "last", set())
@example("convolution", problem(m=1, step=3.5), {}, "all", set())  # P = 0
@example("convolution", problem(m=2, b=1, l=3, e=1, n=1, seed=0, masked=True, step=1.5),
         {}, "all", set())  # P is 1e-12, then 4e-30
@example("scan", problem(l=300), {}, "last", set())
@example("scan", problem(l=301, masked=True), {}, "all", set())
def test_the_modes_agree(mode, p, cuts, read, frozen):
    expected = outcome(p, "recurrence", read, frozen)
    with cut(**cuts):
        assert_close(outcome(p, mode, read, frozen), expected, 1e-10)


# The interpreter is slow, and shrinking would take minutes. The first two examples have
# several samples, blocks of e and segments at once; the second has tiles of BE n = 128.
@triton_only
@settings(max_examples=settings.default.max_examples // 5,
          phases=[Phase.explicit, Phase.generate])
@given(problems_up_to(3, 2, 9, 6, st.sampled_from([1, 2, 4, 8])), CUTS, READ, FROZEN)
@example(problem(2, 2, 5, 6, 4), dict(chunk=2, tile=32, fewest=1), "all", set())
@example(problem(2, 2, 5, 6, 64), dict(chunk=2, tile=512, fewest=1), "H", {"x"})
@example(problem(5, 1, 3, 2, 2), dict(chunk=1, tile=32, fewest=1), "last", {"w"})
def test_the_kernel_agrees(p, cuts, read, frozen):
    expected = outcome(p, "recurrence", read, frozen)
    with cut(**cuts):
        assert_close(outcome(p, "kernel", read, frozen), expected, 1e-10)


@parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@parametrize("mode", ["recurrence", "convolution", "scan", KERNEL])
def test_narrow_inputs_have_a_float32_state(mode, dtype):
    p = problem(l=9, n=4, dtype=dtype, masked=dtype == torch.float32)
    expected = outcome({name: v.double() for name, v in p.items()}, "recurrence")
    with cut(chunk=4):
        got = outcome(p, mode)
    assert got["y"].dtype == got["x"].dtype == got["D"].dtype == dtype
    assert got["H"].dtype == torch.float32
    assert_close(got["H"], expected["H"], TOLERANCE[torch.float32])
    assert_close(got, expected, TOLERANCE[dtype])
    for name in ("D", "w", "H0"):  # one float64 argument is enough
        mixed = {**p, name: p[name].double()}
        y, H = coupled_scan(**{k: v.to(DEVICE) for k, v in mixed.items()}, mode=mode)
        assert y.dtype == dtype and H.dtype == torch.float64


@parametrize("mode", ["scan", KERNEL])
def test_autocast_and_refused_second_derivatives(mode):
    p = problem(l=5, n=4, dtype=torch.float32)
    p = {name: v.to(DEVICE) for name, v in p.items()}
    expected = outcome(p, mode)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_close(outcome(p, mode), expected, 1e-6)
    for v in p.values():
        v.requires_grad_()
    y, _ = coupled_scan(**p, mode=mode)
    dx, = torch.autograd.grad((y ** 2).sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_recurrence_has_second_derivatives_and_vmap():
    def call(*values):
        return coupled_scan(**dict(zip(p, values)), mode="recurrence")
    p = problem(2, 1, 3, 2, 2)
    values = [v.requires_grad_() for v in p.values()]
    assert torch.autograd.gradgradcheck(call, values, atol=1e-6, fast_mode=True)
    several = torch.vmap(call)(*[torch.stack([v, v]) for v in values])
    assert_close([v[1] for v in several], call(*values))


@given(problems)
def test_fft_is_the_recurrence_of_constants(p):
    w = p["w"].reshape(len(p["x"]), -1)[:, 0]
    delta, B, C = (p[name][:, :, :1].expand_as(p[name]) for name in ("delta", "B", "C"))
    expected, _ = coupled_scan(p["x"], delta, p["A"], B, C, w=w, mode="recurrence")
    y = coupled_mamba.fft_convolution(
        p["x"], delta[:, :, 0], p["A"], B[:, :, 0], C[:, :, 0], w)
    assert_close(y, expected)


class Largest(TorchDispatchMode):
    """`size` of the largest tensor that an operation returned, in float32 numbers."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // 4)
        return out


def test_scan_holds_few_states_at_once():
    p = problem(m=2, b=40, l=60, e=32, n=32, dtype=torch.float32)
    with Largest() as seen, cut(chunk=4, cached=2 ** 14):
        outcome(p, "scan")
    assert seen.size == p["x"].numel()  # S of 4 steps of all is twice as large


@parametrize("mode", ["scan", KERNEL])
def test_backward_keeps_a_state_per_chunk(mode):
    p = problem(m=2, b=1, l=12, e=2, n=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda v: kept.append(v.numel()) or v, lambda v: v):
        with cut(chunk=4, tile=8, fewest=1):
            outcome(p, mode)
    names = ["x", "delta", "A", "B", "C", "w", "x", "D"]  # x, D: for the skip
    assert sum(kept) == sum(p[name].numel() for name in names) + 3 * p["H0"].numel()


# ------------------------------------------------------------ the model in NumPy
def silu(x):
    return x / (1 + np.exp(-x))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


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
    H = np.zeros((m, e, n))  # what each chain reads
    u = np.zeros((m, l + taps - 1, e))
    out = f.copy()
    for t in range(l):
        h = H.copy()
        for k in np.flatnonzero(mask[:, t]):
            u[k, t + taps - 1], z = np.split(normed[k, t] @ p["in_proj.weight"][k], 2)
            window = u[k, t:t + taps].T
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
            w = softmax(p.get("coupling_logits", np.zeros(m))[here])
            w = np.ones_like(w) if block.coupling == "sum" else w
            H[:] = np.tensordot(w, h[here], 1)
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


def model_and_input(seed=0, m=3, b=2, l=7, extreme=False, **options):
    """A float64 model without neutral parameters, and streams. extreme: one w is 1."""
    torch.manual_seed(seed)
    widths = (5, 3, 4, 2)[:m]
    model = CoupledMamba(widths, 2, d_model=8, n_layers=2, d_state=8, **options)
    model = model.double()
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
        if extreme and name.endswith("logits"):
            p.data[0] += 2000
    return model, [torch.randn(b, l, width).double() for width in widths]


def gradients(out, model):
    return torch.autograd.grad(out.sum(), list(model.parameters()),
                               materialize_grads=True)


@given(st.fixed_dictionaries(dict(
    coupling=st.sampled_from(["mean", "learned", "sum", "none"]), mix=st.booleans(),
    m=st.integers(1, 4), pooling=st.sampled_from(["max", "mean", "last"]),
    seed=st.integers(0, 999), l=st.integers(1, 9), extreme=st.booleans())),
    st.sampled_from([0.2, 0.6, 1.1]), st.sampled_from([7., math.inf, math.nan]),
    st.sets(st.integers(1, 8)))
def test_the_model_is_figure_1_also_in_pieces(options, share, garbage, stops):
    model, xs = model_and_input(**options)
    l = options["l"]
    mask = torch.rand(len(xs), 2, l) < share  # all may be missing, also always
    dirty = [torch.where(here[..., None], x, garbage) for x, here in zip(xs, mask)]
    state = model.init_state(2)
    first = 0
    for stop in sorted({min(stop, l) for stop in stops} | {l}):
        piece = [x[:, first:stop] for x in dirty]
        out, state = model.advance(piece, state, mask[:, :, first:stop])
        whole = model([x[:, :stop] for x in xs], mask[:, :, :stop])
        assert_close(out, whole)
        first = stop
    assert_close(gradients(out, model), gradients(whole, model))
    assert all(v.isfinite().all() for v in gradients(model(dirty, mask), model))
    features = model.features(dirty, mask)
    for j in range(2):
        expected = figure_1(model, [x[j] for x in xs], mask[:, j].numpy())
        H = [state[f"{i}.H"].movedim(-3, 0)[j] for i in range(2)]
        assert_close([features[:, j], out[j], H], expected)
    if mask.all():
        assert_close([model(xs), model.features(xs)], [out, features])

    block = model.blocks[0]
    f = torch.randn(*mask.shape, 8).double()
    clean, dirty = (torch.where(mask[..., None], f, v) for v in (0, garbage))
    out, state = block(dirty, mask)
    assert_close([out, state], block(clean, mask))
    assert (out[~mask] == 0).all()
    assert all(v.isfinite().all() for v in gradients(out, block))


# ------------------------------------------------------------ what no reference can say
def test_a_sum_overflows_and_a_mean_does_not():
    for coupling in ("mean", "learned"):
        model, xs = model_and_input(l=4096, b=1, coupling=coupling)
        out = model(xs)
        assert all(v.isfinite().all() for v in [out, *gradients(out, model)])
    _, state = Block(3, 128, coupling="sum")(torch.randn(3, 1, 110, 128))
    assert not state["H"].isfinite().all()


def test_parameters_start_as_documented():
    torch.manual_seed(0)
    model = CoupledMamba((768, 33, 709), coupling="learned")
    assert (model.modality_logits == 0).all()
    for block in model.blocks:
        step = F.softplus(block.dt_bias)
        assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 1.01e-1
        assert_close(step.log10().mean(), -2., 0.05)  # log-uniform
        assert_close(block.A_log.exp(), torch.arange(1., 65).expand(3, 256, 64), 1e-6)
        assert block.dt_proj.weight.shape == (3, 8, 256)  # the rank is n / 8
        for weight, fan_in in (
                (block.in_proj.weight, 128), (block.x_proj.weight, 256),
                (block.dt_proj.weight, 8), (block.out_proj.weight, 256),
                (block.conv_weight, 4), (model.mix[0].weight, 256)):
            assert_close(weight.std(), fan_in ** -0.5, 0.04)
        for name in ("norm_bias", "conv_bias", "coupling_logits"):
            assert (getattr(block, name) == 0).all()
        assert (block.D == 1).all() and (block.norm_weight == 1).all()
    assert Block(2, 8, d_state=4).dt_proj.weight.shape == (2, 1, 16)


def test_dropout_of_blocks_and_of_the_head():
    torch.manual_seed(0)
    model = CoupledMamba((3, 3), 8, d_model=8, n_layers=1, d_state=4, dropout=0.5)
    model.head[3].weight.data = torch.eye(8)
    model.head[3].bias.data = torch.zeros(8)
    f = torch.randn(2, 4, 6, 8)
    for call in (model.head, lambda f: model.blocks[0](f)[0] - f):
        model.eval()
        whole = call(f)
        model.train()
        ratio = call(f) / whole
        kept = ratio.abs() > 1e-3
        assert 0.4 < kept.float().mean() < 0.6
        assert_close(ratio[kept], torch.full_like(ratio[kept], 2.), 1e-3)


@parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_has_float32_states(dtype):
    model, xs = model_and_input(b=3, l=300, pooling="mean", coupling="learned")
    model, xs = model.to(dtype), [x.to(dtype) for x in xs]
    mask = torch.zeros(3, 3, 6000, dtype=torch.bool)
    mask[:, 0] = True  # all steps are real
    mask[:, 1, 0] = True  # only the first
    states = [model.init_state(3)]
    with patch.object(coupled_mamba, "coupled_scan", wraps=coupled_scan) as scan:
        for piece in mask.split(300, 2):
            out, state = model.advance(xs, states[-1], piece)
            states.append({name: v.detach() for name, v in state.items()})
    assert all(v.isfinite().all() for v in gradients(out, model))
    assert state["count"].tolist() == 3 * [[6000, 1, 0]]
    assert_close(state["1.H"][1], states[1]["1.H"][1], 1e-6)
    _, _, A, _, _, _, w, H, _ = scan.call_args.args
    wide = [v.dtype for v in (A, w, H, state["mean"])]
    assert wide == 4 * [torch.float32]
    assert out.dtype == dtype
    model, xs = model.float(), [x.float().repeat(1, 20, 1) for x in xs]
    exact, exact_state = model.advance(xs, model.init_state(3), mask)
    assert_close(out, exact, 0.02)
    assert_close(state["mean"], exact_state["mean"], 0.01)


def test_memory_of_pieces_does_not_grow():
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
def test_the_model_runs_on_the_kernel():
    model, xs = model_and_input(l=4, coupling="learned", mode="recurrence")
    mask = torch.rand(3, 2, 4) < 0.6
    out = model(xs, mask)
    expected = [out, *gradients(out, model)]
    for block in model.blocks:
        block.mode = "kernel"
    xs = [x.to(DEVICE) for x in xs]
    model, mask = model.to(DEVICE), mask.to(DEVICE)
    out = model(xs, mask)
    assert_close([out, *gradients(out, model)], expected)
    model, xs = model.float(), [x.float() for x in xs]
    with torch.autocast(DEVICE, torch.bfloat16):
        out, state = model.advance(xs, model.init_state(2), mask)
        model.advance(xs, state, mask)
    assert_close(out, expected[0], 0.1)


def test_torch_can_trace_the_model(recwarn):  # it warns of itself
    model, xs = model_and_input()
    assert_close(torch.compile(model, backend="eager")(xs), model(xs))


def test_a_checkpoint_is_rebuilt_and_goes_on(tmp_path):
    model, xs = model_and_input(coupling="none", pooling="last", mix=False, dt_rank=2)
    _, state = model.advance(xs, model.init_state(2))
    numbers = {name: np.array(v)[()] for name, v in model.config.items()
               if isinstance(v, (int, float))}
    config = CoupledMamba(**{**model.config, **numbers}).config
    torch.save([config, model.state_dict(), state], tmp_path / "a.pt")
    config, weights, state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert config == model.config
    again = CoupledMamba(**config).double()
    again.load_state_dict(weights)
    assert torch.equal(again(xs), model(xs))
    assert_close(again.advance(xs, state)[0], model([x.repeat(1, 2, 1) for x in xs]))
    assert "coupling='none'" in repr(again)


# ------------------------------------------------------------ what a user gets wrong
MASK = "mask .*torch.bool and shape .m 3, b 2, l 7"
FOREIGN = r"state\['.*'\] is .*keep to one model"
MISTAKES = {  # what is written, and what is said
    "scan(mode='fft')": "mode is 'fft', expected one of .'auto'",
    "scan(mode='convolution', w=-ones(3))": "negative weights w: use mode=",
    "scan(x=ones(3, 2, 11, 4).long())": "int64.*floating-point",
    "scan(x=ones(3, 2, 0, 4))": "x is .*l >= 1",
    "scan(delta=ones(3, 2, 1, 4))": "delta is .*3, 2, 1, 4. on cpu, .*l 11",
    "scan(A=ones(3, 4))": "A is a tensor",
    "scan(B=ones(3, 2, 11, 3, device='meta'))": "on meta, expected .* on cpu",
    "scan(C=ones(3, 2, 11, 1))": "C is a tensor",
    "scan(D=ones(1, 4))": "D is a tensor",
    "scan(H0=ones(1, 4, 3))": "H0 is a tensor",
    "scan(w=ones(3, 1, 11))": "w is a tensor .*m 3, b 2, l 11",
    "scan(w=[1, 1, 1])": "w is a list",
    "CoupledMamba((3, 4), coupling='max')": "coupling is 'max', expected .*'mean'",
    "CoupledMamba((3, 4), pooling='sum')": "pooling is 'sum'",
    "CoupledMamba((3, 4), mode='x')": "mode is 'x'",
    "CoupledMamba(6)": "d_inputs is 6, expected a list or tuple",
    "CoupledMamba(())": r"d_inputs is \(\)",
    "model([x.float() for x in xs])": "0. .*float32 .*expected .*float64",
    "model(dict(enumerate(xs)))": r"xs is a dict.* widths \(5, 3, 4\)",
    "model(xs + xs[:1])": "xs is a list, expected a list of 3",
    "model([*xs[:2], xs[2][:, :5]])": "l 7, width 4",
    "model([*xs[:2], xs[2][:1]])": "b 2, l 7, width",
    "model(xs[::-1])": "width 5",
    "model(xs, mask.double())": MASK,
    "model.features(xs, mask[..., :1])": MASK,
    "model.advance(xs, state, mask[:, :1])": MASK,
    "block(f.double())": "f is a tensor of torch.float64",
    "block(f[:2])": "m 3, b >= 1, l >= 1, d 8",
    "block(f, mask[:, :, :1])": "mask is",
    "block(f, state=block.init_state(1))": r"state\['conv'\] .*3, 2, 3, 16",
    "model.advance(xs, None)": r"state is a NoneType.*init_state\(",
    "model.advance(xs, {})": FOREIGN,
    "model.advance(xs, model.init_state(3))": FOREIGN,
    "model.advance(xs, {**state, 'more': xs[0]})": FOREIGN,
    "model.advance(xs, {name: v.float() for name, v in state.items()})": FOREIGN}


@parametrize("written", MISTAKES)
def test_a_mistake_gets_a_sentence(written):
    model, xs = model_and_input()
    names = dict(
        CoupledMamba=CoupledMamba, ones=torch.ones, model=model, xs=xs,
        scan=lambda **wrong: coupled_scan(**{**problem(), **wrong}),
        mask=torch.ones(3, 2, 7, dtype=torch.bool), state=model.init_state(2),
        block=Block(3, 8, d_state=4), f=torch.randn(3, 2, 7, 8))
    with pytest.raises(ValueError, match=MISTAKES[written]):
        eval(written, names)


# ------------------------------------------------------------ where the kernel runs
def copy_to(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(HERE / name, folder / name)


def run_python(*words, folder=None, **environment):
    """Run Python in a process of its own; returns what it printed."""
    return subprocess.run([sys.executable, "-W", "ignore", *words], cwd=folder,
                          env={**os.environ, **environment}, timeout=300,
                          check=True, text=True, stdout=subprocess.PIPE).stdout


def test_auto_is_the_kernel_where_it_can_run(monkeypatch):
    A, on_gpu = torch.ones(3, 4, 4), SimpleNamespace(is_cuda=True)
    assert coupled_mamba.choose_mode(A, A) == "scan"
    monkeypatch.setattr(coupled_mamba, "kernel_problem", lambda x, A: None)
    assert coupled_mamba.choose_mode(on_gpu, A) == "kernel"
    monkeypatch.setattr(coupled_mamba, "kernel_problem", lambda x, A: "too old")
    with pytest.warns(UserWarning, match="goes on in PyTorch.*too old"):
        assert coupled_mamba.choose_mode(on_gpu, A) == "scan"
    with pytest.raises(ValueError, match="mode='kernel' cannot run: too old"):
        coupled_scan(**problem(), mode="kernel")


@triton_only
def test_the_kernel_says_why_it_cannot_run(monkeypatch):
    def reason(m=3, n=4, l=11, on_gpu=False):
        x = SimpleNamespace(shape=(m, 2, l, 4), is_cuda=on_gpu, device="cuda")
        return kernel.unavailable(x, torch.empty(m, 4, n, device="meta"))

    monkeypatch.setattr(kernel.knobs.runtime, "interpret", True)
    assert reason() is None
    assert "up to 8 modalities and got 9" in reason(m=9)
    assert "power of two and got 3" in reason(n=3)
    assert "less than 2^31 elements" in reason(l=2 ** 27)
    with patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True):
        assert "deterministic algorithms" in reason()
    monkeypatch.setattr(kernel.knobs.runtime, "interpret", False)
    assert "needs an NVIDIA GPU, or TRITON_INTERPRET=1" in reason()
    monkeypatch.setattr(torch.version, "hip", None)
    for found, launcher, message in (
            ((7, 5), {}, "8.0 and got 7.5"), ((8, 0), {"utils": "built"}, None),
            ((8, 0), {}, "cannot build its launcher (AttributeError: ")):
        driver = SimpleNamespace(active=SimpleNamespace(**launcher))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(kernel.triton.runtime, "driver", driver)
        said = reason(on_gpu=True)
        assert said is message or message in said


@triton_only
def test_the_kernel_is_found_in_a_package(tmp_path):
    copy_to(tmp_path / "mypkg", "coupled_mamba.py", "kernel.py")
    (tmp_path / "kernel.py").write_text("raise SystemExit")  # not this one
    run_python("-c", "import sys, mypkg.coupled_mamba as cm\n"
               "assert cm.load_kernel().__file__.endswith('mypkg/kernel.py')\n"
               "assert 'kernel' not in sys.modules\n", folder=tmp_path)


@triton_only
@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 5000),
       st.integers(1, 300), st.sampled_from([1, 2, 8, 64, 256]), st.booleans())
@example(3, 16, 500, 256, 64, True)
@example(3, 1, 65536, 256, 64, True)
def test_the_programs_cover_the_problem(m, b, l, e, n, backward):
    x = torch.empty(m, b, l, e, device="meta")
    A = torch.empty(m, e, n, device="meta")
    grid, sizes, constants = kernel.plan(x, A, backward)
    segments, length = sizes[3:]
    assert grid == (b * segments, e // constants["BE"])
    assert e % constants["BE"] == 0
    assert (segments - 1) * length < l <= segments * length
    if segments > 1:
        assert length % kernel.CHUNK == 0 and length >= kernel.SEGMENT
        assert grid[0] * grid[1] <= 132 * kernel.RESIDENT
    if (b, l, e, n) in ((16, 500, 256, 64), (1, 65536, 256, 64)):
        assert grid[0] * grid[1] >= 0.9 * 132 * kernel.RESIDENT  # the GPU is full


# Nothing is compiled with TRITON_INTERPRET, so this runs in a process without it. No
# GPU is needed. On an A100, all that runs at once shares 164 KiB of memory.
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
        values["segments"] = 1  # Triton compiles a 1 as a constant
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
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.getoutput(f"'{tool}' -res-usage cubin")
    stack = re.search(r"STACK:(\\d+)", said)[1]
    assert stack == "0", (name, b, arch)  # no register is spilled
    assert re.search(r"[.]reqntid 32\\b", made.asm["ptx"])  # one warp
    assert made.metadata.shared <= 164 * 1024 // kernel.RESIDENT - 1024
'''


@triton_only
def test_the_compiled_kernel_spills_nothing(tmp_path):
    copy_to(tmp_path, "kernel.py")
    run_python("-c", COMPILE, folder=tmp_path, TRITON_INTERPRET="0",
               TRITON_CACHE_DIR=str(tmp_path))


@triton_only
def test_the_check_of_the_kernel_can_fail(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel.knobs.runtime, "interpret", True)
    for error in (0, 0.001):
        def scan(x, *others):  # with this error in the gradient of x
            return coupled_mamba.scan(x + error * (x - x.detach()), *others)
        with patch.dict(coupled_mamba.MODES, kernel=scan):
            assert kernel.main() == (error > 0)


# ------------------------------------------------------------ what data files mean
STORES = [np.asarray, np.asfortranarray, lambda x: x.astype(x.dtype.newbyteorder()),
          lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1)]  # to arrange memory


def drawn(seed=0, samples=(12, 6, 6), says="both", frames=(6, 40, 25)):
    """Tables of a file and what they mean: by split, a list of streams, and labels.

    A stream is its values, what the file says of its real frames, and which these are.
    says: "no", "mask" (of text), "lengths" or "both". Text is padded in front, audio
    and vision in front or at the end.
    """
    rng = np.random.default_rng(seed)
    front, turned = rng.random(2) < 0.5
    store, dtype = STORES[rng.integers(4)], rng.choice(["f2", "f4", "f8"])
    content, meaning = {}, {}
    for s, count in zip(data.SPLITS, samples):
        streams = []
        for m, number, width in zip(data.MODALITIES, frames, (8, 5, 3)):
            lengths = rng.integers(1, number + 1, count)
            lengths[:2] = number
            lengths[2 + (m == "audio")] = 0  # one has only audio, one all others
            real = np.arange(number) < lengths[:, None]
            if front or m == "text":
                real = real[:, ::-1].copy()
            told = None
            if m == "text" and says in ("mask", "both"):
                told = np.stack([~real, real, ~real], 2 if turned else 1)
            elif says in ("lengths", "both"):
                told = np.where(lengths < number, lengths, 999)  # cut-off frames count
                told = told[:, None] if turned else told
            x = 50 * rng.standard_normal((count, number, width)) + 3
            x[~real] = 7 if np.ndim(told) == 3 else 0
            x[0, 2] = x[1, 0] = 0  # real frames may be zero, but without
            real[1, 0] = told is not None  # lengths, zeros at an end are padding
            with np.errstate(over="ignore"):
                x[3:6, 0, 0] = -np.inf, np.nan, np.finfo(np.float32).min
                x = content[f"{s}/{m}"] = store(x.astype(dtype))
            if told is not None:
                content[f"{s}/{m}_lengths"] = told
            streams.append((x, told, real))
        y = np.append(-3, rng.choice([-0.5, 0, 2, 3 + 2 ** -10], count - 1))
        meaning[s] = streams, {"regression": y.astype(np.float32),
                               "classification": rng.integers(0, 3, count)}
    return content, meaning


def mmsa(seed=0, **options):
    """An MMSA pickle, with entries that are no numbers, perhaps without classes."""
    content, meaning = drawn(seed, **options)
    for s, (streams, y) in meaning.items():
        content[f"{s}/annotations"] = np.array(["Positive"], dtype=object)
        content[f"{s}/regression_labels"] = list(y["regression"])
        if seed % 2:
            content[f"{s}/classification_labels"] = y["classification"][:, None]
        else:
            y["classification"] = np.sign(y["regression"]).astype(int) + 1
        _, told, _ = streams[0]
        if np.ndim(told) == 3:  # then, text_lengths does not count
            content |= {f"{s}/text_bert": told, f"{s}/text_lengths": np.ones(len(told))}
    return {"config": {"not": "a split"}, **content}, meaning


def own(seed=0, **options):
    """A file of one's own, with four classes, numbers or four labels."""
    content, meaning = drawn(seed, **options)
    for s, (streams, y) in meaning.items():
        for _, told, real in streams:  # with one clock, zeros are data
            real |= told is None and len({x.shape[1] for x, *_ in streams}) == 1
        y["classification"][0] = 3 if s == "test" else 0
        if seed % 3 == 2:
            y["classification"] = np.eye(4, dtype=np.float32)[y["classification"]]
        del y["classification" if seed % 3 == 1 else "regression"]
        content[f"{s}/y"], = y.values()
    return content, meaning


def vectors(rows, y, *tables):
    """What tables of vectors mean; rows: those of train, of valid, of test."""
    return {s: ([(x[part], None, None) for x in tables], {"classification": y[part]})
            for s, part in zip(data.SPLITS, rows)}


def mogonet(**_):
    """A MOGONET folder: two classes, one feature constant in training."""
    x = np.random.default_rng(0).random((62, 16))
    x[:55, 0] = 0.5
    views = np.split(x, [7, 12], 1)
    y = np.append(np.repeat([0, 1], (40, 15)), np.arange(7) % 2)
    content = {}
    for key, table in zip(("1", "2", "3", "labels"), (*views, y)):
        content[f"{key}_tr"], content[f"{key}_te"] = table[:55], table[55:]
    valid = [2, 3, 4, 11, 23, 24, 27, 34, 44, 46, 47]  # a fifth of each class
    rows = np.setdiff1d(np.arange(55), valid), valid, np.arange(55, 62)
    return content, vectors(rows, y, *views)


def mmimdb(**_):
    """An MM-IMDB file, with few features and one missing value."""
    x = np.random.default_rng(0).random((25959, 49))
    x[3, 3] = np.nan
    text, image, genres = x[:, :10], x[:, 10:26], np.float32(x[:, 26:] < 0.3)
    rows = np.split(np.arange(25959), [15552, 18160])
    return ({"features": text, "vgg_features": image, "genres": genres},
            vectors(rows, genres, text, image))


NAMES = {mmsa: "mosi", mogonet: "rosmap", mmimdb: "mmimdb", own: "own"}


def write(path, make=mmsa, entries={}, protocol=4, **options):
    """Write what `make` returns in its layout, with other entries (None: without)."""
    content, _ = make(**options)
    for key, value in entries.items():
        content[key] = value(np.asarray(content[key])) if callable(value) else value
        if value is None:
            del content[key]
    if make is mmsa:
        splits = {s: {} for s in data.SPLITS}
        for key, value in content.items():
            split, _, name = key.rpartition("/")
            splits.get(split, splits)[name] = value
        path.write_bytes(pickle.dumps(splits, protocol))
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


def steps_by_definition(streams, length, shared, whole):
    """What the streams of a split become, NaN where a step has no real frame.

    The frames from the first to the last real one (shared: real in any stream; whole:
    all frames) are cut into segments. A step is the mean of the real frames in its
    segment; without lengths, of all. Vectors are filled with zeros and cut.
    """
    found = []
    for x, told, real in streams:
        x = np.where(np.abs(x) < np.float64(1e30), x, 0.0)
        if x.ndim == 2:
            x = np.pad(x, ((0, 0), (0, -x.shape[1] % length)))
            found.append(x.reshape(len(x), length, -1))
            continue
        clock = np.any([r for *_, r in streams], 0) | whole if shared else real
        means = np.full((len(x), length, x.shape[2]), np.nan)
        for i in np.flatnonzero(clock.any(1)):
            seen = np.arange(clock[i].argmax(), 1 + np.flatnonzero(clock[i])[-1])
            here = real[i] | (told is None and real[i].any())
            for j in range(length):
                first = j * len(seen) // length
                last = max(first + 1, (j + 1) * len(seen) // length)
                segment = [t for t in seen[first:last] if here[t]]
                if segment:
                    means[i, j] = x[i, segment].mean(0, dtype=float)
        found.append(means)
    return found


@parametrize("make", NAMES)
@patch.object(data, "BLOCK_ELEMENTS", 999)  # to work in many blocks
@given(st.integers(0, 999), st.sampled_from(["no", "mask", "lengths", "both"]),
       st.sampled_from([(6, 40, 25), (52, 52, 52), (60, 9, 9)]),
       st.sampled_from([None, None, 1, 3, 52]),
       st.sampled_from([None, "regression", "classification"]))
@example(107, "no", (52, 52, 52), None, None)  # protocol 5, axes in another order
def test_a_file_is_read_as_its_definition_says(
        tmp_path_factory, make, seed, says, frames, length, asked):
    path = tmp_path_factory.mktemp("a") / "a"
    options = dict(seed=seed, says=says, frames=frames)
    write(path, make, protocol=seed % 6, **options)
    if make is mogonet and seed % 2:
        path /= "labels_tr.csv"  # instead of the folder
    _, meaning = make(**options)
    labels = meaning["train"][1]
    task = asked if asked in labels else [*labels][0]
    if asked not in (task, None):
        with pytest.raises(data.DataError, match="has no labels for"):
            data.load(NAMES[make], path, length, asked)
        asked = None
    dataset = data.load(NAMES[make], path, length, asked)
    one = frames == (52, 52, 52)  # number of frames for all streams
    shared = one and (make is own or says in ("no", "mask"))
    whole = make is own and one and length in (None, 52)
    usual = min(50, max(frames)) if make in (mmsa, own) else 20
    count = 52 if whole else length or usual
    steps = {s: steps_by_definition(streams, count, shared, whole)
             for s, (streams, _) in meaning.items()}
    axes = (0, 1) if make in (mmsa, own) else 0
    for s, split in dataset.splits.items():
        for x, mask, means, known in zip(*split[:2], steps[s], steps["train"]):
            center, scale = np.nanmean(known, axes), np.nanstd(known, axes)
            scale[scale < 1e-6] = 1  # of a constant feature
            expected = np.nan_to_num((means - center) / scale)
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-4)
            assert (mask == ~np.isnan(means).any(2)).all()
        np.testing.assert_array_equal(split.y, meaning[s][1][task], strict=True)
    if make is own:
        classes = 4 if task == "classification" else 0
        assert dataset.spec[2:6] == (data.MODALITIES, (8, 5, 3), (12, 6, 6), classes)
    notes = "; ".join(dataset.notes)
    assert ("are stretched to one" in notes) == (make is own and not one)
    assert "labels" not in notes  # -3 is as large as is published
    assert_prepares(dataset, meaning["test"][0], shared, whole)


def assert_prepares(dataset, streams, shared, whole):
    """New samples like those of test become the same; other shapes are refused."""
    xs, told, _ = zip(*streams)
    found = data.prepare(xs, dataset.preparation, told)
    test = dataset.splits["test"]
    assert_close(found, [test.xs, test.mask], 1e-6)
    wrong = [xs[:-1], xs[::-1], [xs[0][1:], *xs[1:]], [x[0] for x in xs]]
    if shared:
        wrong.append([xs[0][:, 1:], *xs[1:]])
    if whole:
        wrong.append([x[:, 1:] for x in xs])
    for streams, lengths in [(xs, told[1:]), *((streams, None) for streams in wrong)]:
        with pytest.raises(data.DataError, match="expected"):
            data.prepare(streams, dataset.preparation, lengths)


def test_what_differs_or_is_not_used_is_said(tmp_path):
    added = {"train_mix": {}, "train/depth": np.ones((12, 3, 4)),  # audio is absent
             "train/audio": np.zeros((12, 40, 5)), "train/audio_lengths": [0] * 12}
    for s, count in zip(data.SPLITS, (12, 6, 6)):
        added[f"{s}/regression_labels"] = [-1.0] * count
    for make, entries, notes in (
            (mmsa, added, "not used: train_mix; not used: train/depth; "
             "labels: at most 1 in size, published 3; text: 8 features, published 768; "
             "vision: 3 features, published 20; "
             "(12, 6, 6) samples, published (1284, 229, 686)"),
            (mogonet, {"4_tr": np.ones((20, 2))}, "not used: 4_tr.csv; mrna: 7 feat"),
            (own, {"train/z_lengths": np.ones(12)}, "not used: train/z_lengths; ")):
        write(tmp_path / NAMES[make], make, entries)
        found = data.load(NAMES[make], tmp_path / NAMES[make]).notes
        assert "; ".join(found).startswith(notes)


# ------------------------------------------------------------ damaged and hostile files
# A scalar whose dtype says that it is an object and whose flags deny it: eight bytes of
# the file would be used as a pointer.
FORGED = (b"\x80\x02}U\x05train}U\x04textcnumpy.core.multiarray\nscalar\n"
          b"cnumpy\ndtype\n(U\x02O8I00\nI01\ntR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
          b"J\xff\xff\xff\xffK\x00tbU\x08AAAAAAAA\x86RssU\x05valid}sU\x04test}s.")
EXECUTES = b"cposix\nsystem\n(S'touch hacked'\ntR."
OBJECT = b"\x93NUMPY\x01\x005\0{'descr': '|O', 'fortran_order': False, 'shape': ()}\n"
DEEP_KEY = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."


def run(command):
    return train.main(command.split())


def refused(command, capsys):
    """Run a command that must end with code 2 and one sentence; returns that."""
    try:
        code = run(command)
    except SystemExit as error:  # of argparse, which adds the usage
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1 + ("usage:" in message)
    return message


@parametrize("make, content, message", [
    (mmsa, EXECUTES, "posix.system"),
    (own, OBJECT + EXECUTES, "allow_pickle=False"),
    (mmsa, b"cnumpy\nsave\n(S'hacked'\nI1\ntR.", "numpy.save"),
    (mmsa, FORGED, "is of type O8"),
    (mmsa, DEEP_KEY, "complete MMSA pickle"),
    (mmsa, pickle.dumps([1, 2]), "expected a dict"), (mmsa, b"", "empty file"),
    (mmsa, b"PK\x03\x04...", "zip archive"), (mmsa, b"\x1f\x8b...", "gzip"),
    (mmsa, b"\n<!DOCTYPE html>", "HTML page"), (mmimdb, b"hello", "complete HDF5"),
    (mmsa, b"version https://git-lfs", "LFS"), (own, b"hello", "complete NumPy file")])
def test_a_file_that_is_no_data_gets_one_line(
        make, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(content)
    assert message in refused(f"--dataset {NAMES[make]} --data a", capsys)
    assert os.listdir() == ["a"]  # nothing in the file was executed


def refusal(path, make):
    """The one line that refuses this file; or it is read, into numbers."""
    try:
        splits = data.load(NAMES[make], path).splits
    except data.DataError as error:
        assert str(error).startswith(str(path.parent)) and "\n" not in str(error)
        return str(error)
    assert all(np.isfinite(x).all() for split in splits.values() for x in split.xs)


ANYWHERE = ["a", 7, [1.0], {}, [[1.0], 2], np.ones((0, 3, 4)), np.array([b"a"]),
            np.float32(2), lambda x: x[:-1], lambda x: x.astype("S9")]
STREAM = [None, lambda x: x[None], lambda x: x[:, :0], lambda x: x[..., 1:]]
WRONG = {
    (mmsa, "train"): [], (mmsa, "test/audio"): STREAM,
    (mmsa, "train/regression_labels"): [None, [np.nan] * 12, [-3.5] * 12],
    (mmsa, "test/text_bert"): [np.ones((6, 3, 7))], (mogonet, "3_te"): STREAM,
    (mmsa, "test/audio_lengths"): [[99, 99, 99, -1, 99, 99], [99.5] * 6, [np.nan] * 6],
    (mmsa, "test/vision"): [np.ones((6, 25, 3))],  # not zero outside the frames
    (mogonet, "1_tr"): [None, [], ["1,2", "1"], np.full((55, 7), np.nan),
                        lambda x: np.c_[:55, x[:, 1:]]],  # an index
    (mogonet, "labels_te"): [np.arange(7) % 3, np.arange(7) / 7, -np.ones(7)],
    (mmimdb, "features vgg_features genres"): [],
    (mmimdb, "genres"): [None, np.ones((25959, 3)), np.full((25959, 23), 2)],
    (own, "valid/audio"): STREAM, (mogonet, "labels_tr"): [None],
    (own, "test/y"): [None, np.full(6, 10 ** 17)], (own, "train/y"): [[np.inf] * 12]}


@parametrize("make, places", WRONG)
def test_a_file_with_a_wrong_entry_is_refused(make, places, tmp_path):
    for i, value in enumerate([*ANYWHERE, *WRONG[make, places]]):
        path = tmp_path / str(i)
        try:
            write(path, make, dict.fromkeys(places.split(), value))
        except (TypeError, ValueError, AttributeError, LookupError):
            continue  # no such file can be written
        assert refusal(path, make), value


@given(st.sampled_from([*NAMES]), st.integers(0, 5), st.integers(0, 200), st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1))
def test_a_damaged_file_is_read_or_refused(
        tmp_path_factory, make, protocol, end, changes):
    path = tmp_path_factory.mktemp("a") / "a"
    write(path, make, protocol=protocol)
    file = path / "1_tr.csv" if make is mogonet else path
    content = bytearray(file.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    file.write_bytes(content[:-end or None])
    refusal(path, make)


# ------------------------------------------------------------ the stand-in
TASKS = [(name, task) for name, spec in data.SPECS.items() for task in spec.tasks]
# Published: features, samples, classes, range of labels. Then, what small stand-ins for
# each task add up to: streams of the usual length and of 4 steps, masks, labels.
RECORDED = {
    "mosi": (793, 2199, 3, 3, 4552.61466),
    "mosei": (877, 22856, 3, 3, 5985.69341),
    "sims": (1510, 2281, 3, 1, 7740.14375),
    "simsv2": (970, 4403, 3, 1, 5491.55184),
    "brca": (2503, 875, 5, 0, 3402.70240),
    "rosmap": (600, 351, 2, 0, 857.94451),
    "mmimdb": (4396, 25959, 23, 0, 18099.79841)}


@parametrize("name", RECORDED)
def test_the_stand_in_is_as_recorded(name):
    spec, total = data.SPECS[name], 0
    for task, length in itertools.product(spec.tasks, (None, 4)):
        dataset = data.synthetic(name, length, (40, 5, 6), task=task)
        assert dataset.synthetic
        assert dataset.spec == spec._replace(samples=(40, 5, 6))
        for xs, mask, y in dataset.splits.values():
            total += sum(np.abs(v).sum(dtype=float) for v in [*xs, mask]) / 1000
            total += (y.T * range(len(y))).sum()
    found = sum(spec.widths), sum(spec.samples), spec.classes, spec.scale, total
    assert found == pytest.approx(RECORDED[name], abs=1e-3)


def test_missing_elements_are_zero():
    datasets = [data.synthetic("rosmap", seed=seed) for seed in (0, 0, 0, 0, 1)]
    for dataset, seed in zip(datasets, (0, 0, 1)):
        data.with_missing(dataset, 0.3, seed)
    for s, count in zip(data.SPLITS, (196, 49, 106)):
        for x, same, other, whole, new in zip(*(v.splits[s].xs for v in datasets)):
            assert (x == np.where(x == 0, 0, whole)).all() and len(x) == count
            assert abs((x == 0).mean() - 0.3) < 0.01
            assert (x == same).all() and (x != other).any() and (whole != new).any()


# ------------------------------------------------------------ metrics and fusions
def f1(pairs, c):
    true, pred = zip(*pairs)
    return 2 * pairs.count((c, c)) / max(1, true.count(c) + pred.count(c))


def counted(pairs, *names):
    """Of (true, predicted): accuracy, F1 weighted by true classes, mean of F1."""
    if not pairs:
        return dict.fromkeys(names, math.nan)
    right = [t == p for t, p in pairs]
    of_samples = [f1(pairs, t) for t, _ in pairs]
    of_classes = [f1(pairs, c) for c in {*itertools.chain(*pairs)}]
    return dict(zip(names, map(np.mean, (right, of_samples, of_classes))))


NUMBERS = [-3, -2, -1, -0.8, -0.7, -0.12, -0.1, 0, 0.1, 0.12, 0.7, 0.8, 1.6, 2.6, 4]
PAIRS = list(itertools.product(NUMBERS, NUMBERS))


@given(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=9),
       st.sampled_from([0, 1, 3]))
@example([(0, 0), (0, 1.6)], 3)
@example(PAIRS, 1)
@example(PAIRS, 3)
def test_metrics_of_numbers(pairs, scale):
    y, out = np.float32(pairs).T
    if scale == 1:
        pairs = np.clip(pairs, -1, 1).tolist()

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
        for cuts in ((-0.1, 0.1), (-0.7, -0.1, 0.1, 0.7)):  # on a cut: below it
            expected |= judged(lambda v: sum(v > cut for cut in cuts),
                               f"Acc-{len(cuts) + 1}")
    true, pred = np.array(pairs).T
    varies = np.ptp(true) > 0 and np.ptp(pred) > 0
    expected["MAE"] = np.mean(np.abs(pred - true))
    expected["Corr"] = np.corrcoef(pred, true)[0, 1] if varies else math.nan
    got = train.measure(out[:, None], y, data.SPECS["mosi"]._replace(scale=scale))
    assert got == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert train.score(got) == got["MAE"]


@given(st.integers(0, 9999), st.integers(1, 12))
@example(0, 0)
def test_metrics_and_losses_of_classes(seed, samples):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, samples) if samples else np.ones(5, int)
    logits = np.float32(rng.integers(-3, 4, (len(true), 3)) + np.array([0.1, 0, 0.2]))
    labels = np.float32(rng.integers(0, 2, logits.shape))
    both = list(zip(true, logits.argmax(1)))
    signs = [(t, x[2] > x[0]) for t, x in zip(true, logits)]
    some = [(t, p) for t, p in signs if t != 1]
    sentiment = counted(both, "Acc-3", "F1-3")
    sentiment |= counted(some, "Acc-2 MMSA", "F1 MMSA")
    sentiment |= counted([(t == 2, p) for t, p in some], "Acc-2", "F1")
    sentiment |= counted([(t == 2, p) for t, p in signs], "Acc-2 with 0", "F1 with 0")
    columns = [list(zip(*pair)) for pair in zip(labels.T, logits.T > 0)]
    of_labels = {"micro F1": f1(sum(columns, []), 1),
                 "macro F1": np.mean([f1(column, 1) for column in columns])}
    entropy = [np.log(np.exp(x).sum()) - x[t] for t, x in zip(true, logits)]
    crossed = np.log(1 + np.exp(logits)) - labels * logits
    for name, y, expected, losses in (
            ("brca", true, counted(both, "Acc", "weighted F1", "macro F1"), entropy),
            ("mosi", true, sentiment, entropy),
            ("mmimdb", labels, of_labels, crossed.mean(1))):
        got = train.measure(logits, y, data.SPECS[name])
        expected["loss"] = np.mean(losses)
        assert got == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert train.score(got) == got["loss"]
        each = train.sample_losses(torch.tensor(logits), torch.tensor(y))
        assert_close(each, np.array(losses), 1e-5)


TINY = "--d-model 8 --layers 1 --d-state 4 --batch-size 4"
WIDTHS = (8, 5, 3)  # as in `drawn`


def config_of(words=""):
    """The settings that these options give for real data."""
    command = f"--dataset mosi --data a.pkl --device cpu {words}"
    args = train.parse(command.split())
    return {**train.settings(args), "task": "regression"}


def attention_by_hand(block, f, mask):
    """A block of cross attention for a sample f (m, l, d), mask (m, l), in NumPy."""
    p = {name: v.detach().numpy() for name, v in block.named_parameters()}
    m, l, d = f.shape
    angle = np.arange(l)[:, None] / 10000 ** (np.arange(0, d, 2) / d)
    x = layer_norm(f, p) + np.concatenate([np.sin(angle), np.cos(angle)], 1)[:, :d]
    e = p["q.weight"].shape[2]
    heads = 4 if e % 4 == 0 else 1
    q, k, v = (np.split(x @ p[f"{name}.weight"], heads, 2) for name in "qkv")
    seen = np.array([[here * (m == 1 or j != i) for j, here in enumerate(mask)]
                     for i in range(m)])  # (m, m, l): alone it sees itself
    weights = np.exp(np.einsum("hitc,hjsc->hitjs", q, k) / (e / heads) ** 0.5)
    weights = weights * seen[:, None]
    weights /= weights.sum((3, 4), keepdims=True) + 1e-99
    y = np.einsum("hitjs,hjsc->ithc", weights, v).reshape(m, l, e)
    return np.where(mask[..., None], f + y @ p["out.weight"], 0)


@parametrize("words, m", [
    ("average", 3), ("concat", 3), ("attention", 3),
    ("attention --d-model 7 --expand 1", 3), ("attention", 1)])
def test_a_fusion_is_its_definition(words, m):
    torch.manual_seed(0)
    config = config_of(f"{TINY} --layers 2 --dropout 0.5 --fusion {words}")
    model = train.make_model(config, WIDTHS[:m], 1).double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    xs = [torch.randn(4, 6, width).double() for width in WIDTHS[:m]]
    mask = torch.rand(m, 4, 6) < 0.6
    mask[:, 1] = False  # a sample without any real step
    for mask in (mask, torch.ones_like(mask)):
        f = torch.stack([encoder(x) for encoder, x in zip(model.encoders, xs)])
        f = f * mask[..., None]
        if config["fusion"] == "attention":
            features, f = model.features(xs, mask), f.detach().numpy()
            for j, block in itertools.product(range(4), model.blocks):
                f[:, j] = attention_by_hand(block, f[:, j], mask[:, j].numpy())
            assert_close(features, f, 1e-6)  # the sines are float32
        else:
            one = torch.cat([*f], -1)
            if words == "average":
                one = f.sum(0) / mask.sum(0).clamp(min=1)[..., None]
            alone = CoupledMamba((one.shape[2],), 1, d_model=one.shape[2], n_layers=2,
                                 d_state=4).double()
            alone.load_state_dict(model.mamba.state_dict())
            assert_close(model(xs, mask), alone([one], mask.any(0)[None]))
    assert_close(model(xs), model(xs, mask))
    if config["fusion"] == "attention":
        whole, state = model.advance(xs, model.init_state(4))
        with pytest.raises(ValueError, match="cannot continue"):
            model.advance(xs, state)
        model.blocks.train()  # with dropout
        assert (model(xs) != whole).any()


# ------------------------------------------------------------ training and resuming
RUN = ("--dataset mosi --data a.pkl --device cpu --length 6 --epochs 5 "
       f"--dropout 0.2 --lr 0.05 {TINY} --seeds 1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """To work in: with a small a.pkl, tiny stand-ins, one process for all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "STAND_IN_SAMPLES", (12, 6, 6))
    monkeypatch.setattr(train, "in_own_process", lambda function, *v: function(*v))
    monkeypatch.setattr(train, "memory", lambda *_, **__: 0)
    write(tmp_path / "a.pkl", samples=(13, 6, 6))
    return tmp_path


def results(out):
    """results.json without the seconds, which differ."""
    report = json.loads((Path(out) / "results.json").read_text())
    for result in report["seeds"]:
        for row in result["log"]:
            assert 0 <= row.pop("seconds") < 60
    return report


def contents(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def files_in(out):
    return {**contents(out), "results.json": results(out)}


def interrupted(command, name, count):
    """Run this command, with Ctrl-C at call `count` of this function."""
    function, calls = getattr(train, name), itertools.count(1)

    def stop(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments)
    with patch.object(train, name, stop):
        assert run(command) == 130


def optimizer_by_hand(model, config):
    """Only maps decay, and they do."""
    plain = ("bias", "norm_weight", "A_log", "D", "logits")
    maps, rest = [], []
    for name, p in model.named_parameters():
        group = rest if name.endswith(plain) else maps
        group.append(p)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config["optimizer"]]
    return kind([{"params": maps, "weight_decay": config["weight_decay"]},
                 {"params": rest, "weight_decay": 0.0}])


def outputs_and_labels(model, config, split, rows=slice(None)):
    xs = [torch.tensor(x[rows]) for x in split.xs]
    with torch.autocast("cpu", torch.bfloat16, enabled=config["amp"]):
        out = model(xs, torch.tensor(split.mask[:, rows]))
    return out.float(), torch.tensor(split.y[rows])


def by_hand(config, dataset, seed):
    """What all processes do together: by epoch its number, the loss, that on valid,
    and the weights, the outputs on test and their labels.
    """
    split, valid, test = dataset.splits.values()
    world, count = config["processes"], len(split.y)
    d_output = 3 if config["task"] == "classification" else 1
    sizes = dict(d_model=8, n_layers=1, d_state=4, dropout=0.2)
    torch.manual_seed(seed)
    model = CoupledMamba(WIDTHS, d_output, **sizes)
    optimizer = optimizer_by_hand(model, config)
    outputs = functools.partial(outputs_and_labels, model, config)
    size = config["batch_size"] * world
    for epoch in itertools.count(1):
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] / 2 ** ((epoch - 1) // 50)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        first = (seed * 10 ** 5 + epoch) * world
        dropout = [torch.manual_seed(first + r).get_state() for r in range(world)]
        model.train()
        total = 0.0
        for rows in np.split(order, range(size, count, size)):
            optimizer.zero_grad()
            for rank in range(min(world, len(rows))):
                torch.set_rng_state(dropout[rank])
                found = outputs(split, rows[rank::world])
                dropout[rank] = torch.get_rng_state()
                loss = train.sample_losses(*found).sum()
                (loss / len(rows)).backward()
                total += loss.item()
            optimizer.step()
        model.eval()
        weights = {name: v.clone() for name, v in model.state_dict().items()}
        on_valid = train.sample_losses(*outputs(valid)).mean().item()
        yield epoch, total / count, on_valid, [weights, *outputs(test)]


def train_and_resume(command, place, count):
    assert run(f"{command} --out whole") == 0
    interrupted(f"{command} --out cut", place, count)
    assert run(f"{command} --out cut --resume") == 0


TWO = '''
import functools, os, sys
from test_coupled_mamba import train, train_and_resume
dist = train.dist
dist.init_process_group = functools.cache(dist.init_process_group)
dist.destroy_process_group = dist.barrier  # one group for all runs
if os.environ["RANK"] == "1":
    train.save = lambda *_: os._exit(1)  # only the first process writes
train_and_resume(sys.argv[1], "train_epoch", 3)
'''


@parametrize("processes, place, count, words", [
    (1, "evaluate", 1, "--epochs 40 --patience 2 --optimizer adam --weight-decay 0.1"),
    (1, "save", 4, "--epochs 2 --seeds 2 --seed 3 --amp --task classification"),
    (1, "train_epoch", 3, "--epochs 51 --batch-size 7 --weight-decay 0.1"),
    (2, "train_epoch", 3, "--epochs 3 --batch-size 3 --missing-rate 0.3")])
def test_a_run_is_a_plain_loop_also_if_interrupted(
        processes, place, count, words, folder, capsys):
    command = f"{RUN} {words}"
    if processes == 1:
        train_and_resume(command, place, count)
        said = capsys.readouterr().out
    else:  # the last step: one sample for two
        said = run_python("-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", "--no-python",
                          sys.executable, "-c", TWO, command,
                          PYTHONPATH=str(HERE))
    assert said.count("Results go to") == 3  # three runs; one process prints
    assert said.count("  resumed after epoch ") == 1
    assert files_in("cut") == files_in("whole")
    report = results("whole")
    config = report["config"]
    assert config["processes"] == processes
    dataset = data.load("mosi", folder / "a.pkl", 6, config["task"])
    data.with_missing(dataset, config["missing_rate"])
    for result in report["seeds"]:
        seed, log = result["seed"], result["log"]
        rows = [*itertools.islice(by_hand(config, dataset, seed), len(log))]
        found = [(row["epoch"], row["loss"], train.score(row["valid"])) for row in log]
        np.testing.assert_allclose(found, [row[:3] for row in rows], 1e-4)
        epoch, _, _, expected = min(rows, key=lambda row: row[2])
        patience = config["patience"]
        assert len(log) == (epoch + patience if patience else config["epochs"])
        saved = torch.load(f"whole/seed{seed}.pt", weights_only=True)
        assert result["epoch"] == saved["epoch"] == epoch
        assert result["valid"] == log[epoch - 1]["valid"]
        found = [saved[name] for name in ("weights", "prediction", "target")]
        assert_close(found, expected, 1e-4)
        out, y = (v.numpy() for v in found[1:])
        assert result["test"] == train.measure(out, y, dataset.spec)
    if patience:
        assert run(f"{command} --out cut --resume --epochs 45") == 0
        assert results("cut")["seeds"] == report["seeds"]


def test_nothing_that_was_finished_is_lost(folder, capsys):
    write(folder / "a.pkl", entries={"test/regression_labels": [1.0] * 6})
    interrupted(f"{RUN} --seeds 2 --out cut", "train_epoch", 9)
    assert set(files_in("cut")) == {"results.json", "seed0.pt", "seed1.resume"}
    command = f"{RUN} --seeds 3 --epochs 7 --out"
    for out in ("cut", "whole"):
        assert run(f"{command} {out} --resume") == 0
    assert "seed 1  resumed after epoch 3" in capsys.readouterr().out
    before = files_in("whole")
    assert files_in("cut") == before
    assert run(f"{command} cut --resume") == 0
    assert capsys.readouterr().out.count("was finished before") == 3
    report = before["results.json"]
    assert sorted(before) == ["results.json", "seed0.pt", "seed1.pt", "seed2.pt"]
    assert list(report) == ["dataset", "synthetic", "task", "config", "environment",
                            "seeds", "mean", "std"]
    assert [*report.values()][:3] == ["mosi", False, "regression"]
    maes = [result["test"]["MAE"] for result in report["seeds"]]
    assert report["mean"]["MAE"] == pytest.approx(np.mean(maes))
    assert report["std"]["MAE"] == pytest.approx(np.std(maes))
    assert report["mean"]["Corr"] is None  # JSON has no NaN

    def write_half(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError("No space left")
    with patch.object(Path, "write_bytes", write_half):  # a full disk
        assert "No space left" in refused(f"{command} whole", capsys)
    assert files_in("whole") == before
    interrupted(f"{command} whole", "train_epoch", 2)  # a new run
    Path("whole/seed0.resume").unlink()
    assert files_in("whole") == before
    assert run(f"{command} whole --seeds 1") == 0  # fewer seeds
    assert files_in("whole")["seed1.pt"] == before["seed1.pt"]
    assert results("whole")["seeds"] == report["seeds"]


def test_training_that_diverges_ends(folder, monkeypatch, capsys):
    metrics = [{"MAE": v} for v in (3.0, 3.0, math.nan, 0.5)]  # 0.5: of test
    monkeypatch.setattr(train, "measure", Mock(side_effect=metrics))
    for words in ("", "--resume"):  # the second has nothing to do
        assert run(f"{RUN} --out o {words}") == 0
    result, = results("o")["seeds"]
    assert result["epoch"] == 1 and result["test"]["MAE"] == 0.5
    assert "training has diverged" in capsys.readouterr().out
    for loss in (math.nan, math.inf, None):
        assert train.why_stop([{"loss": loss, "valid": metrics[0]}], {}, config_of())


@parametrize("name", ["results.json", "seed0.resume"])
def test_files_of_another_run_are_kept(name, folder, capsys):
    write(folder / "b.pkl", samples=(11, 6, 6))
    command = f"{RUN} --out o"
    path = Path("o", name)
    others = ["--lr 0.02", "--layers 2", "--length 9", "--optimizer adam", "--epochs 4",
              "--data b.pkl"]
    if name == "results.json":
        assert run(command) == 0
        others += ["--seed 1", "--resume --epochs 4"]
    else:
        interrupted(command, "train_epoch", 5)
        command += " --resume"
    whole = path.read_bytes()
    damaged = [b"", b"hello", b"[]", b'{"config": 0}', whole[:500],
               whole.replace(b"config", b"confix"), whole.replace(b"seeds", b"seedx")]
    capsys.readouterr()
    for content, words, message in [
            *[(whole, words, "give the same options") for words in others],
            *[(content, "", f"{name} is damaged, or no res") for content in damaged]]:
        path.write_bytes(content)
        before = contents("o")
        assert message in refused(f"{command} {words}", capsys)
        assert contents("o") == before


# ------------------------------------------------------------ the command line
@parametrize("words", [
    "--d-model 64", "--layers 2", "--d-state 32", "--expand 3", "--d-conv 2",
    "--dt-rank 5", "--dropout 0.3", "--pooling last", "--pooling mean", "--no-mix",
    "--coupling sum", "--coupling learned", "--coupling none", "--mode recurrence",
    "--mode convolution", "--mode scan", "--length 7", "--missing-rate 0.25",
    "--epochs 7", "--batch-size 9", "--lr 0.1", "--optimizer adam", "--seed 11",
    "--weight-decay 0.1", "--patience 4", "--seeds 2", "--amp"])
def test_an_option_changes_what_it_names(words):
    option, *value = words.split()
    name = option[2:].replace("-", "_")
    new, old = config_of(words), config_of()
    assert [key for key in old if new[key] != old[key]] == [name]
    assert [str(new[name])] == (value or ["True"])
    name = {"layers": "n_layers", "no_mix": "mix"}.get(name, name)
    new, old = (train.make_model(config, WIDTHS, 1).config for config in (new, old))
    changed = [key for key in old if new[key] != old[key]]
    assert changed == ([name] if name in old else [])


def test_defaults_of_paper_dataset_and_stand_in(folder, monkeypatch, capsys):
    model = train.make_model(config_of(), WIDTHS, 1)
    assert model.config == CoupledMamba(WIDTHS).config
    paper = dict(epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5, data=Path("a"))
    small = dict(d_model=32, d_state=16, pooling="mean", layers=1)
    stand_in = dict(small, epochs=12, lr=3e-3, seeds=1, batch_size=32)
    sizes = dict(mosi=128, mosei=1024, sims=128, simsv2=256, brca=64, rosmap=32,
                 mmimdb=512)
    place = data.default_path("mosi")
    place.parent.mkdir(parents=True)
    shutil.copy("a.pkl", place)
    for words, expected in (
            *[(f"{name} --data a", {**paper, "batch_size": size})
              for name, size in sizes.items()],
            ("mosi --fusion mamba", dict(coupling="none", no_mix=True)),
            ("mosi", {**paper, "data": place, "layers": 3, "batch_size": 128}),
            ("sims --layers 4", {**stand_in, "layers": 4}), ("sims", stand_in),
            ("own --data a", {**paper, **small}),
            ("sims --benchmark", dict(batch_size=16, d_model=128,
                                      lengths=[100, 200, 300, 400, 500]))):
        args = train.parse(["--dataset", *words.split()])
        assert vars(args).items() >= expected.items()
    assert run(f"--dataset mosi {TINY} --epochs 1 --seeds 1") == 0
    assert results("runs/mosi-coupled")["synthetic"] is False
    out = capsys.readouterr().out
    assert "synthetic" not in out
    assert "published" in out  # the widths are others
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.parse(["--dataset", "sims"]).device == "cuda"


@parametrize("name, task", TASKS)
def test_every_fusion_trains_and_predicts(name, task, folder, capsys):
    first = dict(brca="Acc", rosmap="Acc", mmimdb="micro F1").get(name, "Acc-2")
    test = data.synthetic(name, 5, (12, 6, 6), task=task).splits["test"]
    for fusion in train.FUSIONS:
        assert run(f"--dataset {name} --task {task} --fusion {fusion} {TINY} "
                   f"--epochs 1 --length 5 --seed 3 --out {fusion}") == 0
        result = results(fusion)
        assert result["synthetic"] is True
        assert result["config"]["fusion"] == fusion
        assert list(result["mean"])[0] == first
        saved = torch.load(f"{fusion}/seed3.pt", weights_only=True)
        assert saved["synthetic"] and saved["config"] == result["config"]
        kind = type(train.make_model(saved["config"], WIDTHS, 1))
        model = kind(**saved["model"]).eval()
        model.load_state_dict(saved["weights"])
        out = model([torch.tensor(x) for x in test.xs])
        assert_close([saved["prediction"], saved["target"]], [out, test.y], 1e-5)
    out, err = capsys.readouterr()
    assert err == ""
    assert all(line.startswith("synthetic | ") for line in out.splitlines())


@parametrize("words", [
    "--data nowhere", "--dataset own --data nowhere", "--epochs 0", "--epochs x",
    "--lr -1", "--lr nan", "--fusion x", "--dropout 1", "--out a.pkl",
    "--device cuda", "--mode kernel", "--benchmark --mode kernel", "--epoch 2",
    "--fusion mamba --coupling learned", "--fusion attention --no-mix",
    "--optimizer sgd", "--dataset brca --task regression", "--dataset own",
    "--dataset own --data a.pkl --benchmark"])
def test_a_wrong_command_is_one_sentence(words, folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kernel:
        monkeypatch.setattr(kernel.knobs.runtime, "interpret", False)
    message = refused(f"--dataset sims {TINY} {words}", capsys)
    assert any(word in message for word in words.split()[-2:])
    assert message.count("error: ") == 1
    assert not list(folder.rglob("results.json"))
    assert "required: --dataset" in refused("", capsys)


@parametrize("error, place, name", [
    (MemoryError(), data._Reader, "load"), (MemoryError(), data, "_resample"),
    (BrokenProcessPool(), train, "train_epoch"),
    (torch.OutOfMemoryError("CUDA out of memory"), train, "train_epoch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), train, "predict"),
    (NameError("a bug"), data, "_resample"), (RuntimeError("a bug"), train, "predict")])
def test_out_of_memory_gets_one_line(error, place, name, folder, capsys, monkeypatch):
    monkeypatch.setattr(place, name, Mock(side_effect=error))
    if str(error) == "a bug":
        with pytest.raises(type(error)):
            run(RUN)
    else:
        assert "try a smaller --batch-size" in refused(RUN, capsys)


@parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_run_says_what_it_is_on_any_terminal(encoding, folder, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(f"--dataset sims --epochs 1 --seeds 2 {TINY} --out 中文") == 0
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    shown = "中文" if encoding == "utf-8" else "??"
    for words in ("There are no data at data/sims/unaligned_39.pkl", "12 samples",
                  "Get unaligned_39.pkl from", "https://github.com/thuiar/",
                  "'text': 768", "14,396 parameters, outputs 1, ", "2 seeds",
                  "(default: 150)", f"Results go to {shown}"):
        assert words in said
    assert "\r" not in said  # progress is for terminals only


# ------------------------------------------------------------ the benchmark
@parametrize("fusion, labels", [
    ("coupled", ["inference", "inference in pieces of 64", "training step"]),
    ("attention", ["inference", "training step", "inference, explicit",
                   "training step, explicit"])])
def test_the_benchmark_does_what_it_says(fusion, labels, capsys, monkeypatch):
    pieces, advance = [], CoupledMamba.advance

    def note_length(model, xs, *arguments):
        pieces.append(xs[0].shape[1])
        return advance(model, xs, *arguments)

    def watched(function, config, spec, length, case):
        if length == 300:
            raise MemoryError
        pieces.clear()
        work = train.make_work(config, spec, length, case)
        model = inspect.getclosurevars(work).nonlocals["model"]
        with Largest() as seen:
            work()
        assert pieces == ([64, 64, 64, 8] if "pieces" in case.label else [200])
        training = "training" in case.label
        assert model.training == training
        assert model.modality_logits.any() == training  # moved by the optimizer
        scores = 4 * 4 * 200 * 400  # samples, heads, steps, keys
        assert (seen.size >= scores) == ("explicit" in case.label)
        return function(config, spec, length, case)
    monkeypatch.setattr(CoupledMamba, "advance", note_length)
    monkeypatch.setattr(train, "memory", lambda _, restart=False: 9e6 - 7e6 * restart)
    monkeypatch.setattr(train, "in_own_process", watched)
    assert run(f"--dataset mosi --device cpu --fusion {fusion} {TINY} "
               "--benchmark --lengths 200 300") == 0
    rows = re.findall(r"(?m)^ +(\d+)  (\S.*?)  +\S+ +(\S+)$", capsys.readouterr().out)
    assert rows == [(length, label, size) for length, size in
                    (("200", "7.0"), ("300", "-")) for label in labels]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_benchmark_runs_as_a_program():
    assert train.in_own_process(os.getpid) != os.getpid()
    words = f"--dataset sims --benchmark --fusion average --lengths 4 {TINY}"
    said = run_python(str(HERE / "train.py"), *words.split())
    assert len(re.findall(r"(?m)^ +4  .* [\d.]+ +[\d.]+$", said)) == 2


# ------------------------------------------------------------ README
README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TRAINING = re.findall(r"(?m)train\.py (--dataset .*?)(?:`|$)", README)


def test_the_snippets_need_torch_and_one_file(tmp_path):
    snippets = [snippet for snippet in SNIPPETS if "numpy" not in snippet]
    assert len(snippets) == 4
    copy_to(tmp_path, "coupled_mamba.py")
    code = "import sys; sys.modules['numpy'] = sys.modules['triton'] = None\n"
    code += "\n".join(snippets) + "import coupled_mamba\n"
    code += "print(coupled_mamba.kernel_problem(text, text))"
    said = run_python("-c", code, folder=tmp_path)
    assert "kernel.py must lie beside" in said


@parametrize("words", TRAINING)
def test_the_training_commands_run(words, folder):
    """With the smallest settings; the files that they name are made here."""
    before, after = [snippet for snippet in SNIPPETS if "numpy" in snippet]
    for name, make in (("FILE", mmsa), ("FOLDER", mogonet), ("FILE.npz", own)):
        write(folder / name, make)
    found = {}
    exec(before, found)  # writes own.npz
    assert run(f"{words} {TINY} --epochs 1 --seeds 1 --lengths 4") == 0
    if "own.npz" in words:
        exec(after, found)
        saved = torch.load("runs/own-coupled/seed0.pt", weights_only=True)
        assert_close(found["prediction"], saved["prediction"], 1e-5)
