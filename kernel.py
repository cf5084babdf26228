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

Why not tl.associative_scan: it carries products of P beside H and combines every element log l
times, where Eq. 7 leaves one multiplication and one addition per step to the walk.

Backward is the same scan run from the end, G[t-1] = P[t] G[t] + Q[t], in the same passes; the chain
rule, and the names g, z, Q, stand above `coupled_mamba._backward_chunk`. H is recomputed,
chunk by chunk from the kept states, into work space for K = CHUNK steps. In memory are thus, beside
inputs and gradients: forward l / K states, backward K more per segment, of which those of the
running programs stay in the GPU's cache, and where there are several segments three of each.
"""
import argparse
import contextlib
import ctypes
import functools
import importlib.util
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
GPU = torch.cuda.is_available()
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
    """All gradients of a segment; the walk starts at its end, with G = `start`.

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
    """168 registers, 65536 / (3 x 128) cut to a multiple of 8, let three programs share an SM."""
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


def check(sizes=((3, 2, 70, 20, 16), (1, 1, 33, 5, 1), (2, 1, 1100, 3, 5))):
    """Print, and return whether small enough, the errors against the float64 reference."""
    import coupled_mamba
    torch.manual_seed(0)
    device, good = "cuda" if GPU else "cpu", True
    print(f"error / largest value, against mode='recurrence' in float64, on {device}")
    large = ((3, 2, 50, 256, 64), (3, 2, 1100, 256, 64)) * GPU           # what training runs
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
        good &= all(error < (2e-4 if GPU else 1e-5) for error in errors)     # False for NaN, too
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


# ----------------------------------------------------------------------------- the benchmark
SECTIONS = {                 # what is run, its cases, of which the last is ours, and its sizes
    "modes": ("the scan, forward and backward; loop: S and V of all steps, then a loop over them",
              ["loop", "recurrence", "scan", "compiled", "kernel"],
              [dict(b=16, l=l) for l in (50, 100, 200, 400)]),
    "long": ("the same, without the slow ones", ["scan", "compiled", "kernel"],
             [dict(b=1, l=l) for l in (1000, 4000, 16000, 65536)]),
    "attention": ("inference as in Figures 3 and 4: cross attention, its scores in memory or "
                  "fused; Coupled Mamba", ["explicit", "fused", "coupled", "compiled"],
                  [dict(b=16, l=l) for l in (100, 200, 300, 400, 500)]
                  + [dict(b=1, l=l) for l in (2000, 8000)]),
    "stream": ("model.step; memory: growth after the first 1,000 steps", ["lone", "coupled"],
               [dict(b=1, l=1000), dict(b=1, l=100_000, layers=1)]),
    "training": ("forward, L1 loss, backward, Adam on SIMS' shapes; scan: on a GPU the kernel",
                 ["recurrence", "scan", "compiled"],
                 [dict(b=128, l=50, widths=(768, 33, 709))])}


class Case(NamedTuple):
    """What one process measures; by default at the paper's size."""
    section: str
    name: str
    b: int
    l: int
    widths: tuple = (128, 128, 128)
    d_model: int = 128
    d_state: int = 64
    layers: int = 3


def loop(x, delta, A, B, C, w, H0):
    """The scan as one first writes it."""
    import coupled_mamba
    (S, V), H, ys = coupled_mamba.discretize(x, delta, A, B), H0, []
    for S_t, V_t, C_t, w_t in zip(*(v.unbind(2) for v in (S, V, C, w))):
        h = S_t * H + V_t
        ys.append(torch.einsum("mben,mbn->mbe", h, C_t))
        H = torch.einsum("kb,kben->ben", w_t, h)
    return torch.stack(ys, 2), H


def workload(case):
    """A function that does once what is to be timed."""
    from coupled_mamba import MODES, CoupledMamba
    from train import CrossAttention
    section, name, b, l, widths, d_model, d_state, layers = case
    device, sizes = "cuda" if GPU else "cpu", dict(d_model=d_model, n_layers=layers, expand=2)
    if section in ("modes", "long"):
        p = problem(len(widths), b, l, 2 * d_model, d_state, device)
        w, H0, _ = (p.pop(k).detach() for k in ("w", "H0", "D"))     # coupling "mean" has no dw
        scan = {**MODES, "loop": loop, "kernel": triton_coupled_scan}.get(name, MODES["scan"])
        dy = torch.randn_like(p["x"])
        return lambda: torch.autograd.grad(scan(**p, w=w, H0=H0)[0], list(p.values()), dy)
    if name in ("explicit", "fused"):
        model = CrossAttention(widths, 1, dropout=0.0, explicit=name == "explicit", **sizes)
    else:
        model = CoupledMamba(widths, d_state=d_state, coupling="none" if name == "lone" else "mean",
                             mode="recurrence" if name == "recurrence" else "auto", **sizes)
    model, state = model.to(device), model.init_state(b)
    shape, adam = (b,) if section == "stream" else (b, l), torch.optim.Adam(model.parameters())
    xs = [torch.randn(*shape, width, device=device) for width in widths]

    def train():
        adam.zero_grad()
        (model(xs) - 1).abs().mean().backward()
        adam.step()

    @torch.no_grad()
    def predict():
        nonlocal state
        for _ in range(l if section == "stream" else 0):
            _, state = model.step(xs, state)
        return state if section == "stream" else model(xs)

    return train if section == "training" else predict


def memory(field):
    """Bytes of tensors on a GPU, else of this process: now ("VmRSS") or at most ("VmHWM")."""
    if GPU:
        return torch.cuda.memory_allocated() if field == "VmRSS" else \
            torch.cuda.max_memory_allocated()
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@functools.cache
def warm(case):
    """The workload after a run to warm up, and the memory in use before it is timed."""
    import coupled_mamba
    if case.name == "compiled":
        coupled_mamba.compile_scan()
    workload(case._replace(l=min(case.l, 1000)) if case.section == "stream" else case)()
    run = workload(case)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:                                        # give back what is free, let VmHWM start anew
        ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return run, memory("VmRSS")


def measure(case):
    """Seconds of a run, and bytes more than before. To be called in a process of its own."""
    run, before = warm(case)
    wait, runs, start = (torch.cuda if GPU else torch.cpu).synchronize, 0, time.perf_counter()
    while not runs or time.perf_counter() - start < 0.1:
        run()
        wait()
        runs += 1
    seconds = (time.perf_counter() - start) / runs
    return seconds, memory("VmRSS" if case.section == "stream" else "VmHWM") - before


def in_turn(row):
    """{case: (seconds of each turn, bytes)} without those that failed. What slows the machine down
    for a while slows all of a row.
    """
    found, spawn = {case: ([], 0) for case in row}, multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {case: stack.enter_context(ProcessPoolExecutor(
            1, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))) for case in row}
        for turn in range(7):
            for case in list(found):
                try:
                    seconds, size = pools[case].submit(measure, case).result()
                    found[case] = [*found[case][0], seconds], size
                except KeyboardInterrupt:                                # the workers know nothing
                    for worker in multiprocessing.active_children():
                        worker.kill()
                    raise
                except (MemoryError, RuntimeError) as error:             # or it was killed
                    print(f"{case.name}: {error}", file=sys.stderr)
                    del found[case]
            slowest = max((turns[-1] for turns, _ in found.values()), default=99)
            if slowest > 20 or turn >= 2 and slowest > 1:
                break
    return found


def benchmark(sections=SECTIONS):
    """Print a table per section; return its lines as dicts of Case, "seconds" and "MB"."""
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    print(torch.cuda.get_device_name() if GPU else
          f"{torch.get_num_threads()} threads of {cpu or platform.processor()}",
          f"torch {torch.__version__}, float32, median of several runs taken in turn", sep=", ")
    print("MB: beside the inputs. x time, x MB: over the last line of the same l. -: it failed")
    lines = []
    for section, (title, names, rows) in sections.items():
        print(f"\n{section}: {title}\n    b      l layers  case         seconds   us/step       MB"
              "   x time     x MB", flush=True)
        for sizes in rows:
            row = [Case(section, name, **sizes) for name in names
                   if name != ("compiled" if GPU else "kernel")]
            found = in_turn(row)
            for case in row:
                line, cells = case._asdict() | {"seconds": None, "MB": None}, "        -"
                if case in found:
                    (seconds, size), ours = found[case], found.get(row[-1], found[case])
                    line |= {"seconds": statistics.median(seconds), "MB": size / 1e6}
                    ratio = statistics.median(s / t for s, t in zip(seconds, ours[0]))
                    cells = (f"{line['seconds']:9.5f} {line['seconds'] / case.l * 1e6:9.1f} "
                             f"{line['MB']:8.1f} {ratio:8.2f} {size / max(ours[1], 1):8.2f}")
                lines.append(line)
                print(f"{case.b:5} {case.l:6} {case.layers:6}  {case.name:10} {cells}", flush=True)
    return lines


def plot(lines, file):
    """Memory and time against l, as in Figures 3 and 4, and time of the modes."""
    from matplotlib.figure import Figure
    figure = Figure((12, 3.5), layout="constrained")
    panels = ("attention", "MB"), ("attention", "seconds"), ("modes", "seconds")
    for axes, (section, value) in zip(figure.subplots(1, 3), panels):
        some = [line for line in lines if line["section"] == section and line["b"] > 1]
        for name in dict.fromkeys(line["name"] for line in some):
            axes.plot(*zip(*((line["l"], line[value]) for line in some if line["name"] == name)),
                      "o-", label=name)
        axes.set(title=section, xlabel="l", ylabel=value)
        axes.legend()
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(
        description="Check the kernels against the float64 reference (without a GPU: in Triton's "
                    "interpreter), print what the compiler makes of them (no GPU needed), and on a "
                    "GPU time them. Exit code 1 if an error is too large or a register is spilled.")
    for name, text in (("check", "the errors: about a minute without a GPU"),
                       ("compile", "the compile table"),
                       ("benchmark", "time and memory of the modes, of the model beside cross "
                        "attention, of a stream, of training, on a GPU or a CPU")):
        parser.add_argument("--" + name, action="store_true", help=f"only {text}")
    parser.add_argument("--plot", metavar="FILE.svg", type=Path,
                        help="--benchmark, then draw it; needs matplotlib")
    args, good = parser.parse_args(), True
    everything = not any(vars(args).values())
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: there is no folder {args.plot.parent}")
    if args.compile and INTERPRETED:
        parser.error("--compile does not go with TRITON_INTERPRET=1: unset it")
    if everything or args.check:
        if GPU or INTERPRETED:
            good = check()
        else:
            again = [sys.executable, __file__, "--check"]
            good = not subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if (everything and not INTERPRETED) or args.compile:
        good &= compile_table()
    if (everything and GPU) or args.benchmark or args.plot:
        lines = benchmark()
        if args.plot:
            plot(lines, args.plot)
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
