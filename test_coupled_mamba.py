"""The laws of Coupled Mamba, and the proof that its modes agree:  python -m pytest -q

The reference against closed forms -> the modes against the reference -> gradients -> laws of the
scan -> the kernel -> the model -> data -> training -> README. Hypothesis draws whole problems. The
environment variable PROFILE says how many per law: `dev` 5; `ci`, the default, 25, always the same;
`thorough` 10,000.
"""
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace as Namespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"         # read by Triton when it is imported
import coupled_mamba
import data
import train
from coupled_mamba import CoupledMamba, coupled_scan

try:
    import kernel
    import triton.language as tl
except ImportError:
    kernel = None
triton_only = pytest.mark.skipif(kernel is None, reason="Triton is published for Linux only")

for name, examples, fixed in (("dev", 5, False), ("ci", 25, True), ("thorough", 10_000, False)):
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=fixed)
settings.load_profile(os.environ.get("PROFILE", "ci"))
EXAMPLES = settings.default.max_examples
pytestmark = pytest.mark.filterwarnings("error")
torch.set_num_threads(2)
HERE = Path(__file__).parent

# Largest error / largest value. float64: rounding over 300 steps. float32: 2^-24 times the ~100
# terms that a decay of 0.99 sums, more for gradients, which sum over time again. 16 bit: y and the
# gradients are rounded to 8 or 11 bits at the end; the state in between is float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHIPPED, CHUNK = coupled_mamba.CHUNK, 4
coupled_mamba.CHUNK = CHUNK                      # several chunks in a few steps
if kernel:
    kernel.CHUNK = CHUNK


@pytest.fixture
def shipped(monkeypatch):
    for module in filter(None, (coupled_mamba, kernel)):
        monkeypatch.setattr(module, "CHUNK", SHIPPED)


# ----------------------------------------------------------------------------- problems
def problem(m=3, b=2, l=11, e=4, n=3, seed=1, w="time", masked=False, H0=True, dtype=torch.float64):
    """Arguments of `coupled_scan` by name. S is mostly between 0.9 and 0.999: gates drawn from
    U(0, 1) forget too fast to show a lost carry.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {"x": randn(m, b, l, e), "delta": 10 ** (randn(m, b, l, e) / 2 - 1.5),
         "A": -torch.exp(randn(m, e, n) / 2), "B": randn(m, b, l, n), "C": randn(m, b, l, n),
         "D": randn(m, e), "w": torch.softmax(randn(m, b, l), 0), "H0": randn(b, e, n) * H0}
    if w == "vector":
        p["w"] = torch.softmax(randn(m), 0)
    if masked:                                               # absent steps do not act on H
        mask = torch.rand(m, b, l, generator=g) < 0.6
        share = torch.where(mask, p["w"] if w == "time" else p["w"][:, None, None], 0)
        p["w"] = torch.where(mask.any(0), share / share.sum(0).clamp(min=1e-9), 1 / m)
        p["delta"] = torch.where(mask[..., None], p["delta"], 0)
    return {k: v.to(dtype) for k, v in p.items()}


def problems_up_to(m, b, l, e, n):
    return st.builds(problem, *(st.integers(1, most) for most in (m, b, l, e, n)),
                     seed=st.integers(0, 10 ** 6), w=st.sampled_from(["time", "vector"]),
                     masked=st.booleans(), H0=st.booleans())


problems = problems_up_to(4, 3, 3 * CHUNK + 2, 5, 5)


def parts(p, time=slice(None), clips=slice(None), chains=slice(None)):
    """The arguments for some of the steps, clips and chains."""
    per_step = {k for k in ("x", "delta", "B", "C", "w") if p[k] is not None and p[k].dim() > 2}
    return {k: v[chains][:, clips][:, :, time] if k in per_step else
            v[clips] if k == "H0" else v if v is None else v[chains] for k, v in p.items()}


def reference(x, delta, A, B, C, D, w, H0):
    """Eq. 6 in NumPy, written from the paper and not from the code."""
    m, b, l, e = x.shape
    w = np.broadcast_to(w.reshape(m, -1, w.shape[2] if w.ndim == 3 else 1), (m, b, l))
    y, H = np.empty_like(x), H0.copy()
    for t in range(l):
        following = np.zeros_like(H)
        for k in range(m):
            step = delta[k, :, t, :, None]                                         # (b, e, 1)
            h = np.exp(step * A[k]) * H + step * x[k, :, t, :, None] * B[k, :, t, None, :]
            y[k, :, t] = (h @ C[k, :, t, :, None])[..., 0] + D[k] * x[k, :, t]
            following += w[k, :, t, None, None] * h
        H = following
    return y, H


def scan_kernel(**p):
    """Compiled on a GPU, else in Triton's interpreter: milliseconds per step and program."""
    p = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in p.items()}      # any layout
    return kernel.triton_coupled_scan(**{k: v.cuda() if GPU else v for k, v in p.items()})


MODES = ["recurrence", "convolution", "scan"]
KERNEL = pytest.param(scan_kernel, marks=triton_only, id="kernel")


def compute(p, mode):
    return mode(**p) if callable(mode) else coupled_scan(**p, mode=mode)


def run(p, mode, last=False):
    """y, H_last and every gradient under random cotangents; `last`: of y at the last step only."""
    p = {k: v.clone().requires_grad_() for k, v in p.items()}
    y, H = compute(p, mode)
    g = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(v.shape, generator=g).bfloat16().to(v) for v in (y, H)]
    if last:
        cotangents[0][:, :, :-1] = 0
    gradients = torch.autograd.grad((y, H), list(p.values()), cotangents)
    return dict(zip(("y", "H", *p), (y, H, *gradients)))


def assert_close(got, expected, tolerance=1e-9):
    """Tensors, arrays, or (dicts of) several, to `tolerance` of the largest expected value."""
    if isinstance(expected, (dict, list, tuple)):
        assert len(got) == len(expected)
        for k in expected if isinstance(expected, dict) else range(len(expected)):
            try:
                assert_close(got[k], expected[k], tolerance)
            except AssertionError as error:
                raise AssertionError(f"{k}: {error}") from None
        return
    got, expected = (torch.as_tensor(v).detach().cpu().double() for v in (got, expected))
    assert got.shape == expected.shape
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(size, 1e-3), f"error {error:.1e} at size {size:.1e}"


class Largest(TorchDispatchMode):
    """`size`: of the largest tensor that an operation gave, in float32 numbers."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // 4)
        return out


# ----------------------------------------------------------------------------- the modes agree
@given(problems)
def test_recurrence_is_equation_6(p):
    expected = reference(*(v.numpy() for v in p.values()))
    assert_close(coupled_scan(**p, mode="recurrence"), expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_constant_parameters_give_the_geometric_series(mode):
    p = problem(l=200)
    for k in ("x", "delta", "B", "C", "w"):
        p[k] = p[k][:, :, :1].expand_as(p[k])
    S, V = coupled_mamba.discretize(p["x"][:, :, 0], p["delta"][:, :, 0], p["A"], p["B"][:, :, 0])
    P, U = coupled_mamba.collapse(S, V, p["w"][:, :, 0])
    H = P ** 200 * p["H0"] + U * (1 - P ** 200) / (1 - P)
    assert_close(coupled_scan(**p, mode=mode)[1], H, 1e-10)


STEPWISE = coupled_mamba._forward_steps, coupled_mamba._backward_steps       # to be compiled


@given(problems, st.booleans(), st.booleans(), st.sampled_from(MODES[1:]),
       st.sampled_from([100, 3 << 19]), st.sampled_from([None, STEPWISE]))
def test_all_modes_agree_in_values_and_every_gradient(p, constant, last, mode, held, stepwise):
    if constant:                                 # in time: an FFT, where w is so, too
        p = {k: v[:, :, 0] if k in ("delta", "B", "C") else v for k, v in p.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupled_mamba, "HELD", held)           # 100: several blocks of the batch
        patch.setattr(coupled_mamba, "_compiled", stepwise)
        assert_close(run(p, mode, last), run(p, "recurrence", last), TOLERANCE[torch.float64])


def test_the_compiled_scan_agrees_and_without_a_compiler_there_is_a_warning(monkeypatch):
    monkeypatch.setattr(coupled_mamba, "_compiled", None)    # and undone at the end, like the modes
    for k in ("scan", "auto"):
        monkeypatch.setitem(coupled_mamba.MODES, k, coupled_mamba.MODES[k])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C.. compiler 'no-such-compiler' found"):
        assert not coupled_mamba.compile_scan()
    monkeypatch.delenv("CXX")
    p = problem(2, 3, 2 * coupled_mamba.STEPS + 1, 5, 16, dtype=torch.float32)
    expected = run({k: v.double() for k, v in p.items()}, "recurrence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # what torch.compile itself says
        if not coupled_mamba.compile_scan():
            pytest.skip("no C++ compiler on this machine")
        assert_close(run(p, "scan"), expected, 1e-5)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("l", (1, 2, SHIPPED - 1, SHIPPED, SHIPPED + 1, 4 * SHIPPED + 1, 300))
def test_modes_agree_at_the_edges_of_chunks_as_shipped(l, mode, shipped):
    for masked in (False, True):
        p = problem(l=l, b=1, masked=masked)
        assert_close(run(p, mode, True), run(p, "recurrence", True), TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["recurrence", "scan", KERNEL])
def test_narrow_inputs_have_a_float32_state_and_their_own_dtype_out(mode, dtype):
    p = problem(l=20, dtype=dtype, masked=dtype == torch.float32)
    expected, got = run({k: v.double() for k, v in p.items()}, "recurrence"), run(p, mode)
    assert got["y"].dtype == got["x"].dtype == dtype and got["H"].dtype == torch.float32
    assert_close(got["H"], expected["H"], TOLERANCE[torch.float32])
    cut_off = 1 + callable(mode)                 # where all else rounds, the interpreter cuts off
    assert_close(got, expected, TOLERANCE[dtype] * cut_off)
    if mode != "recurrence":                     # whose backward is PyTorch's own
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(run(p, mode), got, 1e-6)


@pytest.mark.parametrize("mode", [*MODES, KERNEL])
def test_gradients_are_those_of_finite_differences_and_second_ones_right_or_refused(mode):
    p = {k: v.requires_grad_() for k, v in problem(2, 1, CHUNK + 2, 2, 2, seed=3).items()}
    call = lambda *v: compute(dict(zip(p, v)), mode), tuple(p.values())
    how = dict(atol=1e-6, nondet_tol=1e-9, fast_mode=True)
    assert torch.autograd.gradcheck(*call, **how)
    if mode in ("recurrence", "convolution"):
        assert torch.autograd.gradgradcheck(*call, **how)
        return
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(compute(p, mode)[0].sum(), p["x"], create_graph=True)


# ----------------------------------------------------------------------------- laws of the scan
@given(problems, st.data(), st.sampled_from(MODES))
def test_handing_the_state_over_at_any_cut_changes_nothing(p, draw, mode):
    cut = draw.draw(st.integers(0, p["x"].shape[2]))         # so nothing reads the future, either
    ys, state = [], p["H0"]
    for piece in (slice(0, cut), slice(cut, None)):
        q = parts({**p, "H0": state}, piece)
        if q["x"].shape[2]:
            y, state = coupled_scan(**q, mode=mode)
            ys.append(y)
    assert_close((torch.cat(ys, 2), state), coupled_scan(**p, mode=mode))


@given(problems, st.randoms(use_true_random=False))
def test_order_of_clips_and_of_modalities_is_immaterial(p, random):
    (m, b), (y, H) = p["x"].shape[:2], coupled_scan(**p)
    clips, chains = random.sample(range(b), b), random.sample(range(m), m)
    moved = coupled_scan(**parts(p, clips=clips, chains=chains))
    assert_close(moved, (y[chains][:, clips], H[clips]), 1e-12)


@given(problems)
def test_identity_weights_are_independent_mambas_and_equal_rows_the_vector(p):
    m = len(p["x"])
    w = torch.softmax(torch.arange(m, dtype=torch.float64), 0)
    y, H = coupled_scan(**{**p, "w": w}, mode="recurrence")
    rows = {**p, "w": w.expand(m, m), "H0": p["H0"].expand(m, -1, -1, -1)}
    assert_close(coupled_scan(**rows, mode="recurrence"), (y, H.expand(m, -1, -1, -1)), 1e-12)
    y, H = coupled_scan(**{**rows, "w": torch.eye(m, dtype=torch.float64)}, mode="recurrence")
    for i in range(m):
        alone = coupled_scan(**parts({**p, "w": None}, chains=slice(i, i + 1)), mode="scan")
        assert_close((y[i:i + 1], H[i]), alone)


@given(problems)
def test_under_the_mean_the_state_is_bounded(p):
    p = {**p, "w": None, "H0": None, "delta": p["delta"].clamp(min=1e-3)}
    S, V = coupled_mamba.discretize(p["x"], p["delta"], p["A"], p["B"])
    P, U = coupled_mamba.collapse(S, V, torch.full((len(S), 1, 1), 1 / len(S), dtype=S.dtype))
    assert 0 < P.min() and P.max() < 1
    assert coupled_scan(**p)[1].abs().max() <= U.abs().max() / (1 - P.max()) * (1 + 1e-9)


def test_scan_never_holds_the_states_of_the_whole_sequence(shipped):
    p = problem(m=2, b=2, l=600, e=32, n=32, dtype=torch.float32)
    with Largest() as seen:
        run(p, "scan")
    kept = -(-600 // SHIPPED) * 2 * 32 * 32                  # H at the chunk boundaries
    assert kept <= seen.size <= max(kept, 2 * 2 * 600 * 32) < 2 * 2 * 600 * 32 * 32 / 20


@pytest.mark.parametrize("name, wrong, message", [
    ("mode", "fft", "mode is 'fft', expected one of recurrence"),
    ("delta", torch.ones(3, 2, 5, 4), r"has shape .3, 2, 5, 4., expected .3, 2, 11, 4."),
    ("w", torch.eye(3), "in mode='recurrence'"), ("w", torch.ones(2), "w has shape"),
    ("H0", torch.ones(3, 2, 4, 3), "H0 has shape"), ("D", torch.ones(4), "D has shape"),
    ("x", torch.ones(3, 2, 11, 4, dtype=torch.int64), "x is torch.int64"),
    ("x", torch.ones(3, 2, 0, 4), "no axis of length 0"), ("A", torch.ones(3, 4), "A "),
    ("mode", "convolution", "use mode='recurrence' or mode='scan'")])
def test_wrong_arguments_are_named(name, wrong, message):
    p = {**problem(), "w": -torch.ones(3), name: wrong}
    with pytest.raises(ValueError, match=message):
        coupled_scan(**p)
    if kernel and name != "mode":
        with pytest.raises(ValueError, match=f"{name} (has shape|is torch|.*no axis of length 0)"):
            kernel.triton_coupled_scan(**p)


# ----------------------------------------------------------------------------- the Triton kernel
@triton_only
@settings(max_examples=EXAMPLES // 4, phases=[Phase.generate])               # shrinking: minutes
@given(problems_up_to(3, 2, 2 * CHUNK + 2, 5, 5), st.booleans(), st.sampled_from([CHUNK, 512]))
def test_the_kernel_agrees_in_values_and_every_gradient(p, last, segment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SEGMENT", segment)            # least steps: of one segment or more
        got, expected = run(p, scan_kernel, last), run(p, "recurrence", last)
    assert_close(got, expected, TOLERANCE[torch.float64])


@triton_only
def test_the_kernel_in_float32_is_within_1e_5_of_float64(shipped, monkeypatch):
    monkeypatch.setattr(kernel, "SEGMENT", 64)   # e beyond a block, n beside a power of two
    assert kernel.check(((1, 2, 1, 1, 1), (3, 1, 37, 20, 64), (1, 1, 300, 3, 16), (4, 1, 20, 3, 5),
                         (8, 1, 17, 2, 65)))


@triton_only
def test_the_kernel_has_defaults_wide_offsets_and_a_fixed_order_of_sums_on_demand(monkeypatch):
    p = problem(2, 1, 6, 20, 64)                             # two blocks of e in backward
    plain = {k: v for k, v in p.items() if k not in ("D", "w", "H0")}
    monkeypatch.setattr(kernel, "WIDE", 0)                   # 64-bit offsets
    assert kernel._plan((3, 9, 9, 9), 1, torch.float32, kernel.FORWARD)[2]["INDEX"] == tl.int64
    launch, slices = kernel._backward, []
    monkeypatch.setattr(kernel, "_backward", type("", (), {"__getitem__": lambda _, grid: (
        lambda *a, **k: (slices.append((a[-1], grid[1])), launch[grid](*a, **k)))})())
    torch.use_deterministic_algorithms(True)
    try:
        results = [[run(q, scan_kernel) for q in (p, plain)] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(slices) == {(2, 2)}               # each block of e adds to dB and dC of its own
    assert_close(results[0], [run(p, "scan"), run(plain, "scan")], 1e-10)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*results) for k in a)


@triton_only
def test_the_kernel_saves_its_inputs_and_a_state_per_chunk():
    p, saved = problem(l=3 * CHUNK, e=9), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        run(p, scan_kernel)
    inputs = sum(v.numel() for k, v in p.items() if k != "H0")
    assert sum(v.numel() for v in saved) == inputs + 3 * p["H0"].numel()
    if not GPU:
        assert kernel._scan(*p.values(), False)[2].numel() == 0          # not to train: none


@triton_only
def test_the_kernel_serves_one_output_alone_and_checkpoints_and_is_a_proper_operator():
    p = {k: v.requires_grad_() for k, v in problem(l=3).items()}
    for i in (0, 1):
        expected, got = (torch.autograd.grad(f(**p)[i].sum(), list(p.values()), allow_unused=True)
                         for f in (coupled_scan, scan_kernel))
        assert_close(got, [torch.zeros_like(v) if d is None else d
                           for d, v in zip(expected, p.values())], 1e-10)
    y = checkpoint(lambda **v: scan_kernel(**v)[0], use_reentrant=False, **p)
    assert_close(*(torch.autograd.grad(v.sum(), p["x"])[0] for v in (y, coupled_scan(**p)[0])))
    q = [v.cuda() if GPU else v for v in problem(1, 1, 3, dtype=torch.float32).values()]
    torch.library.opcheck(kernel._scan, [v.requires_grad_() for v in q] + [True])


def test_the_kernel_is_chosen_for_a_gpu_with_triton_and_for_nothing_else(monkeypatch):
    class OnGPU(list):
        is_cuda, device = True, "cuda"

    def chosen(x, major=9):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(major=major))
        return coupled_mamba._kernel(x)

    if kernel:
        assert chosen(OnGPU("abc")) is kernel.triton_coupled_scan
        monkeypatch.setattr(kernel, "INTERPRETED", False)
        with pytest.raises(ValueError, match="x is on cpu, expected a GPU"):
            kernel.triton_coupled_scan(**problem())
        with pytest.raises(ValueError, match="with 1 to 8 modalities"):
            kernel.triton_coupled_scan(**problem(9))
    assert chosen(OnGPU("abc"), major=7) is chosen(OnGPU(range(9))) is chosen(torch.ones(3)) is None
    monkeypatch.setitem(sys.modules, "kernel", None)         # as if Triton were not installed
    assert chosen(OnGPU("abc")) is None


@triton_only
def test_the_kernel_compiles_for_two_kinds_of_gpu_and_spills_no_register(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "import kernel; assert kernel.compile_table(((64, 3),))"], cwd=HERE,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 10 and {row[-4] for row in rows} == {"sm_80", "sm_90"}
    assert all(int(row[-3]) > 0 and row[-2] == "0" for row in rows)


@triton_only
def test_the_benchmark_measures_every_case_and_prints_a_dash_for_what_fails(monkeypatch, capsys):
    monkeypatch.setattr(kernel, "in_turn", lambda row: {
        case: ([kernel.measure(case)[0]], 10 ** 6) for case in row if case.name != "fused"})
    monkeypatch.setattr(coupled_mamba, "compile_scan", lambda: None)
    tiny = [dict(b=2, l=5, widths=(3, 4), d_model=8, d_state=4, layers=1)]
    lines = kernel.benchmark({k: (title, cases, tiny) for k, (title, cases, _) in
                              kernel.SECTIONS.items()})
    assert len(lines) == 4 + 2 + 4 + 2 + 3 and capsys.readouterr().out.count("  -\n") == 1
    for line in lines:
        assert line["seconds"] is None if line["name"] == "fused" else line["seconds"] > 0


# ----------------------------------------------------------------------------- the model
def model_and_input(seed=0, m=3, b=2, l=CHUNK + 3, **options):
    torch.manual_seed(seed)
    widths = (5, 3, 4, 2)[:m]
    model = CoupledMamba(widths, 2, d_model=8, n_layers=2, d_state=8, **options).double()
    for p in model.parameters():                 # so that no bias, logit or skip is still neutral
        p.data += 0.1 * torch.randn_like(p)
    return model, [torch.randn(b, l, width, dtype=torch.float64) for width in widths]


options = st.fixed_dictionaries(dict(
    coupling=st.sampled_from(["mean", "learned", "sum", "none"]), mix=st.booleans(),
    m=st.integers(1, 4), pooling=st.sampled_from(["max", "mean", "last"]),
    seed=st.integers(0, 999)))
GARBAGE = st.sampled_from([7., float("inf"), float("nan")])


def draw_mask(xs, seed, rate=0.6):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(xs), *xs[0].shape[:2], generator=g) < rate
    mask[0, :, 0] = True                         # somebody was there
    return mask


def gradients(out, model):
    found = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if d is None else d for d, p in zip(found, model.parameters())]


def mamba_block(block, f, i):
    """Chain i of a block as a plain Mamba, in NumPy: one clip f (l, d), one modality."""
    p = {k: v.detach().numpy()[i] for k, v in block.named_parameters() if k != "coupling_logits"}
    normed = (f - f.mean(1, keepdims=True)) / np.sqrt(f.var(1, keepdims=True) + 1e-5)
    both = (normed * p["norm_weight"] + p["norm_bias"]) @ p["in_proj.weight"]
    (e, n), l, rank = p["A_log"].shape, len(f), len(p["dt_proj.weight"])
    x, k = np.zeros((l, e)), p["conv_weight"].shape[1]
    for t in range(l):
        x[t] = p["conv_bias"]
        for lag in range(min(k, t + 1)):
            x[t] += p["conv_weight"][:, k - 1 - lag] * both[t - lag, :e]
    x = x / (1 + np.exp(-x))
    maps, h, y = x @ p["x_proj.weight"], np.zeros((e, n)), np.zeros((l, e))
    for t in range(l):
        delta = np.logaddexp(0, maps[t, :rank] @ p["dt_proj.weight"] + p["dt_bias"])[:, None]
        h = np.exp(delta * -np.exp(p["A_log"])) * h + delta * x[t][:, None] * maps[t, rank:rank + n]
        y[t] = h @ maps[t, rank + n:] + p["D"] * x[t]
    gate = both[:, e:]
    return f + (y * gate / (1 + np.exp(-gate))) @ p["out_proj.weight"]


@given(options)
def test_one_modality_or_no_coupling_is_a_plain_mamba(o):
    o = {**o, "mix": False, "coupling": "none" if o["m"] > 1 else o["coupling"]}
    o["coupling"] = "mean" if o["coupling"] == "sum" else o["coupling"]
    model, xs = model_and_input(**o)
    features = model.encode(xs)
    for i, x in enumerate(xs):
        for j in range(len(x)):
            f = model.encoders[i](x[j]).detach().numpy()
            for block in model.blocks:
                f = mamba_block(block, f, i)
            assert_close(features[i, j], f)


@given(options, st.booleans())
def test_streaming_equals_forward_after_every_step(o, masked):
    model, xs = model_and_input(**o)
    mask, state = draw_mask(xs, o["seed"], 0.6 if masked else 1.1), model.init_state(2)
    for t in range(xs[0].shape[1]):
        out, state = model.step([x[:, t] for x in xs], state, mask[:, :, t] if masked else None)
        assert_close(out, model([x[:, :t + 1] for x in xs], mask[:, :, :t + 1]))
    assert all(d.isfinite().all() for d in gradients(out, model))


@given(options, GARBAGE)
def test_what_lies_under_the_mask_is_never_read(o, garbage):
    model, xs = model_and_input(**o)
    mask, results = draw_mask(xs, o["seed"]), []
    for fill in (garbage, 0.):
        filled = [torch.where(k[..., None], x, fill) for x, k in zip(xs, mask)]
        out, features = model(filled, mask), model.encode(filled, mask)
        assert (features[~mask] == 0).all()
        results.append((out, features, *gradients(out, model)))
    assert_close(*results)


@given(options, st.integers(1, CHUNK + 4), st.integers(0, 5), st.integers(0, 5), GARBAGE)
def test_padding_at_either_end_changes_neither_outputs_nor_the_state(o, l, front, back, garbage):
    model, xs = model_and_input(**o, l=l)
    padded = [F.pad(x, (0, 0, front, back), value=garbage) for x in xs]
    mask = F.pad(torch.ones(len(xs), 2, l, dtype=torch.bool), (front, back))
    assert_close(model(padded, mask), model(xs))
    assert_close(model.encode(padded, mask)[:, :, front:front + l], model.encode(xs))
    got, expected = ([block.H for block in model._features(*given, model.init_state(2))[1]]
                     for given in ((padded, mask), (xs, None)))
    assert_close(got, expected)


@given(options, GARBAGE)
def test_a_modality_masked_everywhere_leaves_the_model_of_the_others(o, garbage):
    model, xs = model_and_input(**{**o, "m": 3})
    others, _ = model_and_input(**{**o, "m": 2})
    weights, whole = {}, model.state_dict()
    for name, shape in ((k, v.shape) for k, v in others.state_dict().items()):
        p = whole[name]
        if name.startswith("mix."):              # their rows for the absent third modality go
            p = torch.stack([p[0, :shape[1]], p[1, :shape[1]]])
        weights[name] = p if name.startswith(("encoders", "head")) else p[:2]
    others.load_state_dict(weights)
    mask = draw_mask(xs, o["seed"])
    mask[2] = False
    xs[2] = torch.full_like(xs[2], garbage)
    assert_close(model(xs, mask), others(xs[:2], mask[:2]))


@pytest.mark.parametrize("coupling", ["mean", "learned", "sum"])
def test_4096_steps_stay_finite_in_float32_but_not_the_sum_of_the_paper(coupling, shipped):
    torch.manual_seed(0)
    model = CoupledMamba((4, 4, 4), d_model=16, n_layers=2, d_state=16, coupling=coupling)
    out = model([torch.randn(1, 4096, 4) for _ in range(3)])
    finite = [v.isfinite().all().item() for v in (out, *gradients(out, model))]
    assert all(finite) if coupling != "sum" else not finite[0]
    block = CoupledMamba((4, 4, 4), n_layers=1, coupling="sum").blocks[0]
    largest = [block(torch.randn(3, 1, l, 128))[1].H.abs().max().item() for l in (50, 80, 110)]
    assert 1e15 < largest[0] < largest[1] < np.inf and not np.isfinite(largest[2])


def test_every_parameter_starts_where_the_paper_says():
    torch.manual_seed(0)
    model = CoupledMamba((768, 33, 709))
    for block in model.blocks:
        step = F.softplus(block.dt_bias)
        assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 1.01e-1
        assert_close(-torch.exp(block.A_log), -torch.arange(1., 65).expand(3, 256, 64), 1e-6)
        assert (block.D == 1).all() and block.dt_proj.weight.shape == (3, 8, 256)
    decay, rest = model.param_groups(0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    spared = {id(p) for p in rest["params"]}
    assert len(decay["params"]) + len(spared) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert (id(p) in spared) == bool(re.search("A_log|D$|bias|norm|logits", name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("coupling", ["mean", "learned", "sum", "none"])
def test_a_long_silence_holds_the_state_and_the_pooled_mean_in_any_dtype(coupling, dtype):
    model, xs = model_and_input(l=1, coupling=coupling, pooling="mean")
    model, xs = model.to(dtype), [x.to(dtype) for x in xs]
    mask = F.pad(torch.ones(3, 2, 1, dtype=torch.bool), (0, 299))
    _, spoken = model._advance(xs, None, model.init_state(2))
    out, silent = model._advance([x.expand(-1, 300, -1) for x in xs], mask, model.init_state(2))
    assert out.dtype == dtype and silent.blocks[0].H.dtype == torch.float32
    assert_close(silent.blocks[0].H, spoken.blocks[0].H, 1e-4)
    _, long = model._advance([x.expand(-1, 300, -1) for x in xs], None, model.init_state(2))
    assert (long.count == 300).all()             # bfloat16 cannot count beyond 256


def test_extreme_logits_leave_finite_weights():
    model, xs = model_and_input(coupling="learned")
    for logits in (model.modality_logits, *(block.coupling_logits for block in model.blocks)):
        logits.data[0] = 2000
    mask = draw_mask(xs, 0)
    mask[0] = False
    out = model(xs, mask)
    assert out.isfinite().all() and all(d.isfinite().all() for d in gradients(out, model))


@triton_only
def test_the_model_is_the_same_by_the_kernel_or_compiled_and_nearly_in_bfloat16(monkeypatch):
    model, xs = model_and_input(l=5, coupling="learned")
    model, xs = model.float(), [x.float() for x in xs]
    mask = draw_mask(xs, 0)
    expected = [model(xs, mask), *gradients(model(xs, mask), model)]
    monkeypatch.setattr(coupled_mamba, "_kernel", lambda x: kernel.triton_coupled_scan)
    if GPU:
        model, xs, mask = model.cuda(), [x.cuda() for x in xs], mask.cuda()
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        out = f(xs, mask)
        assert_close([out, *gradients(out, model)], expected, 1e-4)
        with torch.autocast(xs[0].device.type, torch.bfloat16):
            assert_close(f(xs, mask), expected[0], 0.1)


def test_wrong_options_and_inputs_are_named():
    for change, message in ((dict(coupling="max"), "coupling is"), (dict(d_state=0), "least 1"),
                            (dict(pooling="sum"), "pooling is"), (dict(mode="x"), "mode is")):
        with pytest.raises(ValueError, match=message):
            CoupledMamba((3, 4), **change)
    model, xs = model_and_input(l=20)
    for bad in (xs[:2], [xs[0], xs[1], xs[2][:, :5]], [xs[1], xs[0], xs[2]]):
        with pytest.raises(ValueError, match="expected .b, l, width. for each of the widths"):
            model(bad)
    for mask in (torch.ones(3, 2, 20), torch.ones(3, 2, 19, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask is"):
            model(xs, mask)
    with pytest.raises(ValueError, match="a length of at least 1"):
        model([x[:, :0] for x in xs])
    with pytest.raises(ValueError, match="batch of 2: begin with init_state.2."):
        model.step([x[:, 0] for x in xs], model.init_state(3))


def small_model(fusion):
    torch.manual_seed(0)
    config = dict(train.PAPER, d_model=8, layers=2, d_state=4, fusion=fusion, coupling="mean",
                  no_mix=False, pooling="max", mode="auto")
    return train.make_model(config, (5, 3, 4), 2).double()


@given(st.sampled_from(["average", "concat", "attention"]), st.integers(0, 99), GARBAGE)
def test_the_other_fusions_never_read_what_is_absent(fusion, seed, garbage):
    model, (_, xs) = small_model(fusion), model_and_input(seed, l=6)
    mask = draw_mask(xs, seed)
    filled = [[torch.where(k[..., None], x, fill) for x, k in zip(xs, mask)]
              for fill in (garbage, 0.)]
    assert_close(model(filled[0], mask), model(filled[1], mask))
    there = F.pad(torch.ones(3, 2, 6, dtype=torch.bool), (0, 4))
    assert_close(model([F.pad(x, (0, 0, 0, 4), value=garbage) for x in xs], there), model(xs))


def test_the_average_is_over_the_streams_that_are_there():
    model = train.OneMamba((4, 4), 2, concat=False, d_model=8, n_layers=1, d_state=4)
    model.encoders[1].load_state_dict(model.encoders[0].state_dict())
    x, mask = torch.randn(2, 6, 4), torch.ones(2, 2, 6, dtype=torch.bool)
    mask[1, :, 2:] = False                       # twice the same, and only once: the same average
    assert_close(model([x, x], mask), model([x, x]), 1e-6)


def test_explicit_attention_is_the_fused_one_and_reads_every_step_of_the_others():
    model, (_, xs), outs = small_model("attention"), model_and_input(l=6), []
    for explicit in (False, True):
        for block in model.blocks:
            block.explicit = explicit
        outs.append((model(xs), model(xs, draw_mask(xs, 3))))
    assert_close(*outs)
    f = torch.randn(3, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    reads = torch.autograd.grad(model.blocks[0](f)[0][0, 0, 2].sum(), f)[0].abs().sum((1, 3)) > 0
    assert reads[1:].all() and reads[0].tolist() == [j == 2 for j in range(6)]


# ----------------------------------------------------------------------------- data: the formats
def mmsa(seed=0, clips=(12, 6, 6), told=True):
    """Like MMSA's: text padded in front, the others at the end, -inf and NaN inside. `told`: which
    frames are real.
    """
    rng, content = np.random.default_rng(seed), {"config": {"not": "a split"}, "train_mix": {}}
    for s, count in zip(data.SPLITS, clips):
        split = {"id": [f"{s}{i}" for i in range(count)], "raw_text": np.array(["a b"] * count),
                 "regression_labels": rng.uniform(-3, 3, count).astype(np.float32).tolist(),
                 "annotations": np.array(["Positive"] * count, dtype=object)}
        for m, t, width in zip(data.MODALITIES, (6, 40, 25), (8, 3, 5)):
            real, x = rng.integers(1, t + 1, count), 50 * rng.standard_normal((count, t, width)) + 3
            real[2] *= m != "audio"              # nobody speaks
            on = np.arange(t) < real[:, None]
            on = on[:, ::-1] if m == "text" else on
            split[m] = np.where(on[..., None], x, 0).astype(np.float32)
            if told and m == "text":
                split["text_bert"] = np.stack([on, on, on], 1).astype(np.float32)
            elif told:
                split[f"{m}_lengths"] = real.tolist() if m == "audio" else real
        split["audio"][0, 0, 1], split["vision"][1, 0, 0] = -np.inf, np.nan
        content[s] = split
    return content


def mogonet(rows=(20, 7)):
    """Like MOGONET's, two classes, a constant feature."""
    rng, tables = np.random.default_rng(0), {}
    for part, count in zip(("tr", "te"), rows):
        for view, width in zip("123", (7, 5, 4)):
            tables[f"{view}_{part}"] = rng.random((count, width))
            tables[f"{view}_{part}"][:, 0] = 0.5
        tables[f"labels_{part}"] = (np.arange(count) % 2)[:, None].astype(float)
    return tables


def mmimdb():
    """Like MM-IMDB's, of 6, 3, 4 rows: see `small_mmimdb`."""
    rng = np.random.default_rng(0)
    return {"features": rng.standard_normal((13, 10)).astype(np.float32),
            "vgg_features": rng.standard_normal((13, 16)).astype(np.float32),
            "genres": (rng.random((13, 23)) < 0.3).astype(np.int32)}


def write(path, make=mmsa, change=lambda content: None, protocol=4, **options):
    """What `make` returns, changed, as the file or folder that is published."""
    content = make(**options)
    change(content)
    if make is mmsa:
        path.write_bytes(pickle.dumps(content, protocol))
    elif make is mmimdb:
        with h5py.File(path, "w") as file:
            for name, value in content.items():
                file[name] = value
    else:
        path.mkdir()
        for name, table in content.items():
            if isinstance(table, np.ndarray) and table.ndim < 3:
                np.savetxt(path / f"{name}.csv", table, "%s", delimiter=",")
            else:
                (path / f"{name}.csv").write_text(str(table))
    return content


@pytest.fixture(autouse=True)
def small_mmimdb(monkeypatch):
    monkeypatch.setitem(data.SPECS, "mmimdb", data.SPECS["mmimdb"]._replace(clips=(6, 3, 4)))


@pytest.mark.parametrize("protocol, told, length", [(2, 1, 40), (3, 0, 9), (4, 1, 9), (5, 0, 40)])
def test_an_mmsa_file_is_cut_resampled_and_standardised_by_train(protocol, told, length, tmp_path):
    def resampled(x):                            # segment means over the real frames, plain loops
        out = np.full((len(x), length, x.shape[2]), np.nan)              # NaN: nothing there
        for i, frames in enumerate(np.where(np.isfinite(x), x, 0).astype(np.float64)):
            frames = frames[(x[i] != 0).any(1)]
            for j in range(length if len(frames) else 0):
                first, last = j * len(frames) // length, (j + 1) * len(frames) // length
                out[i, j] = frames[first:max(last, first + 1)].mean(0)
        return out

    def label(content):
        for s in data.SPLITS * (protocol == 2):
            content[s]["classification_labels"] = [0, 2, 1, 2, 0, 0] * (len(content[s]["id"]) // 6)

    content = write(tmp_path / "a.pkl", change=label, told=told, protocol=protocol)
    loaded = data.load("mosi", tmp_path / "a.pkl", None if length == 40 else length)
    assert list(loaded.splits) == list(data.SPLITS) and not loaded.synthetic
    of_train = [resampled(content["train"][m]) for m in data.MODALITIES]
    for s, split in loaded.splits.items():
        labels = content[s]["regression_labels"]
        assert split.y.tolist() == labels and split.y.dtype == np.float32
        for m, x, mask, train_values in zip(data.MODALITIES, split.xs, split.mask, of_train):
            values = resampled(content[s][m])
            values -= np.nanmean(train_values, (0, 1))
            values /= np.nanstd(train_values, (0, 1))
            assert (mask == ~np.isnan(values).any(2)).all()
            assert_close(x, np.nan_to_num(values), 1e-5)
    for s, split in data.load("mosi", tmp_path, task="classification").splits.items():
        sign = np.sign(content[s]["regression_labels"]) + 1
        assert split.y.tolist() == content[s].get("classification_labels", sign.tolist())
        assert split.y.dtype == np.int64


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_vectors_are_cut_into_steps_and_valid_is_a_fifth_of_each_class(tokens, tmp_path):
    def cut(x, train):                           # standardised by `train`, zeros at the end
        deviation = np.where(train.std(0) < 1e-6, 1, train.std(0))
        x, width = (x - train.mean(0)) / deviation, -(-x.shape[1] // tokens)
        out = np.zeros((len(x), tokens, width))
        for j in range(x.shape[1]):
            out[:, j // width, j % width] = x[:, j]
        return out

    tables = write(tmp_path / "a", mogonet)
    splits, valid = (data.load("rosmap", tmp_path / "a", tokens=tokens).splits,
                     data._stratified(tables["labels_tr"][:, 0]))
    assert [len(splits[s].y) for s in data.SPLITS] == [16, 4, 7] and valid.sum() == 4
    assert np.bincount(splits["valid"].y).tolist() == [2, 2] and splits["train"].y.dtype == np.int64
    assert splits["test"].y.tolist() == tables["labels_te"][:, 0].tolist()
    for i, view in enumerate("123"):
        table, test = tables[view + "_tr"], tables[view + "_te"]
        for s, rows in (("train", table[~valid]), ("valid", table[valid]), ("test", test)):
            assert_close(splits[s].xs[i], cut(rows, table[~valid]), 1e-5)
            assert splits[s].mask.shape == (3, len(rows), tokens) and splits[s].mask.all()

    content = write(tmp_path / "a.hdf5", mmimdb)
    splits = data.load("mmimdb", tmp_path, tokens=tokens).splits
    for s, rows in zip(data.SPLITS, (slice(0, 6), slice(6, 9), slice(9, 13))):
        assert (splits[s].y == content["genres"][rows]).all() and splits[s].y.dtype == np.float32
        for x, name in zip(splits[s].xs, ("features", "vgg_features")):
            assert_close(x, cut(content[name][rows], content[name][:6]), 1e-5)


# ----------------------------------------------------------------------------- damaged files
class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# A scalar of a dtype that says it is an object and whose flags deny it: bytes read as a pointer.
FORGED = (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n(U\x02O8I00\nI01\ntR(K\x03U\x01|"
          b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08AAAAAAAA\x86R.")
BOMB = []
for _ in range(60):
    BOMB = [BOMB, BOMB]


def wrong(split, key, value):
    return lambda content: (content[split] if split else content).update({key: value})


HOSTILE = [
    (mmsa, pickle.dumps(Calls(os.system, "touch hacked")), "posix.system"),
    (mmsa, pickle.dumps(Calls(np.load, "hacked.npy", None, True)), "numpy"),
    (mmsa, wrong("train", "text", Calls(eval, "open('hacked', 'w')")), "eval"),
    (mmsa, wrong("train", "text", BOMB), "ragged"), (mmsa, FORGED, "not a complete MMSA pickle"),
    (mmsa, b"\x80\x02})" + b"\x85" * 10 ** 6 + b"K\x01s.", "hostile"), (mmsa, b"", "empty"),
    (mmsa, pickle.dumps([1, 2]), "expected a dict"), (mmsa, b"hello", "not a complete"),
    (mmsa, lambda content: content["valid"].pop("text"), "split valid has no 'text'"),
    (mmsa, wrong("test", "audio", np.ones((4, 40, 3))), "test/audio has 4 clips"),
    (mmsa, wrong("train", "regression_labels", [np.nan] * 12), "values that are NaN"),
    (mmsa, wrong("valid", "audio", np.ones((6, 40, 2))), "widths [3, 2, 3]"),
    (mmsa, wrong("test", "regression_labels", [3.5] * 6), "reach 3.5, expected at most 3"),
    (mogonet, lambda content: content.pop("2_te"), "has no 2_te.csv"), (mogonet, None, "no folder"),
    (mogonet, wrong(None, "1_tr", "1,2\n1\n"), "1_tr.csv is empty, ragged"),
    (mogonet, wrong(None, "labels_te", np.arange(7)), "from 0 to 1"),
    (mogonet, wrong(None, "labels_te", np.ones(2)), "2 rows"), (mmimdb, b"hello", "not a complete"),
    (mmimdb, wrong(None, "genres", np.ones((13, 3))), "expected 23 columns"),
    (mmimdb, wrong(None, "features", np.ones((5, 9))), "[5, 13, 13] rows")]
NAMES = {mmsa: "mosi", mogonet: "rosmap", mmimdb: "mmimdb"}


@pytest.mark.parametrize("make, damage, message", [
    pytest.param(*case, id=f"{NAMES[case[0]]}: {case[2]}") for case in HOSTILE])
def test_a_damaged_or_hostile_file_is_one_line_and_exit_code_2(make, damage, message, tmp_path,
                                                              monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if callable(damage):
        write(Path("a"), make, damage)
    elif damage is not None:
        Path("a").write_bytes(damage)
    before = os.listdir()
    assert train.main(["--dataset", NAMES[make], "--data", "a"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert os.listdir() == before


def spoil(content, rng):
    """One thing, somewhere in nested dicts, is gone or of another shape or type."""
    key = rng.choice(list(content))
    value = content[key]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return spoil(value, rng)
    array = np.asarray(value)
    others = ["a", 7, [1.], {}, np.ones((2, 3)), np.ones((0, 3, 4)), np.array([b"a"]), [[1.], 2],
              *([array[:-1], array[None], array.T, array.astype("S9"), array.astype(bool)]
                if array.ndim else [])]
    content[key] = others[rng.integers(len(others))]
    if rng.random() < 0.1:
        del content[key]


@settings(max_examples=2 * EXAMPLES)
@given(st.sampled_from(list(NAMES)), st.booleans(), st.integers(0, 10 ** 6))
def test_any_damage_is_read_or_refused_but_nothing_else(tmp_path_factory, make, bytewise, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("fuzz")
    try:
        write(folder / "a", make, protocol=seed % 4 + 2,
              change=lambda content: None if bytewise else spoil(content, rng))
    except (TypeError, ValueError, AttributeError):          # what HDF5 cannot hold at all
        pass
    target = folder / "a" / f"{rng.integers(1, 4)}_tr.csv" if make is mogonet else folder / "a"
    if bytewise:
        content = bytearray(target.read_bytes())
        for _ in range(rng.integers(1, 8)):
            spot = rng.integers(min(len(content), 10 ** int(rng.integers(2, 5))))
            content[spot] = rng.integers(256)
        target.write_bytes(content[:rng.integers(len(content))] if seed % 5 == 0 else content)
    try:
        for split in data.load(NAMES[make], folder / "a").splits.values():
            assert all(np.isfinite(x).all() for x in split.xs)
    except data.DataError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)
    finally:
        shutil.rmtree(folder)


def test_reading_takes_less_than_three_times_what_is_kept(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({s: {
        "regression_labels": np.zeros(count, np.float32), **{
            m: np.ones((count, *shape), np.float32) for m, shape in
            zip(data.MODALITIES, ((50, 768), (500, 74), (500, 35)))}}
        for s, count in zip(data.SPLITS, (400, 50, 100))}, 4))
    tracemalloc.start()                          # the file itself is mapped, not read as a whole
    splits = data.load("mosei", tmp_path / "a.pkl", 50).splits
    (_, peak), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    kept = sum(x.nbytes for split in splits.values() for x in split.xs)
    assert kept == 550 * 50 * 877 * 4 < peak < 3 * kept


# ----------------------------------------------------------------------------- the stand-in
def test_the_stand_in_hides_its_label_from_every_pooled_statistic():
    splits, again = (data.synthetic("sims", clips=(600, 50, 60)).splits for _ in range(2))
    assert all((a == b).all() for a, b in zip(splits["test"].xs, again["test"].xs))
    assert [x.shape for x in splits["test"].xs] == [(60, 50, 768), (60, 50, 33), (60, 50, 709)]
    y = splits["train"].y
    assert set(np.round(3 * y)) == {-3, -1, 1, 3}
    for x in splits["train"].xs:
        score = x @ np.linalg.svd(x.reshape(-1, x.shape[2])[:5000], full_matrices=False)[2][0]
        for statistic in (score.sum(1), score.max(1), score.min(1), score.std(1)):
            assert abs(np.corrcoef(statistic, y)[0, 1]) < 0.15


def test_what_is_missing_is_the_same_for_every_model_and_of_the_rate_asked_for():
    whole, *holes = (data.synthetic("sims", clips=(20, 10, 10)) for _ in range(3))
    for dataset in holes:
        data.with_missing(dataset, 0.3)
    for s in data.SPLITS:
        for x, a, b in zip(*(d.splits[s].xs for d in (whole, *holes))):
            assert (a == b).all() and ((a == 0) | (a == x)).all()
            assert abs((a == 0).mean() - 0.3) < 0.01


# ----------------------------------------------------------------------------- metrics
def test_metrics_are_those_of_mmsa_worked_out_by_hand():
    true = np.array([-3., -1, 0, 0, 0.4, 1, 2, 2.6])
    pred = np.array([-2., 0.3, 0.2, -0.1, 0.6, 1.4, 4, -0.2])
    assert train.regression_metrics(pred, true, 3) == pytest.approx({
        # without zeros: true - - + + + +, predicted - + + + + -: F1 of "-" 2/4, of "+" 6/8
        "Acc-2": 4 / 6, "F1": (2 * 0.5 + 4 * 0.75) / 6,
        # >= 0: true - - + + + + + +, predicted - + + - + + + -: F1 2/5 and 8/11
        "Acc-2 with 0": 5 / 8, "F1 with 0": (2 * 0.4 + 6 * 8 / 11) / 8,
        # cut at 1: -1 -1 0 0 0 1 1 1 and -1 0 0 0 1 1 1 0, at 2: -2 -1 0 0 0 1 2 2 and -2 0 0 0 1 1
        # 2 0, at 3: -3 -1 0 0 0 1 2 3 and -2 0 0 0 1 1 3 0
        "Acc-3": 5 / 8, "Acc-5": 5 / 8, "Acc-7": 3 / 8, "Corr": np.corrcoef(pred, true)[0, 1],
        "MAE": (1 + 1.3 + 0.2 + 0.1 + 0.2 + 0.4 + 2 + 2.8) / 8}, rel=1e-6)

    true, pred = np.array([-1, -0.1, 0, 0.1, 0.6, 1.]), np.array([-0.8, 0.05, -0.05, -0.3, 2, 0.7])
    for dtype in (np.float32, np.float64):       # a label on a cut is on it in float32, too
        got = train.regression_metrics(pred.astype(dtype), true.astype(dtype), 1)
        assert got == pytest.approx({
            # <= 0 is negative: true - - - + + +, predicted - + - - + +
            "Acc-2": 4 / 6, "F1": 4 / 6,
            # of 3: 0 0 1 1 2 2 and 0 1 1 0 2 2;  of 5: 0 1 2 2 3 4 and 0 2 2 1 4 3
            "Acc-3": 4 / 6, "Acc-5": 2 / 6, "Corr": np.corrcoef(pred.clip(-1, 1), true)[0, 1],
            "MAE": (0.2 + 0.15 + 0.05 + 0.4 + 0.4 + 0.3) / 6}, rel=1e-6)


def test_metrics_of_classes_are_worked_out_by_hand():
    true, pred = np.array([0, 0, 1, 1, 1, 2]), [0, 1, 1, 1, 0, 3]        # 2 is never predicted,
    assert train.class_metrics(np.eye(5)[pred], true) == pytest.approx({ # 4 does not occur at all
        # F1: of 0 2*1/(2+2), of 1 2*2/(3+3), of 2 and of 3, predicted where it is not, 0
        "Acc": 3 / 6, "weighted F1": (2 * 0.5 + 3 * 2 / 3) / 6, "macro F1": (0.5 + 2 / 3) / 4})
    true = np.array([0, 0, 1, 2, 2, 2])
    scores = np.array([[3, 9, 1], [1, 0, 2], [0, 5, 0], [0, 1, 2], [0, 9, 1], [2, 0, 1.]])
    # of three: predicted 1 2 1 2 1 0: right 2 of 6; F1 of 0 0, of 1 2/4, of 2 2*1/(3+2)
    # negative or positive, 5 clips: true - - + + +, predicted - + + + -: F1 2/4 and 4/6
    # MMSA: true 0 0 2 2 2 against 0 1 1 1 0
    assert train.sentiment_metrics(scores, true) == pytest.approx(
        {"Acc-2": 3 / 5, "F1": (2 * 0.5 + 3 * 2 / 3) / 5, "Acc-2 MMSA": 1 / 5,
         "F1 MMSA": 2 * 0.5 / 5, "Acc-3": 2 / 6, "F1-3": (0.5 + 3 * 0.4) / 6})
    true = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])        # the last label: all zero
    pred = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    # micro: hits 2, named 4 + 3; macro: 2*1/(2+1), 2*1/(2+2), 0
    assert train.label_metrics(pred - 0.5, true.astype(np.float32)) == pytest.approx(
        {"micro F1": 4 / 7, "macro F1": (2 / 3 + 1 / 2) / 3})
    # rarer classes weigh more in the loss, where so wished
    assert train.class_weights(np.array([0, 0, 0, 1]), 3).tolist() == pytest.approx([4 / 6, 2, 2])
    assert train.class_weights(true[:, :2], 2).tolist() == pytest.approx([1, 1])


def test_metrics_of_degenerate_predictions_are_numbers_or_nan():
    zeros, none = np.zeros(5), np.zeros((5, 3), np.float32)
    got = train.regression_metrics(zeros, zeros, 3)
    assert np.isnan(got["Acc-2"]) and np.isnan(got["Corr"]) and got["MAE"] == 0 == 1 - got["Acc-7"]
    assert train.label_metrics(none, none) == {"micro F1": 0, "macro F1": 0}
    got = train.sentiment_metrics(none, np.ones(5, int))                 # every clip is neutral
    assert np.isnan(got["Acc-2"]) and got["Acc-3"] == 0 == got["F1-3"]
    assert train.sparkline([3, 1, np.nan, 2]) == "█▁ ▅" and train.sparkline([np.nan]) == " "


# ----------------------------------------------------------------------------- training
TINY = ["--d-model", "8", "--layers", "1", "--d-state", "4", "--batch-size", "4"]
RUN = ["--dataset", "mosi", "--data", "a.pkl", "--epochs", "5", "--dropout", "0.2", "--lr", "0.05",
       *TINY, "--seeds"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """To work in, with a small a.pkl; stand-ins are tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SMALL_CLIPS", (12, 6, 6))
    write(tmp_path / "a.pkl")
    return tmp_path


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def log_of(out, seed=0):
    return [json.loads(line) for line in (Path(out) / f"seed{seed}.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_whole_and_chooses_the_epoch_on_valid(folder, capsys):
    labels, found = mmsa()["test"]["regression_labels"], []
    for sign in (1, -1):                         # the labels of test must not steer anything
        write(folder / "a.pkl",
              change=wrong("test", "regression_labels", [v * sign for v in labels]))
        shutil.rmtree("o", ignore_errors=True)
        assert train.main([*RUN, "2", "--out", "o"]) == 0
        assert sorted(os.listdir("o")) == ["results.json"] + [f"seed{k}.{e}" for k in (0, 1)
                                                              for e in ("jsonl", "npz", "pt")]
        found.append(results("o"))
    assert "synthetic" not in capsys.readouterr().out and found[0]["synthetic"] is False
    for a, b in zip(found[0]["seeds"], found[1]["seeds"]):
        assert a["valid"] == b["valid"] and a["epoch"] == b["epoch"] and a["test"] != b["test"]
        log = log_of("o", a["seed"])
        assert len(log) == 5
        assert min(log, key=lambda row: row["valid"]["MAE"])["epoch"] == a["epoch"]
    saved, stored = torch.load("o/seed0.pt", weights_only=True), np.load("o/seed0.npz")
    model = train.make_model(saved["config"], saved["d_inputs"], saved["d_output"])
    model.load_state_dict(saved["weights"])
    test = data.load("mosi", "a.pkl").splits["test"]
    assert_close(train.predict(model, test, saved["config"], torch.device("cpu")),
                 stored["prediction"], 1e-5)
    assert (stored["target"] == test.y).all() and not stored["synthetic"]
    maes = [r["test"]["MAE"] for r in found[1]["seeds"]]
    assert [found[1][k]["MAE"] for k in ("mean", "std")] == pytest.approx([np.mean(maes),
                                                                           np.std(maes)])
    assert train.main([*RUN, "2", "--out", "o", "--layers", "2"]) == 2   # would lose this one
    assert "give the same options, or another --out" in capsys.readouterr().err
    assert results("o") == found[1] and len(os.listdir("o")) == 7
    assert train.main([*RUN, "1", "--out", "o"]) == 0        # the same anew: nothing old stays
    assert sorted(os.listdir("o")) == ["results.json", "seed0.jsonl", "seed0.npz", "seed0.pt"]


@pytest.mark.parametrize("name, task", [(name, task) for name, spec in data.SPECS.items()
                                        for task in spec.tasks])
def test_every_fusion_runs_on_every_stand_in_in_every_task(name, task, folder, capsys):
    for fusion in ("coupled", "mamba", "average", "concat", "attention"):
        assert train.main(["--dataset", name, "--task", task, "--fusion", fusion, "--epochs", "1",
                           "--missing-rate", "0.5", *TINY, "--drop",
                           data.SPECS[name].modalities[0]]) == 0
        result = results(f"runs/{name}-{fusion}")
        assert result["synthetic"] is True and result["config"]["fusion"] == fusion
        first = "Acc-2" if data.SPECS[name].scale else "micro F1" if name == "mmimdb" else "Acc"
        assert list(result["mean"])[0] == list(result["mean_dropped"])[0] == first
        assert result["mean"] != result["mean_dropped"]
    assert all(line.startswith("synthetic | ") for line in capsys.readouterr().out.splitlines())


def test_a_stopped_run_resumes_to_the_bit_and_a_repeated_one_is_the_same(folder, capsys,
                                                                        monkeypatch):
    def left(out):
        return {p.name: p.read_bytes() for p in Path(out).iterdir() if p.suffix != ".jsonl"}

    def refused(message, *more):
        assert train.main([*RUN, "2", "--out", "stopped", "--resume", *more]) == 2
        assert message in capsys.readouterr().err

    for out in ("whole", "again"):
        assert train.main([*RUN, "2", "--out", out]) == 0
    step, done = torch.optim.Adam.step, []

    def stop(*arguments):
        done.append(1)
        if len(done) == 27:                      # of 3 an epoch, 5 epochs: in the 4th of seed 1
            raise KeyboardInterrupt
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop)
        assert train.main([*RUN, "2", "--out", "stopped"]) == 130
    first, kept = {"results.json", "seed0.pt", "seed0.npz"}, left("stopped")
    assert set(kept) == first | {"seed1.resume"} and len(log_of("stopped", 1)) == 3
    for broken in (b"", kept["seed1.resume"][:500], b"hello"):
        Path("stopped/seed1.resume").write_bytes(broken)
        refused("seed1.resume is damaged")
    Path("stopped/seed1.resume").write_bytes(kept["seed1.resume"])
    write(folder / "b.pkl", seed=1)
    for of_another in (["--lr", "0.02"], ["--layers", "2"], ["--data", "b.pkl"]):
        refused("give the same options", *of_another)
    assert train.main([*RUN, "2", "--out", "stopped", "--resume"]) == 0
    assert set(left("whole")) == first | {"seed1.pt", "seed1.npz"}
    assert left("whole") == left("again") == left("stopped")
    assert [[(row["loss"], row["valid"]) for row in log_of(out, 1)] for out in ("whole", "stopped")
            ] == [[(row["loss"], row["valid"]) for row in log_of("again", 1)]] * 2
    for broken in ("", "[]", '{"config": null}', '{"config": {}, "seeds": [{"seed": 0}]}'):
        Path("stopped/results.json").write_text(broken)
        refused("no result of this program")


def test_two_processes_train_as_one_with_the_doubled_batch(folder):
    write(folder / "a.pkl", clips=(13, 6, 6))                # the last batch: one clip for two
    one = [*RUN, "1", "--dropout", "0", "--out"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", str(HERE / "train.py"), *one, "two"], check=True,
                   capture_output=True)
    assert train.main([*one, "one", "--batch-size", "8"]) == 0
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))
    for a, b in zip(log_of("one"), log_of("two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["valid"]["MAE"] == pytest.approx(a["valid"]["MAE"], rel=1e-3)


def test_workers_autocast_and_compile_change_how_and_not_what(folder, monkeypatch):
    maes = []
    monkeypatch.setattr(train, "compile_scan", lambda: monkeypatch.setattr(
        coupled_mamba, "_compiled", STEPWISE))
    for how in ([], ["--workers", "2"], ["--compile"], ["--amp"]):
        out = "o" + "".join(how)
        assert train.main([*RUN, "1", "--epochs", "2", "--length", "3", "--out", out, *how]) == 0
        maes.append(results(out)["mean"]["MAE"])
    assert maes[0] == maes[1] == pytest.approx(maes[2], rel=1e-5)
    assert maes[0] != maes[3] == pytest.approx(maes[0], rel=0.05)


@pytest.mark.parametrize("wrong", [
    ["--data", "nowhere.pkl"], ["--epochs", "0"], ["--lr", "-1"], ["--tokens", "5"],
    ["--drop", "mrna"], ["--drop", "text", "audio", "vision"], ["--fusion", "x"],
    ["--class-weights"], ["--dropout", "1"], ["--out", "a.pkl"], ["--device", "cuda"]])
def test_a_wrong_command_is_one_line_and_exit_code_2(wrong, folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = train.main(["--dataset", "sims", *TINY, *wrong])
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and "error: " in message and message.count("\n") == 1
    assert os.listdir() == ["a.pkl"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    train.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        train.write_json(path, {"a": object()})
    with pytest.raises(ZeroDivisionError):
        train.write_whole(path, lambda file: (file.write(b"half"), 1 / 0))
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["results.json"]


# ----------------------------------------------------------------------------- README
README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [c.replace("\\\n", " ") for c in re.findall(r"(?m)^    (\S(?:[^\\\n]|\\\n)*)", README)]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_snippets_of_the_readme_need_torch_and_one_file(snippet, tmp_path):
    (tmp_path / "coupled_mamba.py").write_bytes((HERE / "coupled_mamba.py").read_bytes())
    alone = "import sys\nsys.modules['numpy'] = sys.modules['triton'] = None\n" + snippet
    subprocess.run([sys.executable, "-W", "ignore", "-c", alone], cwd=tmp_path, check=True)


@pytest.mark.parametrize("line", [c for c in COMMANDS if "python" in c or "torchrun" in c]
                         + re.findall(r"`(python train.py[^`]*)`", README))
def test_the_commands_of_the_readme_run(line, folder, capsys):
    """Those that train, with the smallest settings; of the others, that there is such a file."""
    write(folder / "a", mogonet)
    words = shlex.split(line.split("&&")[-1])
    if "train.py" in words:
        words = words[words.index("train.py") + 1:]
        name = "a.pkl" if "mosi" in words else "a"
        words = [name if word in ("FILE", "FOLDER") else word for word in words]
        if "--help" not in words:
            assert train.main([*words, *TINY, "--epochs", "1", "--seeds", "1"]) == 0
            return
        with pytest.raises(SystemExit, match="0"):
            train.main(words)
        shown = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
        assert len(shown) > 30
        for option in shown:                     # each is explained with its default
            assert "(default:" in option or option.startswith("--dataset"), option
    else:
        assert words[:2] in (["python", "kernel.py"], ["python", "-m"]), line
        assert (HERE / words[1]).exists() or words[2:] == ["pytest", "-q"], line
