"""The coupled scan as Triton kernels for NVIDIA GPUs, forward and backward.

`coupled_mamba.coupled_scan` calls `scan` in mode "kernel". Symbols, shapes and the
chain rule, which stands above `Scan` there, are those of coupled_mamba.py.

A program is one warp of 32 threads. It owns one sample, one segment of time and a block
of BE channels, and walks through its segment with H in registers:

    time      0 ............................................... l
    segments  |        0        |        1        |     2     |    few samples: several
    chunks    |...|...|...|...|...|...|...|...|...|...|...|...|    each start is kept

Many samples fill a GPU with one segment each. If there are few, time is cut into
segments that are walked at the same time, in two passes ("reduce, then scan"):

    1. `_reduce`   walks each segment from H = 0: product of P, and the H at its end
    2. `_forward`  takes H over all segments before its own, H <- product * H + end,
                   then walks its segment from its true start, and writes y

`_backward` is the same scan from the end of time, in the same two passes. It needs H at
every step, and computes it again chunk by chunk from the kept states, into a work space
of CHUNK steps per program. No tensor as large as S or V exists.

With one warp per program, sums stay within the warp. Several warps would have to add up
through shared memory and wait there: with four, `_backward` takes three times as long
(measured on an H200).
"""
import math
import os
import subprocess
import sys

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton import knobs

CHUNK = 16                       # steps between two kept states
SEGMENT = 64                     # the shortest segment, in steps
FORWARD, BACKWARD = 4, 2         # the fewest segments for which one more pass pays
TILE = 1024                      # numbers of H in one program, at most
RESIDENT = 8                     # programs of 32 x 255 registers that a processor holds
LOG2E = tl.constexpr(math.log2(math.e))


# ------------------------------------------------------------------------- the kernels
# All tensors are contiguous, float32 or float64. BE divides e and n is a power of two:
# no load needs a mask. Offsets into kept states have 64 bits, others 32, for speed.
@triton.jit
def _place(segments, BE: tl.constexpr, N: tl.constexpr):
    """Of this program: its sample, its segment, its channels, the states, its tile."""
    i = tl.program_id(0) // segments
    s = tl.program_id(0) % segments
    channels = tl.program_id(1) * BE + tl.arange(0, BE)
    states = tl.arange(0, N)
    return i, s, channels, states, channels[:, None] * N + states[None, :]


@triton.jit
def _load_A2(A, tile, size, M: tl.constexpr):
    """A log2(e) of every chain: exp2 is one instruction, exp is several."""
    A2 = ()
    for k in tl.static_range(M):
        A2 += (tl.load(A + k * size + tile) * LOG2E,)
    return A2


@triton.jit
def _collapse(x, delta, A2, B, w, row, rows, channels, states, e,
              M: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    """P and U of a step (Eq. 7). With REVERSE: P and Q, given dy for x and C for B."""
    P = tl.zeros(A2[0].shape, A2[0].dtype)
    U = tl.zeros(A2[0].shape, A2[0].dtype)
    for k in tl.static_range(M):
        at = k * rows + row
        d = tl.load(delta + (at * e + channels))
        x_ = tl.load(x + (at * e + channels))
        B_ = tl.load(B + (at * N + states))
        w_ = tl.load(w + at)
        S = tl.exp2(d[:, None] * A2[k])
        P += w_ * S
        if REVERSE:
            U += S * (x_[:, None] * B_[None, :])
        else:
            U += (w_ * d * x_)[:, None] * B_[None, :]
    return P, U


@triton.jit
def _reduce(
    x, delta, A, B, w,           # as in `_forward`
    product, end,                # (b, segments, e, n), written
    b, l, e, segments, length,
    M: tl.constexpr, BE: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
):
    """The product of P over a segment, and H at its end if it starts from H = 0; with
    REVERSE, G at its start if it ends with G = 0.
    """
    i, s, channels, states, tile = _place(segments, BE, N)
    A2 = _load_A2(A, tile, e * N, M)
    H = tl.zeros(A2[0].shape, A2[0].dtype)
    total = H + 1
    first = s * length
    last = min(first + length, l) - 1

    for j in tl.range(last - first + 1, num_stages=3):    # two more steps load early
        t = last - j if REVERSE else first + j
        P, U = _collapse(x, delta, A2, B, w, i * l + t, b * l, channels, states, e,
                         M, N, REVERSE)
        H = P * H + U                                                # Eq. 7
        total *= P

    at = (i * segments + s).to(tl.int64) * e * N + tile
    tl.store(product + at, total)
    tl.store(end + at, H)


@triton.jit
def _forward(
    x, delta,                    # (m, b, l, e)
    A,                           # (m, e, n)
    B, C,                        # (m, b, l, n)
    w,                           # (m, b, l)
    H0,                          # (b, e, n)
    product, end,                # (b, segments, e, n), by `_reduce`
    y,                           # (m, b, l, e), written
    H_last,                      # (b, e, n), written
    keep,                        # (b, chunks, e, n), written if KEEP
    b, l, e, segments, length,
    M: tl.constexpr, BE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    KEEP: tl.constexpr,
):
    """y of a segment. `keep` gets the H before each chunk."""
    i, s, channels, states, tile = _place(segments, BE, N)
    A2 = _load_A2(A, tile, e * N, M)
    H = tl.load(H0 + i * e * N + tile)
    for before in range(s):
        at = (i * segments + before).to(tl.int64) * e * N + tile
        H = tl.load(product + at) * H + tl.load(end + at)

    for c in range(s * length // K, tl.cdiv(min((s + 1) * length, l), K)):
        if KEEP:
            tl.store(keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * N + tile, H)

        for t in tl.range(c * K, min(c * K + K, l), num_stages=3):
            H_next = tl.zeros(A2[0].shape, A2[0].dtype)
            ys = ()

            for k in tl.static_range(M):
                row = (k * b + i) * l + t
                d = tl.load(delta + (row * e + channels))
                x_ = tl.load(x + (row * e + channels))
                B_ = tl.load(B + (row * N + states))
                C_ = tl.load(C + (row * N + states))
                w_ = tl.load(w + row)

                S = tl.exp2(d[:, None] * A2[k])
                h = S * H + (d * x_)[:, None] * B_[None, :]          # Eq. 6
                ys += (tl.sum(h * C_[None, :], 1),)
                H_next += w_ * h

            for k in tl.static_range(M):         # stored after all loads: none waits
                row = (k * b + i) * l + t
                tl.store(y + (row * e + channels), ys[k])
            H = H_next

    if s == segments - 1:
        tl.store(H_last + i * e * N + tile, H)


@triton.jit
def _backward(
    x, delta, A, B, C, w,        # as in `_forward`
    dH_last,                     # (b, e, n)
    product, end,                # (b, segments, e, n), by `_reduce`, of G
    dy,                          # (m, b, l, e)
    keep,                        # (b, chunks, e, n)
    work,                        # (programs, K, BE, n): H before each step of a chunk
    dx, ddelta,                  # (m, b, l, e), written
    dA,                          # (b segments, m, e, n), written: a part per program
    dB, dC,                      # (m, b, l, n): the blocks of e add to them
    dw,                          # (blocks of e, m, b, l), written if DW
    dH0,                         # (b, e, n), written
    b, l, e, segments, length,
    M: tl.constexpr, BE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    DW: tl.constexpr,
):
    """All gradients, for a segment that is walked from its end."""
    i, s, channels, states, tile = _place(segments, BE, N)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    work += program * K * BE * N
    work += tl.arange(0, BE)[:, None] * N + states[None, :]
    dw += tl.program_id(1).to(tl.int64) * M * b * l
    dA += tl.program_id(0).to(tl.int64) * M * e * N
    A2 = _load_A2(A, tile, e * N, M)
    dA_ = ()
    for k in tl.static_range(M):
        dA_ += (tl.zeros(A2[0].shape, A2[0].dtype),)
    G = tl.load(dH_last + i * e * N + tile)
    for after in range(segments - 1, s, -1):
        at = (i * segments + after).to(tl.int64) * e * N + tile
        G = tl.load(product + at) * G + tl.load(end + at)

    for c in range(tl.cdiv(min((s + 1) * length, l), K) - 1, s * length // K - 1, -1):
        H = tl.load(keep + (i * tl.cdiv(l, K) + c).to(tl.int64) * e * N + tile)
        steps = min(K, l - c * K)
        first = i * l + c * K

        for j in tl.range(steps, num_stages=3):              # forward, by Eq. 7
            tl.store(work + j * BE * N, H)
            P, U = _collapse(x, delta, A2, B, w, first + j, b * l, channels,
                             states, e, M, N, False)
            H = P * H + U

        for r in tl.range(steps, num_stages=3):              # and back
            j = steps - 1 - r
            H = tl.load(work + j * BE * N)                   # H[t-1]
            G_next = tl.zeros(A2[0].shape, A2[0].dtype)
            dA_next = ()

            for k in tl.static_range(M):
                row = k * (b * l) + first + j
                d = tl.load(delta + (row * e + channels))
                x_ = tl.load(x + (row * e + channels))
                dy_ = tl.load(dy + (row * e + channels))
                B_ = tl.load(B + (row * N + states))
                C_ = tl.load(C + (row * N + states))
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
                tl.atomic_add(dB + (row * N + states), dB_, sem="relaxed")
                tl.atomic_add(dC + (row * N + states), dC_, sem="relaxed")
                tl.store(dx + (row * e + channels), dv * d)
                tl.store(ddelta + (row * e + channels), dv * x_ + zA)

            G = G_next
            dA_ = dA_next

    for k in tl.static_range(M):
        tl.store(dA + k * e * N + tile, dA_[k])
    if s == 0:
        tl.store(dH0 + i * e * N + tile, G)


# -------------------------------------------------------------------------- the launch
def plan(x, A, backward):
    """Cut e into blocks of BE and, if they do not fill the GPU, time into segments.

    Returns the grid (b segments, blocks of e), the sizes and the constants of a launch.
    """
    m, b, l, e = x.shape
    n = A.shape[-1]
    # Registers hold half as many numbers in backward, of many modalities, in float64.
    crowded = m > 3 or (m == 3 and n <= 16)
    tile = TILE // 2 ** (backward + crowded + (A.dtype == torch.float64))
    BE = min(max(1, tile // n), e & -e)          # e & -e: the largest power of two in e

    processors = 132                             # those of an H100 or H200
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    segments = min(processors * RESIDENT // (b * (e // BE)), l // SEGMENT)
    if segments < (BACKWARD if backward else FORWARD):
        segments = 1
    length = CHUNK * triton.cdiv(triton.cdiv(l, segments), CHUNK)    # whole chunks
    segments = triton.cdiv(l, length)
    constants = {"M": m, "BE": BE, "N": n, "num_warps": 1}
    return (b * segments, e // BE), (b, l, e, segments, length), constants


def reduce(state, x, delta, A, B, w, grid, sizes, constants, reverse):
    """Product and end of each segment, (b, segments, e, n); not read if it is one."""
    b, _, _, segments, _ = sizes
    product, end = state.new_empty(2, b, segments, *state.shape[1:])
    if segments > 1:
        _reduce[grid](x, delta, A, B, w, product, end, *sizes, REVERSE=reverse,
                      **constants)
    return product, end


class Scan(torch.autograd.Function):
    """Kept for backward: the inputs, and H before each chunk of CHUNK steps."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, w, H0):
        x, delta, A, B, C, w, H0 = (v.contiguous() for v in (x, delta, A, B, C, w, H0))
        grid, sizes, constants = plan(x, A, backward=False)
        training = any(ctx.needs_input_grad)
        chunks = triton.cdiv(x.shape[2], CHUNK) if training else 0
        keep = H0.new_empty(len(H0), chunks, *H0.shape[1:])
        y = torch.empty_like(x)
        H_last = torch.empty_like(H0)

        with torch.cuda.device_of(x):
            ends = reduce(H0, x, delta, A, B, w, grid, sizes, constants, False)
            _forward[grid](x, delta, A, B, C, w, H0, *ends, y, H_last, keep, *sizes,
                           K=CHUNK, KEEP=training, **constants)
        ctx.save_for_backward(x, delta, A, B, C, w, keep)
        return y, H_last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dH_last):
        x, delta, A, B, C, w, keep = ctx.saved_tensors
        dy = dy.contiguous()
        dH_last = dH_last.contiguous()
        grid, sizes, constants = plan(x, A, backward=True)
        needs_dw = ctx.needs_input_grad[5]
        dx, ddelta, dH0 = (torch.empty_like(v) for v in (x, delta, dH_last))
        dB, dC = (torch.zeros_like(v) for v in (B, C))
        dA = A.new_empty(grid[0], *A.shape)
        dw = w.new_empty(grid[1] if needs_dw else 0, *w.shape)
        work = A.new_empty(*grid, CHUNK, constants["BE"], A.shape[-1])

        with torch.cuda.device_of(x):
            ends = reduce(dH_last, dy, delta, A, C, w, grid, sizes, constants, True)
            _backward[grid](x, delta, A, B, C, w, dH_last, *ends, dy, keep, work, dx,
                            ddelta, dA, dB, dC, dw, dH0, *sizes, K=CHUNK, DW=needs_dw,
                            **constants)
        dw = dw.sum(0) if needs_dw else None
        return dx, ddelta, dA.sum(0), dB, dC, dw, dH0


# --------------------------------------------------------------------------- the entry
def scan(x, delta, A, B, C, w, H0):
    """Mode "kernel", for arguments that `coupled_mamba.coupled_scan` has checked.

    All are float32, or all float64; shapes as in `_forward`. Returns y without D x, and
    H_last. Differentiable once. Sums in dB and dC have no fixed order.
    """
    return Scan.apply(x, delta, A, B, C, w, H0)


def unavailable(x, A):
    """Why `scan` cannot run on these tensors; None if it can."""
    m, b, l, e = x.shape
    n = A.shape[-1]
    if m > 8:
        return f"it serves up to 8 modalities and got {m}"
    if n & (n - 1):
        return f"it needs a state size n that is a power of two and got {n}"
    if m * b * l * max(e, n) >= 2 ** 31 or b * e * n >= 2 ** 31:
        return "it needs tensors of less than 2^31 elements: use smaller batches"
    if torch.are_deterministic_algorithms_enabled():
        return "its sums have no fixed order and deterministic algorithms are asked for"
    if knobs.runtime.interpret:                  # TRITON_INTERPRET=1
        return None
    if not x.is_cuda or torch.version.hip:
        return ("it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment "
                "before Triton is imported, to be slow on a CPU")
    found = torch.cuda.get_device_capability(x.device)
    if found < (8, 0):
        return f"it needs a GPU of compute capability 8.0 and got {found[0]}.{found[1]}"
    try:
        triton.runtime.driver.active.utils       # Triton compiles it in C, once
    except Exception as error:                   # it has many ways to fail
        return f"Triton cannot build its launcher ({type(error).__name__}: {error})"
    return None


# -------------------------------------------------------------------- python kernel.py
def results(p, dy, dH, mode):
    """y, H_last, and all gradients by name, if those of y and H_last are dy and dH."""
    from coupled_mamba import coupled_scan
    p = {name: v.detach().requires_grad_() for name, v in p.items()}
    y, H = coupled_scan(**p, mode=mode)
    gradients = torch.autograd.grad((y, H), list(p.values()), (dy.to(y), dH.to(H)))
    return {"y": y, "H_last": H, **{"d" + name: v for name, v in zip(p, gradients)}}


def main():
    """Check the kernels, in the interpreter if need be; on a GPU, time the modes."""
    gpu = torch.cuda.is_available()
    if not gpu and not knobs.runtime.interpret:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, __file__], env=environment).returncode
    device = torch.cuda.get_device_name() if gpu else "a CPU"
    sizes = [(3, 2, 20, 12, 16), (1, 1, 33, 4, 1), (1, 1, 257, 2, 4)]
    if gpu:
        sizes += [(3, 128, 50, 256, 64), (3, 16, 500, 256, 64), (3, 1, 4000, 256, 64)]
    worst = 0
    print(f"error / largest value, against mode='recurrence' in float64, on {device}")
    for m, b, l, e, n in sizes:
        torch.manual_seed(0)
        with torch.device("cuda" if gpu else "cpu"):
            p = dict(x=torch.randn(m, b, l, e), A=-torch.randn(m, e, n).div(2).exp(),
                     delta=10 ** (torch.randn(m, b, l, e) / 2 - 1.5),
                     B=torch.randn(m, b, l, n), C=torch.randn(m, b, l, n),
                     D=torch.randn(m, e), w=torch.randn(m, b, l).softmax(0),
                     H0=torch.randn(b, e, n))
            d = torch.randn(m, b, l, e), torch.randn(b, e, n)
        exact = results({name: v.double() for name, v in p.items()}, *d, "recurrence")
        errors = {name: ((v - exact[name]).abs().max() / exact[name].abs().max()).item()
                  for name, v in results(p, *d, "kernel").items()}
        worst = max(worst, *errors.values())
        print(f"m {m} b {b} l {l} e {e} n {n}: ",
              " ".join(f"{name} {error:.0e}" for name, error in errors.items()))
        if gpu and e == 256:
            for mode in ("recurrence", "scan", "kernel"):
                ms = triton.testing.do_bench(lambda: results(p, *d, mode))
                print(f"    {mode}: {ms:.3f} ms forward and backward", flush=True)
    return 0 if worst < 2e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
