"""Train and evaluate Coupled Mamba:  python train.py --dataset sims

Without a data file the run goes on with a synthetic stand-in and says so on every line. Results go
to --out: `results.json`, and for each seed the best weights (`seed0.pt`), the test predictions
(`seed0.npz`) and a line per epoch (`seed0.jsonl`).
"""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
from coupled_mamba import MODES, CoupledMamba

# What the paper (or the authors' script) uses. d_model, layers ... are the model's own defaults.
PAPER = dict(d_model=128, layers=3, d_state=64, dt_rank=None, expand=2, d_conv=4, dropout=0.0,
             epochs=150, lr=5e-4, weight_decay=5e-4, seeds=5)
BATCH = {"mosi": 128, "mosei": 1024, "sims": 128, "simsv2": 256}     # mosi: ours, not the paper's
# On the stand-in, what is not given shrinks to this: about a minute on 2 CPU cores.
SMALL = dict(d_model=32, layers=2, d_state=16, epochs=15, lr=3e-3, seeds=1, batch_size=32)
SMALL_CLIPS = (1368, 456, 457)


# ----------------------------------------------------------------------------- metrics
def accuracy_f1(true, pred):
    """Accuracy, and F1 averaged over the classes with their true counts as weights."""
    f1 = 0.0
    for c in np.unique(true):
        hits = np.sum((true == c) & (pred == c))
        f1 += np.sum(true == c) * 2 * hits / (np.sum(true == c) + np.sum(pred == c))
    return float(np.mean(true == pred)), float(f1 / len(true))


def regression_metrics(pred, true, scale):
    """The metrics of MMSA for labels in [-scale, scale]: 3 for mosi, mosei; 1 for sims, simsv2."""
    pred, true = pred.astype(np.float64), true.astype(np.float64)
    metrics = {}
    if scale == 3:
        some = true != 0
        metrics["Acc-2"], metrics["F1"] = accuracy_f1(true[some] > 0, pred[some] > 0) \
            if some.any() else (float("nan"),) * 2
        metrics["Acc-2 with 0"], metrics["F1 with 0"] = accuracy_f1(true >= 0, pred >= 0)
        for classes, limit in ((3, 1), (5, 2), (7, 3)):
            same = np.round(true.clip(-limit, limit)) == np.round(pred.clip(-limit, limit))
            metrics[f"Acc-{classes}"] = float(np.mean(same))
    else:
        pred, true = pred.clip(-1, 1), true.clip(-1, 1)
        metrics["Acc-2"], metrics["F1"] = accuracy_f1(true > 0, pred > 0)
        for classes, cuts in ((3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            # a value on a cut belongs to the class below it
            same = np.searchsorted(cuts, true) == np.searchsorted(cuts, pred)
            metrics[f"Acc-{classes}"] = float(np.mean(same))
    metrics["MAE"] = float(np.mean(np.abs(pred - true)))
    constant = np.ptp(pred) == 0 or np.ptp(true) == 0
    metrics["Corr"] = float("nan") if constant else float(np.corrcoef(pred, true)[0, 1])
    return metrics


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
        if isinstance(v, dict):
            return {k: finite(u) for k, u in v.items()}
        return None if isinstance(v, float) and not np.isfinite(v) else v    # NaN is not JSON
    text = "".join(json.dumps(finite(row)) + "\n" for row in rows) if lines else \
        json.dumps(finite(rows), indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


# ----------------------------------------------------------------------------- training
def make_model(config, d_inputs):
    return CoupledMamba(
        d_inputs, d_model=config["d_model"], n_layers=config["layers"], d_state=config["d_state"],
        expand=config["expand"], d_conv=config["d_conv"], dt_rank=config["dt_rank"],
        coupling="none" if config["fusion"] == "mamba" else config["coupling"],
        mix=not config["no_mix"], pooling=config["pooling"], dropout=config["dropout"],
        mode=config["mode"])


def batch_of(split, rows, device):
    """xs, mask (None where every step is real) and y of the clips `rows`, on the device."""
    xs = [torch.from_numpy(x[rows]).to(device) for x in split.xs]
    mask = None if split.mask.all() else torch.from_numpy(split.mask[:, rows]).to(device)
    return xs, mask, torch.from_numpy(split.y[rows]).to(device)


@torch.no_grad()
def predict(model, split, batch_size, device):
    model.eval()
    parts = []
    for i in range(0, len(split.y), batch_size):
        xs, mask, _ = batch_of(split, np.arange(i, min(i + batch_size, len(split.y))), device)
        parts.append(model(xs, mask)[:, 0].float().cpu().numpy())
    return np.concatenate(parts)


def train_epoch(model, optimizer, split, order, batch_size, device, progress):
    model.train()
    total = 0.0
    for i in range(0, len(order), batch_size):
        xs, mask, y = batch_of(split, order[i:i + batch_size], device)
        loss = torch.nn.functional.l1_loss(model(xs, mask)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
        progress(min(i + batch_size, len(order)), total / min(i + batch_size, len(order)))
    return total / len(order)


def run_seed(seed, config, dataset, device, out, say):
    """Train once; keep the weights with the best MAE on valid; look at test once, with those."""
    torch.manual_seed(seed)
    order, scale = np.random.default_rng(seed), data.SPECS[dataset.name].scale
    train, valid, test = (dataset.splits[s] for s in data.SPLITS)
    model = make_model(config, [x.shape[2] for x in train.xs]).to(device)
    optimizer = torch.optim.Adam(model.param_groups(config["weight_decay"]), config["lr"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    best, log, started = None, [], time.time()

    def progress(done, loss):
        if sys.stdout.isatty():
            print(f"\r  {done}/{len(train.y)} clips, loss {loss:.4f} \r", end="", flush=True)

    for epoch in range(1, config["epochs"] + 1):
        loss = train_epoch(model, optimizer, train, order.permutation(len(train.y)),
                           config["batch_size"], device, progress)
        scheduler.step()
        prediction = predict(model, valid, config["batch_size"], device)
        metrics = regression_metrics(prediction, valid.y, scale)
        log.append({"epoch": epoch, "loss": loss, "valid": metrics, "synthetic": dataset.synthetic,
                    "seconds": round(time.time() - started, 2)})
        write_json(out / f"seed{seed}.jsonl", log, lines=True)
        better = best is None or metrics["MAE"] < best["metric"]
        if better:
            best = {"weights": {k: v.detach().cpu().clone() for k, v in model.state_dict().items()},
                    "epoch": epoch, "metric": metrics["MAE"]}
        left = (time.time() - started) / epoch * (config["epochs"] - epoch)
        say(f"seed {seed}  epoch {epoch:3d}/{config['epochs']}  loss {loss:.4f}  valid "
            f"MAE {metrics['MAE']:.4f}  Corr {metrics['Corr']:6.3f}  {left / 60:5.1f} min left"
            f"{'  *' if better else ''}")
        if not np.isfinite(loss):
            say(f"seed {seed}  the loss is {loss}: training has diverged"
                + (" (the paper's plain sum does; --coupling mean does not)"
                   if config["coupling"] == "sum" else ", a smaller --lr may help"))
            break
        if config["patience"] and epoch - best["epoch"] >= config["patience"]:
            break

    model.load_state_dict(best["weights"])
    results = {"seed": seed, "epoch": best["epoch"]}
    for s, split in (("valid", valid), ("test", test)):
        prediction = predict(model, split, config["batch_size"], device)
        results[s] = regression_metrics(prediction, split.y, scale)
    write_whole(out / f"seed{seed}.npz",
                lambda file: np.savez(file, prediction=prediction, target=test.y))
    checkpoint = {**best, "config": config, "d_inputs": [x.shape[2] for x in train.xs],
                  "synthetic": dataset.synthetic, "versions": {"torch": str(torch.__version__),
                                                               "numpy": np.__version__}}
    write_whole(out / f"seed{seed}.pt", lambda file: torch.save(checkpoint, file))
    say(f"seed {seed}  test at epoch {best['epoch']}: {show(results['test'])}")
    return results


def show(metrics):
    return "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())


def run(config, dataset, out, say):
    device = torch.device(config["device"])
    model = make_model(config, [x.shape[2] for x in dataset.splits["train"].xs])
    environment = {"device": torch.cuda.get_device_name() if device.type == "cuda" else
                   f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)",
                   "torch": str(torch.__version__), "numpy": np.__version__,
                   "python": platform.python_version(), "system": platform.system()}
    say("config: " + "  ".join(f"{k}={v}" for k, v in config.items()))
    for s, split in dataset.splits.items():
        shapes = "  ".join("x".join(map(str, x.shape[1:])) for x in split.xs)
        say(f"{s}: {len(split.y)} clips of {shapes}, {100 * split.mask.mean():.1f} % of steps real")
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters, device {environment['device']}, mode {config['mode']}, "
        f"results in {out}")
    report = {"dataset": dataset.name, "synthetic": dataset.synthetic, "task": config["task"],
              "config": config, "environment": environment, "seeds": []}
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        report["seeds"].append(run_seed(seed, config, dataset, device, out, say))
        tests = [r["test"] for r in report["seeds"]]
        report["mean"] = {k: float(np.mean([t[k] for t in tests])) for k in tests[0]}
        report["std"] = {k: float(np.std([t[k] for t in tests])) for k in tests[0]}
        write_json(out / "results.json", report)
    say("test, mean ± std of " + (f"{len(tests)} seeds: " if len(tests) > 1 else "1 seed: ")
        + "  ".join(f"{k} {v:.4f} ± {report['std'][k]:.4f}" for k, v in report["mean"].items()))


# ----------------------------------------------------------------------------- command line
def parse(argv):
    p = argparse.ArgumentParser(
        description="Train and evaluate Coupled Mamba. Defaults are the paper's; on the synthetic "
                    "stand-in, what you do not give shrinks to a run of about a minute.")

    def option(name, kind, default, text, says=None, **more):
        p.add_argument(name, type=kind, default=default, **more,
                       help=f"{text} (default: {default if says is None else says})")

    def at_least(kind, low, below=float("inf")):
        def number(text):
            value = kind(text)
            if not low <= value < below:
                raise ValueError
            return value
        number.__name__ = f"{kind.__name__} >= {low}" + (f" and < {below}" if below < 1e99 else "")
        return number

    count, real = at_least(int, 1), at_least(float, 0.0)
    p.add_argument("--dataset", required=True, choices=list(data.SPECS), help="which dataset")
    option("--data", Path, None, "its file or folder", says="data/<dataset>/, else the stand-in")
    option("--out", Path, None, "folder for the results", says="runs/<dataset>-<fusion>")
    option("--task", str, "regression", "what to predict", choices=["regression"])
    option("--fusion", str, "coupled", "coupled: the paper's method; mamba: one independent Mamba "
           "per modality", choices=["coupled", "mamba"])
    option("--coupling", str, "mean", "weights of the states: 1/m, softmax of learned logits, or "
           "all 1 as in Eq. 6, which diverges", choices=["mean", "learned", "sum"])
    p.add_argument("--no-mix", action="store_true", help="leave out the Cat maps between layers")
    for name, text in (("d-model", "model width"), ("layers", "number of blocks"),
                       ("d-state", "state size n"), ("expand", "inner width / model width"),
                       ("d-conv", "width of the convolution")):
        option("--" + name, count, None, text, says=PAPER[name.replace("-", "_")])
    option("--dt-rank", count, None, "rank of the map to delta", says="d_state / 8")
    option("--dropout", at_least(float, 0.0, 1.0), None, "dropout", says=PAPER["dropout"])
    option("--pooling", str, "max", "over time", choices=["max", "mean", "last"])
    option("--length", count, None, "steps every stream is resampled to", "min(50, longest stream)")
    option("--epochs", count, None, "epochs", says=PAPER["epochs"])
    option("--batch-size", count, None, "clips per step",
           says=", ".join(f"{k} {v}" for k, v in BATCH.items()))
    option("--lr", at_least(float, 0.0, 100.0), None, "learning rate, halved every 50 epochs",
           says=PAPER["lr"])
    option("--weight-decay", real, None, "on matrices only", says=PAPER["weight_decay"])
    option("--patience", at_least(int, 0), 0, "stop after so many epochs without a better valid "
           "MAE; 0: never")
    option("--seeds", at_least(int, 1, 10 ** 6), None, "how many runs", says=PAPER["seeds"])
    option("--seed", at_least(int, 0, 2 ** 31), 0, "the first seed; the others follow")
    option("--device", str, "auto", "where to run", choices=["auto", "cpu", "cuda", "mps"])
    option("--mode", str, "auto", "how the scan is computed", choices=list(MODES))
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


def main(argv=None):
    args = vars(parse(argv))
    out, path = args.pop("out"), args.pop("data")
    name = args["dataset"]
    try:
        args["device"] = pick_device(args["device"])
        path = path or (data.default_path(name) if data.default_path(name).exists() else None)
        given = {k: v for k, v in args.items() if v is not None}
        config = {**args, **PAPER, "batch_size": BATCH[name], **({} if path else SMALL), **given}
        if path:
            dataset = data.load(name, path, config["length"])
        else:
            print(f"synthetic | {data.how_to_get(name)} Going on with a synthetic stand-in of the "
                  "same shapes.")
            clips = tuple(map(min, data.SPECS[name].clips, SMALL_CLIPS))
            dataset = data.synthetic(name, config["length"], clips)
        out = out or Path("runs") / f"{name}-{config['fusion']}"
        out.mkdir(parents=True, exist_ok=True)

        def say(line):
            print(("synthetic | " if dataset.synthetic else "") + line, flush=True)

        if dataset.synthetic:
            shrunk = [f"{k}={v}" for k, v in SMALL.items() if args.get(k) is None]
            say(f"shrunk to be quick: {' '.join(shrunk)} and {'/'.join(map(str, clips))} clips")
        run(config, dataset, out, say)
    except (data.DataError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; what was finished is in the output folder", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print("train.py: error: out of memory: try a smaller --batch-size, --d-model or --length",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
