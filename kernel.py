"""The coupled scan as Triton kernels for NVIDIA GPUs, forward and backward.

`coupled_mamba.coupled_scan` calls `scan` in mode "kernel". Symbols and shapes are those
of coupled_mamba.py. `python kernel.py` checks the kernels and times them on a GPU.

The method. A program is one warp of 32 threads. It owns one sample, one segment of time
and a block of the inner width e, and walks through its segment with H in registers:

    time      0 ............................................... l
    segments  |        0        |        1        |     2     |    few samples: several
    chunks    |...|...|...|...|...|...|...|...|...|...|...|...|    each start is kept

Many samples fill a GPU with one segment each. If there are few, time is cut into
segments that are computed at the same time, in two passes with a short step between
("reduce, then scan"):

    1. `_reduce`   walks each segment from H = 0: product of P, and the H at its end
    2. `_carry`    goes over the segments: start[s + 1] = product[s] * start[s] + end[s]
    3. `_forward`  walks each segment again, now from its true start, and writes y

Within a segment a walk needs one multiplication and one addition per step (Eq. 7).
tl.associative_scan would combine each element log(l) times, and products of P with it.

Backward is the same scan from the end of time, in the same passes. Its equations stand
above `_backward`. It needs H at every step, and recomputes it chunk by chunk from the
kept states, into a work space of CHUNK steps per program. No tensor as large as S or V
exists.

With one warp per program, sums over channels and states stay within the warp. Several
warps would have to add up through shared memory, and would wait there most of the time.
"""
import argparse
import functools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

CHUNK = 16                       # steps between two kept states
SEGMENT = 64                     # the shortest segment, in steps
FORWARD, BACKWARD = 4, 2         # the fewest segments for which one more pass pays
TILE = 512                       # numbers of H in one program: 16 per thread
MODALITIES = 8                   # the most that the registers of a program can serve
WIDE = 2 ** 31                   # tensors with more elements need offsets of 64 bits

# A multiprocessor has 65,536 registers, and a thread uses up to 255 of them: so many
# programs of 32 threads run on it at the same time. Without a GPU we plan for an H100.
RESIDENT = 65536 // (32 * 255)
PROCESSORS = 132

LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = knobs.runtime.interpret        # TRITON_INTERPRET=1, read at import


# ------------------------------------------------------------------------- the kernels
# All tensors are contiguous and of one type, ACC: float32 or float64. INDEX is the type
# of offsets. Channels beyond e and states beyond n read 0: then S = 1, V = 0 and C = 0,
# and nothing comes of them. EVEN says that there are none.
@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def _load_A2(A, tile, in_tile, size, M: tl.constexpr):
    """A log2(e) of every chain: exp2 is one instruction, exp is several."""
    A2 = ()
    for k in tl.static_range(M):
        A2 += (_load(A + k * size + tile, in_tile) * LOG2E,)
    return A2


@triton.jit
def _reduce(
    x, delta,                    # (m, b, l, e)
    A,                           # (m, e, n), as wide as the state
    B,                           # (m, b, l, n)
    w,                           # (m, b, l)
    product, end,                # (b, segments, e, n), written
    b, l, e, n, segments, length,
    M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, REVERSE: tl.constexpr,
):
    """The product of P over a segment, and the H at its end if it starts from H = 0.

    With REVERSE: the G at its start if it ends with G = 0. Then dy is given for x and C
    for B, since Q = sum_m S (C dy) takes the place of U = sum_m w (Delta x B).
    """
    i = (tl.program_id(0) // segments).to(INDEX)                     # the sample
    s = tl.program_id(0) % segments                                  # the segment
    channels = tl.program_id(1) * BE + tl.arange(0, BE)
    states = tl.arange(0, BN)
    in_e = (channels < e) | EVEN
    in_n = (states < n) | EVEN
    tile = channels[:, None] * n + states[None, :]
    in_tile = in_e[:, None] & in_n[None, :]

    A2 = _load_A2(A, tile, in_tile, e * n, M)
    H = tl.zeros((BE, BN), ACC)
    total = tl.full((BE, BN), 1.0, ACC)
    first = s * length
    last = min(first + length, l) - 1

    for j in tl.range(last - first + 1, num_stages=2):       # the next step loads early
        t = last - j if REVERSE else first + j
        P = tl.zeros((BE, BN), ACC)
        U = tl.zeros((BE, BN), ACC)

        for k in tl.static_range(M):
            row = (k * b + i) * l + t
            d = _load(delta + (row * e + channels), in_e)
            x_ = _load(x + (row * e + channels), in_e)
            B_ = _load(B + (row * n + states), in_n)
            w_ = tl.load(w + row)

            S = tl.exp2(d[:, None] * A2[k])
            P += w_ * S
            if REVERSE:
                U += S * (x_[:, None] * B_[None, :])
            else:
                U += (w_ * d * x_)[:, None] * B_[None, :]

        H = P * H + U                                                # Eq. 7
        total *= P

    out = (i * segments + s).to(tl.int64) * e * n + tile
    tl.store(product + out, total, mask=in_tile)
    tl.store(end + out, H, mask=in_tile)


@triton.jit
def _carry(
    product, end,                # (b, segments, e n)
    state,                       # (b, e n): where the first segment starts
    start,                       # (b, segments, e n), written
    size, segments, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):
    """The state that each segment starts from. With REVERSE, the last comes first."""
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_size = part < size
    H = _load(state + i * size + part, in_size)

    for j in tl.range(segments, num_stages=2):
        s = segments - 1 - j if REVERSE else j
        at = (i * segments + s) * size + part
        tl.store(start + at, H, mask=in_size)
        H = _load(product + at, in_size) * H + _load(end + at, in_size)


@triton.jit
def _forward(
    x, delta,                    # (m, b, l, e)
    A,                           # (m, e, n)
    B, C,                        # (m, b, l, n)
    D,                           # (m, e)
    w,                           # (m, b, l)
    start,                       # (b, segments, e, n)
    y,                           # (m, b, l, e), written
    H_last,                      # (b, e, n), written
    keep,                        # (b, chunks, e, n), written if KEEP
    b, l, e, n, segments, length,
    M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr,
):
    """y of a segment from its start state. `keep` gets the H before each chunk."""
    i = (tl.program_id(0) // segments).to(INDEX)
    s = tl.program_id(0) % segments
    channels = tl.program_id(1) * BE + tl.arange(0, BE)
    states = tl.arange(0, BN)
    in_e = (channels < e) | EVEN
    in_n = (states < n) | EVEN
    tile = channels[:, None] * n + states[None, :]
    in_tile = in_e[:, None] & in_n[None, :]

    A2 = _load_A2(A, tile, in_tile, e * n, M)
    skip = ()
    for k in tl.static_range(M):
        skip += (_load(D + (k * e + channels), in_e),)
    start += (i * segments + s).to(tl.int64) * e * n
    H = _load(start + tile, in_tile)

    for c in range(s * length // K, tl.cdiv(min((s + 1) * length, l), K)):
        if KEEP:
            kept = keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * n
            tl.store(kept + tile, H, mask=in_tile)

        for t in tl.range(c * K, min(c * K + K, l), num_stages=2):
            H_next = tl.zeros((BE, BN), ACC)
            ys = ()

            for k in tl.static_range(M):
                row = (k * b + i) * l + t
                d = _load(delta + (row * e + channels), in_e)
                x_ = _load(x + (row * e + channels), in_e)
                B_ = _load(B + (row * n + states), in_n)
                C_ = _load(C + (row * n + states), in_n)
                w_ = tl.load(w + row)

                S = tl.exp2(d[:, None] * A2[k])
                h = S * H + (d * x_)[:, None] * B_[None, :]          # Eq. 6
                ys += (tl.sum(h * C_[None, :], 1) + skip[k] * x_,)
                H_next += w_ * h

            for k in tl.static_range(M):         # stored after all loads: none waits
                row = (k * b + i) * l + t
                tl.store(y + (row * e + channels), ys[k], mask=in_e)
            H = H_next

    if s == segments - 1:
        tl.store(H_last + i * e * n + tile, H, mask=in_tile)


# The chain rule on Eqs. 6-7, with g[m,t] = dL/dh[m,t] and G[t] = dL/dH[t]:
#     g[m,t] = C[m,t] dy[m,t] + w[m,t] G[t]
#     G[t-1] = sum_m S[m,t] g[m,t] = P[t] G[t] + Q[t]
#     Q[t]    = sum_m S[m,t] C[m,t] dy[m,t]
# so backward is the same scan, run from the end. With v = delta x, so that V = v B, the
# rest is local:
#     z  = g S H[t-1]      ddelta = sum_n z A + dv x      dA = sum_bl z delta
#     dv = sum_n g B       dx = dv delta + D dy           dB = sum_e g v
#     dC = sum_e h dy      dw = sum_en G h                dH0 = G before the first step
@triton.jit
def _backward(
    x, delta,                    # (m, b, l, e)
    A,                           # (m, e, n)
    B, C,                        # (m, b, l, n)
    D,                           # (m, e)
    w,                           # (m, b, l)
    start,                       # (b, segments, e, n): the G after each segment
    dy,                          # (m, b, l, e)
    keep,                        # (b, chunks, e, n)
    work,                        # (programs, K, BE, BN): H before each step of a chunk
    dx, ddelta,                  # (m, b, l, e), written
    dA,                          # (b segments, m, e, n), written: a part per program
    dB, dC,                      # (slices, m, b, l, n): the blocks of e add to them
    dw,                          # (blocks of e, m, b, l), written if DW, as dA is
    dH0,                         # (b, e, n), written
    b, l, e, n, segments, length, slices,
    M: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr, DW: tl.constexpr,
):
    """All gradients but that of D, for a segment that is walked from its end."""
    i = (tl.program_id(0) // segments).to(INDEX)
    s = tl.program_id(0) % segments
    block = tl.program_id(1)
    channels = block * BE + tl.arange(0, BE)
    states = tl.arange(0, BN)
    in_e = (channels < e) | EVEN
    in_n = (states < n) | EVEN
    tile = channels[:, None] * n + states[None, :]
    in_tile = in_e[:, None] & in_n[None, :]

    work += (tl.program_id(0) * tl.num_programs(1) + block).to(tl.int64) * K * BE * BN
    work += tl.arange(0, BE)[:, None] * BN + states[None, :]
    dB += (block % slices).to(tl.int64) * M * b * l * n
    dC += (block % slices).to(tl.int64) * M * b * l * n
    dw += block.to(tl.int64) * M * b * l

    A2 = _load_A2(A, tile, in_tile, e * n, M)
    dA_ = ()
    for k in tl.static_range(M):
        dA_ += (tl.zeros((BE, BN), ACC),)
    start += (i * segments + s).to(tl.int64) * e * n
    G = _load(start + tile, in_tile)

    for c in range(tl.cdiv(min((s + 1) * length, l), K) - 1, s * length // K - 1, -1):
        kept = keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * n
        H = _load(kept + tile, in_tile)
        steps = min(K, l - c * K)

        for j in tl.range(steps, num_stages=2):              # forward, by Eq. 7
            tl.store(work + j * BE * BN, H)
            P = tl.zeros((BE, BN), ACC)
            U = tl.zeros((BE, BN), ACC)

            for k in tl.static_range(M):
                row = (k * b + i) * l + c * K + j
                d = _load(delta + (row * e + channels), in_e)
                x_ = _load(x + (row * e + channels), in_e)
                B_ = _load(B + (row * n + states), in_n)
                w_ = tl.load(w + row)
                P += w_ * tl.exp2(d[:, None] * A2[k])
                U += (w_ * d * x_)[:, None] * B_[None, :]
            H = P * H + U

        for r in tl.range(steps, num_stages=2):              # and back
            j = steps - 1 - r
            H = tl.load(work + j * BE * BN)
            G_next = tl.zeros((BE, BN), ACC)
            dA_next = ()

            for k in tl.static_range(M):
                row = (k * b + i) * l + c * K + j
                d = _load(delta + (row * e + channels), in_e)
                x_ = _load(x + (row * e + channels), in_e)
                dy_ = _load(dy + (row * e + channels), in_e)
                B_ = _load(B + (row * n + states), in_n)
                C_ = _load(C + (row * n + states), in_n)
                D_ = _load(D + (k * e + channels), in_e)
                w_ = tl.load(w + row)

                v = d * x_
                S = tl.exp2(d[:, None] * A2[k])
                SH = S * H
                h = SH + v[:, None] * B_[None, :]
                if DW:
                    tl.store(dw + row, tl.sum(G * h))
                g = dy_[:, None] * C_[None, :] + w_ * G
                z = SH * g
                G_next += S * g
                dA_next += (dA_[k] + z * d[:, None],)

                dv = tl.sum(g * B_[None, :], 1)
                zA = tl.sum(z * A2[k], 1) / LOG2E
                dB_ = tl.sum(g * v[:, None], 0)
                dC_ = tl.sum(h * dy_[:, None], 0)
                tl.atomic_add(dB + (row * n + states), dB_, mask=in_n, sem="relaxed")
                tl.atomic_add(dC + (row * n + states), dC_, mask=in_n, sem="relaxed")
                tl.store(dx + (row * e + channels), D_ * dy_ + dv * d, mask=in_e)
                tl.store(ddelta + (row * e + channels), dv * x_ + zA, mask=in_e)

            G = G_next
            dA_ = dA_next

    for k in tl.static_range(M):
        out = dA + (tl.program_id(0).to(tl.int64) * M + k) * e * n
        tl.store(out + tile, dA_[k], mask=in_tile)
    if s == 0:
        tl.store(dH0 + i * e * n + tile, G, mask=in_tile)


# -------------------------------------------------------------------------- the launch
class Plan(NamedTuple):
    """How a problem is cut into programs."""
    grid: tuple                  # (b segments, blocks of e)
    sizes: tuple                 # b, l, e, n, segments, steps of a segment
    constants: dict              # what the kernels are compiled for


@functools.cache
def _plan(m, b, l, e, n, double, backward, processors, chunk, shortest, fewest):
    """Cut e into blocks and, if they do not fill the GPU, time into segments."""
    BN = triton.next_power_of_2(n)
    tile = TILE
    if double or m > 4 or (backward and (m > 3 or (m == 3 and BN <= 32))):
        tile = TILE // 2                         # more does not fit into the registers
    BE = min(max(1, tile // BN), triton.next_power_of_2(e))
    blocks = triton.cdiv(e, BE)

    segments = min(processors * RESIDENT // (b * blocks), l // shortest)
    if segments < fewest:
        segments = 1
    length = chunk * triton.cdiv(triton.cdiv(l, segments), chunk)    # whole chunks
    segments = triton.cdiv(l, length)

    wide = max(m * b * l * max(e, n), b * e * n) >= WIDE
    constants = {"M": m, "BE": BE, "BN": BN, "EVEN": e % BE == 0 and n == BN,
                 "ACC": tl.float64 if double else tl.float32,
                 "INDEX": tl.int64 if wide else tl.int32, "num_warps": 1}
    return Plan((b * segments, blocks), (b, l, e, n, segments, length), constants)


def _plan_for(x, A, backward):
    processors = PROCESSORS
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return _plan(*x.shape, A.shape[-1], x.dtype == torch.float64, backward, processors,
                 CHUNK, SEGMENT, BACKWARD if backward else FORWARD)


def _starts(state, x, delta, A, B, w, plan, reverse):
    """The states (b, segments, e, n) that the segments start from, given the first."""
    b, _, e, n, segments, _ = plan.sizes
    if segments == 1:
        return state

    product = state.new_empty(b, segments, e, n)
    end = torch.empty_like(product)
    start = torch.empty_like(product)
    _reduce[plan.grid](x, delta, A, B, w, product, end, *plan.sizes, REVERSE=reverse,
                       **plan.constants)
    _carry[b, triton.cdiv(e * n, 128)](product, end, state, start, e * n, segments,
                                       BLOCK=128, REVERSE=reverse, num_warps=1)
    return start


def _add_up(parts):
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _prepared(*tensors, dtype):
    """Contiguous and of one type. To load bfloat16 at each step would take longer."""
    return [v.to(dtype).contiguous() for v in tensors]


@torch.library.custom_op("coupled_mamba::scan", mutates_args=())
def _scan(x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
          C: torch.Tensor, D: torch.Tensor, w: torch.Tensor, H0: torch.Tensor,
          train: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, H_last and, to train, the H with which each chunk starts (b, chunks, e, n)."""
    dtype = x.dtype
    x, delta, A, B, C, D, w, H0 = _prepared(x, delta, A, B, C, D, w, H0, dtype=H0.dtype)
    plan = _plan_for(x, A, backward=False)
    b, l, e, n, _, _ = plan.sizes
    y = torch.empty_like(x)
    H_last = torch.empty_like(H0)
    keep = H0.new_empty(b, triton.cdiv(l, CHUNK) if train else 0, e, n)

    with torch.cuda.device_of(x):
        start = _starts(H0, x, delta, A, B, w, plan, reverse=False)
        _forward[plan.grid](x, delta, A, B, C, D, w, start, y, H_last, keep,
                            *plan.sizes, K=CHUNK, KEEP=train, **plan.constants)
    return y.to(dtype), H_last, keep


@torch.library.custom_op("coupled_mamba::scan_backward", mutates_args=())
def _scan_backward(x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor,
                   B: torch.Tensor, C: torch.Tensor, D: torch.Tensor, w: torch.Tensor,
                   keep: torch.Tensor, dy: torch.Tensor, dH_last: torch.Tensor,
                   of_w: bool) -> list[torch.Tensor]:
    """The gradients of x, delta, A, B, C, D and H0, and if `of_w` then that of w."""
    given = [x, delta, A, B, C, D, dH_last, w]
    x, delta, A, B, C, D, w, dy, dH_last = _prepared(
        x, delta, A, B, C, D, w, dy, dH_last, dtype=keep.dtype)
    plan = _plan_for(x, A, backward=True)
    m, b, l, e = x.shape
    n = A.shape[-1]
    programs, blocks = plan.grid
    slices = 1
    if torch.are_deterministic_algorithms_enabled():
        slices = blocks                          # a block each: the order is fixed

    dx = torch.empty_like(x)
    ddelta = torch.empty_like(delta)
    dA = keep.new_empty(programs, m, e, n)
    dB = keep.new_zeros(slices, m, b, l, n)
    dC = torch.zeros_like(dB)
    dw = keep.new_empty(blocks if of_w else 0, m, b, l)
    dH0 = torch.empty_like(dH_last)
    work = keep.new_empty(programs * blocks, CHUNK, plan.constants["BE"],
                          plan.constants["BN"])

    with torch.cuda.device_of(x):
        start = _starts(dH_last, dy, delta, A, C, w, plan, reverse=True)
        _backward[plan.grid](x, delta, A, B, C, D, w, start, dy, keep, work, dx, ddelta,
                             dA, dB, dC, dw, dH0, *plan.sizes, slices, K=CHUNK, DW=of_w,
                             **plan.constants)

    dD = (dy * x).sum((1, 2))
    gradients = [dx, ddelta, _add_up(dA), _add_up(dB), _add_up(dC), dD, dH0]
    if of_w:
        gradients.append(_add_up(dw))
    return [d.to(v.dtype) for d, v in zip(gradients, given)]


# The shapes and dtypes that the operators return, which is all that torch.compile asks.
@_scan.register_fake
def _(x, delta, A, B, C, D, w, H0, train):
    chunks = -(-x.shape[2] // CHUNK) if train else 0
    keep = H0.new_empty(H0.shape[0], chunks, *H0.shape[1:])
    return x.new_empty(x.shape), H0.new_empty(H0.shape), keep


@_scan_backward.register_fake
def _(x, delta, A, B, C, D, w, keep, dy, dH_last, of_w):
    inputs = [x, delta, A, B, C, D, dH_last]
    if of_w:
        inputs.append(w)
    return [v.new_empty(v.shape) for v in inputs]


class _Scan(torch.autograd.Function):
    """Saved for backward: the inputs but H0, and H at the start of each chunk."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, w, H0, train):
        y, H_last, keep = _scan(x, delta, A, B, C, D, w, H0, train)
        ctx.save_for_backward(x, delta, A, B, C, D, w, keep)
        return y, H_last

    @staticmethod
    def backward(ctx, dy, dH_last):
        if torch.is_grad_enabled():
            raise RuntimeError("mode 'kernel' has no second derivative, which "
                               "create_graph=True asks for: use mode='recurrence'")
        of_w = ctx.needs_input_grad[6]
        gradients = _scan_backward(*ctx.saved_tensors, dy, dH_last, of_w)
        dx, ddelta, dA, dB, dC, dD, dH0 = gradients[:7]
        dw = gradients[7] if of_w else None
        return dx, ddelta, dA, dB, dC, dD, dw, dH0, None


# --------------------------------------------------------------------------- the entry
def scan(x, delta, A, B, C, D, w, H0):
    """The coupled scan, for arguments that `coupled_mamba.coupled_scan` has checked.

    Args:
        x, delta: (m, b, l, e).   A: (m, e, n).   B, C: (m, b, l, n).   D: (m, e).
        w: (m, b, l).   H0: (b, e, n) in float32, or float64 if any argument is float64.
        The others are float32, bfloat16, float16 or float64, in any memory layout.
    Returns:
        y (m, b, l, e) in the dtype of x, and H_last (b, e, n) in the dtype of H0.
        Differentiable in every argument, once. The order in which dB and dC are added
        up is fixed only under torch.use_deterministic_algorithms(True).
    """
    arguments = (x, delta, A, B, C, D, w, H0)
    train = torch.is_grad_enabled() and any(v.requires_grad for v in arguments)
    return _Scan.apply(*arguments, train)


def unavailable(device, m):
    """Why `scan` cannot run for m modalities on a torch.device; None if it can."""
    if m > MODALITIES:
        return f"it serves up to {MODALITIES} modalities and got {m}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return (f"x is on {device} and TRITON_INTERPRET=1 was not set before Triton "
                "was imported; move x to an NVIDIA GPU, or set it to be slow on a CPU")
    if torch.version.hip:
        return "it needs an NVIDIA GPU and this PyTorch is built for AMD's (ROCm)"

    found = torch.cuda.get_device_properties(device)
    if found.major < 8:
        capability = f"{found.major}.{found.minor}"
        return f"the GPU has compute capability {capability} and it needs 8.0"
    return _launcher_failure()


@functools.cache
def _launcher_failure():
    """Why Triton cannot start kernels on this machine; None if it can.

    Triton compiles a small module in C before its first launch. This has it done now.
    """
    try:
        triton.runtime.driver.active.utils
        return None
    except subprocess.CalledProcessError as error:
        reason = (f"{error.cmd[0]} failed; install the header files of Python, such as "
                  "the package python3-dev, or name another C compiler in CC")
    except AssertionError:
        reason = "libcuda.so was not found; install NVIDIA's driver or run ldconfig"
    except (RuntimeError, OSError, ImportError) as error:
        reason = f"{error}; check CC and the installation of Triton"
        if "C compiler" in str(error):
            reason = "no C compiler was found; install gcc or name one in CC"
    return f"Triton cannot build its launcher: {reason}"


# -------------------------------------------------------------------- python kernel.py
def problem(m, b, l, e, n, device):
    """Random arguments by name, with decays mostly between 0.9 and 0.999."""
    def randn(*shape):
        return torch.randn(*shape, device=device)

    p = {"x": randn(m, b, l, e), "delta": 10 ** (randn(m, b, l, e) / 2 - 1.5),
         "A": -randn(m, e, n).div(2).exp(), "B": randn(m, b, l, n),
         "C": randn(m, b, l, n), "D": randn(m, e), "w": randn(m, b, l).softmax(0),
         "H0": randn(b, e, n)}
    return {name: v.requires_grad_() for name, v in p.items()}


def errors(p):
    """The largest error of each result and gradient, relative to its largest value."""
    from coupled_mamba import coupled_scan
    exact = {name: v.detach().double().requires_grad_() for name, v in p.items()}
    dy = torch.randn_like(p["x"])
    dH = torch.randn_like(p["H0"])

    found = []
    for arguments, mode in ((p, "kernel"), (exact, "recurrence")):
        y, H = coupled_scan(**arguments, mode=mode)
        cotangents = dy.to(y.dtype), dH.to(H.dtype)
        inputs = list(arguments.values())
        found.append((y, H, *torch.autograd.grad((y, H), inputs, cotangents)))

    names = "y", "H_last", *("d" + name for name in p)
    return {name: ((v - u).abs().max() / u.abs().max()).item()
            for name, v, u in zip(names, *found)}


def check(sizes, device, tolerance):
    """Print the errors for each size; return whether all are within the tolerance."""
    print(f"error / largest value, against mode='recurrence' in float64, on {device}")
    torch.manual_seed(0)
    good = True
    for size in sizes:
        found = errors(problem(*size, device))
        print("m {}  b {}  l {}  e {}  n {}:  ".format(*size),
              "  ".join(f"{name} {error:.0e}" for name, error in found.items()))
        good = good and all(error < tolerance for error in found.values())
    return good


def time_modes(sizes):
    """Print how long the modes take on a GPU."""
    from coupled_mamba import coupled_scan
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, float32")
    print("m    b     l    e    n  mode        forward, ms  and backward, ms")
    for size in sizes:
        p = problem(*size, "cuda")
        dy = torch.randn_like(p["x"])
        for mode in ("recurrence", "scan", "kernel"):
            def forward():
                with torch.no_grad():
                    coupled_scan(**p, mode=mode)

            def forward_and_backward():
                y, _ = coupled_scan(**p, mode=mode)
                torch.autograd.grad(y, list(p.values()), dy)

            first = triton.testing.do_bench(forward)
            both = triton.testing.do_bench(forward_and_backward)
            print("{} {:4} {:5} {:4} {:4}".format(*size),
                  f" {mode:10} {first:12.3f} {both:17.3f}", flush=True)


def main():
    argparse.ArgumentParser(description=(
        "Check the kernels against the definition in float64, in Triton's interpreter "
        "if there is no GPU. If there is one, time the modes. Exit code 1 if an error "
        "is too large.")).parse_args()
    small = (3, 2, 37, 20, 16), (1, 1, 33, 5, 1), (2, 1, 257, 3, 5)
    large = (3, 128, 50, 256, 64), (3, 16, 500, 256, 64), (3, 1, 4000, 256, 64)

    if torch.cuda.is_available():
        reason = unavailable(torch.device("cuda"), 3)
        if reason:
            print(f"The kernel cannot run: {reason}.", file=sys.stderr)
            return 1
        good = check(small + large, "cuda", 2e-4)
        time_modes(large)
    elif INTERPRETED:
        good = check(small, "cpu", 1e-5)
    else:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, __file__], env=environment).returncode
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
