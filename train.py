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
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
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

FUSIONS = ("coupled", "mamba", "average", "concat", "attention")


# ------------------------------------------------------------------------------ metrics
def f1_scores(true, pred):
    """F1 of each column of two (N, classes) bool arrays; 0 if it never occurs."""
    return 2 * (true & pred).sum(0) / np.maximum(true.sum(0) + pred.sum(0), 1)


def accuracy_f1(true, pred, *names):
    """Under `names`: accuracy, F1 weighted by how often a class is true, mean of F1."""
    values = [math.nan] * 3                  # where no sample can be judged
    if len(true):
        classes = np.union1d(true, pred)
        true_is = true[:, None] == classes
        f1 = f1_scores(true_is, pred[:, None] == classes)
        values = [np.mean(true == pred), f1 @ true_is.mean(0), f1.mean()]
    return dict(zip(names, map(float, values)))


def regression_metrics(pred, true, scale):
    """The metrics of MMSA for labels in [-scale, scale], rounded and clipped as there.

    scale is 3 (mosi, mosei), 1 (sims, simsv2), or 0: any range, with MAE and Corr only.
    """
    pred, true = [np.float64(np.float32(v)) for v in (pred, true)]
    metrics = {}
    if scale == 3:
        some = true != 0
        metrics |= accuracy_f1(true[some] > 0, pred[some] > 0, "Acc-2", "F1")
        metrics |= accuracy_f1(true >= 0, pred >= 0, "Acc-2 with 0", "F1 with 0")
        for classes, limit in ((3, 1), (5, 2), (7, 3)):
            rounded = [np.round(v.clip(-limit, limit)) for v in (true, pred)]
            metrics |= accuracy_f1(*rounded, f"Acc-{classes}")
    if scale == 1:
        true, pred = true.clip(-1, 1), pred.clip(-1, 1)
        metrics |= accuracy_f1(true > 0, pred > 0, "Acc-2", "F1")
        for classes, cuts in ((3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            # A value on a cut belongs to the class below it, with the cut in float32.
            parts = [np.searchsorted(np.float32(cuts), v) for v in (true, pred)]
            metrics |= accuracy_f1(*parts, f"Acc-{classes}")

    metrics["MAE"] = float(np.mean(np.abs(pred - true)))
    metrics["Corr"] = math.nan
    if np.ptp(pred) > 0 and np.ptp(true) > 0:
        metrics["Corr"] = float(np.corrcoef(pred, true)[0, 1])
    return metrics


def class_metrics(logits, true):
    """One of several classes: accuracy, weighted F1, macro F1."""
    return accuracy_f1(true, logits.argmax(1), "Acc", "weighted F1", "macro F1")


def sentiment_metrics(logits, true):
    """Classes negative, neutral, positive. Acc-2 and F1 leave out the neutral samples;
    "with 0" they count as negative. A sample is positive if that logit is the larger.

    NOTE: "Acc-2 MMSA" and "F1 MMSA" compare predictions 0 and 1 with labels 0 and 2, as
    the scripts behind the paper's numbers do: no positive sample can count as right.
    """
    positive = (logits[:, 2] > logits[:, 0]).astype(int)
    some = true != 1
    return {**accuracy_f1(true[some] // 2, positive[some], "Acc-2", "F1"),
            **accuracy_f1(true // 2, positive, "Acc-2 with 0", "F1 with 0"),
            **accuracy_f1(true[some], positive[some], "Acc-2 MMSA", "F1 MMSA"),
            **accuracy_f1(true, logits.argmax(1), "Acc-3", "F1-3")}


def label_metrics(logits, true):
    """Several labels at once, predicted where the logit is > 0: micro and macro F1."""
    true, pred = true > 0.5, logits > 0
    micro = f1_scores(true.ravel(), pred.ravel())
    return {"micro F1": float(micro), "macro F1": float(f1_scores(true, pred).mean())}


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
    """Table 11: one Mamba on the average of the encoded streams, or on all of them."""

    def __init__(self, d_inputs, d_output, *, concat, d_model, **options):
        super().__init__()
        self.config = dict(d_inputs=d_inputs, d_output=d_output, concat=concat,
                           d_model=d_model, **options)
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        width = d_model * len(d_inputs) if concat else d_model
        self.mamba = CoupledMamba((width,), d_output, d_model=width, **options)

    def forward(self, xs, mask=None):
        """m tensors (b, l, d_inputs[i]), mask (m, b, l) or None -> (b, d_output)."""
        count = len(xs)                      # of the modalities that are present
        there = None                         # whether any of them is
        if mask is not None:
            xs = [zero_absent(x, here) for x, here in zip(xs, mask)]
            count = mask.sum(0).clamp(min=1)[..., None]
            there = mask.any(0)[None]
        f = torch.stack([encoder(x) for encoder, x in zip(self.encoders, xs)])
        f = zero_absent(f, mask)                                     # (m, b, l, d)
        if self.config["concat"]:
            return self.mamba([f.movedim(0, 2).flatten(2)], there)   # (b, l, m d)
        return self.mamba([f.sum(0) / count], there)                 # (b, l, d)


class CrossAttention(CoupledMamba):
    """Table 8: each modality attends to all steps of the others. No scan and no Cat."""

    def __init__(self, d_inputs, d_output, *, mix=False, **options):
        super().__init__(d_inputs, d_output, mix=False, **options)
        self.blocks = nn.ModuleList(
            AttentionBlock(len(d_inputs), **self.config) for _ in self.blocks)

    def advance(self, xs, state, mask=None):
        if state and state["count"].any():   # without one, `super` says what is wrong
            raise ValueError("cross attention cannot continue a sequence")
        return super().advance(xs, state, mask)


class AttentionBlock(nn.Module):
    """Called like `coupled_mamba.Block`, with the same inner width e, but stateless."""

    def __init__(self, m, d_model, expand, dropout, **others):
        super().__init__()
        e = expand * d_model
        self.heads = 4 if e % 4 == 0 else 1
        self.norm_weight = nn.Parameter(torch.ones(m, d_model))
        self.norm_bias = nn.Parameter(torch.zeros(m, d_model))
        self.q, self.k, self.v = [StackedLinear(m, d_model, e) for _ in range(3)]
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


def make_model(config, d_inputs, classes):
    """A model for streams of these widths, with the outputs that the task needs."""
    options = {name: config[name] for name in (
        "d_model", "d_state", "expand", "d_conv", "dt_rank", "coupling", "pooling",
        "dropout", "mode")}
    options |= {"n_layers": config["layers"], "mix": not config["no_mix"]}
    d_output = 1 if config["task"] == "regression" else classes
    kind = CoupledMamba
    if config["fusion"] == "attention":
        kind = CrossAttention
    elif config["fusion"] in ("average", "concat"):
        kind = OneMamba
        options["concat"] = config["fusion"] == "concat"
    return kind(d_inputs, d_output, **options).to(config["device"])


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


def autocast(config):
    return torch.autocast(config["device"], torch.bfloat16, enabled=config["amp"])


@torch.no_grad()
def predict(model, split, config):
    """The outputs (N, d_output) for a split."""
    model.eval()
    outs = []
    for first in range(0, len(split.y), config["batch_size"]):
        rows = slice(first, first + config["batch_size"])
        xs, mask, _ = batch(split, rows, config["device"])
        with autocast(config):
            outs.append(model(xs, mask).float().cpu().numpy())
    return np.concatenate(outs)


def train_epoch(run, model, optimizer, seed, epoch):
    """One pass over the training samples. Returns the mean loss.

    Their order depends on seed and epoch only, dropout on the process, too: so --resume
    repeats them exactly. A step takes world * batch_size samples, shared equally.
    """
    model.train()
    split = run.dataset.splits["train"]
    order = np.random.default_rng((seed, epoch)).permutation(len(split.y))
    torch.manual_seed((seed * 10 ** 5 + epoch) * run.world + run.rank)   # for dropout
    device = run.config["device"]
    total = torch.zeros((), device=device)
    size = run.config["batch_size"] * run.world

    for first in range(0, len(order), size):
        rows = order[first:first + size]
        own = rows[run.rank::run.world]
        # A process without a sample computes one, for all must take part in each step.
        xs, mask, y = batch(split, own if len(own) else rows[:1], device)
        with autocast(run.config):
            out = model(xs, mask)
        loss = sample_losses(out.float(), y)[:len(own)].sum()
        optimizer.zero_grad()
        (loss * run.world / len(rows)).backward()    # processes average their gradients
        optimizer.step()
        total += loss.detach()
        if sys.stdout.isatty():
            run.say(f"{first + len(rows)} of {len(order)} samples", end="\r")

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
    model = make_model(config, [x.shape[2] for x in valid.xs], spec.classes)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    log, best = [], None
    if resume and path.exists():
        saved = load(path, config, resume)
        for name, part in trained.items():
            part.load_state_dict(saved[name])
        log, best = saved["log"], saved["best"]
        run.say(f"seed {seed}  resumed after epoch {len(log)}")
    parallel = model
    if run.world > 1:
        parallel = nn.parallel.DistributedDataParallel(model)

    while not why_stop(log, best, config):
        epoch = len(log) + 1
        start = time.time()
        loss = train_epoch(run, parallel, optimizer, seed, epoch)
        scheduler.step()
        metrics = [measure(predict(model, valid, config), valid.y, spec)]
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
            states = {name: part.state_dict() for name, part in trained.items()}
            save(path, {**states, "log": log, "best": best, "config": config})

    run.say(f"seed {seed}  ends after epoch {len(log)}: {why_stop(log, best, config)}")
    return evaluate(run, seed, model, log, best)


def why_stop(log, best, config):
    """Why training ends here, or None; `best` may be a seed of results.json, too."""
    if not log:
        return None
    values = log[-1]["loss"], score(log[-1]["valid"])
    if any(v is None or not math.isfinite(v) for v in values):       # null in JSON
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
    prediction = predict(model, test, config)
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


def show(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def save(path, content):
    """Write a new file and rename it: `path` is never half written."""
    buffer = io.BytesIO()
    if path.suffix == ".json":               # it has no NaN: they become null
        plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
        buffer.write((json.dumps(plain, indent=2) + "\n").encode())
    else:
        torch.save(content, buffer)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path, config, resume):
    """Read what `save` wrote. Only --seeds and, to resume, --epochs may differ."""
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text())
            # From here on a dict: the number of a seed -> its result.
            found["seeds"] = {result["seed"]: result for result in found["seeds"]}
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
        theirs = {name: found["config"][name] for name in config}
        if resume:                       # to at least as many epochs
            theirs["epochs"] = max(theirs["epochs"], config["epochs"])
    except Exception:                    # damage can surface as nearly any exception
        raise data.DataError(f"{path} is damaged, or no result of this program: delete "
                             "it, or give another --out") from None
    for name, value in config.items():
        if theirs[name] != value and name != "seeds":
            raise data.DataError(f"{path} has {name} {theirs[name]}, not {value}: give "
                                 "the same options, or another --out")
    return found


# ---------------------------------------------------------------------------- all seeds
def train_seeds(run, resume):
    """Train every seed; after each, write results.json with the mean of all so far.

    A seed that an earlier run has finished stays until it is finished again.
    """
    config = run.config
    path = run.out / "results.json"
    seeds = load(path, config, resume)["seeds"] if path.exists() else {}

    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        old = seeds.get(seed)
        if resume and old and why_stop(old["log"], old, config):
            run.say(f"seed {seed}  was finished before")
            continue
        seeds[seed] = train_seed(run, seed, resume)
        if run.rank == 0:
            save(path, report_of(run, seeds))
            (run.out / f"seed{seed}.resume").unlink(missing_ok=True)

    report = report_of(run, seeds)
    if len(seeds) > 1:
        values = [f"{name} {mean:.4f} ± {report['std'][name]:.4f}"
                  for name, mean in report["mean"].items()]
        run.say(f"test, mean ± std of {len(seeds)} seeds: {'  '.join(values)}")


def report_of(run, seeds):
    """The content of results.json; std is the deviation of the population."""
    config, dataset = run.config, run.dataset
    results = [seeds[seed] for seed in sorted(seeds)]
    mean, std = {}, {}
    for name in results[0]["test"]:
        values = np.array([result["test"][name] for result in results], float)
        mean[name], std[name] = float(values.mean()), float(values.std())
    environment = {"device": hardware(config["device"]), "torch": torch.__version__,
                   "numpy": np.__version__, "python": platform.python_version()}
    return {"dataset": dataset.name, "synthetic": dataset.synthetic,
            "task": config["task"], "config": config, "environment": environment,
            "seeds": results, "mean": mean, "std": std}


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


# ------------------------------------------------------------------------ the benchmark
class Case(NamedTuple):
    label: str
    fusions: tuple = FUSIONS     # those that it is for
    training: bool = False
    piece: int = 0               # steps that `advance` gets at a time; 0: all
    explicit: bool = False       # attention with all its scores in memory


FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CASES = [Case("inference"), Case("inference in pieces of 64", FUSIONS[:2], piece=64),
         Case("training step", training=True),
         Case("inference, explicit", ("attention",), explicit=True),
         Case("training step, explicit", ("attention",), training=True, explicit=True)]


def benchmark(config, spec, lengths):
    """Print time and peak memory of the chosen model for each length (Figures 3, 4)."""
    print(hardware(config["device"]), config, "on synthetic numbers")
    print("median seconds (CPU: sum of threads); peak MB besides model and inputs")
    print(f"length  {'case':26} {'seconds':>10} {'MB':>10}   -: out of memory")

    cases = [case for case in CASES if config["fusion"] in case.fusions]
    for length, case in itertools.product(lengths, cases):
        seconds = size = "-"
        try:
            found = in_own_process(measure_case, config, spec, length, case)
            seconds, size = f"{found[0]:.5f}", f"{found[1] / 1e6:.1f}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        except ValueError as error:
            raise data.DataError(f"--mode: {error}") from None
        print(f"{length:6}  {case.label:26} {seconds:>10} {size:>10}", flush=True)


def in_own_process(function, *arguments):
    """One case must not see the memory that another one has left behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_case(config, spec, length, case):
    """Median seconds of three repetitions, and the bytes that they took at most."""
    clock = time.process_time if config["device"] == "cpu" else time.perf_counter
    work = make_work(config, spec, length, case)
    work()                       # the first time also pays for what is built only once
    before = memory(config["device"], restart=True)
    seconds = timeit.repeat(work, timer=clock, repeat=3, number=1)
    return np.median(seconds), memory(config["device"]) - before


def make_work(config, spec, length, case):
    """A function that does once what is to be measured."""
    model = make_model(config, spec.widths, spec.classes).train(case.training)
    optimizer = make_optimizer(model, config)
    b = config["batch_size"]
    xs = [torch.randn(b, length, w, device=config["device"]) for w in spec.widths]
    kind = SDPBackend.MATH if case.explicit else FUSED

    def work():
        with torch.set_grad_enabled(case.training), autocast(config), sdpa_kernel(kind):
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
        if config["device"] == "cuda":
            torch.cuda.synchronize()

    return work


def memory(device, restart=False):
    """The most bytes in use since the restart, which begins with what is in use now."""
    if device == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if restart:
        ctypes.CDLL("libc.so.6").malloc_trim(0)      # give back what is free
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


# --------------------------------------------------------------------- the command line
OWN = dict(d_model=32, layers=1, d_state=16, pooling="mean")
STAND_IN = dict(OWN, epochs=12, lr=3e-3, seeds=1, batch_size=32)
BATCH_SIZE = dict(mosei=1024, sims=128, simsv2=256, brca=64, rosmap=32, mmimdb=512)
STAND_IN_SAMPLES = data.SPECS["sims"].samples    # of every dataset


def number_in(kind, low, below=2 ** 31):
    """A type for argparse: a number of this kind, at least `low` and under `below`."""
    def number(text):
        value = kind(text)
        if low <= value < below:
            return value
        raise argparse.ArgumentTypeError(f"{text}: expected {low} to below {below}")

    return number


def make_parser(devices):
    parser = argparse.ArgumentParser(
        usage="python train.py --dataset NAME [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"Defaults\nstand-in: {STAND_IN}\nown: {OWN}\nbatch size: {BATCH_SIZE}")
    N = dict(type=number_in(int, 1), metavar="N")
    from_0 = dict(type=number_in(int, 0), metavar="N")
    part = dict(type=number_in(float, 0, 1), metavar="PART")
    rate = dict(type=number_in(float, 0), metavar="RATE")

    add = parser.add_argument
    add("--dataset", required=True, choices=[*data.SPECS, "own"], help="required")
    add("--data", type=Path, help="file or folder (default: in data/, or a stand-in)")
    add("--out", type=Path, help="for the results (default: runs/<dataset>-<fusion>)")
    add("--task", choices=["regression", "classification"],
        help="predict a number or classes (default: a number where possible)")
    add("--length", **N, help="resample streams, or cut vectors, to N steps (default: "
        "the longest stream, at most 50; vectors 20; own data as they are)")
    add("--missing-rate", default=0.0, **part, help="part of all inputs that is zeroed")

    add("--fusion", default="coupled", choices=FUSIONS, help="coupled: the paper's; "
        "mamba: one Mamba per modality; average, concat: one Mamba on linear maps of "
        "all streams; attention: each modality attends to the others")
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

    add("--epochs", default=150, **N, help="passes over the training samples")
    add("--batch-size", default=128, **N, help="samples per step and process")
    add("--lr", default=5e-4, **rate, help="learning rate, halved every 50 epochs")
    add("--optimizer", default="adamw", choices=["adamw", "adam"],
        help="adam, the paper's, can keep the coupling from being learned")
    add("--weight-decay", default=5e-4, **rate, help="of the weights of maps only")
    add("--patience", default=0, **from_0, help="stop N epochs after the best; 0 never")
    add("--seeds", default=5, **N, help="number of runs")
    add("--seed", default=0, **from_0, help="of the first run; the next ones count on")

    add("--device", default="auto", choices=["auto", *devices], help="auto: GPU if any")
    add("--mode", default="auto", choices=["auto", *MODES], help="how to do the scan")
    add("--amp", action="store_true", help="matrix products in bfloat16")
    add("--resume", action="store_true", help="continue, also to more epochs or seeds")
    add("--benchmark", action="store_true", help="only print time and memory")
    add("--lengths", nargs="+", default=[100, 200, 300, 400, 500], **N, help="to time")

    for action in parser._actions:
        if action.nargs != 0 and action.default is not None:
            action.help += " (default: %(default)s)"
    return parser


def parse(argv=None):
    """The options; their defaults depend on the dataset, and on whether it is there."""
    devices = ("cpu", "mps", "cuda")
    devices = [kind for kind in devices if getattr(torch, kind).is_available()]
    parser = make_parser(devices)
    name = parser.parse_args(argv).dataset
    parser.set_defaults(batch_size=BATCH_SIZE.get(name, 128))
    spec = data.SPECS.get(name)          # None: own data
    if spec:
        place = data.default_path(name)
        parser.set_defaults(task=spec.tasks[0], data=place if place.exists() else None)
    args = parser.parse_args(argv)
    if args.benchmark:
        parser.set_defaults(batch_size=16)
    elif not spec:
        parser.set_defaults(**OWN)
    elif not args.data:
        parser.set_defaults(**STAND_IN)
    args = parser.parse_args(argv)

    if not spec and (not args.data or args.benchmark):
        parser.error("--dataset own needs --data FILE.npz, and has no --benchmark")
    if spec and args.task not in spec.tasks:
        parser.error(f"--task {args.task}: {name} has only {spec.tasks}")
    if args.fusion != "coupled" and (args.coupling != "mean" or args.no_mix):
        parser.error("--coupling and --no-mix are only for --fusion coupled")
    if args.fusion == "mamba":           # Mambas that are joined in the head only
        args.coupling, args.no_mix = "none", True
    if args.device == "auto":
        args.device = devices[-1]
    return args


def settings(args):
    """The options that make a run what it is: those in results.json."""
    others = ("data", "out", "resume", "benchmark", "lengths")
    return {name: v for name, v in vars(args).items() if name not in others}


def begin(args, config, rank):
    """All that comes before the first seed: data, folder, processes."""
    name, task = args.dataset, args.task
    if args.data:
        dataset = data.load(name, args.data, args.length, task)
    else:
        dataset = data.synthetic(name, args.length, STAND_IN_SAMPLES, task=task)
    if args.missing_rate:
        data.with_missing(dataset, args.missing_rate)
    out = args.out or Path("runs") / f"{name}-{args.fusion}"
    out.mkdir(parents=True, exist_ok=True)

    world = int(os.environ.get("WORLD_SIZE", 1))     # set by torchrun
    if world > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    config |= {"task": task or dataset.spec.tasks[0], "processes": world,
               "length": dataset.preparation["length"],
               "samples": list(dataset.spec.samples),
               "streams": dict(zip(dataset.spec.modalities, dataset.spec.widths))}
    return Run(config, dataset, out, rank, world)


def introduce(run):
    """Print once what is trained on what and where."""
    config, dataset = run.config, run.dataset
    if dataset.synthetic:
        run.say(f"There are no data at {data.default_path(dataset.name)}: this is a "
                f"synthetic stand-in. {data.how_to_get(dataset.name)}")
    for note in dataset.notes:
        run.say(note)
    run.say("config: " + "  ".join(f"{k}={v}" for k, v in config.items()))
    for name, split in dataset.splits.items():
        shapes = "  ".join(f"{x.shape[1]}x{x.shape[2]}" for x in split.xs)
        run.say(f"{name + ':':6} {len(split.y)} samples of {shapes}, "
                f"{100 * split.mask.mean():.1f} % of the steps are real")

    xs, mask, _ = batch(dataset.splits["valid"], slice(1), config["device"])
    model = make_model(config, [x.shape[2] for x in xs], dataset.spec.classes)
    try:
        model(xs, mask)
    except ValueError as error:
        raise data.DataError(f"--mode: {error}") from None
    size = sum(p.numel() for p in model.parameters())
    run.say(f"{size:,} parameters, outputs {model.config['d_output']}, "
            f"{hardware(config['device'])}. Results go to {run.out}.")


def is_out_of_memory(error):
    words = "MemoryError|BrokenProcessPool|enough memory|allocate memory"
    return re.search(words, repr(error)) is not None


def main(argv=None):
    """Returns the exit code: 0, 2 after an error of the user, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")     # no character ends a run
    args = parse(argv)
    rank = int(os.environ.get("RANK", 0))            # set by torchrun
    code, message = 0, None
    try:
        config = settings(args)
        if args.benchmark:
            benchmark(config, data.SPECS[args.dataset], args.lengths)
        else:
            run = begin(args, config, rank)
            introduce(run)
            train_seeds(run, args.resume)
    except (data.DataError, OSError, ImportError) as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --resume continues a training run"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rank = 0                         # print it, whichever process it was
        code, message = 2, "out of memory: try a smaller --batch-size or --length"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message and rank == 0:
        print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
