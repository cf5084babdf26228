r"""Coupled Mamba: fuse M sequences inside the state of a state space model.

Paper: Li, Zhou, Yu, Song, Yang, "Coupled Mamba: Enhanced Multi-modal Fusion with
Coupled State Space Model", NeurIPS 2024 (arXiv 2405.18014). It builds on Gu and Dao,
"Mamba" (arXiv 2312.00752). This file needs torch and nothing else: copy it.

Each modality (text, audio, vision, ...) has a chain: a Mamba layer that turns an input
x into an output y through a state h, which is carried through time. In a Coupled Mamba
the state of every chain is computed from the previous states of all chains:

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
selective: `Block.forward` computes Delta, B and C from the input at every step.

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

Reading order: `recurrence` is the definition (Eq. 6), `collapse` the idea that makes it
cheap (Eq. 7), `convolution` the global convolution kernel (Eq. 8); `coupled_scan` runs
any of them. `Block` is Algorithm 1, `CoupledMamba` Figure 1. There the method ends. The
rest computes it fast; "kernel" means a program for GPUs there, and not a convolution.
"""
import functools
import importlib.util
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------- the method
def discretize(x, delta, A, B):
    """The transition S and the input V of each chain (Eq. 2, Alg. 1 lines 13 and 14).

    x, delta (m, b, l, e), A (m, e, n), B (m, b, l, n) -> S, V (m, b, l, e, n); or, for
    one step, all of them without the axis l.
    """
    S = torch.exp(torch.einsum("m...e,men->m...en", delta, A))      # Alg. 1, line 13
    # NOTE: V is the Euler step that Mamba takes, not the exact integral over the step.
    V = (delta * x)[..., None] * B[..., None, :]                    # Alg. 1, line 14
    return S, V


def recurrence(x, delta, A, B, C, w, H):
    """Mode "recurrence": Eq. 6 with weights w, step after step. It is the reference."""
    ys = []
    steps = zip(x.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), w.unbind(2))
    for x_t, delta_t, B_t, C_t, w_t in steps:
        S, V = discretize(x_t, delta_t, A, B_t)         # (m, b, e, n)
        h = S * H + V                                   # Eq. 6, the coupled transition
        ys.append(torch.einsum("mben,mbn->mbe", h, C_t))
        H = torch.einsum("kb,kben->ben", w_t, h)        # Eq. 5: an H for each chain
    return torch.stack(ys, 2), H


def collapse(S, V, w):
    """M coupled chains are one recurrence. Multiply Eq. 6 by w[m,t] and sum over m:

        sum_m w[m,t] h[m,t] = (sum_m w[m,t] S[m,t]) * H[t-1] + sum_m w[m,t] V[m,t]
               H[t]         =          P[t]         * H[t-1] +        U[t]        Eq. 7

    So one scan serves any number of modalities, only H has to be remembered, and each
    chain is then computed from H by itself: h[m,t] = S[m,t] * H[t-1] + V[m,t].

    S, V (m, ..., e, n), w (m, ...) -> P, U (..., e, n).
    """
    P = (w[..., None, None] * S).sum(0)
    U = (w[..., None, None] * V).sum(0)
    return P, U


def convolution(x, delta, A, B, C, w, H0):
    """Mode "convolution": Eq. 7, unrolled down to H0, is a sum over all past inputs.

        H[t] = P[t] ... P[1] H0 + sum_{s <= t} P[t] ... P[s+1] U[s]

    The paper writes the products as powers P^i (Eqs. 8, 21, 22): see `fft_convolution`.
    In the selective model P changes at every step, so the kernel is a lower-triangular
    matrix over (t, s), with O(b l^2 e n) of time and memory.
    """
    if (w < 0).any():                                  # the logarithm of P would be NaN
        raise ValueError("got negative weights w: use mode='recurrence' or mode='scan'")
    l = x.shape[2]
    S, V = discretize(x, delta, A, B)
    P, U = collapse(S, V, w)                                           # (b, l, e, n)

    # P[t] ... P[s+1] is exp of a sum of logarithms. Each sum is taken by itself: in the
    # gradient of a difference of cumulative sums, a small P is lost beside a large one.
    # log 0 would give NaN, so a number is added; 1 / tiny would overflow in backward.
    log_P = torch.log(P + torch.finfo(P.dtype).tiny ** 0.5)
    t = torch.arange(l, device=x.device)[:, None, None, None]
    s = t.transpose(0, 1)
    sums = torch.where(s < t, log_P[:, :, None], 0).cumsum(1)          # (b, t, s, e, n)
    kernel = torch.where(s <= t, torch.exp(sums), 0)

    H = torch.einsum("btsen,bsen->bten", kernel, U)
    H = H + torch.exp(log_P.cumsum(1)) * H0[:, None]
    H_before = torch.cat([H0[:, None], H[:, :-1]], 1)                  # H[t-1]
    y = torch.einsum("mblen,mbln->mble", S * H_before + V, C)
    return y, H[:, -1]


def fft_convolution(x, delta, A, B, C, w):
    """y (m, b, l, e) by Eq. 8 as the paper has it: by FFT, in O(l log l), from H0 = 0,
    for constant parameters delta (m, b, e), B and C (m, b, n), w (m,).
    """
    l = x.shape[2]
    S, V = discretize(torch.ones_like(delta), delta, A, B)             # V of x = 1
    P, _ = collapse(S, V, w[:, None])                                  # (b, e, n)
    powers = P[..., None] ** torch.arange(l - 1, device=P.device)      # P^i
    CS = S * C[:, :, None]
    wV = w[:, None, None, None] * V

    # y[m,t] reads x[k,t-1-i] through C_m S_m P^i w_k V_k, and x[m,t] through C_m V_m.
    kernel = torch.einsum("mben,kben,beni->mkbei", CS, wV, powers)
    kernel = F.pad(kernel, (1, 0))                           # over t - s = 0 ... l - 1
    kernel = torch.fft.rfft(kernel, 2 * l)                       # 2 l: no wrap-around
    spectrum = torch.fft.rfft(x.transpose(2, 3), 2 * l)
    spectrum = torch.einsum("mkbef,kbef->mbef", kernel, spectrum)
    y = torch.fft.irfft(spectrum, 2 * l)[..., :l].transpose(2, 3)
    return y + torch.einsum("mben,mbn->mbe", V, C)[:, :, None] * x


# ------------------------------------------------------------------- the entry
def coupled_scan(x, delta, A, B, C, D=None, w=None, H0=None, mode="auto"):
    """Run M coupled state space models over a sequence (Eqs. 2-7, Alg. 1 lines 13-15).

    Args:
        x, delta: (m, b, l, e), input and step size; delta = 0 means h[m,t] = H[t-1].
        A: (m, e, n), < 0.  B, C: (m, b, l, n).  D: (m, e), or None for zero.
        w: (m,) or (m, b, l), or None for 1/m.  H0: (b, e, n), or None for zero.
        mode: "recurrence", "convolution", "scan" (any device), "kernel" (NVIDIA GPU),
            all with one result; or "auto": kernel where a GPU can run it, else scan.
    Returns y (m, b, l, e) in the dtype of x, and H_last (b, e, n), the H0 of the next
    call, differentiable in every tensor argument. The state is float32, or float64 if
    any argument is. A ValueError says what does not fit, or why the mode cannot run.
    """
    if torch.compiler.is_dynamo_compiling():   # tracing the loops would take minutes
        return torch.compiler.disable(coupled_scan)(x, delta, A, B, C, D, w, H0, mode)
    check_choice("mode", mode, ("auto", *MODES))
    m, b, l, e = check("x", x, m=None, b=None, l=None, e=None)
    m, e, n = check("A", A, x, m=m, e=e, n=None)
    D = x.new_zeros(m, e) if D is None else D
    w = wide(x.new_ones(m)) / m if w is None else w
    H0 = x.new_zeros(b, e, n) if H0 is None else H0
    check("delta", delta, x, m=m, b=b, l=l, e=e)
    check("B", B, x, m=m, b=b, l=l, n=n)
    check("C", C, x, m=m, b=b, l=l, n=n)
    check("D", D, x, m=m, e=e)
    check("H0", H0, x, b=b, e=e, n=n)
    if isinstance(w, torch.Tensor) and w.shape == (m,):
        w = w[:, None, None].expand(m, b, l)
    check("w", w, x, m=m, b=b, l=l)

    types = [v.dtype for v in (x, delta, A, B, C, D, w, H0)]
    dtype = functools.reduce(torch.promote_types, types, torch.float32)
    if mode == "auto":
        mode = choose_mode(x, A)
    with torch.autocast(x.device.type, enabled=False):
        y, H_last = MODES[mode](*[v.to(dtype) for v in (x, delta, A, B, C, w, H0)])
        # In place, y needs no second copy; torch.vmap, not served by these two, would.
        add = torch.Tensor.addcmul_ if mode in ("scan", "kernel") else torch.addcmul
        y = add(y, D.to(dtype)[:, None, None], x.to(dtype))
    return y.to(x.dtype), H_last


# ------------------------------------------------------------------- the model
def wide(v):
    """v in float32 or wider: 16 bits are not enough for weights and sums over time."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def softmax_over_present(logits, mask):
    """Weights of the modalities: (m,), or as mask (m, b, l); 1/m if all are absent."""
    logits = wide(logits)
    if mask is not None:
        logits = torch.where(mask, logits[:, None, None], -1e9)      # all -inf: NaN
    return torch.softmax(logits, 0)


def zero_absent(x, mask):
    """x (..., l, c) with zeros where mask (..., l) is False. None masks nothing."""
    if mask is None:
        return x
    return torch.where(mask[..., None], x, 0)            # inf * 0 and NaN * 0 are NaN


class StackedLinear(nn.Module):
    """One linear map for each modality, stored together so that one einsum serves all.

    NOTE: the initialisation keeps the variance; nn.Linear's would keep a third of it.
    What y gets from the state is cubic in x, because B and C depend on x, too: at first
    a tenth of the skip D x; with PyTorch's initialisation it would be some thousandths.
    """

    def __init__(self, m, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, d_in, d_out) / d_in ** 0.5)

    def forward(self, x):                                         # (m, b, l, d_in)
        return torch.einsum("mbli,mio->mblo", x, self.weight)     # (m, b, l, d_out)


class Block(nn.Module):
    """Algorithm 1 for all modalities at once; also a layer for your own network.

    Args:
        m, d_model: number of modalities, width of their features.
        d_state, expand, d_conv: n, e / d_model, steps that the convolution reads.
        dt_rank: rank of the map to delta; None: max(1, d_state // 8), as in the paper.
        coupling: the weights w of the chains in H. "mean": 1/m. "learned": softmax of
            logits that start at zero. "sum": 1, as in Eq. 6; H then grows like m^l and
            overflows within some 100 steps. "none": one Mamba for each modality.
        dropout: of the output, before the residual.  mode: see `coupled_scan`.
    """

    def __init__(self, m, d_model, *, d_state=64, expand=2, d_conv=4, dt_rank=None,
                 coupling="mean", dropout=0.0, mode="auto"):
        super().__init__()
        check_choice("coupling", coupling, ("mean", "learned", "sum", "none"))
        check_choice("mode", mode, ("auto", *MODES))
        if dt_rank is None:
            dt_rank = max(1, d_state // 8)
        self.coupling = coupling
        self.mode = mode
        self.split = [dt_rank, d_state, d_state]
        e = expand * d_model
        self.norm_weight = nn.Parameter(torch.ones(m, d_model))
        self.norm_bias = nn.Parameter(torch.zeros(m, d_model))
        self.in_proj = StackedLinear(m, d_model, 2 * e)
        self.conv_weight = nn.Parameter(torch.randn(m, e, d_conv) / d_conv ** 0.5)
        self.conv_bias = nn.Parameter(torch.zeros(m, e))
        self.x_proj = StackedLinear(m, e, sum(self.split))
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
        """f (m, b, l, d_model) -> features like f, 0 where missing, and the next state.

        mask: (m, b, l) bool, True where a modality has a real step; None: all are real.
        state: what the call on the steps before returned; None: nothing came before.
        """
        m, d = self.norm_weight.shape
        _, b, l, _ = check("f", f, self.D, self.D.dtype, m=m, b=None, l=None, d=d)
        if mask is not None:
            check("mask", mask, f, torch.bool, m=m, b=b, l=l)
        state = self.init_state(b) if state is None else state
        check_state(state, self.init_state(b))

        f = zero_absent(f, mask)
        normed = F.layer_norm(f, (d,)) * self.norm_weight[:, None, None]
        normed = normed + self.norm_bias[:, None, None]          # Alg. 1, line 3
        u, z = self.in_proj(normed).chunk(2, -1)              # lines 4, 5: (m, b, l, e)

        u = torch.cat([state["conv"].to(u.dtype), zero_absent(u, mask)], 2)
        x = self.conv_bias[:, None, None]
        for j, tap in enumerate(self.conv_weight.unbind(-1)):    # tap (m, e)
            x = torch.addcmul(x, tap[:, None, None], u[:, :, j:j + l])
        x = F.silu(x)                                            # line 9
        conv = u[:, :, l:].to(state["conv"].dtype, copy=True)    # a view would keep u

        low, B, C = self.x_proj(x).split(self.split, -1)         # lines 10, 11
        delta = self.dt_proj(low) + self.dt_bias[:, None, None]
        delta = F.softplus(delta)                                # line 12
        delta = zero_absent(delta, mask)       # at a missing step S = 1 and V = 0
        A = -torch.exp(wide(self.A_log))                         # (m, e, n)
        y, H = self.coupled_ssm(x, delta, A, B, C, mask, state["H"])   # lines 13-15
        y = zero_absent(y, mask) * F.silu(z)                     # line 19
        f = f + self.dropout(self.out_proj(y))                   # line 21
        return f, {"conv": conv, "H": H}

    def coupled_ssm(self, x, delta, A, B, C, mask, H):
        """y (m, b, l, e) and the last H: (b, e, n), or (m, b, e, n) if not coupled."""
        if self.coupling != "none":
            w = self.weights(mask)
            return coupled_scan(x, delta, A, B, C, self.D, w, H, self.mode)

        done = []
        for i in range(len(x)):                # one modality alone is exactly Mamba
            chain = [v[i:i + 1] for v in (x, delta, A, B, C, self.D)]
            done.append(coupled_scan(*chain, H0=H[i], mode=self.mode))
        ys, states = zip(*done)
        return torch.cat(ys), torch.stack(states)

    def weights(self, mask):
        """The weights w of the chains in H (Eq. 9): (m,), or (m, b, l) with a mask.

        If all are missing, each gets 1/m: H stays as it is, because S = 1 and V = 0.
        """
        if self.coupling == "learned":
            return softmax_over_present(self.coupling_logits, mask)
        w = softmax_over_present(self.D.new_zeros(len(self.D)), mask)
        if self.coupling == "mean":
            return w
        if mask is None:
            return torch.ones_like(w)
        return torch.where(mask.any(0), mask.to(w.dtype), w)

    def init_state(self, batch_size):
        """The state at the start: last inputs of the convolution, and H; all zero."""
        m, e, taps = self.conv_weight.shape
        shape = (batch_size, e, self.A_log.shape[2])
        if self.coupling == "none":
            shape = (m, *shape)
        return {"conv": self.D.new_zeros(m, batch_size, taps - 1, e),
                "H": wide(self.D).new_zeros(shape)}

    def extra_repr(self):
        return f"coupling={self.coupling!r}, mode={self.mode!r}"


class CoupledMamba(nn.Module):
    """M streams of features -> one prediction (Figure 1).

    A linear encoder for each stream -> n_layers blocks, and after each but the last the
    "Cat" of Figure 1: each modality adds a linear map of the concatenated others ->
    pooling over time -> a weighted sum over the modalities (softmax of learned logits)
    -> a head of two layers.

    Args:
        d_inputs: the feature width of each stream, such as (768, 33, 709).
        d_output: the width of the prediction.  mix: whether there is the "Cat".
        pooling: "max", "mean" or "last" (the last real step) over time.
        dropout: of each block's output and in the head.
        The others are those of `Block`; sizes are the paper's by default.
    CoupledMamba(**model.config) is a new model of the same kind.
    """

    def __init__(self, d_inputs, d_output=1, *, d_model=128, n_layers=3, d_state=64,
                 expand=2, d_conv=4, dt_rank=None, coupling="mean", mix=True,
                 pooling="max", dropout=0.0, mode="auto"):
        super().__init__()
        if not isinstance(d_inputs, (list, tuple)) or not d_inputs:
            raise ValueError(f"d_inputs is {d_inputs!r}, expected a list or tuple of "
                             "the streams' feature widths, such as (768, 33, 709)")
        check_choice("pooling", pooling, ("max", "mean", "last"))
        options = dict(d_state=d_state, expand=expand, d_conv=d_conv, dt_rank=dt_rank,
                       coupling=coupling, dropout=dropout, mode=mode)
        self.config = dict(d_inputs=tuple(int(width) for width in d_inputs),
                           d_output=d_output, d_model=d_model, n_layers=n_layers,
                           mix=mix, pooling=pooling, **options)
        for name, value in self.config.items():      # a checkpoint holds no NumPy types
            if hasattr(value, "item"):
                self.config[name] = value.item()

        m = len(d_inputs)
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        blocks = [Block(m, d_model, **options) for _ in range(n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.mix = nn.ModuleList()
        if mix and m > 1:
            for _ in range(n_layers - 1):
                self.mix.append(StackedLinear(m, (m - 1) * d_model, d_model))
        self.pooling = pooling
        self.modality_logits = nn.Parameter(torch.zeros(m))
        self.head = nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU(),
                                  nn.Dropout(dropout), nn.Linear(d_model, d_output))

    def forward(self, xs, mask=None):
        """Whole sequences xs, m tensors (b, l, d_inputs[i]) -> (b, d_output).

        mask: (m, b, l) bool, True where a modality has a real step; None: all are real.
        What a missing step contains is never read.
        """
        return self.advance(xs, self._start(xs, mask), mask)[0]

    def features(self, xs, mask=None):
        """The features before pooling, (m, b, l, d), 0 where missing."""
        return self._features(xs, self._start(xs, mask), mask)[0]

    def advance(self, xs, state, mask=None):
        """Continue a stream by a piece of any length, l >= 1; xs, mask as in `forward`.

        state: that of the last call, or `init_state`. Returns the output, which equals
        `forward` on all steps so far, and the next state. Gradients flow through it.
        """
        check_state(state, self._start(xs, mask))
        f, states = self._features(xs, state, mask)
        if mask is None:
            mask = f.new_ones(f.shape[:3], dtype=torch.bool)
        pooled = self._pool(f, state[self.pooling], mask)            # (m, b, d)
        count = state["count"] + mask.sum(2)                         # (m, b)
        next_state = {**states, self.pooling: pooled, "count": count}

        seen = (count > 0)[..., None]                                # (m, b, 1)
        if self.pooling == "mean":
            pooled = pooled / count.clamp(min=1)[..., None]
        weights = softmax_over_present(self.modality_logits, seen)
        fused = (weights * torch.where(seen, pooled, 0)).sum(0)      # (b, d)
        return self.head(fused.to(f.dtype)), next_state

    def init_state(self, batch_size):
        """The state at the start, a dict of tensors: "0.conv", "0.H" ... of the blocks,
        "max", "mean" (a sum) or "last" of the features, and "count" of the real steps.
        """
        state = {f"{i}.{name}": v for i, block in enumerate(self.blocks)
                 for name, v in block.init_state(batch_size).items()}
        shape = (len(self.encoders), batch_size, self.config["d_model"])
        start = -math.inf if self.pooling == "max" else 0.0
        state[self.pooling] = wide(self.modality_logits).new_full(shape, start)
        state["count"] = self.modality_logits.new_zeros(shape[:2], dtype=torch.long)
        return state

    def _features(self, xs, state, mask):
        """f (m, b, l, d) after the last block, 0 where missing; the blocks' states."""
        if mask is not None:                   # NaN would reach the encoder's gradient
            xs = [zero_absent(x, here) for x, here in zip(xs, mask)]
        f = torch.stack([encoder(x) for encoder, x in zip(self.encoders, xs)])
        states = {}
        for i, block in enumerate(self.blocks):
            own = {name: state[f"{i}.{name}"] for name in block.init_state(0)}
            f, own = block(f, mask, own)
            states |= {f"{i}.{name}": v for name, v in own.items()}
            if i < len(self.mix):                                    # "Cat" of Figure 1
                fs = f.unbind()
                others = [torch.cat(fs[:k] + fs[k + 1:], -1) for k in range(len(fs))]
                f = f + self.mix[i](torch.stack(others))             # blocks mask it
        return f, states

    def _pool(self, f, pooled, mask):
        """Join the features f (m, b, l, d) of a piece to what is pooled, (m, b, d)."""
        if self.pooling == "max":
            real = torch.where(mask[..., None], f, -math.inf)
            return torch.maximum(pooled, real.amax(2))
        if self.pooling == "mean":
            return pooled + f.sum(2, dtype=pooled.dtype)      # f is 0 where missing
        time = torch.arange(mask.shape[2], device=mask.device)
        last = (mask * time).argmax(2)                               # (m, b)
        f_last = torch.take_along_dim(f, last[..., None, None], 2)[:, :, 0]
        return torch.where(mask.any(2)[..., None], f_last, pooled)

    def _start(self, xs, mask):
        """The state at the start, after checks of xs and mask."""
        widths = self.config["d_inputs"]
        if not isinstance(xs, (list, tuple)) or len(xs) != len(widths):
            raise ValueError(f"xs is {described(xs)}, expected a list of {len(widths)} "
                             f"tensors (b, l, width) with the widths {widths}")
        like = self.modality_logits
        b = l = None
        for i, (x, width) in enumerate(zip(xs, widths)):
            b, l, _ = check(f"xs[{i}]", x, like, like.dtype, b=b, l=l, width=width)
        if mask is not None:
            check("mask", mask, like, torch.bool, m=len(xs), b=b, l=l)
        return self.init_state(b)


# ------------------------------------------------------------------- what was expected
def check(name, v, like=None, dtype=None, **axes):
    """The shape of v; ValueError unless v is as expected. Nothing is broadcast.

    like: a tensor on the same device. dtype: None is any of floating-point numbers.
    axes: their names and sizes; None is any size from 1 on.
    """
    fits = (isinstance(v, torch.Tensor) and v.dim() == len(axes) and v.numel() > 0
            and (like is None or v.device == like.device)
            and all(size in (None, got) for size, got in zip(axes.values(), v.shape)))
    if fits and v.dtype != dtype:
        converts = (dtype != torch.bool and v.dtype != torch.float64
                    and torch.is_autocast_enabled(v.device.type))
        fits = v.is_floating_point() and (dtype is None or converts)
    if not fits:
        shape = ", ".join(f"{axis} {size or '>= 1'}" for axis, size in axes.items())
        where = "" if like is None else f" on {like.device}"
        raise ValueError(f"{name} is {described(v)}, expected a tensor of "
                         f"{dtype or 'floating-point numbers'} and shape "
                         f"({shape}){where}")
    return v.shape


def described(v):
    if isinstance(v, torch.Tensor):
        return f"a tensor of {v.dtype} and shape {tuple(v.shape)} on {v.device}"
    return f"a {type(v).__name__}"


def check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")


def check_state(state, start):
    """Raise ValueError unless `state` has the names, shapes and dtypes of `start`."""
    if not isinstance(state, dict):
        raise ValueError(f"state is {described(state)}, begin with init_state()")
    for name in {**start, **state}:
        got, expected = described(state.get(name)), described(start.get(name))
        if got != expected:
            raise ValueError(f"state[{name!r}] is {got}, expected {expected}: begin "
                             "with init_state(), and keep to one model and batch size")


# ================================================================= the method ends here
CHUNK = 10                    # steps between two states that are kept for backward
CACHED = 2 ** 20              # numbers of S to work on at once, for the cache: 4 MB


def scan(x, delta, A, B, C, w, H0):
    """Mode "scan": Eqs. 6 and 7 step by step, without V and without h.

    Time and memory are linear in l. It can be differentiated once, not twice. On a CPU
    a few samples are computed at a time, so that S of a chunk stays in the cache.
    """
    samples = len(H0)
    if not x.is_cuda:
        samples = max(1, CACHED // (CHUNK * A.numel()))
    parts = [v.transpose(0, 2).split(samples, 1) for v in (x, delta, B, C, w)]
    done = [Scan.apply(x, delta, A, B, C, w, H)
            for x, delta, B, C, w, H in zip(*parts, H0.split(samples))]
    ys, states = zip(*done)                                          # y (l, b, m, e)
    return torch.cat([y.transpose(0, 2) for y in ys], 1), torch.cat(states)


# The chain rule on Eqs. 6 and 7, with g[m,t] = dL/dh[m,t] and G[t] = dL/dH[t]:
#     g[m,t] = C[m,t] dy[m,t] + w[m,t] G[t]
#     G[t-1] = sum_m S[m,t] g[m,t] = P[t] G[t] + Q[t]
#     Q[t]   = sum_m S[m,t] C[m,t] dy[m,t]
#
# so backward is the same recurrence as Eq. 7, run from the end (kernel.py uses Q). With
# v = delta x, so that V = v B, and z = g S H[t-1], the gradients of a step are
#     ddelta = sum_n z A + dv x     dA = sum_bl z delta     dw = sum_en G h
#     dv = sum_n g B                dx = dv delta           dH0 = G before step 1
#     dB = sum_e g v                dC = sum_e dy h
#
# Sums of h and g are taken term by term, so that neither h nor V is formed:
#     C . h = C . (S H) + v (C . B)            sum_n g B = dy (C . B) + w sum_n G B
class Scan(torch.autograd.Function):
    """Kept for backward: the inputs, and H before each chunk of CHUNK steps.

    Time comes first: x, delta (l, b, m, e), A (m, e, n), B, C (l, b, m, n), w
    (l, b, m), H (b, e, n). Large tensors are made once, because new memory is slow.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, w, H):
        l, b, _, _ = x.shape
        A2 = A * math.log2(math.e)                       # exp2 is faster than exp
        S = x.new_empty(min(CHUNK, l), b, *A.shape)
        H = H.clone(memory_format=torch.contiguous_format)
        H_chains, H_row = H[:, None], H.flatten(1)[:, None]      # views of H
        v = delta * x
        wv = (w[..., None] * v).mT                       # (l, b, e, m)
        y = v * (B * C).sum(-1, keepdim=True)            # v (C . B)
        kept = []

        for first in range(0, l, CHUNK):
            if any(ctx.needs_input_grad):
                kept.append(H.clone())
            chunk = slice(first, first + CHUNK)
            SH = S[:l - first]                           # the last chunk may be shorter
            torch.mul(delta[chunk, ..., None], A2, out=SH).exp2_()
            steps = zip(SH, SH.flatten(3), w[chunk, :, None], wv[chunk], B[chunk])
            for SH_t, rows, w_t, wv_t, B_t in steps:     # rows (b, m, e n)
                SH_t.mul_(H_chains)                                     # S H of Eq. 6
                torch.bmm(w_t, rows, out=H_row)
                H.baddbmm_(wv_t, B_t)                                   # P H + U, Eq. 7
            y[chunk] += (C[chunk][..., None, :] @ SH.mT).squeeze(3)     # C . (S H)
        ctx.save_for_backward(x, delta, A, B, C, w, *kept)
        return y, H

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, G):
        x, delta, A, B, C, w, *kept = ctx.saved_tensors
        large = A.new_empty(2, min(CHUNK, len(x)), len(G), *A.shape)
        states = A.new_empty(2, min(CHUNK, len(x)) + 1, *G.shape)
        dA = torch.zeros_like(A)
        with torch.autocast(dy.device.type, enabled=False):
            delta, B, C, w, dy = (u.contiguous() for u in (delta, B, C, w, dy))
            v = delta * x
            wv = (w[..., None] * v).mT
            sums = [torch.empty_like(u) for u in (dy, dy, B, B)] + [torch.zeros_like(w)]
            for i in reversed(range(len(kept))):
                chunk = slice(i * CHUNK, i * CHUNK + CHUNK)
                now = [u[chunk] for u in (delta, v, wv, B, C, w, dy, *sums)]
                G = chunk_sums(*now, dA, A, kept[i], G, large, states,
                               ctx.needs_input_grad[5])
            zA, GB, Gv, dySH, dw = sums
            dw += (GB * v).sum(-1)
            vdy = (v * dy).sum(-1, keepdim=True)
            dB = Gv.mul_(w[..., None]).addcmul_(C, vdy)
            dC = dySH.addcmul_(B, vdy)
            dv = GB.mul_(w[..., None]).addcmul_(dy, (C * B).sum(-1, keepdim=True))
            ddelta = zA.addcmul_(dv, x)
        return dv.mul_(delta), ddelta, dA, dB, dC, dw, G.clone()


def chunk_sums(delta, v, wv, B, C, w, dy, zA, GB, Gv, dySH, dw, dA, A, H_first, G_last,
               large, states, needs_dw):
    """Write zA, GB, Gv and dySH of a chunk, add to dw and dA, return G before it."""
    k, b, m, _ = v.shape
    S, g = large[:, :k]              # (k, b, m, e, n); g also holds products for a sum
    H, G = states[:, :k + 1]         # (k + 1, b, e, n); step t reads H[t] and G[t + 1]
    H_rows, G_rows = states[:, :k + 1].flatten(3).unsqueeze(3)      # (..., 1, e n)
    H[0], G[k] = H_first, G_last
    torch.mul(delta[..., None], A * math.log2(math.e), out=S).exp2_()
    steps = zip(S, g, g.flatten(3), w[:, :, None], wv, B, H[:, :, None], H[1:],
                H_rows[1:])
    for S_t, SH_t, rows, w_t, wv_t, B_t, H_t, H_next, H_row in steps:
        torch.mul(S_t, H_t, out=SH_t)
        torch.bmm(w_t, rows, out=H_row)
        H_next.baddbmm_(wv_t, B_t)                                      # Eq. 7

    dySH[:] = (dy[..., None, :] @ g).squeeze(3)                         # sum_e dy S H
    torch.mul(dy[..., None], C[..., None, :], out=g)                    # C dy
    ones = S.new_ones(b, 1, m)
    steps = zip(S, g, S.flatten(3), w[..., None, None], dw, H_rows, G[1:, :, None],
                G_rows[1:], G_rows)
    for S_t, g_t, rows, w_t, dw_t, H_row, G_t, G_row, G_before in reversed(list(steps)):
        if needs_dw:                                     # it takes a tenth of the time
            dw_t += torch.bmm(G_row * H_row, rows.mT)[:, 0]             # sum_en G S H
        S_t.mul_(g_t.addcmul_(w_t, G_t))                                # S g
        torch.bmm(ones, rows, out=G_before)                             # G[t-1]
    z = S.mul_(H[:k, :, None])
    torch.sum(torch.mul(z, A, out=g), -1, out=zA)
    dA += torch.mul(z, delta[..., None], out=g).flatten(0, 1).sum(0)
    torch.matmul(B, G[1:].mT, out=GB)                                   # (k, b, m, e)
    torch.matmul(v, G[1:], out=Gv)                                      # (k, b, m, n)
    return G[0]


# ------------------------------------------------------------------- the Triton kernel
@functools.cache
def load_kernel():
    """kernel.py in the folder of this file, found by its path: no other is taken."""
    file = Path(__file__).with_name("kernel.py")
    spec = importlib.util.spec_from_file_location("coupled_mamba_kernel", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_problem(x, A):
    """Why kernel.py cannot serve x and A, or None if it can."""
    try:
        return load_kernel().unavailable(x, A)
    except (ImportError, OSError) as error:
        return f"kernel.py must lie beside this file and needs Triton ({error})"


def triton_scan(x, delta, A, B, C, w, H0):
    """Mode "kernel": Eqs. 6 and 7 in Triton, by kernel.py."""
    reason = kernel_problem(x, A)
    if reason:
        raise ValueError(f"mode='kernel' cannot run: {reason}. Use mode='scan'")
    return load_kernel().scan(x, delta, A, B, C, w, H0)


MODES = {"recurrence": recurrence, "convolution": convolution, "scan": scan,
         "kernel": triton_scan}


def choose_mode(x, A):
    """The mode that "auto" stands for; a warning says why a GPU goes without kernel."""
    if not x.is_cuda:
        return "scan"
    reason = kernel_problem(x, A)
    if not reason:
        return "kernel"
    warnings.warn("coupled_scan goes on in PyTorch (mode='scan') and not in the Triton "
                  f"kernel: {reason}", stacklevel=3)
    return "scan"
