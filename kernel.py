"""The coupled scan as Triton kernels, forward and backward:  python kernel.py

`triton_coupled_scan` computes what `coupled_mamba.coupled_scan` does, in one walk over time per
direction. Symbols and shapes are those of coupled_mamba.py.

One program owns one clip, one segment of time and a block of the inner width e, and walks its
segment with H (BE, n) in registers:

    time        0 ............................................... l
    segments    |        0        |        1        |     2     |      few clips: several segments
    chunks      |...|...|...|...|...|...|...|...|...|...|...|...|      H is kept where one begins

Many clips fill a GPU with one segment each. Few do not: time is then cut into segments, and a scan
in two passes (reduce, then scan) keeps them busy at the same time:

    1. `_reduce`    every segment from H = 0: its product of P, and the H that it ends with
    2. `_carry`     a short loop over segments:  start[s + 1] = product[s] start[s] + end[s]
    3. `_forward`   every segment again, now from its true start: y

Why not tl.associative_scan: it also carries products of P and combines log l times, and Eq. 7
leaves so little to do per step that the walk takes a third of the instructions of such a scan.

Backward is the same scan run from the end, G[t-1] = P[t] G[t] + Q[t], in the same passes; the chain
rule, and the names g, z, Q, stand above `coupled_mamba._ChunkedScan.backward`. H is recomputed,
chunk by chunk from the kept states, into work space for K steps. In memory are thus, beside inputs
and gradients: forward l / K states, backward K more per segment, of which those of the running
programs stay in the GPU's cache.
"""
import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CHUNK = 16                   # steps between two kept states
FILL = 800                   # programs that keep a large GPU busy: below, time is cut ...
SEGMENT = 512                # ... into segments of at least so many steps
LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = knobs.runtime.interpret                        # TRITON_INTERPRET=1, at import


# ----------------------------------------------------------------------------- the kernels
# Pointers, all contiguous: x, delta, y, dy, dx, ddelta (m, b, l, e); B, C (m, b, l, n);
# w (m, b, l); A (m, e, n); D (m, e); start, product, end (b, segments, e, n);
# keep (b, chunks, e, n); H_last, dH0 (b, e, n).
# BE, BN: channels and (a power of two) states of a program. EVEN: none lies outside e or n. Those
# that do read 0: then S = 1, V = 0, C = 0, and nothing comes of them. ACC: float32, or float64 for
# float64 inputs; what is loaded becomes ACC at once. INDEX: int64 where offsets need it.
@triton.jit
def _program(A, e, n, segments, M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
             ACC: tl.constexpr, EVEN: tl.constexpr, INDEX: tl.constexpr):
    """Clip, segment and block of this program with its masks, and A log2(e) of each chain."""
    i, s = (tl.program_id(0) // segments).to(INDEX), tl.program_id(0) % segments
    es, ns = tl.program_id(1) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e, in_n = (es < e) | EVEN, (ns < n) | EVEN
    tile, in_tile = es[:, None] * n + ns[None, :], in_e[:, None] & in_n[None, :]
    A2 = ()
    for k in tl.static_range(M):
        A2 += (tl.load(A + k * e * n + tile, in_tile, 0.).to(ACC) * LOG2E,)
    return i, s, es, ns, in_e, in_n, tile, in_tile, A2


@triton.jit
def _step(x, delta, B, w, row, e, n, es, ns, in_e, in_n, ACC: tl.constexpr):
    """delta, x, v = delta x (V = v B), B and w of one step of one chain."""
    d = tl.load(delta + row * e + es, in_e, 0.).to(ACC)
    x_ = tl.load(x + row * e + es, in_e, 0.).to(ACC)
    B_ = tl.load(B + row * n + ns, in_n, 0.).to(ACC)
    return d, x_, d * x_, B_, tl.load(w + row).to(ACC)


@triton.jit
def _reduce(x, delta, A, B, w, product, end, b, l, e, n, segments, length,
            M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
            EVEN: tl.constexpr, INDEX: tl.constexpr, REVERSE: tl.constexpr):
    """Product of P over a segment, and its last H from H = 0.

    With REVERSE, G from G = 0 backwards; x and B are then dy and C, as Q = sum_m S C dy.
    """
    i, s, es, ns, in_e, in_n, tile, in_tile, A2 = _program(A, e, n, segments, M, BE, BN, ACC, EVEN,
                                                        INDEX)
    H, product_ = tl.zeros((BE, BN), ACC), tl.full((BE, BN), 1., ACC)
    first, last = s * length, min((s + 1) * length, l)
    for j in range(last - first):
        t = last - 1 - j if REVERSE else first + j
        P, U = tl.zeros((BE, BN), ACC), tl.zeros((BE, BN), ACC)
        for k in tl.static_range(M):
            row = (k * b + i) * l + t
            d, x_, v, B_, w_ = _step(x, delta, B, w, row, e, n, es, ns, in_e, in_n, ACC)
            S = tl.exp2(d[:, None] * A2[k])
            P += w_ * S
            U += S * (x_[:, None] * B_[None, :]) if REVERSE else (w_ * v)[:, None] * B_[None, :]
        H = P * H + U
        product_ *= P
    out = (i * segments + s).to(tl.int64) * e * n + tile
    tl.store(product + out, product_, in_tile)
    tl.store(end + out, H, in_tile)


@triton.jit
def _forward(x, delta, A, B, C, D, w, start, y, H_last, keep, b, l, e, n, segments, length,
             M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
             EVEN: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr):
    """y of a segment from its start state; H where a chunk begins goes to `keep`."""
    i, s, es, ns, in_e, in_n, tile, in_tile, A2 = _program(A, e, n, segments, M, BE, BN, ACC, EVEN,
                                                        INDEX)
    H = tl.load(start + (i * segments + s).to(tl.int64) * e * n + tile, in_tile, 0.)
    for c in range(s * length // K, tl.cdiv(min((s + 1) * length, l), K)):
        if KEEP:
            tl.store(keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * n + tile, H, in_tile)
        for t in range(c * K, min(c * K + K, l)):
            H_next = tl.zeros((BE, BN), ACC)
            for k in tl.static_range(M):
                row = (k * b + i) * l + t
                d, x_, v, B_, w_ = _step(x, delta, B, w, row, e, n, es, ns, in_e, in_n, ACC)
                C_ = tl.load(C + row * n + ns, in_n, 0.).to(ACC)
                D_ = tl.load(D + k * e + es, in_e, 0.).to(ACC)
                h = tl.exp2(d[:, None] * A2[k]) * H + v[:, None] * B_[None, :]          # Eq. 6
                tl.store(y + row * e + es, tl.sum(h * C_[None, :], 1) + D_ * x_, in_e)
                H_next += w_ * h
            H = H_next
    if s == segments - 1:
        tl.store(H_last + i * e * n + tile, H, in_tile)


@triton.jit
def _backward(x, delta, A, B, C, D, w, start, dy, keep, work, dx, ddelta, dA, dBC, dw, dH0,
              b, l, e, n, segments, length, slices,
              M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
              EVEN: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr, DW: tl.constexpr):
    """All gradients of a segment from G at its end, `start`.

    work (programs, K, BE, BN): the H that each step of a chunk reads. dA (b segments, m, e, n) and
    dw (blocks of e, m, b, l) are the parts of each program. The blocks of e add up dB and dC in
    dBC (slices, m, b, l, n, 2): in one slice, or each in its own if the order must be fixed.
    """
    i, s, es, ns, in_e, in_n, tile, in_tile, A2 = _program(A, e, n, segments, M, BE, BN, ACC, EVEN,
                                                        INDEX)
    pe = tl.program_id(1)
    dBC += (pe % slices).to(tl.int64) * M * b * l * n * 2
    pairs = 2 * ns[:, None] + tl.arange(0, 2)[None, :]
    in_pairs = (pairs < 2 * n) | EVEN
    work += (tl.program_id(0) * tl.num_programs(1) + pe).to(tl.int64) * K * BE * BN
    work += tl.arange(0, BE)[:, None] * BN + ns[None, :]
    G, dA_ = tl.load(start + (i * segments + s).to(tl.int64) * e * n + tile, in_tile, 0.), ()
    for k in tl.static_range(M):
        dA_ += (tl.zeros((BE, BN), ACC),)
    for c in range(tl.cdiv(min((s + 1) * length, l), K) - 1, s * length // K - 1, -1):
        steps = min(K, l - c * K)
        H = tl.load(keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * n + tile, in_tile, 0.)
        tl.debug_barrier()           # all warps have read the chunk before: work is free again
        for j in range(steps):
            tl.store(work + j * BE * BN, H)
            H_next = tl.zeros((BE, BN), ACC)
            for k in tl.static_range(M):
                row = (k * b + i) * l + c * K + j
                d, x_, v, B_, w_ = _step(x, delta, B, w, row, e, n, es, ns, in_e, in_n, ACC)
                H_next += w_ * (tl.exp2(d[:, None] * A2[k]) * H + v[:, None] * B_[None, :])
            H = H_next
        tl.debug_barrier()           # all of this chunk is written, whichever warp needs it
        for j in range(steps - 1, -1, -1):
            H, G_next, dA_next = tl.load(work + j * BE * BN), tl.zeros((BE, BN), ACC), ()
            for k in tl.static_range(M):
                row = (k * b + i) * l + c * K + j
                d, x_, v, B_, w_ = _step(x, delta, B, w, row, e, n, es, ns, in_e, in_n, ACC)
                C_ = tl.load(C + row * n + ns, in_n, 0.).to(ACC)
                D_ = tl.load(D + k * e + es, in_e, 0.).to(ACC)
                dy_ = tl.load(dy + row * e + es, in_e, 0.).to(ACC)
                S = tl.exp2(d[:, None] * A2[k])
                SH, g = S * H, dy_[:, None] * C_[None, :] + w_ * G
                h, z = SH + v[:, None] * B_[None, :], SH * g
                dA_next += (dA_[k] + z * d[:, None],)
                G_next += S * g
                dv = tl.sum(g * B_[None, :], 1)
                tl.store(dx + row * e + es, dv * d + D_ * dy_, in_e)
                tl.store(ddelta + row * e + es, dv * x_ + tl.sum(z * A2[k], 1) / LOG2E, in_e)
                both = tl.sum(tl.join(g * v[:, None], h * dy_[:, None]), 0)    # dB and dC (BN, 2)
                tl.atomic_add(dBC + row * 2 * n + pairs, both, in_pairs, sem="relaxed")
                if DW:
                    tl.store(dw + pe.to(tl.int64) * M * b * l + row, tl.sum(G * h))
            G, dA_ = G_next, dA_next
    for k in tl.static_range(M):
        tl.store(dA + (tl.program_id(0).to(tl.int64) * M + k) * e * n + tile, dA_[k], in_tile)
    if s == 0:
        tl.store(dH0 + i * e * n + tile, G, in_tile)


# ----------------------------------------------------------------------------- launching
# (numbers of H per program, most modalities): 4 warps keep what belongs to so many numbers in
# registers, as `python kernel.py` shows; with more modalities a program gets half as many.
# Instructions per number and modality at n = 64, M = 3 on sm_90, counted in the machine code:
# forward 11.1; backward 8.8 to recompute and 33.9 to walk back, with dw 8.3 and 36.4.
FORWARD, BACKWARD = (2048, 6), (1024, 3)
WIDE = 2 ** 31                       # tensors of more elements need 64-bit offsets


def _plan(shape, n, acc, fits):
    """Grid, sizes and constants of a launch. fits: FORWARD or BACKWARD."""
    (m, b, l, e), BN, (tile, most) = shape, triton.next_power_of_2(n), fits
    BE = min(max(1, tile // (1 + (m > most)) // BN), triton.next_power_of_2(e))
    blocks = triton.cdiv(e, BE)
    segments = max(1, min(FILL // (b * blocks), l // SEGMENT))
    length = CHUNK * triton.cdiv(triton.cdiv(l, segments), CHUNK)        # whole chunks
    segments = triton.cdiv(l, length)
    return (b * segments, blocks), (b, l, e, n, segments, length), dict(
        M=m, BE=BE, BN=BN, ACC=tl.float64 if acc == torch.float64 else tl.float32,
        EVEN=e % BE == 0 and n == BN, num_warps=4,
        INDEX=tl.int64 if b * max(m * l * max(e, 2 * n), e * n) >= WIDE else tl.int32)


def _options(constants, of_w):
    """168 registers, 65536 / (3 x 128) rounded down, let three backward programs share an SM."""
    c, (tile, most) = constants, BACKWARD
    fits = not of_w and c["EVEN"] and c["M"] <= most and c["BE"] * c["BN"] <= tile
    return c | {"maxnreg": 168} if fits and c["ACC"] == tl.float32 else c


def _carry(state, x, delta, A, B, w, plan, reverse):
    """The state that each segment starts from, (b, segments, e, n), given the very first."""
    grid, sizes, constants = plan
    (b, e, n), segments = state.shape, sizes[4]
    if segments == 1:
        return state[:, None].contiguous()
    product, end = state.new_empty(2, b, segments, e, n)
    _reduce[grid](x, delta, A, B, w, product, end, *sizes, REVERSE=reverse, **constants)
    starts = torch.empty_like(end)
    for s in range(segments)[::-1 if reverse else 1]:
        starts[:, s] = state
        state = torch.addcmul(end[:, s], product[:, s], state)
    return starts


@torch.library.custom_op("coupled_mamba::scan", mutates_args=())
def _scan(x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
          D: torch.Tensor, w: torch.Tensor, H0: torch.Tensor, train: bool
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, H_last and, to train, H where each chunk begins (b, chunks, e, n)."""
    x, delta, A, B, C, D, w, H0 = (v.contiguous() for v in (x, delta, A, B, C, D, w, H0))
    (b, e, n), l = H0.shape, x.shape[2]
    y, H_last = torch.empty_like(x), torch.empty_like(H0)
    keep = H0.new_empty(b, triton.cdiv(l, CHUNK) if train else 0, e, n)
    with torch.cuda.device_of(x):
        plan = grid, sizes, constants = _plan(x.shape, n, H0.dtype, FORWARD)
        start = _carry(H0, x, delta, A, B, w, plan, False)
        _forward[grid](x, delta, A, B, C, D, w, start, y, H_last, keep, *sizes, K=CHUNK, KEEP=train,
                       **constants)
    return y, H_last, keep


@torch.library.custom_op("coupled_mamba::scan_backward", mutates_args=())
def _scan_backward(x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                   C: torch.Tensor, D: torch.Tensor, w: torch.Tensor, keep: torch.Tensor,
                   dy: torch.Tensor, dH_last: torch.Tensor, of_w: bool) -> list[torch.Tensor]:
    """The gradients of x, delta, A, B, C, D, w (zero unless `of_w`) and H0."""
    x, delta, A, B, C, D, w, dy, dH_last = (v.contiguous() for v in
                                            (x, delta, A, B, C, D, w, dy, dH_last))
    (m, b, l, e), n = x.shape, A.shape[-1]
    with torch.cuda.device_of(x):
        plan = grid, sizes, constants = _plan(x.shape, n, keep.dtype, BACKWARD)
        start = _carry(dH_last, dy, delta, A, C, w, plan, True)
        slices = grid[1] if torch.are_deterministic_algorithms_enabled() else 1
        work = keep.new_empty(math.prod(grid), CHUNK, constants["BE"], constants["BN"])
        dx, ddelta, dH0 = torch.empty_like(x), torch.empty_like(delta), torch.empty_like(dH_last)
        dA, dBC = keep.new_empty(grid[0], m, e, n), keep.new_zeros(slices, m, b, l, n, 2)
        dw = keep.new_zeros(grid[1] if of_w else 1, m, b, l)
        _backward[grid](x, delta, A, B, C, D, w, start, dy, keep, work, dx, ddelta, dA, dBC, dw,
                        dH0, *sizes, slices, K=CHUNK, DW=of_w, **_options(constants, of_w))
    dD = (dy.to(keep.dtype) * x).sum((1, 2))
    parts = dA.sum(0), dBC[..., 0].sum(0), dBC[..., 1].sum(0), dD, dw.sum(0)
    return [dx, ddelta, *(d.to(v.dtype) for d, v in zip(parts, (A, B, C, D, w))), dH0]


@_scan.register_fake
def _(x, delta, A, B, C, D, w, H0, train):
    chunks = -(-x.shape[2] // CHUNK) if train else 0
    keep = H0.new_empty(H0.shape[0], chunks, *H0.shape[1:])      # no len: it may be symbolic
    return x.new_empty(x.shape), H0.new_empty(H0.shape), keep


@_scan_backward.register_fake
def _(x, delta, A, B, C, D, w, keep, dy, dH_last, of_w):
    return [v.new_empty(v.shape) for v in (x, delta, A, B, C, D, w, dH_last)]


def _save(ctx, inputs, output):
    *tensors, H0, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)     # no zeros for `keep`, which nobody differentiates


def _gradients(ctx, dy, dH_last, _):
    if torch.is_grad_enabled():
        raise RuntimeError("the Triton kernel has no second derivative, which create_graph=True "
                           "asks for: use mode='recurrence'")
    saved = x, *_, keep = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dH_last = torch.zeros_like(keep[:, 0]) if dH_last is None else dH_last
    return *_scan_backward(*saved, dy, dH_last, ctx.needs_input_grad[6]), None


torch.library.register_autograd(_scan, _gradients, setup_context=_save)


# ----------------------------------------------------------------------------- the entry point
def triton_coupled_scan(x, delta, A, B, C, D=None, w=None, H0=None):
    """`coupled_mamba.coupled_scan` by the kernels: same arguments, same results.

    Args:
        x, delta: (m, b, l, e), m from 1 to 8.   A: (m, e, n).   B, C: (m, b, l, n).
        D: (m, e) or None.   w: (m,) or (m, b, l); None is 1/m each.   H0: (b, e, n) or None.
        float32, bfloat16, float16 or float64, in any memory layout.
    Returns:
        y (m, b, l, e) in the dtype of x, and H_last (b, e, n) in float32, or float64 if any
        argument is. Differentiable in every tensor argument, but not twice. dB and dC are added up
        in no fixed order unless torch.use_deterministic_algorithms(True).
    Raises:
        ValueError: a shape, dtype or device that does not fit, saying what was expected.
    """
    if x.dim() != 4 or A.dim() != 3 or len(x) > 8 or 0 in (*x.shape, *A.shape):
        raise ValueError(f"x has shape {tuple(x.shape)} and A {tuple(A.shape)}, expected "
                         "(m, b, l, e) and (m, e, n), with 1 to 8 modalities, no axis of length 0")
    (m, b, l, e), n = x.shape, A.shape[-1]
    expected = {"x": (m, b, l, e), "delta": (m, b, l, e), "A": (m, e, n), "B": (m, b, l, n),
                "C": (m, b, l, n), "D": (m, e), "w": (m,), "H0": (b, e, n)}
    given = {k: v for k, v in zip(expected, (x, delta, A, B, C, D, w, H0)) if v is not None}
    for name, v in given.items():
        if v.shape != expected[name] and not (name == "w" and v.shape == (m, b, l)):
            raise ValueError(f"{name} has shape {tuple(v.shape)}, expected {expected[name]}"
                             + f" or {(m, b, l)}" * (name == "w"))
        if v.device != x.device or not v.is_floating_point():
            raise ValueError(f"{name} is {v.dtype} on {v.device}, expected floating point on "
                             f"{x.device}")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"x is on {x.device}, expected a GPU: coupled_mamba.coupled_scan runs "
                         "anywhere; TRITON_INTERPRET=1 in the environment, before Triton is "
                         "imported, runs the kernel on a CPU, slowly")
    wide = torch.float64 if any(v.dtype == torch.float64 for v in given.values()) else torch.float32
    D = x.new_zeros(m, e) if D is None else D
    w = x.new_full((m,), 1 / m, dtype=wide) if w is None else w
    w = w[:, None, None].expand(m, b, l) if w.dim() == 1 else w
    H0 = x.new_zeros(b, e, n, dtype=wide) if H0 is None else H0.to(wide)
    train = torch.is_grad_enabled() and any(v.requires_grad for v in given.values())
    y, H_last, _ = _scan(x, delta, A, B, C, D, w, H0, train)
    return y, H_last


# ----------------------------------------------------------------------------- python kernel.py
def problem(m, b, l, e, n, device, dtype=torch.float32):
    """Random arguments by name, with decays mostly between 0.9 and 0.999."""
    def randn(*shape):
        return torch.randn(*shape, device=device)
    p = {"x": randn(m, b, l, e), "delta": 10 ** (randn(m, b, l, e) / 2 - 1.5),
         "A": -randn(m, e, n).div(2).exp(), "B": randn(m, b, l, n), "C": randn(m, b, l, n),
         "D": randn(m, e), "w": randn(m, b, l).softmax(0), "H0": randn(b, e, n)}
    return {k: v.to(dtype).requires_grad_() for k, v in p.items()}


def check():
    """Print, and return whether small enough, the errors against the float64 reference."""
    import coupled_mamba
    torch.manual_seed(0)
    gpu, good = torch.cuda.is_available(), True
    device = "cuda" if gpu else "cpu"
    print(f"error / largest value, against mode='recurrence' in float64, on {device}")
    sizes = [(3, 2, 70, 20, 16), (1, 1, 33, 5, 1), (2, 1, 1100, 3, 5)]
    large = [(3, 2, 50, 256, 64), (3, 2, 1100, 256, 64)] * gpu           # what training runs
    for size, of_w in [(size, True) for size in sizes + large] + [(size, False) for size in large]:
        p, found = problem(*size, device), []
        p["w"].requires_grad_(of_w)
        wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in p.items()}
        dy, dH = (torch.randn(v.shape, device=device) for v in (p["x"], p["H0"]))
        for q, (y, H) in ((p, triton_coupled_scan(**p)),
                          (wide, coupled_mamba.coupled_scan(**wide, mode="recurrence"))):
            inputs = [v for v in q.values() if v.requires_grad]
            cotangents = dy.to(y.dtype), dH.to(H.dtype)
            found.append((y, H, *torch.autograd.grad((y, H), inputs, cotangents)))
        errors = [((v - u).abs().max() / u.abs().max()).item() for v, u in zip(*found)]
        names = ("y", "H_last", *("d" + k for k, v in p.items() if v.requires_grad))
        print("m {}  b {}  l {}  e {}  n {}:  ".format(*size)
              + "  ".join(f"{k} {error:.0e}" for k, error in zip(names, errors)))
        good &= all(error < 2e-4 for error in errors)        # False for NaN, too
    return good


def compiled(fn, arch, constants, options):
    """Compile for a GPU that need not be there: registers, bytes spilled, shared bytes."""
    constants = {k: v for k, v in {**constants, "segments": 1, "slices": 1}.items()
                 if k in fn.arg_names}           # a launch makes constants of arguments that are 1
    signature = {k: "constexpr" if k in constants else "i32" if k in ("b", "l", "e", "n", "length")
                 else "*fp32" for k in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(fn.arg_names)
               if k not in constants and k != "l"}           # also noticed at launch
    kernel = triton.compile(ASTSource(fn, signature, constants, aligned),
                            GPUTarget("cuda", arch, 32), options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/ptxas", "-v", ptx,
                   f"--gpu-name=sm_{arch}" + "a" * (arch >= 90), "-o", folder + "/cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return (int(re.search(r"Used (\d+) registers", said)[1]),
            sum(map(int, re.findall(r"(\d+) bytes spill", said))), kernel.metadata.shared)


def compile_table(sizes=((64, 3), (64, 8), (5, 3)), e=256):
    """Print what the compiler makes of the kernels as launched at b = 128, l = 50 for each (n, m);
    False if any of (64, 3) spills.
    """
    print("   n  m  kernel    target  registers  spilled bytes  shared bytes  (float32, e = 256)")
    clean = True
    for n, m in sizes:
        for fn, name, fits, more in (
                (_reduce, "reduce", FORWARD, {"REVERSE": False}),
                (_forward, "forward", FORWARD, {"K": CHUNK, "KEEP": True}),
                (_reduce, "reduce G", BACKWARD, {"REVERSE": True}),
                (_backward, "backward", BACKWARD, {"K": CHUNK, "DW": False}),
                (_backward, "with dw", BACKWARD, {"K": CHUNK, "DW": True})):
            for arch in (80, 90):
                given = _options(_plan((m, 128, 50, e), n, torch.float32, fits)[2],
                                 more.get("DW", True))
                options = {k: v for k, v in given.items() if k in ("num_warps", "maxnreg")}
                constants = {k: v for k, v in given.items() if k not in options} | more
                registers, spilled, shared = compiled(fn, arch, constants, options)
                clean &= not spilled or (n, m) != (64, 3)
                print(f"{n:4} {m:2}  {name:8}  sm_{arch} {registers:10} {spilled:14} {shared:13}")
    return clean


def benchmark():
    """Print times on this GPU: the kernels, the PyTorch form, and Mamba's own kernel if there."""
    import coupled_mamba
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        selective_scan_fn = None
    gpu = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    exps = gpu["multiprocessor_count"] * 16 * gpu["sm_clock_rate"]       # per ms: 16 per SM, clock
    print(f"{torch.cuda.get_device_name()}: ms forward and backward; share of the limit that the "
          "exponentials set (1 per element forward, 2 backward); others: times slower")

    def times(f, p):
        with torch.no_grad():
            ahead = triton.testing.do_bench(lambda: f(p), return_mode="median")
        out = f(p)
        out = [v for v in (out if isinstance(out, tuple) else (out,)) if v.requires_grad]
        gradients = [torch.randn_like(v) for v in out]
        inputs = [v for v in p.values() if v.requires_grad]
        back = triton.testing.do_bench(lambda: torch.autograd.grad(
            out, inputs, gradients, retain_graph=True), return_mode="median")
        return ahead, back

    def lone(q):                                             # one modality after the other
        return tuple(selective_scan_fn(*v) for v in zip(*q.values()))

    for b, l in ((128, 50), (128, 500), (1, 65536)):
        m, e, n = 3, 256, 64
        p = problem(m, b, l, e, n, "cuda")
        w, H0 = (p.pop(k).detach() for k in ("w", "H0"))     # no gradient: coupling "mean"
        del p["D"]
        mine = times(lambda p: triton_coupled_scan(**p, w=w, H0=H0), p)
        share = [m * b * l * e * n * k / exps / ms for k, ms in zip((1, 2), mine)]
        line = f"b {b:3}  l {l:5}:  kernel {mine[0]:.3f} {mine[1]:.3f}  "
        line += f"{share[0]:.0%} {share[1]:.0%}"
        others = {"PyTorch": (lambda p: coupled_mamba.scan(**p, w=w, H0=H0), p)}
        if selective_scan_fn:
            q = {k: v.detach().transpose(2, 3).contiguous().requires_grad_() if v.dim() == 4 else v
                 for k, v in p.items()}
            others["mamba_ssm"] = lone, q
        for name, (f, p) in others.items():
            ahead, back = times(f, p)
            line += f"  {name} {ahead:.3f} {back:.3f}"
            line += f"  x{ahead / mine[0]:.1f} x{back / mine[1]:.1f}"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description="Check the kernels against the float64 reference (without a GPU: in Triton's "
                    "interpreter), print what the compiler makes of them (no GPU needed), and on a "
                    "GPU time them. Exit code 1 if an error is too large or a register is spilled.")
    for name, text in (("check", "the errors"), ("compile", "the compile table"),
                       ("benchmark", "the times on this GPU")):
        parser.add_argument("--" + name, action="store_true", help=f"only {text}")
    args, gpu, good = parser.parse_args(), torch.cuda.is_available(), True
    everything = not any(vars(args).values())
    if args.benchmark and not gpu:
        parser.error("--benchmark needs a GPU, and this machine has none")
    if args.compile and INTERPRETED:
        parser.error("--compile does not go with TRITON_INTERPRET=1: unset it")
    if everything or args.check:
        if gpu or INTERPRETED:
            good = check()
        else:
            again = [sys.executable, __file__, "--check"]
            good = not subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if (everything and not INTERPRETED) or args.compile:
        good &= compile_table()
    if (everything and gpu) or args.benchmark:
        benchmark()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
