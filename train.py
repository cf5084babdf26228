"""Train and evaluate Coupled Mamba and the fusions that the paper compares it with.

  python train.py --dataset sims                   train on a stand-in, no data needed
  python train.py --dataset sims --fusion mamba    the same network without the coupling
  python train.py --dataset mosi --data FILE       real data, 5 seeds
  python train.py --dataset sims --benchmark       time and memory over lengths
  torchrun --nproc_per_node=2 train.py --dataset sims --out runs/two   2 GPUs or CPUs

Without data, the program trains on a synthetic stand-in of the same shapes, and says so
on every line. Results go to the folder --out: results.json, and for each seed the best
weights (seed0.pt), the predictions for test (seed0.npz) and a line per epoch
(seed0.jsonl).
"""
# Reading order: settings, metrics, files, the other fusions, one epoch, one seed (set
# up, train, evaluate), all seeds, the benchmark, the command line.
import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from coupled_mamba import MODES, CoupledMamba, StackedLinear, zero_absent

# The settings of a run are the union of these presets, of which a later one wins: OURS,
# PAPER, the batch size of the dataset, then STAND_IN (training on synthetic data) or
# BENCHMARK, and last what the user gives.
OURS = dict(
    task=None, length=None, tokens=None, missing_rate=0.0, drop=[], fusion="coupled",
    coupling="mean", no_mix=False, pooling="max", optimizer="adamw", stream_dropout=0.0,
    patience=0, seed=0, device="auto", mode="auto", amp=False, compile=False)
PAPER = dict(
    d_model=128, layers=3, d_state=64, dt_rank=None, expand=2, d_conv=4, dropout=0.0,
    epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5)
BATCH_SIZE = dict(  # the paper names the first three
    mosei=1024, sims=128, simsv2=256, mosi=128, brca=64, rosmap=32, mmimdb=512)
STAND_IN = dict(
    d_model=32, layers=1, d_state=16, pooling="mean", epochs=12, lr=3e-3, seeds=1,
    batch_size=32)
STAND_IN_SAMPLES = (1368, 456, 457)  # in train, valid and test, as in sims
BENCHMARK = dict(batch_size=16)
LENGTHS = (100, 200, 300, 400, 500)  # those of Figures 3 and 4

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
NAN = float("nan")


# ------------------------------------------------------------------------------ metrics
def f1_scores(true, pred):
    """F1 of each column of two (N, classes) bool arrays; 0 if it never occurs."""
    hits = (true & pred).sum(0)
    named = true.sum(0) + pred.sum(0)
    return 2 * hits / np.maximum(named, 1)


def accuracy_f1(true, pred):
    """Accuracy, F1 weighted by how often a class is true, and the plain mean of F1."""
    classes = np.union1d(true, pred)
    true_is = true[:, None] == classes
    pred_is = pred[:, None] == classes
    f1 = f1_scores(true_is, pred_is)
    accuracy = np.mean(true == pred)
    return float(accuracy), float(f1 @ true_is.mean(0)), float(f1.mean())


def two_classes(true, pred):
    """Accuracy and weighted F1; NaN where there is no sample to be judged."""
    if len(true) == 0:
        return NAN, NAN
    accuracy, f1, _ = accuracy_f1(true, pred)
    return accuracy, f1


def regression_metrics(pred, true, scale):
    """The metrics of MMSA for labels in [-scale, scale], rounded and clipped as there.

    scale is 3 for mosi and mosei, and 1 for sims and simsv2.
    """
    pred = pred.astype(np.float32).astype(np.float64)
    true = true.astype(np.float32).astype(np.float64)
    metrics = {}
    if scale == 3:
        some = true != 0
        metrics["Acc-2"], metrics["F1"] = two_classes(true[some] > 0, pred[some] > 0)
        with_zero = two_classes(true >= 0, pred >= 0)
        metrics["Acc-2 with 0"], metrics["F1 with 0"] = with_zero
        for classes, limit in ((3, 1), (5, 2), (7, 3)):
            true_class = np.round(true.clip(-limit, limit))
            pred_class = np.round(pred.clip(-limit, limit))
            metrics[f"Acc-{classes}"] = float(np.mean(true_class == pred_class))
    else:
        true = true.clip(-1, 1)
        pred = pred.clip(-1, 1)
        metrics["Acc-2"], metrics["F1"] = two_classes(true > 0, pred > 0)
        for classes, cuts in ((3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            # A value on a cut belongs to the class below it, with the cut in float32.
            cuts = np.float32(cuts).astype(np.float64)
            same = np.searchsorted(cuts, true) == np.searchsorted(cuts, pred)
            metrics[f"Acc-{classes}"] = float(np.mean(same))

    metrics["MAE"] = float(np.mean(np.abs(pred - true)))
    metrics["Corr"] = NAN
    if np.ptp(pred) > 0 and np.ptp(true) > 0:
        metrics["Corr"] = float(np.corrcoef(pred, true)[0, 1])
    return metrics


def class_metrics(logits, true):
    """One of several classes: accuracy, weighted F1, macro F1."""
    accuracy, weighted, macro = accuracy_f1(true, logits.argmax(1))
    return {"Acc": accuracy, "weighted F1": weighted, "macro F1": macro}


def sentiment_metrics(logits, true):
    """Classes negative, neutral, positive. Acc-2 and F1 leave out the neutral samples.

    NOTE: the scripts of MMSA, whose numbers the paper prints, compare predictions 0 and
    1 with labels 0 and 2 there, so that no positive sample can count as right. These
    numbers are "Acc-2 MMSA" and "F1 MMSA".
    """
    some = true != 1
    positive = (logits[:, 2] > logits[:, 0]).astype(int)[some]
    metrics = {}
    metrics["Acc-2"], metrics["F1"] = two_classes(true[some] // 2, positive)
    as_mmsa = two_classes(true[some], positive)
    metrics["Acc-2 MMSA"], metrics["F1 MMSA"] = as_mmsa
    metrics["Acc-3"], metrics["F1-3"], _ = accuracy_f1(true, logits.argmax(1))
    return metrics


def label_metrics(logits, true):
    """Several labels at once, predicted where the logit is > 0: micro and macro F1."""
    true = true > 0.5
    pred = logits > 0
    micro = f1_scores(true.reshape(-1, 1), pred.reshape(-1, 1))[0]
    return {"micro F1": float(micro), "macro F1": float(f1_scores(true, pred).mean())}


def sample_losses(out, y):
    """The loss of each sample (N,). The form of y tells the task, see `data.Split`."""
    if y.dim() == 2:
        losses = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        return losses.mean(1)
    if y.dtype == torch.int64:
        return F.cross_entropy(out, y, reduction="none")
    return (out[:, 0] - y).abs()


def measure(out, y, spec):
    """All metrics of a split from the outputs (N, d_output)."""
    if y.ndim == 1 and y.dtype == np.float32:
        return regression_metrics(out[:, 0], y, spec.scale)
    if y.ndim == 2:
        metrics = label_metrics(out, y)
    elif spec.scale:
        metrics = sentiment_metrics(out, y)
    else:
        metrics = class_metrics(out, y)
    losses = sample_losses(torch.from_numpy(out), torch.from_numpy(y))
    return {**metrics, "loss": losses.mean().item()}


# -------------------------------------------------------------------------------- files
def write_whole(path, write):
    """Call `write(file)` on a new file, then rename it to `path`.

    A reader sees the whole old file or the whole new file, and never a part.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def to_json(value, indent=None):
    """JSON has no NaN and no infinity: they become null."""
    def finite(v):
        if isinstance(v, dict):
            return {k: finite(u) for k, u in v.items()}
        if isinstance(v, list):
            return [finite(u) for u in v]
        if isinstance(v, float) and not math.isfinite(v):
            return None
        return v
    return json.dumps(finite(value), indent=indent) + "\n"


# ------------------------------------------------------------------- the other fusions
class OneMamba(nn.Module):
    """Table 11, "average" and "concat": one Mamba for all encoded streams together.

    It reads their average over the modalities that are present, (b, l, d), or with
    `concat` all of them side by side, (b, l, m d).
    """

    def __init__(self, d_inputs, d_output, *, concat, d_model, **options):
        super().__init__()
        self.config = dict(d_inputs=d_inputs, d_output=d_output, concat=concat,
                           d_model=d_model, **options)
        self.concat = concat
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        width = d_model
        if concat:
            width = d_model * len(d_inputs)
        self.mamba = CoupledMamba((width,), d_output, d_model=width, **options)

    def forward(self, xs, mask=None):
        """m tensors (b, l, d_inputs[i]), mask (m, b, l) or None -> (b, d_output)."""
        masks = mask
        if mask is None:
            masks = [None] * len(xs)
        f = torch.stack([
            encoder(zero_absent(x, here))
            for encoder, x, here in zip(self.encoders, xs, masks)])  # (m, b, l, d)
        f = zero_absent(f, mask)

        if self.concat:
            f = f.movedim(0, 2).flatten(2)  # (b, l, m d)
        elif mask is None:
            f = f.mean(0)  # (b, l, d)
        else:
            present = mask.sum(0).clamp(min=1)  # (b, l)
            f = f.sum(0) / present[..., None]
        if mask is not None:
            mask = mask.any(0)[None]
        return self.mamba([f], mask)


class CrossAttention(CoupledMamba):
    """Table 8: each modality attends to all steps of the others. No scan and no Cat."""

    def __init__(self, d_inputs, d_output, *, mix=False, **options):
        super().__init__(d_inputs, d_output, mix=False, **options)
        self.blocks = nn.ModuleList(
            AttentionBlock(len(d_inputs), options["d_model"], options["expand"],
                           options["dropout"])
            for _ in self.blocks)

    def advance(self, xs, state, mask=None):
        if state["count"].any():
            raise ValueError("cross attention reads the whole sequence, so it cannot "
                             "continue one")
        return super().advance(xs, state, mask)


class AttentionBlock(nn.Module):
    """Called like `coupled_mamba.Block`, with the same inner width e.

    explicit: softmax(Q K^T) V with all scores in memory, for the benchmark.
    """

    def __init__(self, m, d, expand, dropout):
        super().__init__()
        e = expand * d
        self.explicit = False
        self.heads = 4 if e % 4 == 0 else 1
        self.norm_weight = nn.Parameter(torch.ones(m, d))
        self.norm_bias = nn.Parameter(torch.zeros(m, d))
        self.q = StackedLinear(m, d, e)
        self.k = StackedLinear(m, d, e)
        self.v = StackedLinear(m, d, e)
        self.out = StackedLinear(m, e, d)
        self.dropout = nn.Dropout(dropout)

    def init_state(self, b):
        """Attention has no state: it needs the whole sequence at once."""
        return {}

    def forward(self, f, mask=None, state=None):
        """f (m, b, l, d), mask (m, b, l) or None -> features (m, b, l, d), {}."""
        m, b, l, d = f.shape
        x = F.layer_norm(f, (d,)) * self.norm_weight[:, None, None]
        x = x + self.norm_bias[:, None, None] + positions(l, d, f)
        q = self.split_heads(self.q(x))  # (m, b, heads, l, c), c = e / heads
        k = self.split_heads(self.k(x))
        v = self.split_heads(zero_absent(self.v(x), mask))

        ys = []
        for i in range(m):
            others = [j for j in range(m) if j != i] or [i]
            keys = torch.cat([k[j] for j in others], 2)  # (b, heads, (m-1) l, c)
            values = torch.cat([v[j] for j in others], 2)
            there = None
            if mask is not None:
                there = torch.cat([mask[j] for j in others], 1)[:, None, None]
                # Where nothing is there, the weights are equal and the values are zero.
                there = there | ~there.any(-1, keepdim=True)
            ys.append(self.attend(q[i], keys, values, there))
        y = torch.stack(ys).transpose(2, 3).flatten(3)  # (m, b, l, e)
        return zero_absent(f + self.dropout(self.out(y)), mask), {}

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def attend(self, q, k, v, there):
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, there)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if there is not None:
            scores = scores.masked_fill(~there, -torch.inf)
        return scores.softmax(-1) @ v


def positions(l, d, like):
    """Sines and cosines that tell the steps apart, (l, d)."""
    steps = torch.arange(l, device=like.device)[:, None]
    rates = 10000 ** (torch.arange(0, d, 2, device=like.device) / d)
    angles = steps / rates  # (l, d / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :d].to(like.dtype)


def make_model(config, d_inputs, d_output):
    options = {name: config[name] for name in (
        "d_model", "d_state", "expand", "d_conv", "dt_rank", "coupling", "pooling",
        "dropout", "mode")}
    options["n_layers"] = config["layers"]
    options["mix"] = not config["no_mix"]
    fusion = config["fusion"]
    if fusion in ("average", "concat"):
        return OneMamba(d_inputs, d_output, concat=fusion == "concat", **options)
    if fusion == "attention":
        return CrossAttention(d_inputs, d_output, **options)
    return CoupledMamba(d_inputs, d_output, **options)


def parameter_groups(model, weight_decay):
    """Weights of maps decay. A_log, D, biases, norms and logits do not."""
    decayed = []
    not_decayed = []
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            decayed.append(parameter)
        else:
            not_decayed.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": not_decayed, "weight_decay": 0.0}]


def make_optimizer(model, config):
    groups = parameter_groups(model, config["weight_decay"])
    return OPTIMIZERS[config["optimizer"]](groups, config["lr"])


# ---------------------------------------------------------------------------- one epoch
class Run(NamedTuple):
    """What all seeds of a run share."""
    config: dict
    dataset: data.Dataset
    out: Path
    device: torch.device
    rank: int  # the number of this process among `world` processes
    world: int

    def say(self, line, end="\n"):
        """Print in the first process only. On synthetic data every line says so."""
        if self.dataset.synthetic:
            line = "synthetic | " + line
        if self.rank == 0:
            print(line, end=end, flush=True)


def batch(split, mask, rows, device):
    """xs, mask and y of the samples `rows`. A mask of None stays None."""
    xs = [torch.from_numpy(x[rows]).to(device) for x in split.xs]
    y = torch.from_numpy(split.y[rows]).to(device)
    if mask is not None:
        mask = torch.from_numpy(mask[:, rows]).to(device)
    return xs, mask, y


def drop_streams(mask, rate, rng):
    """The mask (m, N, l) after each sample has lost each stream with this probability.

    A sample that would lose all the streams it has keeps one of them, drawn at random.
    """
    has = mask.any(2)  # (m, N)
    lost = rng.random(has.shape) < rate
    draw = np.where(has, rng.random(has.shape), -1)
    loses_all = np.flatnonzero(~(has & ~lost).any(0))
    lost[draw.argmax(0)[loses_all], loses_all] = False
    return mask & ~lost[..., None]


def autocast(config, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config["amp"])


@torch.no_grad()
def predict(model, split, config, device, drop=()):
    """The outputs (N, d_output) for a split, without the modalities of index `drop`."""
    model.eval()
    mask = split.mask.copy()
    mask[list(drop)] = False
    if mask.all():
        mask = None
    outs = []
    for first in range(0, len(split.y), config["batch_size"]):
        rows = slice(first, first + config["batch_size"])
        xs, here, _ = batch(split, mask, rows, device)
        with autocast(config, device):
            outs.append(model(xs, here).float().cpu().numpy())
    return np.concatenate(outs)


def draw_epoch(run, seed, epoch):
    """The order of the training samples in this epoch, and their mask.

    They depend on seed and epoch only, dropout on the process, too: so --resume repeats
    them exactly.
    """
    rng = np.random.default_rng((seed, epoch))
    torch.manual_seed((seed * 10 ** 5 + epoch) * run.world + run.rank)  # for dropout
    split = run.dataset.splits["train"]
    order = rng.permutation(len(split.y))
    mask = split.mask
    if run.config["stream_dropout"] > 0:
        mask = drop_streams(mask, run.config["stream_dropout"], rng)
    if mask.all():
        mask = None  # a little faster
    return order, mask


def train_epoch(run, model, optimizer, seed, epoch):
    """One pass over the training samples. Returns the mean loss.

    A step takes world * batch_size samples, an equal part for each process.
    """
    model.train()
    config = run.config
    split = run.dataset.splits["train"]
    order, mask = draw_epoch(run, seed, epoch)
    total = torch.zeros((), device=run.device)
    size = config["batch_size"] * run.world
    for first in range(0, len(order), size):
        rows = order[first:first + size]
        own = rows[run.rank::run.world]
        idle = len(own) == 0
        if idle:
            own = rows[:1]  # all processes must take part in every step
        xs, here, y = batch(split, mask, own, run.device)
        with autocast(config, run.device):
            out = model(xs, here)
        loss = sample_losses(out.float(), y).sum()
        if idle:
            loss = 0 * loss
        optimizer.zero_grad()
        (loss * run.world / len(rows)).backward()  # processes average their gradients
        optimizer.step()
        total += loss.detach()
        if sys.stdout.isatty():
            done = first + len(rows)
            shown = total.item() * run.world / done
            run.say(f"{done}/{len(order)} samples, loss {shown:.4f} ", end="\r")
    if run.world > 1:
        dist.all_reduce(total)
    return total.item() / len(order)


# ----------------------------------------------------------------------------- one seed
@dataclass
class Training:
    """What changes while one seed is trained."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    log: list  # a dict per finished epoch
    best: dict | None  # weights, epoch and metric of the epoch that is best on valid
    started: float  # when it started, had it never been interrupted


def set_up(run, seed, resume=False):
    """Model, optimiser and schedule as they start, or as --resume finds them."""
    config = run.config
    torch.manual_seed(seed)
    model = make_model(config, *widths(run)).to(run.device)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    training = Training(model, optimizer, scheduler, [], None, time.time())
    path = run.out / f"seed{seed}.resume"
    if resume and path.exists():
        restore(path, config, training)
        run.say(f"seed {seed}  resumed after epoch {len(training.log)}")
    if config["compile"]:
        model.compile()
    return training


def train_epochs(run, seed, training):
    """Train; after every epoch keep the weights that are best on valid, and save."""
    config = run.config
    valid = run.dataset.splits["valid"]
    model = training.model
    if run.world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    for epoch in range(len(training.log) + 1, config["epochs"] + 1):
        if diverged(training) or out_of_patience(training, config):
            break
        loss = train_epoch(run, model, training.optimizer, seed, epoch)
        training.scheduler.step()
        out = predict(training.model, valid, config, run.device)
        metrics = measure(out, valid.y, data.SPECS[config["dataset"]])
        record(run, seed, training, loss, of_first_process(run, metrics))

    if diverged(training):
        hint = "a smaller --lr may help"
        if config["coupling"] == "sum":
            hint = "the plain sum of the paper does so, --coupling mean does not"
        run.say(f"seed {seed}  the loss or the metric on valid is no longer finite: "
                f"training has diverged; {hint}")


def evaluate(run, seed, training):
    """Look at test once, with the weights that were best on valid; write the files."""
    config = run.config
    spec = data.SPECS[config["dataset"]]
    best = training.best
    training.model.load_state_dict(best["weights"])
    results = {"seed": seed, "epoch": best["epoch"]}
    valid, test = run.dataset.splits["valid"], run.dataset.splits["test"]
    results["valid"] = measure(predict(training.model, valid, config, run.device),
                               valid.y, spec)
    prediction = predict(training.model, test, config, run.device)
    results["test"] = measure(prediction, test.y, spec)
    run.say(f"seed {seed}  test at epoch {best['epoch']}: {show(results['test'])}")
    if config["drop"]:
        drop = [spec.modalities.index(name) for name in config["drop"]]
        dropped = predict(training.model, test, config, run.device, drop)
        results["test_dropped"] = measure(dropped, test.y, spec)
        run.say(f"seed {seed}  test without {', '.join(config['drop'])}: "
                f"{show(results['test_dropped'])}")

    synthetic = run.dataset.synthetic
    saved = {**best, "model": training.model.config, "config": config,
             "versions": environment(run.device), "synthetic": synthetic}
    arrays = {"prediction": prediction, "target": test.y, "synthetic": synthetic}
    if run.rank == 0:
        write_whole(run.out / f"seed{seed}.npz", lambda file: np.savez(file, **arrays))
        write_whole(run.out / f"seed{seed}.pt", lambda file: torch.save(saved, file))
    return results


def record(run, seed, training, loss, metrics):
    """Log an epoch, keep its weights if they are the best, save for the next epoch."""
    config = run.config
    epoch = len(training.log) + 1
    metric = metrics[chosen_metric(config)]
    best = training.best
    star = ""
    if best is None or metric < best["metric"] or math.isnan(best["metric"]):
        weights = training.model.state_dict()
        weights = {name: v.detach().cpu().clone() for name, v in weights.items()}
        training.best = {"weights": weights, "epoch": epoch, "metric": metric}
        star = "  *"
    seconds = time.time() - training.started
    training.log.append({
        "epoch": epoch, "loss": loss, "valid": metrics,
        "synthetic": run.dataset.synthetic, "seconds": round(seconds, 2)})

    minutes = seconds / epoch * (config["epochs"] - epoch) / 60
    last = dict(list(metrics.items())[-3:])
    run.say(f"seed {seed}  epoch {epoch:3d}/{config['epochs']}  loss {loss:.4f}  "
            f"valid {show(last)}  {minutes:5.1f} min left{star}")
    if run.rank == 0:
        lines = "".join(to_json(row) for row in training.log)
        write_text(run.out / f"seed{seed}.jsonl", lines)
        state = {"weights": training.model.state_dict(),
                 "optimizer": training.optimizer.state_dict(),
                 "scheduler": training.scheduler.state_dict(),
                 "best": training.best, "log": training.log, "config": config}
        path = run.out / f"seed{seed}.resume"
        write_whole(path, lambda file: torch.save(state, file))


def restore(path, config, training):
    """Put `training` where the last `record` left it."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        check_same_run(path, state["config"], config)
        training.model.load_state_dict(state["weights"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.scheduler.load_state_dict(state["scheduler"])
        training.best = state["best"]
        training.log = state["log"]
        training.started -= training.log[-1]["seconds"]
    except data.DataError:
        raise
    except Exception:  # damage can surface as nearly any exception
        raise data.DataError(
            f"{path} is damaged: delete it to train this seed from its start") from None


def chosen_metric(config):
    """The metric that chooses the epoch on valid. Less is better."""
    if config["task"] == "regression":
        return "MAE"
    return "loss"


def diverged(training):
    """Whether the last epoch ended in a loss or a metric that is not finite."""
    if not training.log:
        return False
    last = training.log[-1]
    metric = last["valid"].get("loss", last["valid"].get("MAE"))
    return not (math.isfinite(last["loss"]) and math.isfinite(metric))


def out_of_patience(training, config):
    """Whether the last --patience epochs were no better than the best before them."""
    if config["patience"] == 0 or training.best is None:
        return False
    return len(training.log) - training.best["epoch"] >= config["patience"]


def widths(run):
    """The widths of the streams, and of the output."""
    d_inputs = [x.shape[2] for x in run.dataset.splits["train"].xs]
    return d_inputs, output_width(run.config)


def output_width(config):
    if config["task"] == "regression":
        return 1
    return data.SPECS[config["dataset"]].classes


def of_first_process(run, metrics):
    """The metrics of the first process in all of them: they must decide the same."""
    box = [metrics]
    if run.world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def show(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def sparkline(values, width=60):
    """The course of `values` as a line of bars. A value that is not finite is blank."""
    picked = np.linspace(0, len(values) - 1, min(width, len(values)))
    values = np.array(values)[picked.round().astype(int)]
    finite = values[np.isfinite(values)]
    bars = [" "] * len(values)
    for i in np.flatnonzero(np.isfinite(values)):
        height = (values[i] - finite.min()) / (np.ptp(finite) or 1)
        bars[i] = "▁▂▃▄▅▆▇█"[round(7 * height)]
    return "".join(bars)


# ---------------------------------------------------------------------------- all seeds
def train_seeds(run, resume):
    """Train every seed; after each, write results.json with the mean of all so far."""
    report = begin_report(run, resume)
    finished = [result["seed"] for result in report["seeds"]]
    first = run.config["seed"]
    for seed in range(first, first + run.config["seeds"]):
        if seed in finished:
            run.say(f"seed {seed}  was finished before")
            continue
        training = set_up(run, seed, resume)
        train_epochs(run, seed, training)
        name = chosen_metric(run.config)
        course = [row["valid"][name] for row in training.log]
        run.say(f"seed {seed}  valid {name} by epoch  {sparkline(course)}  "
                f"{course[0]:.4f} to {course[-1]:.4f}, "
                f"best {training.best['metric']:.4f}")
        report["seeds"].append(evaluate(run, seed, training))
        report |= statistics_of(report["seeds"])
        if run.rank == 0:
            write_text(run.out / "results.json", to_json(report, indent=2))
            (run.out / f"seed{seed}.resume").unlink(missing_ok=True)
    say_summary(run, report)


def begin_report(run, resume):
    """results.json before the first seed, or as the interrupted run has left it."""
    path = run.out / "results.json"
    report = {"dataset": run.dataset.name, "synthetic": run.dataset.synthetic,
              "task": run.config["task"], "config": run.config,
              "environment": environment(run.device), "seeds": []}
    there = path.exists()
    if there:
        seeds = read_seeds(path, run.config, resume)
    if there and resume:
        report |= {"seeds": seeds, **statistics_of(seeds)}
    elif resume:
        run.say(f"There is nothing to resume in {run.out}: training starts anew.")
    elif there and run.rank == 0:  # the same run anew: nothing of the old one stays
        for old in run.out.glob("seed*"):
            if re.fullmatch(r"seed\d+\.(resume|pt|npz|jsonl)", old.name):
                old.unlink()
    if run.rank == 0:
        write_text(path, to_json(report, indent=2))  # now, to see that it can be done
    return report


def read_seeds(path, config, resume):
    """The seeds that are in results.json, after a check that it is of the same run."""
    try:
        report = json.loads(path.read_text())
        theirs = dict(report["config"])
        seeds = report["seeds"]
        theirs["seeds"] = int(theirs["seeds"])
        statistics_of(seeds)
        if len({int(result["seed"]) for result in seeds}) != len(seeds):
            raise ValueError("a seed occurs twice")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise data.DataError(
            f"{path} is no result of this program: give another --out") from None
    if not resume:  # the same run is repeated, with any number of seeds
        config = config | {"seeds": theirs["seeds"]}
    check_same_run(path, theirs, config)
    return seeds


def check_same_run(path, theirs, config):
    """Raise unless `config` is that of the run at `path`. It may ask for more seeds."""
    different = []
    for name in sorted(config):
        more_seeds = name == "seeds" and theirs.get(name, 0) < config[name]
        if theirs.get(name) != config[name] and not more_seeds:
            different.append(f"{name}={theirs.get(name)} (here {config[name]})")
    if different:
        raise data.DataError(f"{path} is of another run, with {', '.join(different)}: "
                             "give the same options, or another --out")


def statistics_of(seeds):
    """Mean and deviation of every metric of test, with and without what is dropped."""
    found = {}
    for part, suffix in (("test", ""), ("test_dropped", "_dropped")):
        if not seeds or (part == "test_dropped" and part not in seeds[0]):
            continue
        means, deviations = {}, {}
        for name in seeds[0][part]:
            values = np.array([result[part][name] for result in seeds], float)
            means[name] = float(values.mean())
            deviations[name] = float(values.std())
        found |= {"mean" + suffix: means, "std" + suffix: deviations}
    return found


def say_summary(run, report):
    """A line with the mean over the seeds, and with --drop a second one."""
    count = len(report["seeds"])
    titles = {"": "test"}
    if run.config["drop"]:
        titles["_dropped"] = f"test without {', '.join(run.config['drop'])}"
    for suffix, title in titles.items():
        mean, std = report["mean" + suffix], report["std" + suffix]
        if count == 1:
            run.say(f"{title}, 1 seed: {show(mean)}")
        else:
            values = [f"{name} {mean[name]:.4f} ± {std[name]:.4f}" for name in mean]
            run.say(f"{title}, mean ± std of {count} seeds: {'  '.join(values)}")


def environment(device):
    return {"device": hardware(device), "torch": str(torch.__version__),
            "numpy": np.__version__, "python": platform.python_version(),
            "system": platform.system()}


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


# ------------------------------------------------------------------------ the benchmark
PIECE = 64  # steps that `advance` gets at a time


def benchmark(config, lengths):
    """Print time and peak memory of the chosen model for each length (Figures 3, 4)."""
    device = torch.device(config["device"])
    cases = ["inference", "training step"]
    if config["fusion"] == "attention":
        cases = [f"{case}, {how}" for case in cases for how in ("explicit", "fused")]
    elif config["fusion"] in ("coupled", "mamba") and not config["compile"]:
        cases.insert(1, f"inference in pieces of {PIECE}")
    print(f"{hardware(device)}, torch {torch.__version__}\n"
          f"--fusion {config['fusion']}, batches of {config['batch_size']}, synthetic: "
          f"random numbers in the widths of {config['dataset']}\n"
          "seconds: the median of several; on a CPU, the sum over its threads\n"
          "MB: the most memory in use except model, optimiser and inputs\n"
          "-: out of memory, or the process died\n"
          f"length  {'case':26} {'seconds':>10} {'MB':>10}")
    for length in lengths:
        for case in cases:
            seconds, size = "-", "-"
            try:
                found = in_own_process(measure_case, config, length, case)
                seconds, size = f"{found[0]:.5f}", f"{found[1] / 1e6:.1f}"
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            print(f"{length:6}  {case:26} {seconds:>10} {size:>10}", flush=True)


def in_own_process(function, *arguments):
    """One case must not see the memory that another one has left behind."""
    spawn = multiprocessing.get_context("spawn")
    no_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, below
    with ProcessPoolExecutor(1, spawn, signal.signal, no_interrupt) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def measure_case(config, length, case):
    """Median seconds of up to five repetitions, and the bytes they took at most."""
    device = torch.device(config["device"])
    work = make_work(config, length, case)
    work()  # the first time also pays for what is built only once
    before = memory(device, "VmRSS", restart=True)
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 20:
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return statistics.median(seconds), memory(device, "VmHWM") - before


def make_work(config, length, case):
    """A function that does once what is to be measured."""
    torch.manual_seed(0)
    device = torch.device(config["device"])
    d_inputs = data.SPECS[config["dataset"]].widths
    model = make_model(config, d_inputs, output_width(config)).to(device)
    training = "training" in case
    model.train(training)
    if "explicit" in case:
        for block in model.blocks:
            block.explicit = True
    if config["compile"]:
        model.compile()
    optimizer = make_optimizer(model, config)
    b = config["batch_size"]
    xs = [torch.randn(b, length, width, device=device) for width in d_inputs]

    def work():
        with torch.set_grad_enabled(training), autocast(config, device):
            if "pieces" in case:
                state = model.init_state(b)
                for t in range(0, length, PIECE):
                    out, state = model.advance([x[:, t:t + PIECE] for x in xs], state)
            else:
                out = model(xs)
        if training:
            (out.float() - 1).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return work


def now(device):
    """The CPU time of this process, or the time when the GPU has finished its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory(device, field, restart=False):
    """Bytes in use now ("VmRSS") or at most ("VmHWM") since the last `restart`."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        if field == "VmRSS":
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if restart:
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free but not yet returned
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+)", status)[1]) * 1024


# --------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"train.py: error: {message}; --help explains every option\n")


def number(kind, low, below=math.inf):
    """A type for argparse: a number of this kind, at least `low` and under `below`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = NAN
        if not low <= value < below:
            name = "number"
            if kind is int:
                name = "whole number"
            limits = f"of at least {low}"
            if below < math.inf:
                limits += f" and below {below}"
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a {name} {limits}")
        return value
    return convert


def option(group, name, text, default=None, **more):
    """Add an option that is absent from the result unless the user gives it.

    default: what --help says about it. None: what the presets have.
    """
    if default is None:
        default = {**OURS, **PAPER}[name[2:].replace("-", "_")]
    more["help"] = f"{text} (default: {default})"
    group.add_argument(name, default=argparse.SUPPRESS, **more)


def parse(argv=None):
    """The options that the user gave, as a dict."""
    p = Parser(usage="python train.py --dataset NAME [options]", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
               epilog="On the stand-in, these are the defaults: "
               f"{' '.join(f'{name}={value}' for name, value in STAND_IN.items())}.")
    N = dict(type=number(int, 1, 10 ** 7), metavar="N")
    RATE = dict(type=number(float, 0, 1), metavar="RATE")
    PATH = dict(type=Path, metavar="PATH")
    FLAG = dict(action="store_true")
    names = sorted({name for spec in data.SPECS.values() for name in spec.modalities})
    sizes = ", ".join(f"{name} {size}" for name, size in BATCH_SIZE.items())

    g = p.add_argument_group("data")
    g.add_argument("--dataset", required=True, choices=list(data.SPECS),
                   help="The dataset. This option must be given.")
    option(g, "--data", "Its file or folder.",
           "its place below data/; without a file there, the stand-in", **PATH)
    option(g, "--out", "The folder for the results.", "runs/<dataset>-<fusion>", **PATH)
    option(g, "--task", "Predict a number, or classes.", "a number where possible",
           choices=["regression", "classification"])
    option(g, "--length", "Resample streams of mosi, mosei, sims, simsv2 to N steps.",
           "the length of the longest stream, at most 50", **N)
    option(g, "--tokens", "Cut the vectors of brca, rosmap, mmimdb into N steps.",
           data.TOKENS, **N)
    option(g, "--missing-rate", "Set this part of all input elements to zero, which is "
           "their mean, in all splits: the same for every model and seed.", **RATE)
    option(g, "--drop", "Evaluate test once more without these modalities, some of "
           f"{', '.join(names)}.", "none", nargs="+", choices=names, metavar="NAME")

    g = p.add_argument_group("model")
    option(g, "--fusion", "coupled is the paper's method. mamba is one Mamba per "
           "modality, their results weighted at the end. average and concat are one "
           "Mamba on the streams averaged or side by side. In attention each modality "
           "attends to the others.",
           choices=["coupled", "mamba", "average", "concat", "attention"])
    option(g, "--coupling", "The weights of the chains in the state that all of them "
           "read. mean: equal weights that sum to one. learned: a softmax of learned "
           "numbers. sum: all one as in Eq. 6; the state then grows without limit. "
           "none: no coupling.",
           choices=["mean", "learned", "sum", "none"])
    option(g, "--no-mix", "Leave out the Cat of Figure 1, in which the modalities are "
           "mixed between two blocks.", "off", **FLAG)
    option(g, "--d-model", "The model width d.", **N)
    option(g, "--layers", "The number of blocks.", **N)
    option(g, "--d-state", "The state size n.", **N)
    option(g, "--expand", "The inner width e is N times d.", **N)
    option(g, "--d-conv", "The number of steps that the convolution reads.", **N)
    option(g, "--dt-rank", "The rank of the map to the step size.", "d_state / 8", **N)
    option(g, "--dropout", "Dropout on the output of a block and in the head.", **RATE)
    option(g, "--pooling", "How time is summarised. last is the last real step.",
           choices=["max", "mean", "last"])

    g = p.add_argument_group("training")
    option(g, "--epochs", "The number of passes over the training samples.", **N)
    option(g, "--batch-size", "Samples per step and process.",
           f"{sizes}; {BENCHMARK['batch_size']} for --benchmark", **N)
    option(g, "--lr", "The learning rate. It is halved every 50 epochs.",
           type=number(float, 0, 100), metavar="RATE")
    option(g, "--optimizer", "adamw shrinks the weights directly. adam adds the weight "
           "decay to the gradient as the paper does, which can keep the coupling from "
           "being learned.", choices=list(OPTIMIZERS))
    option(g, "--weight-decay", "The weight decay of the maps. Biases, norms, A, D and "
           "the weights over modalities do not decay.",
           type=number(float, 0), metavar="RATE")
    option(g, "--stream-dropout", "In training, each sample loses each whole stream "
           "with this probability, but never all of them.", **RATE)
    option(g, "--patience", "Stop after N epochs without a better MAE (regression) or "
           "loss (classification) on valid. 0 is never.",
           type=number(int, 0), metavar="N")
    option(g, "--seeds", "The number of runs.", **N)
    option(g, "--seed", "The seed of the first run. The next runs count on.",
           type=number(int, 0, 2 ** 31), metavar="N")

    g = p.add_argument_group("how it runs")
    option(g, "--device", "Where to run. auto is a GPU if there is one.",
           choices=["auto", "cpu", "cuda", "mps"])
    option(g, "--mode", "How the scan is computed. auto is kernel where it can run, "
           "otherwise scan.", choices=["auto", *MODES])
    option(g, "--amp", "Multiply matrices in bfloat16; the state stays float32.", "off",
           **FLAG)
    option(g, "--compile", "Use torch.compile; the first step takes long.", "off",
           **FLAG)
    option(g, "--resume", "Continue an interrupted run with the same options.", "off",
           **FLAG)
    option(g, "--benchmark", "Do not train. Print time and peak memory of inference "
           "and of a training step, each in a process of its own.", "off", **FLAG)
    option(g, "--lengths", "The sequence lengths of --benchmark.",
           " ".join(map(str, LENGTHS)), nargs="+", **N)
    return vars(p.parse_args(argv))


def make_config(given, preset):
    """The settings of a run: the paper's and ours, then `preset`, then the user's."""
    spec = data.SPECS[given["dataset"]]
    given = {name: value for name, value in given.items() if name not in (
        "data", "out", "resume", "benchmark", "lengths")}
    config = {**OURS, **PAPER, "task": spec.tasks[0],
              "batch_size": BATCH_SIZE[given["dataset"]], **preset, **given}
    name, drop = config["dataset"], config["drop"]
    if config["task"] not in spec.tasks:
        raise data.DataError(
            f"--task {config['task']}: {name} has only {', '.join(spec.tasks)}")
    if config["length"] and spec.layout != "mmsa":
        raise data.DataError(f"--length is not for {name}: use --tokens")
    if config["tokens"] and spec.layout == "mmsa":
        raise data.DataError(f"--tokens is not for {name}: use --length")
    if not set(drop) < set(spec.modalities):
        raise data.DataError(f"--drop {' '.join(drop)}: {name} has "
                             f"{', '.join(spec.modalities)}, of which one must stay")
    if config["fusion"] != "coupled" and ("coupling" in given or config["no_mix"]):
        raise data.DataError("--coupling and --no-mix are only for --fusion coupled: "
                             f"{config['fusion']} has neither coupling nor Cat")
    if config["fusion"] == "mamba":  # Mambas that are joined in the head only
        config |= {"coupling": "none", "no_mix": True}
    config["device"] = pick_device(config["device"])
    check_mode(config)
    return config


def pick_device(wish):
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.append("mps")
    if torch.cuda.is_available():
        present.append("cuda")
    if wish == "auto":
        return present[-1]
    if wish not in present:
        raise data.DataError(
            f"--device {wish}: this machine has none, only {', '.join(present)}")
    return wish


def check_mode(config):
    """Raise now, and not in the first epoch, if --mode cannot run here."""
    model = make_model(config, [1, 1], 1).to(config["device"])
    try:
        with torch.no_grad():
            model([torch.zeros(1, 2, 1, device=config["device"])] * 2)
    except ValueError as error:
        raise data.DataError(f"--mode {config['mode']}: {error}") from None


def begin(given, rank, world):
    """All that comes before the first seed: settings, data, folder, processes."""
    name = given["dataset"]
    spec = data.SPECS[name]
    path = given.get("data")
    if path is None and data.default_path(name).exists():
        path = data.default_path(name)
    if world > 1 and torch.cuda.is_available() and given.get("device") != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    config = make_config(given, {} if path else STAND_IN)
    options = {"length": config["length"], "task": config["task"],
               "tokens": config["tokens"] or data.TOKENS}
    if path:
        dataset = data.load(name, path, **options)
    else:
        dataset = data.synthetic(name, samples=STAND_IN_SAMPLES, **options)
    data.with_missing(dataset, config["missing_rate"])
    steps = dataset.splits["train"].xs[0].shape[1]
    if spec.layout == "mmsa":
        config["length"] = steps
    else:
        config["tokens"] = steps
    config |= {"processes": world, "checksum": fingerprint(dataset)}

    out = given.get("out", Path("runs") / f"{name}-{config['fusion']}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.DataError(
            f"--out {out} ({error.strerror}): expected a folder") from None
    device = torch.device(config["device"])
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Run(config, dataset, out, device, rank, world)


def fingerprint(dataset):
    """A checksum by which --resume notices other data."""
    checksum = 0
    for split in dataset.splits.values():
        for array in (*split.xs, split.mask, split.y):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return f"{checksum:08x}"


def introduce(run, given):
    """Print once what is trained on what and where, and what to try next."""
    config = run.config
    if run.dataset.synthetic:
        name = run.dataset.name
        changed = [f"{k}={v}" for k, v in STAND_IN.items() if k not in given]
        sizes = "/".join(str(len(split.y)) for split in run.dataset.splits.values())
        run.say(f"There are no data at {data.default_path(name)}. "
                f"{data.how_to_get(name)} "
                "This run uses a synthetic stand-in of the same shapes.")
        run.say(f"It has {sizes} samples and, to be learned quickly, these settings "
                f"instead of the paper's: {' '.join(changed)}")
    run.say("config: " + "  ".join(f"{k}={v}" for k, v in config.items()))
    for name, split in run.dataset.splits.items():
        shapes = "  ".join(f"{x.shape[1]}x{x.shape[2]}" for x in split.xs)
        run.say(f"{name + ':':6} {len(split.y)} samples of {shapes}, "
                f"{100 * split.mask.mean():.1f} % of the steps are real")
    model = make_model(config, *widths(run))
    size = sum(p.numel() for p in model.parameters())
    run.say(f"{size:,} parameters, device {hardware(run.device)}, "
            f"processes {run.world}, mode {config['mode']}")
    run.say(f"Results go to {run.out}.")
    if config["fusion"] == "coupled" and config["coupling"] != "none":
        other = "--coupling none and another --out"
        if config["layers"] == 1 and "coupling" not in given and not config["no_mix"]:
            other = "--fusion mamba"  # one block has no Cat that this would take away
        run.say(f"To see what the coupling adds, run the same with {other}.")


def is_out_of_memory(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, BrokenProcessPool)):
        return True
    return re.search("not enough memory|can't allocate memory", str(error)) is not None


def start(given, rank, world):
    """What the options ask for: the benchmark, or training."""
    if "benchmark" in given:
        config = make_config(given, BENCHMARK)
        if world > 1:
            raise data.DataError(f"--benchmark got {world} processes, expected one")
        if config["device"] != "cuda" and sys.platform != "linux":
            raise data.DataError("--benchmark measures memory on Linux or on an NVIDIA "
                                 f"GPU, and this is {sys.platform}")
        benchmark(config, given.get("lengths", LENGTHS))
        return
    run = begin(given, rank, world)
    introduce(run, given)
    train_seeds(run, "resume" in given)


def main(argv=None):
    """Returns the exit code: 0, 2 after an error of the user, 130 after Ctrl-C."""
    given = parse(argv)
    rank = int(os.environ.get("RANK", 0))  # set by torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))
    code, message = 2, ""
    try:
        start(given, rank, world)
        code = 0
    except (data.DataError, OSError) as error:
        message = f"train.py: error: {error}"
    except KeyboardInterrupt:
        code = 130
        message = "\ntrain.py: interrupted"
        if "benchmark" not in given:
            message += "; the same command with --resume goes on after the last epoch"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rank = 0  # print it, whichever process it was
        message = ("train.py: error: out of memory: try a smaller --batch-size, "
                   "--d-model, --length or --tokens")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message and rank == 0:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
