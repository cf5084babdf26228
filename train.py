"""Train and evaluate Coupled Mamba, and what the paper compares it with:

    python train.py --dataset sims
    torchrun --nproc_per_node=2 train.py --dataset sims --out runs/two     # on two GPUs or CPUs

Without a data file the run goes on with a synthetic stand-in and says so on every line. Results go
to --out: `results.json`, and for each seed the best weights (`seed0.pt`), the test predictions
(`seed0.npz`) and a line per epoch (`seed0.jsonl`).
"""
import argparse
import json
import os
import platform
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from coupled_mamba import MODES, CoupledMamba, StackedLinear, compile_scan

# What the paper (or the authors' script) uses. d_model, layers ... are the model's own defaults.
PAPER = dict(d_model=128, layers=3, d_state=64, dt_rank=None, expand=2, d_conv=4, dropout=0.0,
             epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5)
BATCH = {"mosei": 1024, "sims": 128, "simsv2": 256,
         "mosi": 128, "brca": 64, "rosmap": 32, "mmimdb": 512}               # these are ours
# On the stand-in, what is not given shrinks to this: about a minute on 2 CPU cores.
SMALL = dict(d_model=32, layers=2, d_state=16, epochs=15, lr=3e-3, seeds=1, batch_size=32)
SMALL_CLIPS = (1368, 456, 457)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # by torchrun


# ----------------------------------------------------------------------------- metrics
def f1_scores(true, pred):
    """F1 of each column of two (N, classes) bool arrays; 0 for a class that nobody ever names."""
    hits, named = (true & pred).sum(0), true.sum(0) + pred.sum(0)
    return 2 * hits / np.maximum(named, 1)


def accuracy_f1(true, pred):
    """Accuracy, and F1 averaged over classes with their true counts as weights, and plainly."""
    classes = np.union1d(true, pred)
    true_is, pred_is = true[:, None] == classes, pred[:, None] == classes
    f1 = f1_scores(true_is, pred_is)
    return float(np.mean(true == pred)), float(f1 @ true_is.mean(0)), float(f1.mean())


def regression_metrics(pred, true, scale):
    """The metrics of MMSA for labels in [-scale, scale]: 3 for mosi, mosei; 1 for sims, simsv2."""
    pred, true = (v.astype(np.float32).astype(np.float64) for v in (pred, true))
    metrics = {}
    if scale == 3:
        some = true != 0
        metrics["Acc-2"], metrics["F1"] = accuracy_f1(true[some] > 0, pred[some] > 0)[:2] \
            if some.any() else (float("nan"),) * 2
        metrics["Acc-2 with 0"], metrics["F1 with 0"], _ = accuracy_f1(true >= 0, pred >= 0)
        for classes, limit in ((3, 1), (5, 2), (7, 3)):
            same = np.round(true.clip(-limit, limit)) == np.round(pred.clip(-limit, limit))
            metrics[f"Acc-{classes}"] = float(np.mean(same))
    else:
        pred, true = pred.clip(-1, 1), true.clip(-1, 1)
        metrics["Acc-2"], metrics["F1"], _ = accuracy_f1(true > 0, pred > 0)
        for classes, cuts in ((3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            # a value on a cut belongs to the class below it; both as float32 has them
            cuts = np.float32(cuts).astype(np.float64)
            same = np.searchsorted(cuts, true) == np.searchsorted(cuts, pred)
            metrics[f"Acc-{classes}"] = float(np.mean(same))
    metrics["MAE"] = float(np.mean(np.abs(pred - true)))
    constant = np.ptp(pred) == 0 or np.ptp(true) == 0
    metrics["Corr"] = float("nan") if constant else float(np.corrcoef(pred, true)[0, 1])
    return metrics


def class_metrics(logits, true):
    """One of several classes: accuracy, weighted F1, macro F1."""
    return dict(zip(("Acc", "weighted F1", "macro F1"), accuracy_f1(true, logits.argmax(1))))


def sentiment_metrics(logits, true):
    """Negative, neutral, positive. Acc-2 and F1: negative or positive, of the clips not neutral.

    NOTE: MMSA's scripts, whose numbers the paper prints, hold predictions 0 and 1 against labels 0
    and 2 there, so that no positive clip can count as right: "Acc-2 MMSA" and "F1 MMSA".
    """
    some, nan = true != 1, (float("nan"),) * 2
    positive = (logits[:, 2] > logits[:, 0]).astype(int)[some]
    pairs = [("", true[some] // 2), (" MMSA", true[some])]
    metrics = {}
    for name, labels in pairs:
        both = accuracy_f1(labels, positive)[:2] if some.any() else nan
        metrics["Acc-2" + name], metrics["F1" + name] = both
    return metrics | dict(zip(("Acc-3", "F1-3"), accuracy_f1(true, logits.argmax(1))))


def label_metrics(logits, true):
    """Several labels at once, each there if its logit is > 0: micro and macro F1."""
    true, pred = true > 0.5, logits > 0
    return {"micro F1": float(f1_scores(true.reshape(-1, 1), pred.reshape(-1, 1))[0]),
            "macro F1": float(f1_scores(true, pred).mean())}


def sample_losses(out, y, weights=None):
    """Loss of each sample (N,), and by the form of y what the task is, see `data.Split`."""
    if y.dim() == 2:
        return F.binary_cross_entropy_with_logits(out, y, reduction="none", pos_weight=weights
                                                  ).mean(1)
    if y.dtype == torch.int64:
        return F.cross_entropy(out, y, weight=weights, reduction="none")
    return (out[:, 0] - y).abs()


def measure(out, y, spec):
    """All metrics of a split, from the outputs (N, d_output); the loss, too, where it selects."""
    if spec.scale and y.dtype == np.float32:
        return regression_metrics(out[:, 0], y, spec.scale)
    metrics = label_metrics if y.ndim == 2 else \
        sentiment_metrics if spec.scale else class_metrics
    loss = sample_losses(torch.from_numpy(out), torch.from_numpy(y)).mean().item()
    return {**metrics(out, y), "loss": loss}


# ----------------------------------------------------------------------------- files
def write_whole(path, write):
    """`write(file)` beside `path`, then rename: a reader sees the old file or the new, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, rows, lines=False):
    def finite(v):
        if isinstance(v, (dict, list)):
            return {k: finite(u) for k, u in v.items()} if isinstance(v, dict) else \
                [finite(u) for u in v]
        return None if isinstance(v, float) and not np.isfinite(v) else v    # NaN is not JSON
    text = "".join(json.dumps(finite(row)) + "\n" for row in rows) if lines else \
        json.dumps(finite(rows), indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


# ----------------------------------------------------------------------------- other fusions
class OneMamba(nn.Module):
    """Table 11: one Mamba on the average of the encoded streams, or on all of them side by side."""
    param_groups = CoupledMamba.param_groups

    def __init__(self, d_inputs, d_output, *, concat, d_model, **options):
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(width, d_model) for width in d_inputs)
        self.concat, width = concat, d_model * (len(d_inputs) if concat else 1)
        self.mamba = CoupledMamba((width,), d_output, d_model=width, **options)

    def forward(self, xs, mask=None):
        real = [None] * len(xs) if mask is None else mask[..., None]
        f = torch.stack([encoder(x if here is None else torch.where(here, x, 0))
                         for encoder, x, here in zip(self.encoders, xs, real)])      # (m, b, l, d)
        f = f if mask is None else torch.where(real, f, 0)
        if self.concat:
            f = f.movedim(0, 2).flatten(2)                                           # (b, l, m d)
        else:
            f = f.mean(0) if mask is None else f.sum(0) / mask.sum(0).clamp(min=1)[..., None]
        return self.mamba([f], None if mask is None else mask.any(0)[None])


class CrossAttention(CoupledMamba):
    """Table 8: each modality attends to all steps of the others, in place of scan and Cat."""

    def __init__(self, d_inputs, d_output, *, explicit=False, **options):
        super().__init__(d_inputs, d_output, **{**options, "mix": False})
        d, expand, dropout = options["d_model"], options["expand"], options["dropout"]
        self.blocks = nn.ModuleList(AttentionBlock(len(d_inputs), d, expand * d, dropout, explicit)
                                    for _ in self.blocks)


class AttentionBlock(nn.Module):
    """Called like `coupled_mamba.Block`. explicit: softmax(Q K^T) V in memory, for comparison."""

    def __init__(self, m, d, e, dropout, explicit):
        super().__init__()
        self.heads, self.explicit = 4 if e % 4 == 0 else 1, explicit
        self.norm_weight = nn.Parameter(torch.ones(m, d))
        self.norm_bias = nn.Parameter(torch.zeros(m, d))
        self.q, self.k, self.v = (StackedLinear(m, d, e) for _ in range(3))
        self.out, self.dropout = StackedLinear(m, e, d), nn.Dropout(dropout)

    def init_state(self, b):
        return None

    def forward(self, f, mask=None, state=None, mode=None):
        m, b, l, d = f.shape
        angle = torch.arange(l, device=f.device)[:, None] / 10000 ** (
            torch.arange(0, d, 2, device=f.device) / d)                              # (l, d / 2)
        position = torch.cat([angle.sin(), angle.cos()], -1)[:, :d].to(f.dtype)
        x = F.layer_norm(f, (d,)) * self.norm_weight[:, None, None] + self.norm_bias[:, None, None]
        q, k, v = (p(x + position).unflatten(-1, (self.heads, -1)).transpose(2, 3)
                   for p in (self.q, self.k, self.v))                            # (m, b, h, l, c)
        ys = []
        for i in range(m):
            others = [j for j in range(m) if j != i] or [i]
            keys, values = (torch.cat([p[j] for j in others], 2) for p in (k, v))
            there = None
            if mask is not None:                             # (b, 1, 1, (m-1) l); nobody there: 0
                there = torch.cat([mask[j] for j in others], 1)[:, None, None]
                values = torch.where(there[:, 0, 0, :, None][:, None], values, 0)
                there = there | ~there.any(-1, keepdim=True)
            ys.append(self.attend(q[i], keys, values, there))
        y = torch.stack(ys).transpose(2, 3).flatten(3)                               # (m, b, l, e)
        f = f + self.dropout(self.out(y))
        return (f if mask is None else torch.where(mask[..., None], f, 0)), None

    def attend(self, q, k, v, there):
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, there)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores if there is None else scores.masked_fill(~there, -torch.inf)).softmax(-1) @ v


def make_model(config, d_inputs, d_output):
    options = dict(d_model=config["d_model"], n_layers=config["layers"], d_state=config["d_state"],
                   expand=config["expand"], d_conv=config["d_conv"], dt_rank=config["dt_rank"],
                   coupling=config["coupling"], mix=not config["no_mix"], mode=config["mode"],
                   pooling=config["pooling"], dropout=config["dropout"])
    fusion = config["fusion"]
    if fusion in ("average", "concat"):
        return OneMamba(d_inputs, d_output, concat=fusion == "concat", **options)
    if fusion == "attention":
        return CrossAttention(d_inputs, d_output, **options)
    if fusion == "mamba":
        options["coupling"] = "none"
    return CoupledMamba(d_inputs, d_output, **options)


# ----------------------------------------------------------------------------- training
class Batches(torch.utils.data.Dataset):
    """xs, mask (None where every step is real) and y of the clips `rows`; `drop`: modalities."""

    def __init__(self, split, drop=()):
        self.split, self.mask = split, split.mask.copy()
        self.mask[list(drop)] = False
        self.complete = self.mask.all()

    def __getitem__(self, rows):
        mask = None if self.complete else torch.from_numpy(self.mask[:, rows])
        return [torch.from_numpy(x[rows]) for x in self.split.xs], mask, \
            torch.from_numpy(self.split.y[rows])


def loader(batches, order, config, device):
    """Batch by batch on the device; `order` is a list of row numbers for each."""
    pin = device.type == "cuda"
    for xs, mask, y in torch.utils.data.DataLoader(
            batches, None, sampler=order, num_workers=config["workers"], pin_memory=pin,
            generator=torch.Generator()):
        move = [v if v is None else v.to(device, non_blocking=pin) for v in (*xs, mask, y)]
        yield move[:-2], move[-2], move[-1]


def autocast(config, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config["amp"])


@torch.no_grad()
def predict(model, split, config, device, drop=()):
    """(N, d_output)"""
    model.eval()
    order = np.array_split(np.arange(len(split.y)), -(-len(split.y) // config["batch_size"]))
    with autocast(config, device):
        return np.concatenate([model(xs, mask).float().cpu().numpy() for xs, mask, _ in
                               loader(Batches(split, drop), order, config, device)])


def train_epoch(model, optimizer, split, order, config, device, progress):
    """Mean loss. With several processes each takes its share of every WORLD * batch_size clips."""
    model.train()
    classes = data.SPECS[config["dataset"]].classes
    weights = class_weights(split.y, classes).to(device) if config["class_weights"] else None
    together = [order[i:i + config["batch_size"] * WORLD]
                for i in range(0, len(order), config["batch_size"] * WORLD)]
    shares = [rows[RANK::WORLD] if len(rows) > RANK else rows[:1] for rows in together]
    total, done = torch.zeros((), device=device), 0
    for rows, (xs, mask, y) in zip(together, loader(Batches(split), shares, config, device)):
        with autocast(config, device):
            out = model(xs, mask)
        losses = sample_losses(out.float(), y, weights).sum() * (len(rows) > RANK)
        optimizer.zero_grad()
        (losses * WORLD / len(rows)).backward()              # DDP takes the mean over processes
        optimizer.step()
        total, done = total + losses.detach(), done + len(rows)
        progress(done, total, len(order))
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item() / len(order)


def class_weights(y, classes):
    """Rarer classes weigh more: N / (classes * count). Of several labels each: absent / present."""
    if y.ndim == 2:
        return torch.from_numpy((1 - y).sum(0) / y.sum(0).clip(min=1))
    counts = np.bincount(y, minlength=classes)
    weights = len(y) / ((counts > 0).sum() * counts.clip(min=1))
    return torch.from_numpy(weights.astype(np.float32))


def decide(function):
    """What `function` returns in the first process, in every process: all must go the same way."""
    if WORLD == 1:
        return function()
    box = [function() if RANK == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def run_seed(seed, config, dataset, device, out, say, resume=False):
    """Train once; keep the weights best on valid; look at test once, with those.

    Best: the least MAE, or loss where classes are predicted. After every epoch all that the next
    one needs goes to `seed<k>.resume`; the order of clips and dropout depend on seed and epoch.
    """
    spec = data.SPECS[dataset.name]
    train, valid, test = (dataset.splits[s] for s in data.SPLITS)
    d_inputs, d_output = [x.shape[2] for x in train.xs], width_of(dataset)
    torch.manual_seed(seed)
    model = make_model(config, d_inputs, d_output).to(device)
    optimizer = torch.optim.Adam(model.param_groups(config["weight_decay"]), config["lr"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    chosen = "MAE" if config["task"] == "regression" else "loss"
    best, log, first, started, kept = None, [], 1, time.time(), out / f"seed{seed}.resume"
    if resume and kept.exists():
        try:
            state = torch.load(kept, weights_only=True, map_location="cpu")
            same_run(kept, state["config"], config)
            best, log, first = state["best"], state["log"], len(state["log"]) + 1
            started -= log[-1]["seconds"]
            model.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        except data.DataError:
            raise
        except Exception:
            raise data.DataError(f"{kept} is damaged: delete it to train this seed from its start"
                                 ) from None
        say(f"seed {seed}  resumed after epoch {len(log)}")
    if config["compile"]:
        compile_scan() if device.type == "cpu" else model.compile()
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

    def progress(done, total, whole):
        if RANK == 0 and sys.stdout.isatty():
            print("\r" + "synthetic | " * dataset.synthetic
                  + f"{done}/{whole} clips, loss {total.item() / done * WORLD:.4f} \r", end="",
                  flush=True)

    for epoch in range(first, config["epochs"] + 1):
        if log and over(log, best, config):
            break
        order = np.random.default_rng((seed, epoch)).permutation(len(train.y))
        torch.manual_seed((seed * 10 ** 5 + epoch) * WORLD + RANK)           # dropout
        loss = train_epoch(parallel, optimizer, train, order, config, device, progress)
        scheduler.step()
        metrics = decide(lambda: measure(predict(model, valid, config, device), valid.y, spec))
        better = best is None or metrics[chosen] < best["metric"] or np.isnan(best["metric"])
        if better:
            best = {"weights": {k: v.detach().cpu().clone() for k, v in model.state_dict().items()},
                    "epoch": epoch, "metric": metrics[chosen]}
        log.append({"epoch": epoch, "loss": loss, "valid": metrics, "synthetic": dataset.synthetic,
                    "seconds": round(time.time() - started, 2)})
        left = log[-1]["seconds"] / epoch * (config["epochs"] - epoch)
        say(f"seed {seed}  epoch {epoch:3d}/{config['epochs']}  loss {loss:.4f}  valid "
            f"{show(metrics, 3)}  {left / 60:5.1f} min left{'  *' if better else ''}")
        if RANK == 0:
            write_json(out / f"seed{seed}.jsonl", log, lines=True)
            state = {"weights": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "scheduler": scheduler.state_dict(), "best": best, "log": log,
                     "config": config}
            write_whole(kept, lambda file: torch.save(state, file))
    if diverged(log):
        say(f"seed {seed}  loss {log[-1]['loss']}, valid {best['metric']}: training has diverged"
            + (" (the paper's plain sum does; --coupling mean does not)"
               if config["coupling"] == "sum" else ", a smaller --lr may help"))

    course = [row["valid"][chosen] for row in log]
    say(f"seed {seed}  valid {chosen} by epoch  {sparkline(course)}  {course[0]:.4f} to "
        f"{course[-1]:.4f}, best {best['metric']:.4f}")
    model.load_state_dict(best["weights"])
    results = {"seed": seed, "epoch": best["epoch"]}
    for s, split in (("valid", valid), ("test", test)):
        prediction = predict(model, split, config, device)
        results[s] = measure(prediction, split.y, spec)
    say(f"seed {seed}  test at epoch {best['epoch']}: {show(results['test'])}")
    if config["drop"]:
        drop = [spec.modalities.index(name) for name in config["drop"]]
        dropped = predict(model, test, config, device, drop)
        results["test_dropped"] = measure(dropped, test.y, spec)
        say(f"seed {seed}  test without {', '.join(config['drop'])}: "
            + show(results["test_dropped"]))
    checkpoint = {**best, "config": config, "d_inputs": d_inputs, "d_output": d_output,
                  "synthetic": dataset.synthetic, "versions": {"torch": str(torch.__version__),
                                                               "numpy": np.__version__}}
    if RANK == 0:
        write_whole(out / f"seed{seed}.npz",
                    lambda file: np.savez(file, prediction=prediction, target=test.y,
                                          synthetic=dataset.synthetic))
        write_whole(out / f"seed{seed}.pt", lambda file: torch.save(checkpoint, file))
    return results


def diverged(log):
    valid = log[-1]["valid"]
    return not np.isfinite([log[-1]["loss"], valid.get("MAE", valid.get("loss"))]).all()


def over(log, best, config):
    """Whether training ends before its last epoch: it diverged, or --patience is exhausted."""
    return diverged(log) or 0 < config["patience"] <= len(log) - best["epoch"]


def sparkline(values, width=60):
    """The course of `values` as a line of bars, the lowest for the least; blank: not finite."""
    picked = np.array(values)[np.linspace(0, len(values) - 1, min(width, len(values))).round()
                              .astype(int)]
    finite = picked[np.isfinite(picked)]
    low, span = (finite.min(), np.ptp(finite) or 1) if len(finite) else (0, 1)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round(7 * (v - low) / span)] if np.isfinite(v) else " " for v in picked)


def show(metrics, most=None):
    return "  ".join(f"{k} {v:.4f}" for k, v in list(metrics.items())[-(most or 99):])


def width_of(dataset):
    """d_output: 1, or the number of classes."""
    floats = dataset.splits["train"].y.dtype == np.float32
    return 1 if floats and dataset.splits["train"].y.ndim == 1 else data.SPECS[dataset.name].classes


def run(config, dataset, out, say, resume=False):
    device = torch.device(config["device"])
    if device.type == "cuda" and WORLD > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    environment = {"device": torch.cuda.get_device_name() if device.type == "cuda" else
                   f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)",
                   "torch": str(torch.__version__), "numpy": np.__version__,
                   "python": platform.python_version(), "system": platform.system()}
    report = {"dataset": dataset.name, "synthetic": dataset.synthetic, "task": config["task"],
              "config": config, "environment": environment, "seeds": []}
    there = (out / "results.json").exists()
    done = finished(out, config, resume) if there else []
    if resume:
        report["seeds"] = done
        if not there:
            say(f"nothing to resume in {out}: from the first epoch")
    elif there and RANK == 0:                    # the same run anew: nothing of the old one stays
        for old in out.glob("seed*"):
            if re.fullmatch(r"seed\d+\.(resume|pt|npz|jsonl)", old.name):
                old.unlink()
    if RANK == 0:
        write_json(out / "results.json", report)             # now, so that --out is seen to work
    model = make_model(config, [x.shape[2] for x in dataset.splits["train"].xs], width_of(dataset))
    say("config: " + "  ".join(f"{k}={v}" for k, v in config.items()))
    for s, split in dataset.splits.items():
        shapes = "  ".join("x".join(map(str, x.shape[1:])) for x in split.xs)
        say(f"{s}: {len(split.y)} clips of {shapes}, {100 * split.mask.mean():.1f} % of steps real")
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters, device {environment['device']}"
        + f" x {WORLD} processes" * (WORLD > 1) + f", mode {config['mode']}, results in {out}")
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        if seed in [r["seed"] for r in report["seeds"]]:
            say(f"seed {seed}  was finished before")
        else:
            report["seeds"].append(run_seed(seed, config, dataset, device, out, say, resume))
        for part, suffix in (("test", ""), ("test_dropped", "_dropped")):
            tests = [r[part] for r in report["seeds"] if part in r]
            for name, statistic in (("mean", np.mean), ("std", np.std)) if tests else ():
                report[name + suffix] = {k: float(statistic([t[k] for t in tests]))
                                         for k in tests[0]}
        if RANK == 0:
            write_json(out / "results.json", report)
            (out / f"seed{seed}.resume").unlink(missing_ok=True)
    several = len(report["seeds"]) > 1
    for suffix, without in ("", ""), ("_dropped", f" without {', '.join(config['drop'] or [])}"):
        if "mean" + suffix in report:
            say(f"test{without}, mean" + " ± std" * several
                + f" of {len(report['seeds'])} seed{'s' * several}: "
                + "  ".join(f"{k} {v:.4f}" + f" ± {report['std' + suffix][k]:.4f}" * several
                            for k, v in report["mean" + suffix].items()))


def finished(out, config, resume):
    """The seeds that `out/results.json` has, after a check that it is of the same run."""
    path = out / "results.json"
    try:
        report = json.loads(path.read_text())
        theirs, seeds = dict(report["config"]), report["seeds"]
        if len({int(r["seed"]) for r in seeds}) != len(seeds):
            raise ValueError
        for r in seeds:
            for part in r.keys() - {"seed", "epoch"} | {"valid", "test"}:
                r[part] = {k: float("nan") if v is None else float(v) for k, v in r[part].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise data.DataError(f"{path} is no result of this program: give another --out") from None
    same_run(path, theirs, config if resume else config | {"seeds": theirs.get("seeds")})
    return seeds


def same_run(path, theirs, config):
    """Raise unless `config` is that of the run at `path`, up to more seeds and other workers."""
    other = [f"{k}={theirs.get(k)} (here {config[k]})" for k in sorted(config.keys() - {"workers"})
             if theirs.get(k) != config[k] and not (k == "seeds" and theirs.get(k, 0) < config[k])]
    if other:
        raise data.DataError(f"{path} is of another run, with {', '.join(other)}: give the same "
                             "options, or another --out")


# ----------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):                                # one line, without the usage
        self.exit(2, f"train.py: error: {message}; --help explains every option\n")


HELP = """Train and evaluate Coupled Mamba.

  python train.py --dataset sims                         a minute, without data on a stand-in
  python train.py --dataset mosi --data FILE             the paper's settings, 5 seeds
  python train.py --dataset sims --fusion attention      what the paper compares with
  torchrun --nproc_per_node=2 train.py --dataset sims --out runs/two    on two GPUs or CPUs

Defaults are the paper's; on the synthetic stand-in, what you do not give shrinks to a run of about
a minute. Results go to --out: results.json, and for each seed weights, predictions and a log.
"""


def parse(argv):
    p = Parser(usage="python train.py --dataset NAME [options]", description=HELP,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = p

    def option(name, kind, default, text, says=None, **more):
        more |= {} if "choices" in more else {"metavar": "PATH" if kind is Path else "N"}
        group.add_argument(name, type=kind, default=default, **more,
                           help=f"{text} (default: {default if says is None else says})")

    def flag(name, text):
        group.add_argument(name, action="store_true", help=f"{text} (default: off)")

    def at_least(kind, low, below=float("inf")):
        def number(text):
            try:
                if low <= kind(text) < below:
                    return kind(text)
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a {'whole ' * (kind is int)}number from {low} up"
                + f", below {below}" * (below < 1e99))
        return number

    count, real, share = at_least(int, 1, 10 ** 7), at_least(float, 0.0), at_least(float, 0.0, 1.0)
    names = sorted({name for spec in data.SPECS.values() for name in spec.modalities})

    group = p.add_argument_group("data")
    group.add_argument("--dataset", required=True, choices=list(data.SPECS), help="which dataset")
    option("--data", Path, None, "its file or folder", says="data/<dataset>/, else the stand-in")
    option("--out", Path, None, "folder for the results", says="runs/<dataset>-<fusion>")
    option("--task", str, None, "what to predict: a number; or classes, labels in mmimdb",
           says="regression for the sentiment sets, else classification",
           choices=["regression", "classification"])
    option("--length", count, None, "steps every stream of a sentiment set is resampled to",
           "min(50, longest stream)")
    option("--tokens", count, None, "steps every vector of brca, rosmap, mmimdb is cut into",
           data.TOKENS)
    option("--missing-rate", share, 0.0, "set this share of all input elements to zero, the mean, "
           "for training and evaluation; the same elements for every model and seed")
    option("--drop", str, None, "evaluate on test also without these: " + ", ".join(names), "none",
           nargs="+", choices=names, metavar="MODALITY")

    group = p.add_argument_group("model")
    option("--fusion", str, "coupled", "coupled: the paper's method; mamba: one Mamba for each "
           "modality, joined only by the Cat maps; average, concat: one Mamba on the streams "
           "averaged or side by side; attention: each modality attends to the others",
           choices=["coupled", "mamba", "average", "concat", "attention"])
    option("--coupling", str, "mean", "weights of the states: 1/m, softmax of learned logits, or "
           "all 1 as in Eq. 6, which diverges", choices=["mean", "learned", "sum"])
    flag("--no-mix", "leave out the Cat maps between layers")
    for name, text in (("d-model", "model width"), ("layers", "number of blocks"),
                       ("d-state", "state size n"), ("expand", "inner width / model width"),
                       ("d-conv", "width of the convolution")):
        option("--" + name, count, None, text, says=PAPER[name.replace("-", "_")])
    option("--dt-rank", count, None, "rank of the map to delta", says="d_state / 8")
    option("--dropout", share, None, "of each block's output and in the head", PAPER["dropout"])
    option("--pooling", str, "max", "over time; last: the last real step",
           choices=["max", "mean", "last"])

    group = p.add_argument_group("training")
    option("--epochs", count, None, "how often all training clips are seen", says=PAPER["epochs"])
    option("--batch-size", count, None, "clips per step and process",
           says=", ".join(f"{k} {v}" for k, v in BATCH.items()))
    option("--lr", at_least(float, 0.0, 100.0), None, "learning rate, halved every 50 epochs",
           says=PAPER["lr"])
    option("--weight-decay", real, None, "on matrices only", says=PAPER["weight_decay"])
    flag("--class-weights", "let rarer classes weigh more in the loss")
    option("--patience", at_least(int, 0), 0, "stop after so many epochs without a better valid "
           "MAE (regression) or loss (classification); 0: never")
    option("--seeds", at_least(int, 1, 10 ** 6), None, "how many runs", says=PAPER["seeds"])
    option("--seed", at_least(int, 0, 2 ** 31), 0, "the first seed; the others follow")

    group = p.add_argument_group("how it runs")
    option("--device", str, "auto", "where to run", choices=["auto", "cpu", "cuda", "mps"])
    option("--mode", str, "auto", "how the scan is computed", choices=list(MODES))
    flag("--amp", "matrix products in bfloat16; the state stays float32")
    flag("--compile", "torch.compile the model, on CPUs the scan alone (needs a C++ compiler): the "
         "first step takes long")
    option("--workers", at_least(int, 0), 0, "processes that gather batches ahead")
    flag("--resume", "go on where a run with the same options and --out was broken off")
    return p.parse_args(argv)


def pick_device(wish):
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    if wish == "auto":
        return next(name for name in have if have[name])
    if not have[wish]:
        raise data.DataError(f"--device {wish}: this machine has none, only "
                             f"{', '.join(k for k in have if have[k])}")
    return wish


def get_dataset(args, path):
    """The dataset that the options ask for, from `path`, or the stand-in where that is None."""
    name, task, spec = args["dataset"], args["task"], data.SPECS[args["dataset"]]
    if task not in spec.tasks:
        raise data.DataError(f"--task {task}: {name} has only {', '.join(spec.tasks)}")
    for option, other in (("length", "tokens"), ("tokens", "length")):
        if args[option] and (spec.layout == "mmsa") != (option == "length"):
            raise data.DataError(f"--{option} is not for {name}: use --{other}")
    if args["drop"] and not set(args["drop"]) < set(spec.modalities):
        raise data.DataError(f"--drop {' '.join(args['drop'])}: {name} has "
                             f"{', '.join(spec.modalities)}, of which one must stay")
    if args["class_weights"] and task == "regression":
        raise data.DataError("--class-weights needs --task classification")
    shape = dict(length=args["length"], task=task, tokens=args["tokens"] or data.TOKENS)
    dataset = data.load(name, path, **shape) if path else \
        data.synthetic(name, clips=tuple(map(min, spec.clips, SMALL_CLIPS)), **shape)
    data.with_missing(dataset, args["missing_rate"])
    return dataset


def fingerprint(dataset):
    crc = 0
    for split in dataset.splits.values():
        for v in (*split.xs, split.mask, split.y):
            crc = zlib.crc32(np.ascontiguousarray(v), crc)
    return f"{crc:08x}"


def main(argv=None):
    args = vars(parse(argv))
    out, path, resume = args.pop("out"), args.pop("data"), args.pop("resume")
    name = args["dataset"]
    args["task"] = args["task"] or data.SPECS[name].tasks[0]

    def say(line):
        if RANK == 0:
            print("synthetic | " * (path is None) + line, flush=True)

    try:
        args["device"] = pick_device(args["device"])
        path = path or (data.default_path(name) if data.default_path(name).exists() else None)
        given = {k: v for k, v in args.items() if v is not None}
        config = {**args, **PAPER, "batch_size": BATCH[name], **({} if path else SMALL), **given}
        dataset = get_dataset(args, path)
        steps = "length" if data.SPECS[name].layout == "mmsa" else "tokens"
        config |= {steps: dataset.splits["train"].xs[0].shape[1], "processes": WORLD,
                   "data": fingerprint(dataset)}
        if dataset.synthetic:
            clips = "/".join(str(len(split.y)) for split in dataset.splits.values())
            shrunk = " ".join(f"{k}={v}" for k, v in SMALL.items() if args.get(k) is None)
            say(f"No data at {data.default_path(name)}. {data.how_to_get(name)} Going on with a "
                "synthetic stand-in of the same shapes.")
            say(f"shrunk to be quick: {shrunk} and {clips} clips")
        out = out or Path("runs") / f"{name}-{config['fusion']}"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise data.DataError(f"--out {out} ({error.strerror}): expected a folder") from None
        if WORLD > 1:
            dist.init_process_group("nccl" if args["device"] == "cuda" else "gloo")
        run(config, dataset, out, say, resume)
    except (data.DataError, OSError) as error:
        if RANK == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if RANK == 0:
            print("\ntrain.py: interrupted; the same command with --resume goes on after the last "
                  "whole epoch", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(
                "not enough memory|can't allocate memory", str(error)):
            raise
        print("train.py: error: out of memory: try a smaller --batch-size, --d-model or --length",
              file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
