r"""Coupled Mamba: fuse M sequences inside the state of a state space model.

Paper: Li, Zhou, Yu, Song, Yang, "Coupled Mamba: Enhanced Multi-modal Fusion with
Coupled State Space Model", NeurIPS 2024 (arXiv 2405.18014). It builds on Gu and Dao,
"Mamba" (arXiv 2312.00752). This file needs torch and nothing else: copy it.

Each modality (text, audio, vision, ...) has its own Mamba layer, which turns an input x
into an output y through a state h that is carried through time. This recurrence is the
chain of the modality. In a Coupled Mamba the state of every chain is computed from the
previous states of all chains:

             time t-1                                     time t

    text     h[0,t-1] --.                      .--> h[0,t] = S[0,t] * H[t-1] + V[0,t]
                         \                    /
    audio    h[1,t-1] ----> sum w h = H[t-1] ----> h[1,t] = S[1,t] * H[t-1] + V[1,t]
                         /                    \
    vision   h[2,t-1] --'                      '--> h[2,t] = S[2,t] * H[t-1] + V[2,t]

    y[m,t] = C[m,t] . h[m,t] + D[m] x[m,t]           the output of each chain

All products * are elementwise, because A is diagonal: each of the e channels is a
recurrence of its own, on n numbers, and channels meet only in the linear maps of the
block. The transition S = exp(Delta A) lies between 0 and 1, because A < 0: a small step
size Delta keeps the state, a large one overwrites it with the input. The model is
called selective because Delta, B and C are computed from the input at every step; this
happens in `Block.forward`.

The axes always have this order: m modalities, b batch, l time, then the channels: d
(width of the model), e = expand * d (inner width), n (size of the state of a channel).

    symbol              in code  shape              meaning
    x                   x        (m, b, l, e)       input of the state space model
    Delta               delta    (m, b, l, e)       step size, > 0
    A                   A        (m, e, n)          continuous transition, < 0
    B, C                B, C     (m, b, l, n)       input map and output map
    D                   D        (m, e)             skip connection
    S = exp(Delta A)    S        (m, b, l, e, n)    transition     Eq. 2, Alg. 1 line 13
    V = Delta B x       V        (m, b, l, e, n)    input          Alg. 1 line 14
    w                   w        (m,) or (m, b, l)  weight of each chain in H
    h                   h        (m, b, e, n)       state of each chain
    H = sum_k w_k h_k   H        (b, e, n)          coupled state, carried through time
    P, U                P, U     (b, l, e, n)       transition and input of H, Eq. 7

Reading order: `recurrence` is the definition (Eq. 6). `collapse` is the idea that makes
it cheap (Eq. 7). `convolution` is the global convolution kernel (Eq. 8). `coupled_scan`
runs any of them; to scan is to compute a recurrence over time. `Block` is Algorithm 1
and `CoupledMamba` is Figure 1. There the method ends. The rest of the file computes it
fast; the mode "kernel" there is a program for GPUs, written in Triton.
"""
import functools
import importlib
import importlib.util
import math
import numbers
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------- the method
def discretize(x, delta, A, B):
    """The transition S and the input V of each chain (Eq. 2, Alg. 1 lines 13 and 14).

    Args:
        x, delta: (m, b, e) for one step, or (m, b, l, e).
        A: (m, e, n).  B: (m, b, n) for one step, or (m, b, l, n).
    Returns:
        S, V: (m, b, e, n) for one step, or (m, b, l, e, n).
    """
    m, e, n = A.shape
    between = [1] * (x.dim() - 2)                       # b, or b and l
    A = A.reshape(m, *between, e, n)
    S = torch.exp(delta[..., None] * A)                 # Alg. 1, line 13
    # NOTE: V is the Euler step that Mamba takes, not the exact integral over the step.
    V = (delta * x)[..., None] * B[..., None, :]        # Alg. 1, line 14
    return S, V


def recurrence(x, delta, A, B, C, D, w, H0):
    """Mode "recurrence": Eq. 6 as written, one step after the other. The reference.

    w (m, b, l) holds one weight per chain, the same for all that read it. Here it may
    also be a matrix (m, m): row i says how much chain i reads of each chain (Eq. 5).
    Then every chain reads a sum of its own, so H0 and H_last are (m, b, e, n). Equal
    rows are the same as one weight per chain; the identity is M independent Mambas.
    """
    if w.dim() == 2:
        couple = "mk,kben->mben"
        weights = [w] * x.shape[2]
    else:
        couple = "kb,kben->ben"
        weights = w.unbind(2)

    H = H0
    ys = []
    steps = zip(x.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), weights)
    for x_t, delta_t, B_t, C_t, w_t in steps:
        S, V = discretize(x_t, delta_t, A, B_t)         # (m, b, e, n)
        h = S * H + V                                   # Eq. 6, the coupled transition
        ys.append(torch.einsum("mben,mbn->mbe", h, C_t))
        H = torch.einsum(couple, w_t, h)                # what the next step reads
    return torch.stack(ys, 2) + D[:, None, None] * x, H


def collapse(S, V, w):
    """M coupled chains are one recurrence. Multiply Eq. 6 by w[m,t] and sum over m:

        sum_m w[m,t] h[m,t] = (sum_m w[m,t] S[m,t]) * H[t-1] + sum_m w[m,t] V[m,t]
               H[t]         =          P[t]         * H[t-1] +        U[t]        Eq. 7

    So one scan serves any number of modalities, only H has to be remembered, and each
    chain is then computed from H by itself: h[m,t] = S[m,t] * H[t-1] + V[m,t].

    Args:
        S, V: (m, ..., e, n).  w: (m, ...).
    Returns:
        P, U: (..., e, n).
    """
    P = (w[..., None, None] * S).sum(0)
    U = (w[..., None, None] * V).sum(0)
    return P, U


def convolution(x, delta, A, B, C, D, w, H0):
    """Mode "convolution": Eq. 7 put into itself, down to H0, sums over all past inputs.

        H[t] = P[t] ... P[1] H0 + sum_{s <= t} P[t] ... P[s+1] U[s]

    The paper writes the products as powers P^i (Eqs. 8, 21, 22). That is exact where
    parameters are constant in time: delta (m, b, e), B and C (m, b, n), w (m,). Then an
    FFT applies the kernel in O(l log l). The model that is trained is selective, so P
    changes at every step and the kernel is a lower-triangular matrix over (t, s), with
    O(l^2 e n) of time and memory. Read it to understand Eq. 8; train with `scan`.

    Raises:
        ValueError: a weight is negative, or all weights of a step are zero.
    """
    if (w < 0).any() or (w.sum(0) <= 0).any():
        raise ValueError(
            "mode='convolution' takes the logarithm of P and got weights w that are "
            "negative or all zero at a step: use mode='recurrence' or mode='scan'")
    if delta.dim() == 3:
        y, H_last = convolve_constant(x, delta, A, B, C, w, H0)
    else:
        y, H_last = convolve_selective(x, delta, A, B, C, w, H0)
    return y + D[:, None, None] * x, H_last


def log_of(P):
    """log P, finite also where P is so small that it was rounded to zero."""
    return torch.log(P + torch.finfo(P.dtype).tiny ** 0.5)


def convolve_selective(x, delta, A, B, C, w, H0):
    """y without D x, and H_last, by a kernel matrix over (t, s)."""
    l = x.shape[2]
    S, V = discretize(x, delta, A, B)
    P, U = collapse(S, V, w)                                           # (b, l, e, n)

    # P[t] ... P[s+1] is exp of a difference of cumulative logarithms, which is <= 0
    # while the weights sum to one. A quotient of products would soon be 0 / 0.
    log_P = log_of(P).cumsum(1)
    exponent = log_P[:, :, None] - log_P[:, None]                      # (b, t, s, e, n)
    causal = torch.ones(l, l, dtype=torch.bool, device=x.device).tril()
    exponent = exponent.masked_fill(~causal[:, :, None, None], -math.inf)
    kernel = torch.exp(exponent)

    H = torch.einsum("btsen,bsen->bten", kernel, U)
    H = H + torch.exp(log_P) * H0[:, None]
    H_before = torch.cat([H0[:, None], H[:, :-1]], 1)                  # H[t-1]
    y = torch.einsum("mblen,mbln->mble", S * H_before + V, C)
    return y, H[:, -1]


def convolve_constant(x, delta, A, B, C, w, H0):
    """y without D x, and H_last, by FFT (Eq. 8), for parameters constant in time."""
    l = x.shape[2]
    S, V = discretize(torch.ones_like(delta), delta, A, B)             # V of x = 1
    P, _ = collapse(S, V, w[:, None])                                  # (b, e, n)
    exponents = torch.arange(l + 1, dtype=P.dtype, device=P.device)
    powers = torch.exp(log_of(P)[..., None] * exponents)          # (b, e, n, l + 1)
    CS = S * C[:, :, None]
    wV = w[:, None, None, None] * V

    # y[m,t] reads x[k,t-1-i] through C_m S_m P^i w_k V_k, and x[m,t] through C_m V_m.
    kernel = torch.einsum("mben,kben,beni->mkbei", CS, wV, powers[..., :l - 1])
    kernel = F.pad(kernel, (1, 0))                           # over t - s = 0 ... l - 1
    x = x.transpose(2, 3)                                              # (m, b, e, l)
    kernel_spectrum = torch.fft.rfft(kernel, 2 * l)              # 2 l: no wrap-around
    x_spectrum = torch.fft.rfft(x, 2 * l)
    spectrum = torch.einsum("mkbef,kbef->mbef", kernel_spectrum, x_spectrum)
    y = torch.fft.irfft(spectrum, 2 * l)[..., :l]
    y = y + torch.einsum("mben,mbn->mbe", V, C)[..., None] * x
    y = y + torch.einsum("mben,ben,beni->mbei", CS, H0, powers[..., :l])

    H_last = torch.einsum("kben,bens,kbes->ben", wV, powers[..., :l].flip(-1), x)
    H_last = H_last + powers[..., l] * H0
    return y.transpose(2, 3), H_last


# ------------------------------------------------------------------- the entry
def coupled_scan(x, delta, A, B, C, D=None, w=None, H0=None, mode="auto"):
    """Run M coupled state space models over a sequence (Eqs. 2-7, Alg. 1 lines 13-15).

    Args:
        x: (m, b, l, e), the input.
        delta: (m, b, l, e), the step size, > 0. Where it is 0, h[m,t] is H[t-1].
        A: (m, e, n), < 0.
        B, C: (m, b, l, n). If delta, B or C is constant in time, the axis l may be left
            out: delta (m, b, e), B and C (m, b, n).
        D: (m, e), or None for zero.
        w: (m,) or (m, b, l), or None for the mean, 1/m each. In mode "recurrence" also
            (m, m), see there.
        H0: (b, e, n), the coupled state before the first step, or None for zero.
        mode: "recurrence", "convolution", "scan" (PyTorch, on any device), "kernel"
            (Triton, on an NVIDIA GPU), all with the same result; or "auto": the kernel
            for tensors on a GPU that can run it, else scan.
    Returns:
        y (m, b, l, e) in the dtype of x, and H_last (b, e, n). As H0 of the next call,
        H_last continues the sequence. Both are differentiable in every tensor argument.
        The state is float32, or float64 if any argument is float64.
    Raises:
        ValueError: a shape, dtype, device or mode that does not fit, or a mode that
            cannot run. The message says what was expected.
    """
    check_arguments(x, delta, A, B, C, D, w, H0, mode)
    if mode == "auto":
        mode = choose_mode(x.device, len(x))
    arguments = complete_arguments(x, delta, A, B, C, D, w, H0, mode)
    with torch.autocast(x.device.type, enabled=False):
        y, H_last = MODES[mode](*arguments)
    return y.to(x.dtype), H_last


def complete_arguments(x, delta, A, B, C, D, w, H0, mode):
    """The arguments as the modes take them: defaults filled in, one value per step."""
    m, b, l, e = x.shape
    dtype = state_dtype(*[v for v in (x, delta, A, B, C, D, w, H0) if v is not None])
    if D is None:
        D = x.new_zeros(m, e)
    if w is None:
        w = x.new_full((m,), 1 / m, dtype=dtype)
    if H0 is None:
        H0 = x.new_zeros(b, e, A.shape[-1], dtype=dtype)
        if w.dim() == 2:
            H0 = H0.expand(m, -1, -1, -1)

    constant = delta.dim() == 3 and B.dim() == 3 and C.dim() == 3 and w.dim() == 1
    if not (constant and mode == "convolution"):
        delta, B, C = (v if v.dim() == 4 else v[:, :, None].expand(-1, -1, l, -1)
                       for v in (delta, B, C))
        if w.dim() == 1:
            w = w[:, None, None].expand(m, b, l)

    arguments = [x, delta, A, B, C, D, w]
    if mode != "kernel":                 # kernel.py converts them in one operation
        arguments = [v.to(dtype) for v in arguments]
    return *arguments, H0.to(dtype)


def state_dtype(*tensors):
    """float32, or float64 if a tensor is: the errors of rounding the state add up."""
    if any(v.dtype == torch.float64 for v in tensors):
        return torch.float64
    return torch.float32


def check_arguments(x, delta, A, B, C, D, w, H0, mode):
    """Raise ValueError unless the arguments are what `coupled_scan` says."""
    if mode != "auto" and mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of auto, {', '.join(MODES)}")
    given = {"x": x, "A": A, "delta": delta, "B": B, "C": C, "D": D, "w": w, "H0": H0}
    for name in ("D", "w", "H0"):
        if given[name] is None:
            del given[name]
    for name, v in given.items():
        if not isinstance(v, torch.Tensor) or not v.is_floating_point():
            kind = type(v).__name__
            if isinstance(v, torch.Tensor):
                kind = f"a tensor of {v.dtype}"
            raise ValueError(f"{name} is {kind}, expected a tensor of floating-point "
                             "numbers: convert it with torch.as_tensor and .float()")
    if x.dim() != 4 or A.dim() != 3 or 0 in x.shape or 0 in A.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and A {tuple(A.shape)}, "
                         "expected (m, b, l, e) and (m, e, n), no axis of length 0")

    m, b, l, e = x.shape
    n = A.shape[-1]
    maps = [(m, b, l, n), (m, b, n)]
    shapes = {"x": [(m, b, l, e)], "A": [(m, e, n)], "delta": [(m, b, l, e), (m, b, e)],
              "B": maps, "C": maps, "D": [(m, e)], "w": [(m,), (m, b, l)],
              "H0": [(b, e, n)]}
    if mode == "recurrence":
        shapes["w"].append((m, m))
        if w is not None and w.dim() == 2:
            shapes["H0"] = [(m, b, e, n)]
    for name, v in given.items():
        if tuple(v.shape) not in shapes[name]:
            expected = " or ".join(map(str, shapes[name]))
            if name == "w" and v.shape == (m, m):
                expected += ": weights (m, m) need mode='recurrence'"
            raise ValueError(f"{name} has shape {tuple(v.shape)}, expected {expected}")
        if v.device != x.device:
            raise ValueError(f"{name} is on {v.device} and x on {x.device}: move both "
                             "to one device with .to()")


# ------------------------------------------------------------------- the model
ABSENT = -1e9            # softmax turns it into weight 0, or 1/m if all are so


class BlockState(NamedTuple):
    """What a block remembers between two pieces of a sequence."""
    conv: torch.Tensor       # (m, b, d_conv - 1, e), the last inputs of the convolution
    H: torch.Tensor          # (b, e, n), or (m, b, e, n) if nothing is coupled


class State(NamedTuple):
    """What a `CoupledMamba` remembers. Its size does not depend on the time so far."""
    blocks: list             # of BlockState
    pooled: torch.Tensor     # (m, b, d), maximum, sum or last of the features so far
    count: torch.Tensor      # (m, b), number of real steps so far


def zero_absent(x, mask):
    """x (..., l, c) with zeros where mask (..., l) is False. None masks nothing.

    It selects and does not multiply, because inf * 0 and NaN * 0 are NaN.
    """
    if mask is None:
        return x
    return torch.where(mask[..., None], x, 0)


def other_modalities(f):
    """For each modality those of all others: (m, b, l, d) -> (m, b, l, (m - 1) d)."""
    m = len(f)
    rows = []
    for i in range(m):
        others = [f[k] for k in range(m) if k != i]
        rows.append(torch.cat(others, -1))
    return torch.stack(rows)


class StackedLinear(nn.Module):
    """One linear map for each modality, stored together so that one einsum serves all.

    NOTE: the initialisation keeps the variance; nn.Linear's would keep a third of it.
    What y gets from the state is cubic in x, because B and C depend on x, too: at the
    start it is 0.1 of the skip D x here, and would be 0.002 of it there.
    """

    def __init__(self, m, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, d_in, d_out) / d_in ** 0.5)

    def forward(self, x):                                         # (m, b, l, d_in)
        return torch.einsum("mbli,mio->mblo", x, self.weight)     # (m, b, l, d_out)


class Block(nn.Module):
    """Algorithm 1 for all modalities at once. Each modality has its own parameters."""

    def __init__(self, m, d_model, d_state, expand, d_conv, dt_rank, coupling, dropout,
                 mode):
        super().__init__()
        e = expand * d_model
        self.coupling = coupling
        self.mode = mode
        self.norm_weight = nn.Parameter(torch.ones(m, d_model))
        self.norm_bias = nn.Parameter(torch.zeros(m, d_model))
        self.in_proj = StackedLinear(m, d_model, 2 * e)
        self.conv_weight = nn.Parameter(torch.randn(m, e, d_conv) / d_conv ** 0.5)
        self.conv_bias = nn.Parameter(torch.zeros(m, e))
        self.x_proj = StackedLinear(m, e, dt_rank + 2 * d_state)
        self.dt_proj = StackedLinear(m, dt_rank, e)
        self.out_proj = StackedLinear(m, e, d_model)
        self.dropout = nn.Dropout(dropout)

        # softplus(dt_bias) is the step size at the start, log-uniform in [0.001, 0.1].
        step = torch.empty(m, e).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        # A = -1, ..., -n in every channel: Mamba's initialisation, called S4D-real.
        A = torch.arange(1.0, d_state + 1).repeat(m, e, 1)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(m, e))
        if coupling == "learned":
            self.coupling_logits = nn.Parameter(torch.zeros(m))

    def forward(self, f, mask=None, state=None):
        """f (m, b, l, d), mask (m, b, l) or None -> f of the same shape, BlockState."""
        if state is None:
            state = self.init_state(f.shape[1])
        rank = self.dt_proj.weight.shape[1]
        n = self.A_log.shape[2]

        normed = F.layer_norm(f, f.shape[-1:]) * self.norm_weight[:, None, None]
        normed = normed + self.norm_bias[:, None, None]          # Alg. 1, line 3
        u, z = self.in_proj(normed).chunk(2, -1)              # lines 4, 5: (m, b, l, e)
        u, conv_state = self.causal_conv(zero_absent(u, mask), state.conv)
        x = F.silu(u)                                            # line 9
        low, B, C = self.x_proj(x).split([rank, n, n], -1)       # lines 10, 11
        delta = self.dt_proj(low) + self.dt_bias[:, None, None]
        delta = F.softplus(delta)                                # line 12
        delta = zero_absent(delta, mask)       # at a missing step S = 1 and V = 0
        A = -torch.exp(self.A_log.to(state_dtype(self.A_log)))   # (m, e, n)
        y, H = self.coupled_ssm(x, delta, A, B, C, mask, state.H)     # lines 13-15
        y = zero_absent(y, mask) * F.silu(z)                     # line 19
        f = f + self.dropout(self.out_proj(y))                   # line 21
        return f, BlockState(conv_state, H)

    def coupled_ssm(self, x, delta, A, B, C, mask, H):
        """y (m, b, l, e) and the last H: (b, e, n), or (m, b, e, n) if not coupled."""
        mode = self.mode
        if mode == "auto" and x.shape[2] == 1:
            mode = "recurrence"                # a loop of one step needs no preparation
        if self.coupling != "none":
            w = self.weights(mask)
            return coupled_scan(x, delta, A, B, C, self.D, w, H, mode)

        ys = []
        states = []
        for i in range(len(x)):                # one modality alone is exactly Mamba
            chain = [v[i:i + 1] for v in (x, delta, A, B, C, self.D)]
            y, H_last = coupled_scan(*chain, H0=H[i], mode=mode)
            ys.append(y)
            states.append(H_last)
        return torch.cat(ys), torch.stack(states)

    def weights(self, mask):
        """The weights w of the chains in H (Eq. 9): (m,), or (m, b, l) with a mask.

        At each step they are renormalised over the modalities that are present. If all
        are missing, each gets 1/m; H then stays as it is, because S = 1 and V = 0.
        """
        m = len(self.D)
        dtype = state_dtype(self.D)
        if self.coupling == "sum":
            if mask is None:
                return self.D.new_ones(m, dtype=dtype)
            return torch.where(mask.any(0), mask.to(dtype), 1 / m)

        logits = self.D.new_zeros(m, dtype=dtype)
        if self.coupling == "learned":
            logits = self.coupling_logits.to(dtype)
        if mask is not None:
            logits = torch.where(mask, logits[:, None, None], ABSENT)
        return torch.softmax(logits, 0)

    def causal_conv(self, u, last_inputs):
        """Depthwise convolution (line 9): time t reads u from t - d_conv + 1 to t.

        u (m, b, l, e); last_inputs (m, b, d_conv - 1, e), what came before u. Returns
        the result, and what comes before the next piece, in the same shapes.
        """
        l = u.shape[2]
        taps = self.conv_weight.shape[-1]
        u = torch.cat([last_inputs.to(u.dtype), u], 2)
        out = self.conv_bias[:, None, None]
        for j in range(taps):
            tap = self.conv_weight[:, None, None, :, j]              # (m, 1, 1, e)
            out = torch.addcmul(out, tap, u[:, :, j:j + l])
        return out, u[:, :, l:].clone()        # a view would keep all of u in memory

    def state_shapes(self, b):
        """The shapes of a BlockState for a batch of b."""
        m, e, n = self.A_log.shape
        taps = self.conv_weight.shape[-1]
        if self.coupling == "none":
            return BlockState((m, b, taps - 1, e), (m, b, e, n))
        return BlockState((m, b, taps - 1, e), (b, e, n))

    def init_state(self, b):
        """The BlockState before the first step for a batch of b: all zero."""
        shapes = self.state_shapes(b)
        conv = self.D.new_zeros(shapes.conv)
        H = self.D.new_zeros(shapes.H, dtype=state_dtype(self.D))
        return BlockState(conv, H)


class CoupledMamba(nn.Module):
    """M streams of features -> one prediction (Figure 1).

    A linear encoder for each stream -> n_layers blocks, and after each but the last the
    "Cat" of Figure 1: each modality adds a linear map of the concatenated others ->
    pooling over time -> a weighted sum over the modalities (softmax of learned logits)
    -> a head of two layers.

    Args:
        d_inputs: the feature width of each stream, such as (768, 33, 709).
        d_output: the width of the prediction.
        d_model, n_layers, d_state, expand, d_conv: sizes; the paper's by default.
        dt_rank: rank of the map to delta. None is d_state // 8, the paper's choice.
        coupling: the weights w of the chains in the state that all of them read.
            "mean": 1/m. "learned": softmax of logits that start at zero. "sum": 1, as
            Eq. 6 has it; P is then near m at the start and H grows like m^l: with 3
            modalities, 3 blocks and float32 the output is not finite from l = 50 on.
            "none": one Mamba for each modality, nothing coupled.
        mix: whether there is the "Cat" between blocks.
        pooling: "max", "mean" or "last" (the last real step) over time.
        dropout: of each block's output and in the head.
        mode: how the scan is computed, see `coupled_scan`.

    The attribute `config` holds these arguments, so that CoupledMamba(**model.config)
    is a new model of the same kind.

    Raises:
        ValueError: an argument that does not fit. The message says what was expected.
    """

    def __init__(self, d_inputs, d_output=1, *, d_model=128, n_layers=3, d_state=64,
                 expand=2, d_conv=4, dt_rank=None, coupling="mean", mix=True,
                 pooling="max", dropout=0.0, mode="auto"):
        super().__init__()
        self.config = dict(
            d_inputs=d_inputs, d_output=d_output, d_model=d_model, n_layers=n_layers,
            d_state=d_state, expand=expand, d_conv=d_conv, dt_rank=dt_rank,
            coupling=coupling, mix=mix, pooling=pooling, dropout=dropout, mode=mode)
        check_config(self.config)
        m = len(d_inputs)
        if dt_rank is None:
            dt_rank = max(1, d_state // 8)

        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            self.blocks.append(Block(m, d_model, d_state, expand, d_conv, dt_rank,
                                     coupling, dropout, mode))
        self.mix = nn.ModuleList()
        if mix and m > 1:
            for _ in range(n_layers - 1):
                self.mix.append(StackedLinear(m, (m - 1) * d_model, d_model))
        self.modality_logits = nn.Parameter(torch.zeros(m))
        self.head = nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU(),
                                  nn.Dropout(dropout), nn.Linear(d_model, d_output))

    def forward(self, xs, mask=None):
        """Predict from whole sequences.

        Args:
            xs: m tensors (b, l, d_inputs[i]) in the dtype of the model.
            mask: (m, b, l) bool, True where a modality has a real step, or None if all
                are real. What a missing step contains is never read.
        Returns:
            (b, d_output).
        Raises:
            ValueError: xs or mask do not fit.
        """
        self._check(xs, mask)
        out, _ = self._advance(xs, self.init_state(len(xs[0])), mask)
        return out

    def encode(self, xs, mask=None):
        """The features before pooling, (m, b, l, d), 0 where missing; see `forward`."""
        self._check(xs, mask)
        f, _ = self._features(xs, self.init_state(len(xs[0])), mask)
        return f

    def advance(self, xs, state, mask=None):
        """Continue a stream by a piece of any length.

        Args:
            xs, mask: the next l steps, l >= 1, as for `forward`.
            state: what the last call of this model returned, or `init_state(b)`.
        Returns:
            out (b, d_output), equal to `forward` on all steps so far, and a new state.
            Gradients flow through the state. Under torch.no_grad memory is constant.
        Raises:
            ValueError: xs, mask or state do not fit.
        """
        self._check(xs, mask)
        self._check_state(state, len(xs[0]))
        return self._advance(xs, state, mask)

    def step(self, xs_t, state, mask=None):
        """`advance` by one step: xs_t m tensors (b, d_inputs[i]), mask (m, b)."""
        self._check(xs_t, mask, axes=("b",))
        self._check_state(state, len(xs_t[0]))
        xs = [x[:, None] for x in xs_t]
        if mask is not None:
            mask = mask[..., None]
        return self._advance(xs, state, mask)

    def init_state(self, batch_size):
        """The `State` before the first step, for `advance` and `step`."""
        m = len(self.encoders)
        d = self.encoders[0].out_features
        like = self.modality_logits
        pooled = like.new_zeros(m, batch_size, d, dtype=state_dtype(like))
        if self.config["pooling"] == "max":
            pooled = pooled - math.inf
        count = like.new_zeros(m, batch_size, dtype=torch.long)
        blocks = [block.init_state(batch_size) for block in self.blocks]
        return State(blocks, pooled, count)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _features(self, xs, state, mask):
        """f (m, b, l, d) after the last block, 0 where missing; the block states."""
        f = []
        for i, encoder in enumerate(self.encoders):
            x = xs[i]
            if mask is not None:
                x = zero_absent(x, mask[i])    # NaN would reach the encoder's gradient
            f.append(encoder(x))
        f = zero_absent(torch.stack(f), mask)                        # (m, b, l, d)

        block_states = []
        for i, block in enumerate(self.blocks):
            f, block_state = block(f, mask, state.blocks[i])
            block_states.append(block_state)
            if i < len(self.mix):                                    # "Cat" of Figure 1
                f = zero_absent(f + self.mix[i](other_modalities(f)), mask)
        return f, block_states

    def _advance(self, xs, state, mask):
        """out and the new State, from arguments that were checked."""
        f, block_states = self._features(xs, state, mask)
        if mask is None:
            mask = f.new_ones(f.shape[:3], dtype=torch.bool)
        pooled = self._pool(f, state.pooled, mask)
        count = state.count + mask.sum(2)
        out = self.head(self._weighted_sum(pooled, count).to(f.dtype))
        return out, State(block_states, pooled, count)

    def _pool(self, f, pooled, mask):
        """Join the features f (m, b, l, d) of a piece to what is pooled, (m, b, d)."""
        pooling = self.config["pooling"]
        if pooling == "max":
            real = torch.where(mask[..., None], f, -math.inf)
            return torch.maximum(pooled, real.amax(2))
        if pooling == "mean":
            return pooled + f.sum(2, dtype=pooled.dtype)      # f is 0 where missing
        time = torch.arange(mask.shape[2], device=mask.device)
        last = (mask * time).argmax(2)                               # (m, b)
        f_last = torch.take_along_dim(f, last[..., None, None], 2)[:, :, 0]
        return torch.where(mask.any(2)[..., None], f_last, pooled)

    def _weighted_sum(self, pooled, count):
        """The weighted sum over the modalities with at least one real step: (b, d)."""
        seen = (count > 0)[..., None]                                # (m, b, 1)
        if self.config["pooling"] == "mean":
            pooled = pooled / count.clamp(min=1)[..., None]
        logits = self.modality_logits.to(pooled.dtype)[:, None, None]
        weights = torch.softmax(torch.where(seen, logits, ABSENT), 0)
        return (weights * torch.where(seen, pooled, 0)).sum(0)

    def _check(self, xs, mask, axes=("b", "l")):
        """Raise ValueError unless xs are m tensors (*axes, width) and mask fits."""
        widths = tuple(self.config["d_inputs"])
        expected = (f"a list of {len(widths)} tensors ({', '.join(axes)}, width) with "
                    f"the widths {widths} and the same {' and '.join(axes)}")
        if not isinstance(xs, (list, tuple)):
            raise ValueError(f"xs is a {type(xs).__name__}, expected {expected}")
        for x in xs:
            if not isinstance(x, torch.Tensor):
                raise ValueError(f"xs holds a {type(x).__name__}, expected {expected}: "
                                 "convert an array with torch.as_tensor; for a stream "
                                 "that is absent give zeros and a mask")
        shapes = [tuple(x.shape) for x in xs]
        leading = shapes[0][:-1] if shapes else ()
        fits = shapes == [(*leading, width) for width in widths]
        if not fits or len(leading) != len(axes) or 0 in leading:
            raise ValueError(f"xs has the shapes {shapes}, expected {expected}, none "
                             "of them 0: resample or pad streams of other lengths")

        dtype = self.modality_logits.dtype
        narrow = (torch.float32, torch.float16, torch.bfloat16)
        for x in xs:
            cast = torch.is_autocast_enabled(x.device.type) and x.dtype in narrow
            if x.dtype != dtype and not cast:
                raise ValueError(f"xs holds a tensor of {x.dtype} and the model is of "
                                 f"{dtype}: convert the tensor with .to({dtype})")

        shape = (len(widths), *leading)
        if mask is None:
            return
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"mask is a {type(mask).__name__}, expected a bool tensor "
                             f"of shape {shape}: torch.as_tensor converts an array, "
                             "torch.stack joins a list of tensors")
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}, "
                             f"expected torch.bool of shape {shape}, True where real")

    def _check_state(self, state, b):
        """Raise ValueError unless `state` has the shapes of this model and batch."""
        advice = f"begin with state = model.init_state({b})"
        if not isinstance(state, State):
            raise ValueError(f"state is a {type(state).__name__}, expected a State: "
                             f"{advice}")
        m = len(self.encoders)
        d = self.encoders[0].out_features
        fits = state.pooled.shape == (m, b, d) and len(state.blocks) == len(self.blocks)
        for given, block in zip(state.blocks, self.blocks):
            shapes = BlockState(given.conv.shape, given.H.shape)
            fits = fits and shapes == block.state_shapes(b)
        if not fits:
            raise ValueError("state is of another model or of another batch size, "
                             f"expected one for a batch of {b}: {advice}")


def check_config(config):
    """Raise ValueError unless `config` holds arguments that `CoupledMamba` can take.

    Sizes become Python's own integers, which torch.load(weights_only=True) accepts.
    """
    d_inputs = config["d_inputs"]
    if not isinstance(d_inputs, (list, tuple)) or not d_inputs:
        raise ValueError(f"d_inputs is {d_inputs!r}, expected the feature widths of "
                         "the streams in a list or tuple, such as (768, 33, 709)")
    choices = {"coupling": ("mean", "learned", "sum", "none"),
               "mix": (True, False),
               "pooling": ("max", "mean", "last"),
               "mode": ("auto", *MODES)}
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} is {config[name]!r}, expected one of "
                             f"{', '.join(map(str, allowed))}")

    sizes = {f"d_inputs[{i}]": width for i, width in enumerate(d_inputs)}
    for name in ("d_output", "d_model", "n_layers", "d_state", "expand", "d_conv"):
        sizes[name] = config[name]
    if config["dt_rank"] is not None:
        sizes["dt_rank"] = config["dt_rank"]
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} is {size!r}, expected a whole number from 1 up")
        if name in config:
            config[name] = int(size)
    config["d_inputs"] = tuple(int(width) for width in d_inputs)


# ================================================================= the method ends here
# What follows computes the same numbers faster: in PyTorch (mode "scan"), and by the
# Triton kernel. You can understand and use the model without reading it.

CHUNK = 16                    # steps between two states that are kept for backward
CHUNK_ELEMENTS = 3 * 2 ** 19  # numbers in S of a chunk: some megabytes, for the cache


def scan(x, delta, A, B, C, D, w, H0):
    """Mode "scan": Eq. 7 in chunks of time, without any tensor (..., l, e, n).

    Time and memory are linear in l. It can be differentiated once, not twice.
    """
    apply = ChunkedScan.apply
    if torch.compiler.is_compiling():          # its loops would take minutes to compile
        apply = torch.compiler.disable(apply)
    y, H_last = apply(x, delta, A, B, C, w, H0)
    return torch.addcmul(y, D[:, None, None], x), H_last


class ChunkedScan(torch.autograd.Function):
    """y without D x, and H_last. Kept: the inputs, and H where chunks begin."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, w, H0):
        batches, chunks = pieces(x.shape, A.shape[-1])
        space = Workspace(H0)
        y = torch.empty_like(x)
        H_last = torch.empty_like(H0)
        training = any(ctx.needs_input_grad)
        kept = H0.new_empty(len(chunks) if training else 0, *H0.shape)

        for rows in batches:
            H = H0[rows]
            for i, steps in enumerate(chunks):
                if training:
                    kept[i, rows] = H
                at = (slice(None), rows, steps)
                y[at], H = forward_chunk(x[at], delta[at], A, B[at], C[at], w[at], H,
                                         space)
            H_last[rows] = H
        ctx.save_for_backward(x, delta, A, B, C, w, kept)
        return y, H_last

    @staticmethod
    def backward(ctx, dy, dH_last):
        if torch.is_grad_enabled():
            raise RuntimeError("mode='scan' has no second derivative, and create_graph="
                               "True asks for one: use mode='recurrence'")
        needs_dw = ctx.needs_input_grad[5]
        with torch.autocast(dy.device.type, enabled=False):
            return adjoint(*ctx.saved_tensors, dy, dH_last, needs_dw)


def pieces(shape, n):
    """Slices of the batch, so that S of a chunk stays small, and the chunks of time."""
    m, b, l, e = shape
    rows = max(1, CHUNK_ELEMENTS // (CHUNK * m * e * n))
    batches = [slice(i, i + rows) for i in range(0, b, rows)]
    chunks = [slice(i, i + CHUNK) for i in range(0, l, CHUNK)]
    return batches, chunks


class Workspace:
    """Tensors that every chunk uses again: allocating them costs more than the sums."""

    def __init__(self, like):
        self.like = like
        self.tensors = {}

    def get(self, name, *shape):
        size = math.prod(shape)
        if name not in self.tensors or self.tensors[name].numel() < size:
            self.tensors[name] = self.like.new_empty(size)
        return self.tensors[name][:size].view(shape)


def walk(P, U, H, reads, steps):
    """H <- P[t] H + U[t] for t in `steps`; reads[:, t] becomes the H before step t.

    P, U, reads (b, t, e, n), H (b, e, n). Returns the last H.
    """
    P = P.unbind(1)
    U = U.unbind(1)
    reads = reads.unbind(1)
    reads[steps[0]].copy_(H)
    for t, following in zip(steps, steps[1:]):
        torch.addcmul(U[t], P[t], reads[t], out=reads[following])
    t = steps[-1]
    return torch.addcmul(U[t], P[t], reads[t])


def chunk_states(delta, v, A, B, w, H, space):
    """`collapse` and the recurrence of H over one chunk, without forming V = v B.

    delta, v = delta x (m, b, t, e); B (m, b, t, n); w (m, b, t); H (b, e, n) before.
    Returns S (m, b, t, e, n), P and the H that each step reads (b, t, e, n), last H.
    """
    m, b, t, e = delta.shape
    n = A.shape[-1]

    A_log2 = A * math.log2(math.e)                    # exp2 is faster than exp
    S = space.get("S", m, b, t, e, n)
    torch.mul(delta[..., None], A_log2[:, None, None], out=S).exp2_()

    wv = w[..., None] * v
    P = torch.mul(S[0], w[0, ..., None, None], out=space.get("P", b, t, e, n))
    U = torch.mul(wv[0, ..., None], B[0, :, :, None], out=space.get("U", b, t, e, n))
    for k in range(1, m):
        P.addcmul_(S[k], w[k, ..., None, None])       # P = sum_k w_k S_k
        U.addcmul_(wv[k, ..., None], B[k, :, :, None])          # U = sum_k w_k v_k B_k

    H_before = space.get("H", b, t, e, n)
    H = walk(P, U, H, H_before, range(t))
    return S, P, H_before, H


def forward_chunk(x, delta, A, B, C, w, H, space):
    """y (m, b, t, e) of one chunk, and H after it, from H (b, e, n) before it."""
    v = delta * x
    S, _, H_before, H = chunk_states(delta, v, A, B, w, H, space)

    # C . h = C . (S H + v B) = C . (S H) + v (C . B)
    SH = S.mul_(H_before)                             # overwrites S
    y = torch.einsum("mbtn,mbten->mbte", C, SH)
    return y + v * (B * C).sum(-1, keepdim=True), H


# The chain rule on Eqs. 6 and 7, with g[m,t] = dL/dh[m,t] and G[t] = dL/dH[t]:
#
#     g[m,t] = C[m,t] dy[m,t] + w[m,t] G[t]
#     G[t-1] = sum_m S[m,t] g[m,t] = P[t] G[t] + Q[t]
#     Q[t] = sum_m S[m,t] C[m,t] dy[m,t]
#
# so backward is the same recurrence as Eq. 7, run from the end. With v = delta x, so
# that V = v B, and with gSH = g S H[t-1], the gradients of every step are
#
#     ddelta = sum_n gSH A + dv x     dA = sum_bl gSH delta     dw = sum_en G h
#     dv = sum_n g B                  dx = dv delta             dH0 = G before step 1
#     dB = sum_e g v                  dC = sum_e dy h
#
# Sums of g and h are taken term by term: sum_n g B = dy (C . B) + w sum_n G B.
def backward_chunk(x, delta, A, B, C, w, dy, H, G, space, needs_dw):
    """The gradients of one chunk, from H before it and G after it, both (b, e, n).

    Returns G before the chunk; dx, ddelta (m, b, t, e); dB, dC (m, b, t, n); dw
    (m, b, t) or None; dA (m, e, n).
    """
    m, b, t, e = x.shape
    n = A.shape[-1]
    v = delta * x
    S, P, H_before, _ = chunk_states(delta, v, A, B, w, H, space)

    g = torch.mul(dy[..., None], C[..., None, :], out=space.get("g", m, b, t, e, n))
    Q = torch.mul(S[0], g[0], out=space.get("U", b, t, e, n))
    for k in range(1, m):
        Q.addcmul_(S[k], g[k])
    G_after = space.get("G", b, t, e, n)
    G = walk(P, Q, G, G_after, range(t)[::-1])

    SH = S.mul_(H_before)                             # overwrites S
    sum_GB = torch.einsum("mbtn,bten->mbte", B, G_after)
    sum_Gv = torch.einsum("mbte,bten->mbtn", v, G_after)
    sum_dySH = torch.einsum("mbte,mbten->mbtn", dy, SH)
    dw = None
    if needs_dw:
        dw = (sum_GB * v + (SH * G_after).sum(-1)).sum(-1)

    for k in range(m):
        g[k].addcmul_(G_after, w[k, ..., None, None])           # g = C dy + w G
    gSH = SH.mul_(g)
    sum_gSHA = torch.mul(gSH, A[:, None, None], out=g).sum(-1)
    dA = torch.mul(gSH, delta[..., None], out=g).sum(2).sum(1)

    dv = dy * (B * C).sum(-1, keepdim=True) + w[..., None] * sum_GB
    sum_vdy = (v * dy).sum(-1, keepdim=True)
    dB = C * sum_vdy + w[..., None] * sum_Gv
    dC = B * sum_vdy + sum_dySH
    return G, dv * delta, dv * x + sum_gSHA, dB, dC, dw, dA


def adjoint(x, delta, A, B, C, w, kept, dy, dH_last, needs_dw):
    """The gradients of x, delta, A, B, C, w and H0, chunk by chunk from the end."""
    batches, chunks = pieces(x.shape, A.shape[-1])
    space = Workspace(dH_last)
    dx, ddelta, dB, dC = (torch.empty_like(v) for v in (x, delta, B, C))
    dw = None
    if needs_dw:
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    dA = torch.zeros_like(A)
    dH0 = torch.empty_like(dH_last)

    for rows in batches:
        G = dH_last[rows]
        for i in reversed(range(len(chunks))):
            at = (slice(None), rows, chunks[i])
            G, dx[at], ddelta[at], dB[at], dC[at], dw_chunk, dA_chunk = backward_chunk(
                x[at], delta[at], A, B[at], C[at], w[at], dy[at], kept[i, rows], G,
                space, needs_dw)
            dA += dA_chunk
            if needs_dw:
                dw[at] = dw_chunk
        dH0[rows] = G
    return dx, ddelta, dA, dB, dC, dw, dH0


# ------------------------------------------------------------------- the Triton kernel
# The name of kernel.py, which may have been copied into a package with this file.
KERNEL = f"{__package__}.kernel" if __package__ else "kernel"


def triton_scan(x, delta, A, B, C, D, w, H0):
    """Mode "kernel": Eq. 7 in Triton, by kernel.py in the folder of this file."""
    reason = kernel_problem(x.device, len(x))
    if reason:
        raise ValueError(f"mode='kernel' cannot run: {reason}. Use mode='scan', which "
                         "runs on any device")
    kernel = sys.modules[KERNEL]          # torch.compile can trace this, but no import
    return kernel.scan(x, delta, A, B, C, D, w, H0)


MODES = {"recurrence": recurrence, "convolution": convolution, "scan": scan,
         "kernel": triton_scan}


def choose_mode(device, m):
    """What "auto" means for m modalities on `device`."""
    if device.type != "cuda":
        return "scan"
    reason = kernel_problem(device, m)
    if reason:
        warn_once(reason)
        return "scan"
    return "kernel"


@functools.cache
def warn_once(reason):
    warnings.warn("coupled_scan goes on in PyTorch (mode='scan') and not in the Triton "
                  f"kernel: {reason}", stacklevel=4)


def kernel_problem(device, m):
    """Why the kernel cannot serve m modalities on `device`, or None if it can."""
    reason = import_problem()
    if reason:
        return reason
    return sys.modules[KERNEL].unavailable(device, m)


# torch.compile must call these two and not trace them. The public way to say so,
# torch.compiler.assume_constant_result, would make every import a second slower.
choose_mode._dynamo_marked_constant = True
kernel_problem._dynamo_marked_constant = True


@functools.cache
def import_problem():
    """Import kernel.py, here and not before because it needs Triton.

    Returns None, or the reason why it cannot be imported.
    """
    file = Path(__file__).with_name("kernel.py")
    if not file.exists():
        return f"there is no kernel.py in the folder {file.parent}"
    try:
        spec = importlib.util.find_spec(KERNEL)
    except ValueError:                    # a module that somebody made without a file
        spec = None
    if spec is None or not spec.origin or Path(spec.origin).resolve() != file.resolve():
        return f"the module {KERNEL!r} that Python finds is not {file}"
    try:
        importlib.import_module(KERNEL)
    except ImportError as error:
        return f"kernel.py cannot be imported ({error}): install Triton"
    return None
