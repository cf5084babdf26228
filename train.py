"""Train and evaluate Coupled Mamba and the fusions that the paper compares it with.

  python train.py --dataset sims                   train on a stand-in, no data needed
  python train.py --dataset sims --fusion mamba    the same network without the coupling
  python train.py --dataset mosi --data FILE       real data, 5 seeds
  python train.py --dataset own --data FILE.npz    your own data
  python train.py --dataset sims --benchmark       time and memory over lengths
  torchrun --nproc_per_node=2 train.py --dataset sims --out runs/two   2 GPUs or CPUs

Without data, the program trains on a synthetic stand-in of the same shapes, and says so
on every line. Results go to the folder --out: results.json, and for each seed the best
weights with all that a prediction needs (seed0.pt).
"""
# In this order: metrics, fusions, an epoch, a seed, all seeds, benchmark, command line.
import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from coupled_mamba import MODES, CoupledMamba, StackedLinear, zero_absent


# ------------------------------------------------------------------------------ metrics
def f1_scores(true, pred):
    """F1 of each column of two (N, classes) bool arrays; 0 if it never occurs."""
    return 2 * (true & pred).sum(0) / np.maximum(true.sum(0) + pred.sum(0), 1)


def accuracy_f1(true, pred):
    """Accuracy, F1 weighted by how often a class is true, and the plain mean of F1."""
    if len(true) == 0:           # no sample that could be judged
        return math.nan, math.nan, math.nan
    classes = np.union1d(true, pred)
    true_is = true[:, None] == classes
    f1 = f1_scores(true_is, pred[:, None] == classes)
    return float(np.mean(true == pred)), float(f1 @ true_is.mean(0)), float(f1.mean())


def two_classes(true, pred, suffix=""):
    accuracy, f1, _ = accuracy_f1(true, pred)
    return {"Acc-2" + suffix: accuracy, "F1" + suffix: f1}


def regression_metrics(pred, true, scale):
    """The metrics of MMSA for labels in [-scale, scale], rounded and clipped as there.

    scale is 3 (mosi, mosei), 1 (sims, simsv2), or 0: any range, with MAE and Corr only.
    """
    pred = pred.astype(np.float32).astype(np.float64)
    true = true.astype(np.float32).astype(np.float64)
    metrics = {}
    if scale == 3:
        some = true != 0
        metrics |= two_classes(true[some] > 0, pred[some] > 0)
        metrics |= two_classes(true >= 0, pred >= 0, " with 0")
        for classes, limit in ((3, 1), (5, 2), (7, 3)):
            true_class = np.round(true.clip(-limit, limit))
            same = true_class == np.round(pred.clip(-limit, limit))
            metrics[f"Acc-{classes}"] = float(np.mean(same))
    if scale == 1:
        true, pred = true.clip(-1, 1), pred.clip(-1, 1)
        metrics |= two_classes(true > 0, pred > 0)
        for classes, cuts in ((3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            # A value on a cut belongs to the class below it, with the cut in float32.
            cuts = np.float32(cuts).astype(np.float64)
            same = np.searchsorted(cuts, true) == np.searchsorted(cuts, pred)
            metrics[f"Acc-{classes}"] = float(np.mean(same))

    metrics["MAE"] = float(np.mean(np.abs(pred - true)))
    metrics["Corr"] = math.nan
    if np.ptp(pred) > 0 and np.ptp(true) > 0:
        metrics["Corr"] = float(np.corrcoef(pred, true)[0, 1])
    return metrics


def class_metrics(logits, true):
    """One of several classes: accuracy, weighted F1, macro F1."""
    accuracy, weighted, macro = accuracy_f1(true, logits.argmax(1))
    return {"Acc": accuracy, "weighted F1": weighted, "macro F1": macro}


def sentiment_metrics(logits, true):
    """Classes negative, neutral, positive. Acc-2 and F1 leave out the neutral samples;
    "with 0" they count as negative. A sample is positive if that logit is the larger.

    NOTE: "Acc-2 MMSA" and "F1 MMSA" compare predictions 0 and 1 with labels 0 and 2, as
    the scripts behind the paper's numbers do: no positive sample can count as right.
    """
    positive = (logits[:, 2] > logits[:, 0]).astype(int)
    some = true != 1
    metrics = two_classes(true[some] // 2, positive[some])
    metrics |= two_classes(true // 2, positive, " with 0")
    metrics |= two_classes(true[some], positive[some], " MMSA")
    metrics["Acc-3"], metrics["F1-3"], _ = accuracy_f1(true, logits.argmax(1))
    return metrics


def label_metrics(logits, true):
    """Several labels at once, predicted where the logit is > 0: micro and macro F1."""
    true = true > 0.5
    pred = logits > 0
    micro = float(f1_scores(true.reshape(-1, 1), pred.reshape(-1, 1))[0])
    return {"micro F1": micro, "macro F1": float(f1_scores(true, pred).mean())}


def sample_losses(out, y):
    """The loss of each sample (N,). The form of y tells the task, see `data.Split`."""
    if y.dim() == 2:
        return F.binary_cross_entropy_with_logits(out, y, reduction="none").mean(1)
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


def score(metrics):
    """What chooses the epoch on valid, the less the better: the loss, or the MAE."""
    return metrics.get("loss", metrics.get("MAE"))


# ------------------------------------------------------------------- the other fusions
class OneMamba(nn.Module):
    """Table 11, "average" and "concat": one Mamba for all encoded streams together.

    The average is that of the modalities that are present.
    """

    def __init__(self, d_inputs, d_output, *, concat, d_model, **options):
        super().__init__()
        self.config = dict(d_inputs=d_inputs, d_output=d_output, concat=concat,
                           d_model=d_model, **options)
        self.concat = concat
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        if concat:
            d_model = d_model * len(d_inputs)
        self.mamba = CoupledMamba((d_model,), d_output, d_model=d_model, **options)

    def forward(self, xs, mask=None):
        """m tensors (b, l, d_inputs[i]), mask (m, b, l) or None -> (b, d_output)."""
        if mask is not None:
            xs = [zero_absent(x, here) for x, here in zip(xs, mask)]
        f = torch.stack([encoder(x) for encoder, x in zip(self.encoders, xs)])
        f = zero_absent(f, mask)                                     # (m, b, l, d)

        if self.concat:
            f = f.movedim(0, 2).flatten(2)                           # (b, l, m d)
        elif mask is None:
            f = f.mean(0)                                            # (b, l, d)
        else:
            f = f.sum(0) / mask.sum(0).clamp(min=1)[..., None]
        if mask is not None:
            mask = mask.any(0)[None]
        return self.mamba([f], mask)


class CrossAttention(CoupledMamba):
    """Table 8: each modality attends to all steps of the others. No scan and no Cat."""

    def __init__(self, d_inputs, d_output, *, mix=False, **options):
        super().__init__(d_inputs, d_output, mix=False, **options)
        self.blocks = nn.ModuleList(
            AttentionBlock(len(d_inputs), **self.config) for _ in self.blocks)

    def advance(self, xs, state, mask=None):
        if state["count"].any():
            raise ValueError("cross attention reads the whole sequence at once and "
                             "cannot continue one")
        return super().advance(xs, state, mask)


class AttentionBlock(nn.Module):
    """Called like `coupled_mamba.Block`, with the same inner width e, but stateless."""

    def __init__(self, m, d_model, expand, dropout, **others):
        super().__init__()
        e = expand * d_model
        self.heads = 4 if e % 4 == 0 else 1
        self.norm_weight = nn.Parameter(torch.ones(m, d_model))
        self.norm_bias = nn.Parameter(torch.zeros(m, d_model))
        self.q = StackedLinear(m, d_model, e)
        self.k = StackedLinear(m, d_model, e)
        self.v = StackedLinear(m, d_model, e)
        self.out = StackedLinear(m, e, d_model)
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch_size):
        return {}

    def forward(self, f, mask=None, state=None):
        """f (m, b, l, d), mask (m, b, l) or None -> features (m, b, l, d), no state."""
        m, b, l, d = f.shape
        steps = torch.arange(l, device=f.device)[:, None]
        angles = steps / 10000 ** (torch.arange(0, d, 2, device=f.device) / d)
        positions = torch.cat([angles.sin(), angles.cos()], -1)[:, :d]        # (l, d)
        x = F.layer_norm(f, (d,)) * self.norm_weight[:, None, None]
        x = x + self.norm_bias[:, None, None] + positions.to(f.dtype)
        maps = self.q(x), self.k(x), zero_absent(self.v(x), mask)
        q, k, v = [y.unflatten(-1, (self.heads, -1)).transpose(2, 3) for y in maps]

        ys = []
        for i in range(m):
            others = [j for j in range(m) if j != i] or [i]
            keys = torch.cat([k[j] for j in others], 2)      # (b, heads, (m - 1) l, c)
            values = torch.cat([v[j] for j in others], 2)
            there = None
            if mask is not None:
                there = torch.cat([mask[j] for j in others], 1)[:, None, None]
                # Where nothing is there, the weights are equal and the values are zero.
                there = there | ~there.any(-1, keepdim=True)
            ys.append(F.scaled_dot_product_attention(q[i], keys, values, there))
        y = torch.stack(ys).transpose(2, 3).flatten(3)   # (m, b, l, e)
        return zero_absent(f + self.dropout(self.out(y)), mask), {}


def make_model(config, d_inputs, d_output):
    options = {name: config[name] for name in (
        "d_model", "d_state", "expand", "d_conv", "dt_rank", "coupling", "pooling",
        "dropout", "mode")}
    options |= {"n_layers": config["layers"], "mix": not config["no_mix"]}
    fusion = config["fusion"]
    if fusion in ("average", "concat"):
        return OneMamba(d_inputs, d_output, concat=fusion == "concat", **options)
    if fusion == "attention":
        return CrossAttention(d_inputs, d_output, **options)
    return CoupledMamba(d_inputs, d_output, **options)


def model_for(config, spec, widths):
    """A model for streams of these widths, with the outputs that the task needs."""
    task = config["task"] or spec.tasks[0]
    if task == "regression":
        return make_model(config, widths, 1)
    return make_model(config, widths, spec.classes)


def make_optimizer(model, config):
    """Weights of maps decay. A_log, D, biases, norms and logits do not."""
    others = dict(model.named_parameters())
    maps = [name for name in others if name.endswith("weight") and "norm" not in name]
    decayed = [others.pop(name) for name in maps]
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]},
              {"params": list(others.values()), "weight_decay": 0.0}]
    if config["optimizer"] == "adam":
        return torch.optim.Adam(groups, config["lr"])
    return torch.optim.AdamW(groups, config["lr"])


# ---------------------------------------------------------------------------- one epoch
class Run(NamedTuple):
    """What all seeds of a run share."""
    config: dict
    dataset: data.Dataset
    out: Path
    device: torch.device
    rank: int                    # the number of this process among `world` processes
    world: int

    def say(self, line, end="\n"):
        """Print in the first process only. On synthetic data every line says so."""
        if self.dataset.synthetic:
            line = "synthetic | " + line
        if self.rank == 0:
            print(line, end=end, flush=True)


def batch(split, rows, device):
    """xs, mask and y of the samples `rows`. Where all steps are real, mask is None."""
    xs = [torch.from_numpy(x[rows]).to(device) for x in split.xs]
    y = torch.from_numpy(split.y[rows]).to(device)
    if split.mask.all():
        return xs, None, y
    return xs, torch.from_numpy(split.mask[:, rows]).to(device), y


def autocast(config, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config["amp"])


@torch.no_grad()
def predict(model, split, config, device):
    """The outputs (N, d_output) for a split."""
    model.eval()
    outs = []
    for first in range(0, len(split.y), config["batch_size"]):
        rows = slice(first, first + config["batch_size"])
        xs, mask, _ = batch(split, rows, device)
        with autocast(config, device):
            outs.append(model(xs, mask).float().cpu().numpy())
    return np.concatenate(outs)


def train_epoch(run, model, optimizer, seed, epoch):
    """One pass over the training samples. Returns the mean loss.

    Their order depends on seed and epoch only, dropout on the process, too: so --resume
    repeats them exactly. A step takes world * batch_size samples, shared equally.
    """
    model.train()
    config = run.config
    split = run.dataset.splits["train"]
    order = np.random.default_rng((seed, epoch)).permutation(len(split.y))
    torch.manual_seed((seed * 10 ** 5 + epoch) * run.world + run.rank)   # for dropout
    total = torch.zeros((), device=run.device)
    size = config["batch_size"] * run.world

    for first in range(0, len(order), size):
        rows = order[first:first + size]
        own = rows[run.rank::run.world]
        # A process without a sample computes one, for all must take part in each step.
        xs, mask, y = batch(split, own if len(own) else rows[:1], run.device)
        with autocast(config, run.device):
            out = model(xs, mask)
        loss = sample_losses(out.float(), y)[:len(own)].sum()
        optimizer.zero_grad()
        (loss * run.world / len(rows)).backward()    # processes average their gradients
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
def train_seed(run, seed, resume):
    """Train with one seed, keep the epoch that is best on valid, look at test once."""
    config, spec = run.config, run.dataset.spec
    valid = run.dataset.splits["valid"]
    path = run.out / f"seed{seed}.resume"
    torch.manual_seed(seed)
    model = model_for(config, spec, [x.shape[2] for x in valid.xs]).to(run.device)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    log = []
    best = None
    if resume and path.exists():
        log, best = restore(path, config, model, optimizer, scheduler)
        run.say(f"seed {seed}  resumed after epoch {len(log)}")
    parallel = model
    if run.world > 1:
        parallel = nn.parallel.DistributedDataParallel(model)

    while not why_stop(log, best, config):
        epoch = len(log) + 1
        start = time.time()
        loss = train_epoch(run, parallel, optimizer, seed, epoch)
        scheduler.step()
        metrics = [measure(predict(model, valid, config, run.device), valid.y, spec)]
        if run.world > 1:                # all processes must decide the same
            dist.broadcast_object_list(metrics)
        metrics = metrics[0]
        log.append({"epoch": epoch, "loss": loss, "valid": metrics,
                    "seconds": round(time.time() - start, 2)})
        if best is None or score(metrics) < best["score"]:
            weights = {name: v.cpu().clone() for name, v in model.state_dict().items()}
            best = {"epoch": epoch, "score": score(metrics), "weights": weights}
        star = "  *" if best["epoch"] == epoch else ""
        last = dict(list(metrics.items())[-3:])
        left = sum(row["seconds"] for row in log) / 60 * (config["epochs"] / epoch - 1)
        run.say(f"seed {seed}  epoch {epoch:3d}/{config['epochs']}  loss {loss:.4f}  "
                f"valid {show(last)}  {left:5.1f} min left{star}")
        if run.rank == 0:
            save(path, {"weights": model.state_dict(), "log": log, "best": best,
                        "optimizer": optimizer.state_dict(), "config": config,
                        "scheduler": scheduler.state_dict()})

    run.say(f"seed {seed}  ends after epoch {len(log)}: {why_stop(log, best, config)}")
    return evaluate(run, seed, model, log, best)


def why_stop(log, best, config):
    """Why training ends here, or None; `best` may be a seed of results.json, too."""
    if not log:
        return None
    values = log[-1]["loss"], score(log[-1]["valid"])
    if any(v is None or not math.isfinite(v) for v in values):       # None: see to_json
        return "training has diverged; try a smaller --lr, or --coupling mean, not sum"
    if len(log) >= config["epochs"]:
        return "all epochs are done"
    if 0 < config["patience"] <= len(log) - best["epoch"]:
        return f"the last {config['patience']} epochs were no better"
    return None


def evaluate(run, seed, model, log, best):
    """Look at test, with the weights that were best on valid; write seed<k>.pt."""
    config, dataset = run.config, run.dataset
    epoch = best["epoch"]
    test = dataset.splits["test"]
    model.load_state_dict(best["weights"])
    prediction = predict(model, test, config, run.device)
    metrics = measure(prediction, test.y, dataset.spec)
    run.say(f"seed {seed}  test at epoch {epoch}: {show(metrics)}")
    if run.rank == 0:
        save(run.out / f"seed{seed}.pt", {
            "weights": best["weights"], "model": model.config, "epoch": epoch,
            "preparation": dataset.preparation, "config": config,
            "prediction": torch.from_numpy(prediction),
            "target": torch.from_numpy(test.y), "synthetic": dataset.synthetic})
    return {"seed": seed, "epoch": epoch, "valid": log[epoch - 1]["valid"],
            "test": metrics, "log": log}


def restore(path, config, model, optimizer, scheduler):
    """Put all that is trained where `path` left it; returns its log and best epoch."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        check_same_run(path, saved["config"], config, resume=True)
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        return saved["log"], saved["best"]
    except data.DataError:
        raise
    except Exception:                    # damage can surface as nearly any exception
        raise data.DataError(f"{path} is damaged: delete it to start anew") from None


def show(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def write_whole(path, write):
    """Call `write` on a new file, then rename it: `path` is never half written."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path, content):
    write_whole(path, lambda file: torch.save(content, file))


# ---------------------------------------------------------------------------- all seeds
def train_seeds(run, resume):
    """Train every seed; after each, write results.json with the mean of all so far.

    A seed that an earlier run has finished stays until it is finished again.
    """
    config, dataset = run.config, run.dataset
    path = run.out / "results.json"
    report = {"dataset": dataset.name, "synthetic": dataset.synthetic,
              "task": config["task"], "config": config, "environment": {
                  "device": hardware(run.device), "torch": str(torch.__version__),
                  "numpy": np.__version__, "python": platform.python_version(),
                  "system": platform.system()}}
    seeds = read_seeds(path, config, resume)
    if resume and not seeds and not list(run.out.glob("seed*.resume")):
        run.say(f"There is nothing to resume in {run.out}: training starts anew.")

    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        old = seeds.get(seed)
        if resume and old and why_stop(old["log"], old, config):
            run.say(f"seed {seed}  was finished before")
            continue
        seeds[seed] = train_seed(run, seed, resume)
        if run.rank == 0:
            report["seeds"] = [seeds[number] for number in sorted(seeds)]
            text = to_json({**report, **statistics_of(seeds)})
            write_whole(path, lambda file: file.write(text.encode()))
            (run.out / f"seed{seed}.resume").unlink(missing_ok=True)

    found = statistics_of(seeds)
    if len(seeds) > 1:
        values = [f"{name} {value:.4f} ± {found['std'][name]:.4f}"
                  for name, value in found["mean"].items()]
        run.say(f"test, mean ± std of {len(seeds)} seeds: {'  '.join(values)}")


def read_seeds(path, config, resume):
    """The results by seed in results.json, after a check that it is of the same run."""
    if not path.exists():
        return {}
    try:
        report = json.loads(path.read_text())
        check_same_run(path, report["config"], config, resume)
        return {result["seed"]: result for result in report["seeds"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise data.DataError(
            f"{path} is no result of this program: give another --out") from None


def check_same_run(path, theirs, config, resume):
    """Raise unless the runs agree but for --seeds and, to resume, more --epochs."""
    expected = {**config, "seeds": theirs.get("seeds")}
    if resume:
        expected["epochs"] = min(config["epochs"], theirs.get("epochs", 0))
    different = [f"{name}={theirs.get(name)} (here {value})"
                 for name, value in expected.items() if theirs.get(name) != value]
    if different:
        raise data.DataError(
            f"{path} is of another run, or no result of this program, with "
            f"{', '.join(different)}: give the same options, or another --out")


def statistics_of(seeds):
    """Mean and deviation (of the population) of every metric of test."""
    tests = [result["test"] for result in seeds.values()]
    mean, std = {}, {}
    for name in tests[0]:
        values = np.array([test[name] for test in tests], float)
        mean[name], std[name] = float(values.mean()), float(values.std())
    return {"mean": mean, "std": std}


def to_json(value):
    """JSON has no NaN and no infinity: they become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2) + "\n"


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


# ------------------------------------------------------------------------ the benchmark
EXPLICIT = [SDPBackend.MATH]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Case(NamedTuple):
    label: str
    training: bool = False
    piece: int = 0               # steps that `advance` gets at a time; 0: all
    explicit: bool = False       # attention with all its scores in memory


CASES = [Case("inference"), Case("inference in pieces of 64", piece=64),
         Case("training step", training=True)]
ATTENTION_CASES = [
    Case("inference, explicit", explicit=True), Case("inference, fused"),
    Case("training step, explicit", training=True, explicit=True),
    Case("training step, fused", training=True)]


def benchmark(config, spec, lengths):
    """Print time and peak memory of the chosen model for each length (Figures 3, 4)."""
    cases = CASES
    if config["fusion"] == "attention":
        cases = ATTENTION_CASES
    elif config["fusion"] in ("average", "concat"):
        cases = [case for case in CASES if not case.piece]
    print(hardware(torch.device(config["device"])), config, "on synthetic numbers")
    print("seconds: median, on a CPU the sum over threads; -: out of memory")
    print("MB: most memory in use, without the model and its inputs")
    print(f"length  {'case':26} {'seconds':>10} {'MB':>10}")

    for length in lengths:
        for case in cases:
            try:
                seconds, size = in_own_process(measure_case, config, spec, length, case)
                cells = f"{seconds:10.5f} {size / 1e6:10.1f}"
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                cells = f"{'-':>10} {'-':>10}"
            print(f"{length:6}  {case.label:26} {cells}", flush=True)


def in_own_process(function, *arguments):
    """One case must not see the memory that another one has left behind."""
    spawn = multiprocessing.get_context("spawn")
    quiet = (signal.SIGINT, signal.SIG_DFL)      # Ctrl-C ends it without a traceback
    with ProcessPoolExecutor(1, spawn, signal.signal, quiet) as pool:
        return pool.submit(function, *arguments).result()


def measure_case(config, spec, length, case):
    """Median seconds of up to five repetitions, and the bytes they took at most."""
    device = torch.device(config["device"])
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    work = make_work(config, spec, length, case)
    work()                       # the first time also pays for what is built only once

    before = memory(device, "VmRSS", restart=True)
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 20:
        start = clock()
        work()
        seconds.append(clock() - start)
    return np.median(seconds), memory(device, "VmHWM") - before


def make_work(config, spec, length, case):
    """A function that does once what is to be measured."""
    torch.manual_seed(0)
    device = torch.device(config["device"])
    model = model_for(config, spec, spec.widths).to(device).train(case.training)
    optimizer = make_optimizer(model, config)
    backends = EXPLICIT if case.explicit else FUSED
    b = config["batch_size"]
    xs = [torch.randn(b, length, width, device=device) for width in spec.widths]

    def work():
        with torch.set_grad_enabled(case.training), autocast(config, device), \
                sdpa_kernel(backends):
            if case.piece:
                state = model.init_state(b)
                for piece in zip(*(x.split(case.piece, 1) for x in xs)):
                    out, state = model.advance(piece, state)
            else:
                out = model(xs)
        if case.training:
            (out.float() - 1).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work


def memory(device, field, restart=False):
    """Bytes in use now ("VmRSS") or at most ("VmHWM") since the last `restart`."""
    if device.type == "cuda":
        if restart:              # then the peak is what is in use now
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if restart:
        Path("/proc/self/status").stat()    # raises OSError unless this is Linux
        ctypes.CDLL(None).malloc_trim(0)    # give back what is free but not returned
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+)", status)[1]) * 1024


# --------------------------------------------------------------------- the command line
OWN = dict(d_model=32, layers=1, d_state=16, pooling="mean")
STAND_IN = dict(OWN, epochs=12, lr=3e-3, seeds=1, batch_size=32)
BATCH_SIZE = dict(               # the paper names the first three
    mosei=1024, sims=128, simsv2=256, brca=64, rosmap=32, mmimdb=512)
STAND_IN_SAMPLES = (1368, 456, 457)  # in train, valid and test, as in sims


def number_in(kind, low, below=2 ** 31):
    """A type for argparse: a number of this kind, at least `low` and under `below`."""
    def number(text):
        value = kind(text)
        if low <= value < below:
            return value
        raise argparse.ArgumentTypeError(f"{text}: expected {low} to below {below}")

    return number


def make_parser():
    parser = argparse.ArgumentParser(
        usage="python train.py --dataset NAME [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"Other defaults\n  on the stand-in: {STAND_IN}\n  for own data: {OWN}\n"
               f"  batch size of a dataset: {BATCH_SIZE}")
    N = dict(type=number_in(int, 1), metavar="N")
    from_0 = dict(type=number_in(int, 0), metavar="N")
    part = dict(type=number_in(float, 0, 1), metavar="PART")
    rate = dict(type=number_in(float, 0), metavar="RATE")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", required=True, choices=[*data.SPECS, "own"], help="must be given")
    add("--data", type=Path, help="file or folder (default: in data/, or a stand-in)")
    add("--out", type=Path, help="for the results (default: runs/<dataset>-<fusion>)")
    add("--task", choices=["regression", "classification"],
        help="predict a number or classes (default: a number where possible)")
    add("--length", **N, help="resample streams, or cut vectors, to N steps (default: "
        "the longest stream, at most 50; vectors 20; own data as they are)")
    add("--missing-rate", default=0.0, **part, help="part of all inputs that is zeroed")

    add = parser.add_argument_group("model").add_argument
    add("--fusion", choices=["coupled", "mamba", "average", "concat", "attention"],
        default="coupled", help="coupled: the paper's; mamba: one Mamba per modality; "
        "average, concat: one Mamba on linear maps of all streams, which differ in "
        "width; attention: each modality attends to the others")
    add("--coupling", default="mean", choices=["mean", "learned", "sum", "none"],
        help="weights of the coupled states; sum is Eq. 6, which grows without limit")
    add("--no-mix", action="store_true", help="leave out the Cat between two blocks")
    add("--d-model", default=128, **N, help="model width d")
    add("--layers", default=3, **N, help="number of blocks")
    add("--d-state", default=64, **N, help="state size n")
    add("--expand", default=2, **N, help="the inner width e is N d")
    add("--d-conv", default=4, **N, help="steps that the convolution reads")
    add("--dt-rank", **N, help="rank of the map to delta (default: d_state // 8)")
    add("--dropout", default=0.0, **part, help="of each block's output and in the head")
    add("--pooling", default="max", choices=["max", "mean", "last"], help="over time")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", default=150, **N, help="passes over the training samples")
    add("--batch-size", default=128, **N, help="samples per step and process")
    add("--lr", default=5e-4, **rate, help="learning rate, halved every 50 epochs")
    add("--optimizer", default="adamw", choices=["adamw", "adam"],
        help="adam adds the decay, of maps only, to the gradient as the paper does; it "
        "can keep the coupling from being learned")
    add("--weight-decay", default=5e-4, **rate, help="of the weights of maps only")
    add("--patience", default=0, **from_0, help="stop N epochs after the best; 0 never")
    add("--seeds", default=5, **N, help="number of runs")
    add("--seed", default=0, **from_0, help="of the first run; the next ones count on")

    add = parser.add_argument_group("how it runs").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
        help="auto is a GPU if there is one")
    add("--mode", default="auto", choices=["auto", *MODES], help="how to do the scan")
    add("--amp", action="store_true", help="matrix products in bfloat16")
    add("--resume", action="store_true", help="continue, also to more epochs or seeds")
    add("--benchmark", action="store_true", help="only print time and memory")
    add("--lengths", nargs="+", default=[100, 200, 300, 400, 500], **N,
        help="sequence lengths of --benchmark")

    for action in parser._actions:
        if action.nargs != 0 and action.default is not None:
            action.help += " (default: %(default)s)"
    return parser


def parse(argv=None):
    """The options; their defaults depend on the dataset, and on whether it is there."""
    parser = make_parser()
    args = parser.parse_args(argv)
    own = args.dataset == "own"
    place = args.data
    if not own and not place and data.default_path(args.dataset).exists():
        place = data.default_path(args.dataset)
    parser.set_defaults(batch_size=BATCH_SIZE.get(args.dataset, 128))
    if args.benchmark:
        parser.set_defaults(batch_size=16)
    elif own:
        parser.set_defaults(**OWN)
    elif not place:
        parser.set_defaults(**STAND_IN)
    args = parser.parse_args(argv)
    args.data = place

    if own and (not place or args.benchmark):
        parser.error("--dataset own needs --data FILE.npz, and has no --benchmark")
    if args.fusion != "coupled" and (args.coupling != "mean" or args.no_mix):
        parser.error("--coupling and --no-mix are only for --fusion coupled")
    if args.fusion == "mamba":           # Mambas that are joined in the head only
        args.coupling, args.no_mix = "none", True
    return args


def settings(args):
    """The options that make a run what it is: those in results.json."""
    others = ("data", "out", "resume", "benchmark", "lengths")
    config = {name: v for name, v in vars(args).items() if name not in others}
    kinds = ("cpu", "mps", "cuda")
    present = [kind for kind in kinds if getattr(torch, kind).is_available()]
    if args.device == "auto":
        config["device"] = present[-1]
    elif args.device not in present:
        raise data.DataError(f"--device {args.device}: expected one of {present}")
    return config


def begin(args, config, rank):
    """All that comes before the first seed: data, folder, processes."""
    name, task = args.dataset, args.task
    if args.data:
        dataset = data.load(name, args.data, args.length, task)
    else:
        dataset = data.synthetic(name, args.length, STAND_IN_SAMPLES, task=task)
    data.with_missing(dataset, args.missing_rate)
    if task and task not in dataset.spec.tasks:
        raise data.DataError(f"--task {task}: {name} has only {dataset.spec.tasks}")
    out = args.out or Path("runs") / f"{name}-{args.fusion}"
    if out.is_file():
        raise data.DataError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)

    world = int(os.environ.get("WORLD_SIZE", 1))     # set by torchrun
    device = torch.device(config["device"])
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config |= {"task": task or dataset.spec.tasks[0], "processes": world,
               "length": dataset.splits["train"].xs[0].shape[1],
               "samples": [len(split.y) for split in dataset.splits.values()]}
    return Run(config, dataset, out, device, rank, world)


def introduce(run):
    """Print once what is trained on what and where, and what to try next."""
    config, dataset = run.config, run.dataset
    if dataset.synthetic:
        run.say(f"There are no data at {data.default_path(dataset.name)}. "
                f"{data.how_to_get(dataset.name)} This run uses a synthetic stand-in "
                "of the same shapes, and a small model that learns it quickly.")
    for note in dataset.notes:
        run.say(note)
    run.say("config: " + "  ".join(f"{k}={v}" for k, v in config.items()))
    for name, split in dataset.splits.items():
        shapes = "  ".join(f"{x.shape[1]}x{x.shape[2]}" for x in split.xs)
        run.say(f"{name + ':':6} {len(split.y)} samples of {shapes}, "
                f"{100 * split.mask.mean():.1f} % of the steps are real")

    xs, mask, _ = batch(dataset.splits["valid"], slice(1), run.device)
    widths = [x.shape[2] for x in xs]
    model = model_for(config, dataset.spec, widths).to(run.device)
    try:
        model(xs, mask)
    except ValueError as error:
        raise data.DataError(f"--mode: {error}") from None
    size = sum(p.numel() for p in model.parameters())
    run.say(f"{size:,} parameters, {hardware(run.device)}, processes {run.world}, "
            f"mode {config['mode']}. Results go to {run.out}.")
    if config["fusion"] == "coupled" and config["coupling"] != "none":
        other = "--coupling none and another --out"
        if config["layers"] == 1 and config["coupling"] == "mean":
            other = "--fusion mamba"     # one block has no Cat to be taken away
        run.say(f"To see what the coupling adds, run the same with {other}.")


def is_out_of_memory(error):
    kinds = (MemoryError, torch.OutOfMemoryError, BrokenExecutor)
    in_words = re.search("not enough memory|can't allocate memory", str(error))
    return isinstance(error, kinds) or in_words is not None


def main(argv=None):
    """Returns the exit code: 0, 2 after an error of the user, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")     # no character ends a run
    args = parse(argv)
    rank = int(os.environ.get("RANK", 0))            # set by torchrun
    code, message = 2, None
    try:
        config = settings(args)
        if args.benchmark:
            benchmark(config, data.SPECS[args.dataset], args.lengths)
        else:
            run = begin(args, config, rank)
            introduce(run)
            train_seeds(run, args.resume)
        code = 0
    except (data.DataError, OSError, ImportError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --resume goes on after the last epoch"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rank = 0                         # print it, whichever process it was
        message = "error: out of memory: try a smaller --batch-size or --length"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message and rank == 0:
        print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
