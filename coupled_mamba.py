"""Coupled Mamba: fuse M sequences inside the state of a state space model.

Paper: Li, Zhou, Yu, Song, Yang, "Coupled Mamba: Enhanced Multi-modal Fusion with Coupled State
Space Model", NeurIPS 2024 (arXiv 2405.18014). Built on Gu and Dao, "Mamba" (arXiv 2312.00752).
This file needs torch and nothing else: copy it into your project.

The method. A Mamba turns its input x into y through a state h, a linear recurrence over time whose
step size and maps (Delta, B, C) are computed from x at every step ("selective"). Here each modality
(text, audio, vision, ...) has such a chain, and each chain reads the last states of *all* chains:

    h[m,t] = S[m,t] * sum_k w[k,t-1] h[k,t-1] + V[m,t]      y[m,t] = C[m,t] . h[m,t] + D[m] x[m,t]

for t = 1 .. l, from a given H[0] = sum_k w[k,0] h[k,0], by default zero.
Axes, always in this order: m modalities, b batch, l time, then d (model width), e = expand * d
(inner width), n (state size).

    symbol              in code  shape              meaning
    x                   x        (m, b, l, e)       input of the state space model
    Delta               delta    (m, b, l, e)       step size, > 0
    A                   A        (m, e, n)          continuous transition, < 0
    B, C                B, C     (m, b, l, n)       input and output maps, functions of x
    D                   D        (m, e)             skip connection
    S = exp(Delta A)    S        (m, b, l, e, n)    discrete transition      Eq. 2, Alg. 1 line 13
    V = Delta B x       V        (m, b, l, e, n)    discrete input           Alg. 1 line 14
    w                   w        (m,) or (m, b, l)  share of h[k,t] in H[t], for all readers
    h                   h        (m, b, e, n)       the state of each chain
    H = sum_k w_k h_k   H        (b, e, n)          the coupled state: all that time carries along
    P, U                P, U     (b, l, e, n)       transition and input of H, see `collapse`

Reading order: `discretize`, `recurrence` (the definition), `collapse` (the idea), `convolution` and
`scan` (the same numbers in less time or memory), `coupled_scan` (calls one of the three), `Block`
(Alg. 1), `CoupledMamba` (Fig. 1). On a CPU, `compile_scan()` makes `scan` faster still.
"""
import math
import os
import shutil
import sys
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def discretize(x, delta, A, B):
    """S and V of Eq. 2, for one step (x and delta (m, b, e), B (m, b, n)) or for all at once."""
    A = A.reshape(len(A), *[1] * (x.dim() - 2), *A.shape[1:])        # (m, 1.., e, n)
    S = torch.exp(delta[..., None] * A)                              # Alg. 1, line 13
    V = (delta * x)[..., None] * B[..., None, :]                     # Alg. 1, line 14
    return S, V                           # NOTE: V is Mamba's Euler step, not the exact integral


# ----------------------------------------------------------------------------- mode "recurrence"
def recurrence(x, delta, A, B, C, w, H0):
    """Eq. 6 as written: every chain, one step after the other. The reference for all other modes.

    w (m, b, l). Or (m, m): row i is what chain i reads of each chain (Eq. 5), and there is one H
    per chain: H0 and H_last are (m, b, e, n). Equal rows are the same as one weight per chain, the
    identity is M independent Mambas. Returns y without the skip D x, and H_last.
    """
    if w.dim() == 2:
        couple, weights = "mk,kben->mben", [w] * x.shape[2]
    else:
        couple, weights = "kb,kben->ben", w.unbind(2)
    H, ys = H0, []
    for x_t, delta_t, B_t, C_t, w_t in zip(*(v.unbind(2) for v in (x, delta, B, C)), weights):
        S, V = discretize(x_t, delta_t, A, B_t)                      # (m, b, e, n)
        h = S * H + V                     # Eq. 6, the coupled transition: H = sum_k w_k h_k[t-1]
        ys.append(torch.einsum("mben,mbn->mbe", h, C_t))
        H = torch.einsum(couple, w_t, h)                             # what the next step reads
    return torch.stack(ys, 2), H


# ----------------------------------------------------------------------------- the heart: Eq. 7
def collapse(S, V, w):
    """M coupled chains are one recurrence. Multiply Eq. 6 by w[m,t] and sum over m:

        sum_m w[m,t] h[m,t]  =  (sum_m w[m,t] S[m,t]) * H[t-1]  +  sum_m w[m,t] V[m,t]
               H[t]          =          P[t]          * H[t-1]  +         U[t]          Eq. 7

    So one scan serves any number of modalities, H is all that has to be remembered, and each chain
    is read off pointwise: h[m,t] = S[m,t] * H[t-1] + V[m,t].
    """
    P = (w[..., None, None] * S).sum(0)
    U = (w[..., None, None] * V).sum(0)
    return P, U


# ----------------------------------------------------------------------------- mode "convolution"
def convolution(x, delta, A, B, C, w, H0):
    """Eq. 7 unrolled. Put H[t-1] = P[t-1] H[t-2] + U[t-1] into it, and so on down to H0:

        H[t]  =  P[t] ... P[1] H0  +  sum_{s <= t} P[t] ... P[s+1] U[s]         a global kernel

    The paper writes the products as powers P^i (Eqs. 8, 21-22), exact for parameters constant
    in time: delta (m, b, e), B and C (m, b, n), w (m,). Then an FFT applies the kernel in
    O(l log l). Selective parameters, those one trains, change P at every step: the kernel becomes
    a lower-triangular matrix over (t, s), O(l^2 e n) in time and memory. For study, not for use.
    """
    if (w < 0).any() or (w.sum(0) <= 0).any():
        raise ValueError("mode='convolution' takes the logarithm of P and got w with negative or "
                         "only zero weights at a step: use mode='recurrence' or mode='scan'")
    convolve = _time_invariant if delta.dim() == 3 else _selective
    return convolve(x, delta, A, B, C, w, H0)


def _log(P):
    return torch.log(P + torch.finfo(P.dtype).tiny ** 0.5)           # finite where P underflows


def _selective(x, delta, A, B, C, w, H0):
    S, V = discretize(x, delta, A, B)
    P, U = collapse(S, V, w)
    log_P = _log(P).cumsum(1)                                        # (b, l, e, n)
    # Differences of cumulative logs: <= 0 while w sums to one. Quotients of products would be 0/0.
    exponent = log_P[:, :, None] - log_P[:, None]                    # (b, t, s, e, n)
    causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
    kernel = torch.exp(exponent.masked_fill(~causal[:, :, None, None], -math.inf))
    H = torch.einsum("btsen,bsen->bten", kernel, U) + torch.exp(log_P) * H0[:, None]
    before = torch.cat([H0[:, None], H[:, :-1]], 1)                  # H[t-1]
    return torch.einsum("mblen,mbln->mble", S * before + V, C), H[:, -1]


def _time_invariant(x, delta, A, B, C, w, H0):
    l = x.shape[2]
    S, V = discretize(torch.ones_like(delta), delta, A, B)           # (m, b, e, n), V of x = 1
    P, _ = collapse(S, V, w[:, None])                                # (b, e, n)
    time = torch.arange(l + 1, dtype=P.dtype, device=P.device)
    powers = torch.exp(_log(P)[..., None] * time)                    # (b, e, n, l + 1): P^0 ... P^l
    CS, wV = S * C[:, :, None], w[:, None, None, None] * V
    # Eq. 8: y[m,t] reads x[k,t-1-i] through C_m S_m P^i w_k V_k, and x[m,t] through C_m V_m.
    kernel = torch.einsum("mben,kben,beni->mkbei", CS, wV, powers[..., :l - 1])
    kernel = F.pad(kernel, (1, 0))                                   # (m, k, b, e, l) over t - s
    x = x.transpose(2, 3)                                            # (m, b, e, l)
    spectrum = torch.einsum("mkbef,kbef->mbef", torch.fft.rfft(kernel, 2 * l),
                            torch.fft.rfft(x, 2 * l))                # 2 l: no wrap-around
    y = torch.fft.irfft(spectrum, 2 * l)[..., :l]
    y = y + torch.einsum("mben,mbn->mbe", V, C)[..., None] * x
    y = y + torch.einsum("mben,ben,beni->mbei", CS, H0, powers[..., :l])
    H = torch.einsum("kben,bens,kbes->ben", wV, powers[..., :l].flip(-1), x)
    return y.transpose(2, 3), H + powers[..., l] * H0


# ----------------------------------------------------------------------------- mode "scan"
def scan(x, delta, A, B, C, w, H0):
    """The form used for training: linear in l, and no (.., l, e, n) tensor ever exists.

    On a GPU `coupled_scan` takes kernel.py instead, if there.
    """
    return _ChunkedScan.apply(x, delta, A, B, C, w, H0)


CHUNK = 16               # steps between two states kept for backward (compiled: STEPS)
HELD = 3 << 19           # elements of S held at once: a few megabytes, which stay in the cache


class _Buffers(dict):
    """Work space that every chunk reuses: allocating it anew costs more than what is done in it."""

    def __call__(self, name, like, *shape):
        size = math.prod(shape)
        if name not in self or self[name].numel() < size:
            self[name] = like.new_empty(size)
        return self[name][:size].view(shape)


def _flat(v):
    """(m, b, t, c) -> (b t, m, c), so that one batched matmul contracts over the modalities."""
    return v.permute(1, 2, 0, 3).flatten(0, 1)


def _walk(P, U, H, out, steps):
    """H <- P[t] H + U[t] over `steps`; out[:, t] gets the H that step t reads. Returns the last."""
    P, U, out = P.unbind(1), U.unbind(1), out.unbind(1)
    out[steps[0]].copy_(H)
    for t, after in zip(steps, steps[1:]):
        torch.addcmul(U[t], P[t], out[t], out=out[after])
    return torch.addcmul(U[steps[-1]], P[steps[-1]], out[steps[-1]])


def _states(delta, v, A, B, w, H, buffers):
    """`collapse` and the recurrence of H for one chunk, without ever forming V.

    delta and v = delta x (m, b, t, e), B (m, b, t, n), w (m, b, t), H (b, e, n) before the chunk.
    Returns S (m, b, t, e, n), then P and the H that each step reads (b, t, e, n), then the last H.
    """
    (m, b, t, e), n = delta.shape, A.shape[-1]
    S = torch.mul(delta[..., None], (A * math.log2(math.e))[:, None, None],
                  out=buffers("S", H, m, b, t, e, n)).exp2_()        # exp2 is faster than exp
    P = torch.mul(S[0], w[0, ..., None, None], out=buffers("P", H, b, t, e, n))
    for k in range(1, m):
        P.addcmul_(S[k], w[k, ..., None, None])                      # P = sum_k w_k S_k
    U = torch.bmm(_flat(w[..., None] * v).transpose(1, 2), _flat(B),     # U = sum_k w_k v_k B_k
                  out=buffers("U", H, b * t, e, n)).view(b, t, e, n)
    before = buffers("H", H, b, t, e, n)
    H = _walk(P, U, H, before, range(t))
    return S, P, before, H


def _forward_chunk(delta, v, A, B, C, w, H, buffers):
    """y (m, b, t, e) of one chunk, and the H after it. The arguments are those of `_states`."""
    n = A.shape[-1]
    S, _, before, H = _states(delta, v, A, B, w, H, buffers)
    SH = S.mul_(before)                  # overwrites S.  C h = C (S H + v B) = C (S H) + v <B, C>
    CSH = torch.bmm(C.reshape(-1, 1, n), SH.flatten(0, 2).transpose(1, 2))
    return CSH.view_as(v) + v * (B * C).sum(-1, True), H


# The chain rule on Eqs. 6-7, with g[m,t] = dL/dh[m,t] and G[t] = dL/dH[t]:
#     g[m,t] = C[m,t] dy[m,t] + w[m,t] G[t]
#     G[t-1] = sum_m S[m,t] g[m,t] = P[t] G[t] + Q[t],   Q[t] = sum_m S[m,t] C[m,t] dy[m,t]
# so backward is the same scan, run from the end. With v = delta x, so V = v B, the rest is local:
#     z  = g H[t-1] S      ddelta = sum_n z A + dv x      dA = sum_bl z delta
#     dv = sum_n g B       dx = dv delta                  dB = sum_e g v
#     dC = sum_e dy h      dw = sum_en G h                dH0 = G before the first step
# g is never summed itself: sum_n g B = dy <B, C> + w sum_n G B, and so on. A chunk returns what G
# and S H make, `adjoint` adds the rest. D x is added outside, by `coupled_scan`.
def _backward_chunk(delta, v, A, B, C, w, dy, H, G, of_w, buffers):
    """The sums of the chain rule over one chunk, from H before it and G after it (b, e, n).

    Returns G before it, dA (m, b, e, n), then sum_n z A, sum_n G B (m, b, t, e), sum_e G v,
    sum_e dy S H (m, b, t, n) and, if `of_w`, sum_n G S H (m, b, t, e).
    """
    (m, b, t, e), n = delta.shape, A.shape[-1]
    S, P, before, _ = _states(delta, v, A, B, w, H, buffers)
    g = torch.mul(dy[..., None], C[..., None, :], out=buffers("g", v, m, b, t, e, n))
    Q = torch.mul(S[0], g[0], out=buffers("U", v, b, t, e, n))
    for k in range(1, m):
        Q.addcmul_(S[k], g[k])
    after = buffers("G", v, b, t, e, n)
    G = _walk(P, Q, G, after, range(t)[::-1])                        # after[:, t] = G[t]
    SH = S.mul_(before)                                              # overwrites S
    flat = after.flatten(0, 1)                                       # (b t, e, n)
    GB = torch.bmm(_flat(B), flat.transpose(1, 2)).view(b, t, m, e).permute(2, 0, 1, 3)
    Gv = torch.bmm(_flat(v), flat).view(b, t, m, n).permute(2, 0, 1, 3)
    ySH = torch.bmm(dy.reshape(-1, 1, e), SH.flatten(0, 2)).view_as(B)
    GSH = [(SH * after).sum(-1)] if of_w else []
    for k in range(m):
        g[k].addcmul_(after, w[k, ..., None, None])
    z = SH.mul_(g)
    zA = torch.mul(z, A[:, None, None], out=g).sum(-1)
    dA = torch.mul(z, delta[..., None], out=g).sum(2)
    return G, dA, zA, GB, Gv, ySH, *GSH


# `_forward_chunk` and `_backward_chunk` as plain formulas, step by step. torch.compile fuses them:
# S, h, g and z stay in registers, and little but H, G and the sums is written to memory.
STEPS = 4                # at a time: with more, compiling takes longer and nothing gets faster
_compiled = None         # the two, compiled, once `compile_scan` has been called


def _forward_steps(delta, v, A, B, C, w, H):
    (m, b, T, e), ys = delta.shape, []
    for t in range(T):
        before, H = H, 0
        for k in range(m):
            S = torch.exp(delta[k, :, t, :, None] * A[k])                # (b, e, n)
            h = S * before + v[k, :, t, :, None] * B[k, :, t, None]      # Eq. 6
            H = H + w[k, :, t, None, None] * h
            ys.append((h * C[k, :, t, None]).sum(-1))
    return torch.stack(ys).view(T, m, b, e).permute(1, 2, 0, 3), H


def _backward_steps(delta, v, A, B, C, w, dy, H, G, of_w):
    (m, b, T, _), dA, S, before, sums = delta.shape, [0] * len(A), [], [], {}
    for t in range(T):
        before.append(H)
        S.append([torch.exp(delta[k, :, t, :, None] * A[k]) for k in range(m)])
        H = sum(w[k, :, t, None, None] * (S[t][k] * H + v[k, :, t, :, None] * B[k, :, t, None])
                for k in range(m))
    for t in reversed(range(T)):
        after, G = G, 0
        for k in range(m):
            SH, dy_ = S[t][k] * before[t], dy[k, :, t, :, None]
            g = C[k, :, t, None] * dy_ + w[k, :, t, None, None] * after
            z, G = g * SH, G + S[t][k] * g
            dA[k] = dA[k] + z * delta[k, :, t, :, None]
            sums[k, t] = [(z * A[k]).sum(-1), (after * B[k, :, t, None]).sum(-1),
                          (after * v[k, :, t, :, None]).sum(1), (SH * dy_).sum(1),
                          *[(SH * after).sum(-1)] * of_w]
    sums = zip(*(sums[k, t] for k in range(m) for t in range(T)))
    return G, torch.stack(dA), *(torch.stack(v).view(m, T, b, -1).transpose(1, 2) for v in sums)


def compile_scan():
    """From now on mode "scan" runs compiled code on CPUs: faster, once the first call is over.

    Returns whether that is so: it takes a C++ compiler, g++ or what the variable CXX names.
    """
    global _compiled
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        warnings.warn(f"compile_scan: no C++ compiler {compiler!r} found: install one, or name it "
                      "in the environment variable CXX. Going on without.", stacklevel=2)
        return False
    _compiled = torch.compile(_forward_steps), torch.compile(_backward_steps)
    MODES["scan"] = MODES["auto"] = torch.compiler.disable(scan)     # no torch.compile(model) in it
    return True


def _run(which, buffers, delta, *rest):
    """A chunk forward (which = 0) or backward (1), if whole by compiled code where asked for."""
    if not _compiled or delta.shape[2] != STEPS or not delta.is_cpu:
        return (_forward_chunk, _backward_chunk)[which](delta, *rest, buffers)
    # All alike in layout and in not asking for a gradient: else each kind is compiled anew.
    return _compiled[which](*(a.detach().contiguous() if torch.is_tensor(a) else a
                              for a in (delta, *rest)))


def _pieces(x, n):
    """Slices of the batch, so that S of a chunk is about HELD elements, and the chunks of time."""
    (m, b, l, e), steps = x.shape, STEPS if _compiled and x.is_cpu else CHUNK
    rows = max(1, HELD // (max(steps, 2 * STEPS) * m * e * n))      # compiled: half is best
    return ([slice(i, i + rows) for i in range(0, b, rows)],
            [slice(i, i + steps) for i in range(0, l, steps)])


class _ChunkedScan(torch.autograd.Function):
    """Walk time in chunks. Kept for backward: the inputs, and H where a chunk begins."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, w, H0):
        rows, chunks = ctx.pieces = _pieces(x, A.shape[-1])
        y, H_last, buffers = torch.empty_like(x), torch.empty_like(H0), _Buffers()
        keep = H0.new_empty(len(chunks) if any(ctx.needs_input_grad) else 0, *H0.shape)
        ctx.save_for_backward(x, delta, A, B, C, w, keep)
        for r in rows:
            H = H0[r]
            for i, c in enumerate(chunks):
                if len(keep):
                    keep[i, r] = H
                x_, delta_, B_, C_, w_ = (v[:, r, c] for v in (x, delta, B, C, w))
                y[:, r, c], H = _run(0, buffers, delta_, delta_ * x_, A, B_, C_, w_, H)
            H_last[r] = H
        return y, H_last

    @staticmethod
    def backward(ctx, dy, dH_last):
        if torch.is_grad_enabled():
            raise RuntimeError("mode 'scan' has no second derivative, which create_graph=True asks "
                               "for: use mode='recurrence'")
        with torch.autocast(dy.device.type, enabled=False):
            return _ChunkedScan.adjoint(ctx, dy, dH_last)

    @staticmethod
    def adjoint(ctx, dy, dH_last):
        x, delta, A, B, C, w, keep = ctx.saved_tensors
        rows, chunks = ctx.pieces
        dx, ddelta, dB, dC = (torch.empty_like(v) for v in (x, delta, B, C))
        dA, dH0, buffers = torch.zeros_like(A), torch.empty_like(dH_last), _Buffers()
        of_w = ctx.needs_input_grad[5]
        dw = torch.empty_like(dC[..., 0]) if of_w else None
        for r in rows:
            G = dH_last[r]
            for i, c in reversed(list(enumerate(chunks))):
                x_, delta_, B_, C_, w_, dy_ = (v[:, r, c] for v in (x, delta, B, C, w, dy))
                v = delta_ * x_
                G, dA_, zA, GB, Gv, ySH, *GSH = _run(1, buffers, delta_, v, A, B_, C_, w_, dy_,
                                                     keep[i, r], G, of_w)
                BC, vdy = (B_ * C_).sum(-1, True), (v * dy_).sum(-1, True)
                dv = dy_ * BC + w_[..., None] * GB
                dx[:, r, c] = dv * delta_
                ddelta[:, r, c] = dv * x_ + zA
                dB[:, r, c] = C_ * vdy + w_[..., None] * Gv
                dC[:, r, c] = B_ * vdy + ySH
                dA += dA_.sum(1)
                if of_w:
                    dw[:, r, c] = (GB * v + GSH[0]).sum(-1)
            dH0[r] = G
        return dx, ddelta, dA, dB, dC, dw, dH0


# ----------------------------------------------------------------------------- the entry point
MODES = {"recurrence": recurrence, "convolution": convolution, "scan": scan, "auto": scan}


def coupled_scan(x, delta, A, B, C, D=None, w=None, H0=None, mode="auto"):
    """Run M coupled state space models over a sequence (Eqs. 2-7, Alg. 1 lines 13-16).

    Args:
        x, delta: (m, b, l, e). Input, and step size > 0. A step with delta = 0 adds nothing to H.
        A: (m, e, n), < 0.     B, C: (m, b, l, n).     D: (m, e) or None.
        w: (m,) or (m, b, l); None is the mean, 1/m each. In mode "recurrence" also (m, m).
        H0: (b, e, n), the coupled state before the first step; None is zero.
        mode: "recurrence", "convolution", "scan", or "auto" (= "scan": on an NVIDIA GPU the
            kernels of kernel.py where they and Triton are at hand, else PyTorch).
        Parameters constant in time may be given as delta (m, b, e), B and C (m, b, n).
    Returns:
        y (m, b, l, e) in the dtype of x, and H_last (b, e, n), which as H0 continues the sequence.
        Differentiable in every tensor argument. State and arithmetic are float32, or float64 if any
        argument is.
    Raises:
        ValueError: a shape, dtype, device or mode that does not fit, saying what was expected.
    """
    _check(x, delta, A, B, C, D, w, H0, mode)
    (m, b, l, e), n, dtype = x.shape, A.shape[-1], x.dtype
    constant = delta.dim() == B.dim() == C.dim() == 3 and (w is None or w.dim() == 1)
    if not (constant and mode == "convolution"):
        delta, B, C = (v if v.dim() == 4 else v[:, :, None].expand(-1, -1, l, -1)
                       for v in (delta, B, C))
    kernel = _kernel(x) if mode in ("scan", "auto") else None
    if kernel:
        return kernel(x, delta, A, B, C, D, w, H0)
    tensors = [x, delta, A, B, C, D, w, H0]
    wide = _state_dtype(*(v for v in tensors if v is not None))
    x, delta, A, B, C, D, w, H0 = (v if v is None else v.to(wide) for v in tensors)
    if w is None:
        w = x.new_full((m,), 1 / m)
    matrix = mode == "recurrence" and w.dim() == 2
    if H0 is None:
        H0 = x.new_zeros((m,) * matrix + (b, e, n))
    if delta.dim() == 4:
        w = w[:, None, None].expand(m, b, l) if w.dim() == 1 else w
    with torch.autocast(x.device.type, enabled=False):
        y, H_last = MODES[mode](x, delta, A, B, C, w, H0)
        if D is not None:
            y = torch.addcmul(y, D[:, None, None], x)
    return y.to(dtype), H_last


def _kernel(x):
    """`kernel.triton_coupled_scan` where it can serve, else None. Imported here and not before."""
    if not x.is_cuda or torch.version.hip or len(x) > 8 or \
            torch.cuda.get_device_properties(x.device).major < 8:
        return None
    try:
        from kernel import triton_coupled_scan
    except ImportError:                  # no Triton, or this file was copied without kernel.py
        return None
    return triton_coupled_scan


def _state_dtype(*tensors):
    """float32, or float64 where any tensor is: rounding a state at every step would add up."""
    return torch.float64 if any(v.dtype == torch.float64 for v in tensors) else torch.float32


def _check(x, delta, A, B, C, D, w, H0, mode):
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if x.dim() != 4 or A.dim() != 3 or 0 in x.shape or 0 in A.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and A {tuple(A.shape)}, expected "
                         "(m, b, l, e) and (m, e, n) with no axis of length 0")
    (m, b, l, e), n = x.shape, A.shape[-1]
    per_chain = mode == "recurrence" and w is not None and w.dim() == 2
    expected = {"x": [(m, b, l, e)], "delta": [(m, b, l, e), (m, b, e)], "A": [(m, e, n)],
                "B": [(m, b, l, n), (m, b, n)], "C": [(m, b, l, n), (m, b, n)], "D": [(m, e)],
                "w": [(m,), (m, b, l)] + [(m, m)] * (mode == "recurrence"),
                "H0": [(m, b, e, n) if per_chain else (b, e, n)]}
    for name, v in zip(expected, (x, delta, A, B, C, D, w, H0)):
        if v is None and name in ("D", "w", "H0"):
            continue
        if tuple(v.shape) not in expected[name]:
            hint = ", or (m, m) in mode='recurrence'" * (name == "w" and mode != "recurrence")
            raise ValueError(f"{name} has shape {tuple(v.shape)}, expected "
                             f"{' or '.join(map(str, expected[name]))}{hint}")
        if not v.is_floating_point() or v.device != x.device:
            raise ValueError(f"{name} is {v.dtype} on {v.device}, expected a floating-point tensor "
                             f"on {x.device}: convert it with .to()")


# ----------------------------------------------------------------------------- the model
ABSENT = -1e9                # a logit that softmax turns into 0, or into 1/m where all are absent


class BlockState(NamedTuple):
    """What a block remembers between two pieces of a sequence."""
    conv: torch.Tensor       # (m, b, d_conv - 1, e)  the last inputs of the convolution
    H: torch.Tensor          # (b, e, n)              the coupled state; (m, b, e, n) if "none"


class State(NamedTuple):
    """What `CoupledMamba` remembers: constant size, however long the sequence."""
    blocks: list             # of BlockState
    pooled: torch.Tensor     # (m, b, d)  max or sum so far, or the last real features
    count: torch.Tensor      # (m, b)     real steps so far


def _select(x, mask):
    """Zero the absent steps by selection: inf * 0 would be NaN. x (.., l, c), mask (.., l)."""
    return x if mask is None else torch.where(mask[..., None], x, 0)


class StackedLinear(nn.Module):
    """One linear map per modality, stored together so that one batched matmul serves all.

    NOTE: initialised to keep unit variance, where nn.Linear keeps a third. What y gets from the
    state is cubic in x, through B and C: it starts at 0.1 of the skip D x, with a third at 0.002.
    """

    def __init__(self, m, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, d_in, d_out) / d_in ** 0.5)

    def forward(self, x):                                                # (m, b, l, d_in)
        return torch.einsum("mbli,mio->mblo", x, self.weight)            # (m, b, l, d_out)


class Block(nn.Module):
    """Algorithm 1 for all modalities at once, each with its own parameters."""

    def __init__(self, m, d_model, d_state, expand, d_conv, dt_rank, coupling, dropout, mode):
        super().__init__()
        e, self.coupling, self.mode = expand * d_model, coupling, mode
        self.norm_weight = nn.Parameter(torch.ones(m, d_model))
        self.norm_bias = nn.Parameter(torch.zeros(m, d_model))
        self.in_proj = StackedLinear(m, d_model, 2 * e)
        self.conv_weight = nn.Parameter(torch.randn(m, e, d_conv) / d_conv ** 0.5)
        self.conv_bias = nn.Parameter(torch.zeros(m, e))
        self.x_proj = StackedLinear(m, e, dt_rank + 2 * d_state)
        self.dt_proj = StackedLinear(m, dt_rank, e)
        step = torch.empty(m, e).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(it) = step
        self.A_log = nn.Parameter(torch.arange(1., d_state + 1).log().repeat(m, e, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(m, e))
        self.out_proj = StackedLinear(m, e, d_model)
        self.dropout = nn.Dropout(dropout)
        if coupling == "learned":
            self.coupling_logits = nn.Parameter(torch.zeros(m))

    def weights(self, mask):
        """Eq. 9: w (m,); with a mask (m, b, l), renormalised over the modalities at each step."""
        m, dtype = len(self.D), _state_dtype(self.D)
        if self.coupling == "sum":
            w = self.D.new_ones(m, dtype=dtype)
            return w if mask is None else torch.where(mask.any(0), mask.to(dtype), 1 / m)
        logits = self.coupling_logits.to(dtype) if self.coupling == "learned" else \
            self.D.new_zeros(m, dtype=dtype)
        if mask is not None:             # nobody there: all 1/m and S = 1, so that H is held
            logits = torch.where(mask, logits[:, None, None], ABSENT)
        return torch.softmax(logits, 0)

    def conv(self, u, tail):
        """Causal depthwise convolution: u (m, b, l, e), preceded by its last d_conv - 1 inputs."""
        u = torch.cat([tail.to(u.dtype), u], 2)
        l, x = u.shape[2] - tail.shape[2], self.conv_bias[:, None, None]
        for j in range(tail.shape[2] + 1):
            x = torch.addcmul(x, self.conv_weight[:, None, None, :, j], u[:, :, j:j + l])
        return x, u[:, :, l:].clone()    # a view would keep all of u alive

    def ssm(self, x, delta, A, B, C, mask, H, mode):
        """y (m, b, l, e) and the last H (b, e, n), or (m, b, e, n) where nothing is coupled."""
        if self.coupling != "none":
            return coupled_scan(x, delta, A, B, C, self.D, self.weights(mask), H, mode)
        chains = [coupled_scan(*(v[i:i + 1] for v in (x, delta, A, B, C, self.D)), None, H[i], mode)
                  for i in range(len(x))]                                # M = 1 is exactly Mamba
        return torch.cat([y for y, _ in chains]), torch.stack([H for _, H in chains])

    def forward(self, f, mask=None, state=None, mode=None):
        """f (m, b, l, d), mask (m, b, l) or None -> features (m, b, l, d), BlockState."""
        state = state or self.init_state(f.shape[1])
        rank, n = self.dt_proj.weight.shape[1], self.A_log.shape[2]
        normed = F.layer_norm(f, f.shape[-1:]) * self.norm_weight[:, None, None]     # (m, b, l, d)
        u, gate = self.in_proj(normed + self.norm_bias[:, None, None]).chunk(2, -1)  # (m, b, l, e)
        x, tail = self.conv(_select(u, mask), state.conv)                # tail: see BlockState
        x = F.silu(x)                                                    # (m, b, l, e)
        low, B, C = self.x_proj(x).split([rank, n, n], -1)               # (m, b, l, rank | n | n)
        delta = F.softplus(self.dt_proj(low) + self.dt_bias[:, None, None])         # (m, b, l, e)
        delta = _select(delta, mask)            # after softplus: an absent step has S = 1 and V = 0
        A = -torch.exp(self.A_log.to(_state_dtype(self.A_log)))          # (m, e, n)
        y, H = self.ssm(x, delta, A, B, C, mask, state.H, mode or self.mode)
        y = _select(y, mask) * F.silu(gate)                                 # (m, b, l, e)
        return f + self.dropout(self.out_proj(y)), BlockState(tail, H)

    def init_state(self, b):
        (m, e, n), k = self.A_log.shape, self.conv_weight.shape[-1]
        chains = (m,) if self.coupling == "none" else ()
        return BlockState(self.D.new_zeros(m, b, k - 1, e),
                          self.D.new_zeros(*chains, b, e, n, dtype=_state_dtype(self.A_log)))


class CoupledMamba(nn.Module):
    """M streams of features -> one prediction (Fig. 1).

    encoders -> n_layers x (Block, then "Cat": each modality adds a map of the others) -> pooling
    over time -> softmax-weighted sum over modalities -> two-layer head.

    Args:
        d_inputs: feature width of each stream, e.g. (768, 33, 709) for text, audio, vision.
        d_output: width of the prediction.
        d_model, n_layers, d_state, expand, d_conv: the paper's settings by default.
        dt_rank: rank of the map to delta; None is d_state // 8, the paper's choice.
        coupling: what a chain reads of all states. "mean": w = 1/m. "learned": w = softmax of
            logits that start at zero. "sum": w = 1, Eq. 6 to the letter; P is then near m at the
            start and H grows like m^l: with 3 modalities and 3 blocks in float32, output and
            gradients are not finite from l = 50 on. "none": one Mamba per modality.
        mix: between layers, each modality adds a map of the others ("Cat" in Fig. 1).
        pooling: "max", "mean" or "last" (the last real step) over time.
        dropout: on the output of each block and in the head.
        mode: how the scan is computed, see `coupled_scan`.
    """

    def __init__(self, d_inputs, d_output=1, *, d_model=128, n_layers=3, d_state=64, expand=2,
                 d_conv=4, dt_rank=None, coupling="mean", mix=True, pooling="max", dropout=0.0,
                 mode="auto"):
        super().__init__()
        for name, value, choices in (("coupling", coupling, ("mean", "learned", "sum", "none")),
                                     ("pooling", pooling, ("max", "mean", "last")),
                                     ("mode", mode, MODES)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        d_inputs = tuple(d_inputs)
        m, dt_rank = len(d_inputs), max(1, d_state // 8) if dt_rank is None else dt_rank
        if min([m, *d_inputs, d_output, d_model, n_layers, d_state, expand, d_conv, dt_rank]) < 1:
            raise ValueError("every size must be at least 1, and there must be one stream or more")
        self.pooling = pooling
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        self.blocks = nn.ModuleList(Block(m, d_model, d_state, expand, d_conv, dt_rank, coupling,
                                          dropout, mode) for _ in range(n_layers))
        self.mix = nn.ModuleList(StackedLinear(m, (m - 1) * d_model, d_model)
                                 for _ in range(n_layers - 1 if mix and m > 1 else 0))
        self.modality_logits = nn.Parameter(torch.zeros(m))
        self.head = nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU(), nn.Dropout(dropout),
                                  nn.Linear(d_model, d_output))

    def forward(self, xs, mask=None):
        """xs: m tensors (b, l, d_inputs[i]). mask (m, b, l), True where there is a frame, or None.

        What an absent step holds is never read: it counts as zero. Returns (b, d_output).
        """
        self._check(xs, mask)
        return self._advance(xs, mask, self.init_state(len(xs[0])))[0]

    def encode(self, xs, mask=None):
        """The features before pooling, (m, b, l, d), zero on absent steps."""
        self._check(xs, mask)
        return self._features(xs, mask, self.init_state(len(xs[0])))[0]

    def step(self, xs_t, state, mask=None):
        """One step of a stream: xs_t m tensors (b, d_inputs[i]), mask (m, b) or None -> out, state.

        After t steps out (b, d_output) equals `model` on those t steps. Memory stays constant; the
        graph grows with every step unless you work under `torch.no_grad` or detach the state.
        """
        xs, mask = [x[:, None] for x in xs_t], None if mask is None else mask[..., None]
        self._check(xs, mask)
        b = len(xs[0])
        if len(state.blocks) != len(self.blocks) or state.pooled.shape[:2] != (len(xs), b):
            raise ValueError(f"state is not one of this model for a batch of {b}: begin with "
                             f"init_state({b})")
        return self._advance(xs, mask, state, mode="recurrence")

    def init_state(self, batch_size):
        """The `State` before the first step."""
        m, d = len(self.encoders), self.encoders[0].out_features
        like, fill = self.modality_logits, -math.inf if self.pooling == "max" else 0
        return State([block.init_state(batch_size) for block in self.blocks],
                     like.new_full((m, batch_size, d), fill, dtype=_state_dtype(like)),
                     like.new_zeros(m, batch_size, dtype=torch.long))

    def param_groups(self, weight_decay):
        """For the optimiser: weights of maps decay; A_log, D, biases, norms and logits do not."""
        groups = {True: [], False: []}
        for name, p in self.named_parameters():
            groups[name.endswith("weight") and "norm" not in name].append(p)
        return [{"params": groups[True], "weight_decay": weight_decay},
                {"params": groups[False], "weight_decay": 0.0}]

    def _features(self, xs, mask, state, mode=None):
        masks = [None] * len(xs) if mask is None else mask
        f = torch.stack([encoder(_select(x, here))                       # keeps NaN out of dW, too
                         for encoder, x, here in zip(self.encoders, xs, masks)])
        f, m, blocks = _select(f, mask), len(xs), []                     # (m, b, l, d)
        for i, block in enumerate(self.blocks):
            f, block_state = block(f, mask, state.blocks[i], mode)
            blocks.append(block_state)
            if i < len(self.mix):                                        # Fig. 1, "Cat"
                others = torch.stack([torch.cat([f[k] for k in range(m) if k != i], -1)
                                      for i in range(m)])                # (m, b, l, (m-1) d)
                f = _select(f + self.mix[i](others), mask)
        return f, blocks

    def _advance(self, xs, mask, state, mode=None):
        """Features, then pooling joined to what the state has seen, then the head."""
        f, blocks = self._features(xs, mask, state, mode)
        if mask is None:
            mask = f.new_ones(f.shape[:3], dtype=torch.bool)
        real, count = mask[..., None], state.count + mask.sum(2)
        if self.pooling == "max":
            pooled = torch.maximum(state.pooled, torch.where(real, f, -math.inf).amax(2))
        elif self.pooling == "mean":
            pooled = state.pooled + f.sum(2, dtype=state.pooled.dtype)   # absent steps are zero
        else:
            last = (mask * torch.arange(mask.shape[2], device=mask.device)).argmax(2)      # (m, b)
            pooled = torch.take_along_dim(f, last[..., None, None], 2)[:, :, 0]
            pooled = torch.where(mask.any(2)[..., None], pooled, state.pooled)
        state = State(blocks, pooled, count)
        seen = (count > 0)[..., None]                                    # (m, b, 1)
        if self.pooling == "mean":
            pooled = pooled / count.clamp(min=1)[..., None]
        weight = torch.where(seen, self.modality_logits[:, None, None], ABSENT).softmax(0)
        return self.head((weight * torch.where(seen, pooled, 0)).sum(0).to(f.dtype)), state

    def _check(self, xs, mask):
        widths = tuple(encoder.in_features for encoder in self.encoders)
        got = [tuple(x.shape) for x in xs]
        b_l = got[0][:2] if got else ()
        if got != [(*b_l, width) for width in widths]:
            raise ValueError(f"xs has shapes {got}, expected (b, l, width) for each of the widths "
                             f"{widths}, with one b and one l: resample to a common length")
        if 0 in b_l:
            raise ValueError(f"xs has shapes {got}, expected a batch and a length of at least 1")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(got), *b_l)):
            raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool of "
                             f"shape {(len(got), *b_l)}: True where there is a frame")
