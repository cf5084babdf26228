"""The datasets: published files become arrays of one common length, standardised.

mosi, mosei, sims, simsv2: a pickle of the MMSA project, a dict of train, valid, test.
    Each has `text`, `audio`, `vision` (N, frames, width) and labels. It may count the
    real frames: `text_lengths` and so on (N,); or mark those of text: `text_bert`
    (N, 3, frames), whose middle row is the attention mask.
brca, rosmap: a MOGONET folder: three views, 1_tr.csv ... 3_te.csv, and labels_tr.csv.
mmimdb: an HDF5 file with `features`, `vgg_features` and `genres`.
own: a NumPy file (.npz) with `train/<stream>` (N, frames, width) for each stream,
    `train/y`, perhaps `train/<stream>_lengths` (N,); likewise valid and test.
    `y`: (N,) floats, (N,) classes from 0, or (N, k) of 0 and 1 for k labels.

A stream becomes `length` steps, each the mean of a segment of its real frames. Streams
with one number of frames (and, in a pickle, no lengths) share one clock: all are cut at
the same frames. Without lengths zeros at both ends are padding, but data in such `own`.
"""
import contextlib
import mmap
import pickle
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test")
MODALITIES = ("text", "audio", "vision")
OMICS = ("mrna", "methylation", "mirna")
SENTIMENT = ("regression", "classification")
VECTORS = ("mogonet", "mmimdb")  # layouts without frames
BLOCK_ELEMENTS = 1 << 22  # worked on at once: some 50 MB
SENTINEL = np.float64(1e30)  # no feature is that large
LATENT = 8  # directions that carry a stream of the stand-in


class Spec(NamedTuple):
    """What is published under a name, or was found in a file."""
    layout: str         # how it is stored: a key of FORMATS
    file: str
    modalities: tuple
    widths: tuple       # number of features per modality
    samples: tuple      # number of samples in train, valid, test
    classes: int        # number of classes, or of labels (N, k)
    scale: float = 0.0  # labels lie in [-scale, scale]; 0: not known
    tasks: tuple = ("classification",)  # of its labels, the default first


SPECS = {
    "mosi": Spec("mmsa", "unaligned_50.pkl", MODALITIES, (768, 5, 20),
                 (1284, 229, 686), classes=3, scale=3.0, tasks=SENTIMENT),
    "mosei": Spec("mmsa", "unaligned_50.pkl", MODALITIES, (768, 74, 35),
                  (16326, 1871, 4659), classes=3, scale=3.0, tasks=SENTIMENT),
    "sims": Spec("mmsa", "unaligned_39.pkl", MODALITIES, (768, 33, 709),
                 (1368, 456, 457), classes=3, scale=1.0, tasks=SENTIMENT),
    "simsv2": Spec("mmsa", "unaligned.pkl", MODALITIES, (768, 25, 177),
                   (2722, 647, 1034), classes=3, scale=1.0, tasks=SENTIMENT),
    "brca": Spec("mogonet", "labels_tr.csv", OMICS, (1000, 1000, 503),
                 (490, 122, 263), classes=5),
    "rosmap": Spec("mogonet", "labels_tr.csv", OMICS, (200, 200, 200),
                   (196, 49, 106), classes=2),
    "mmimdb": Spec("mmimdb", "multimodal_imdb.hdf5", ("text", "image"),
                   (300, 4096), (15552, 2608, 7799), classes=23),
}
FORMATS = {"mmsa": "MMSA pickle", "mogonet": "MOGONET folder",
           "mmimdb": "HDF5 file of MM-IMDB", "own": "NumPy file (.npz)"}
SOURCES = {"mmsa": "the links on https://github.com/thuiar/MMSA, section Datasets",
           "mogonet": "https://github.com/txWang/MOGONET, with all of its folder",
           "mmimdb": "the link on https://github.com/johnarevalo/gmu-mmimdb"}
STARTS = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "compressed by gzip",
          b"<": "an HTML page", b"version https://git-lfs": "a Git LFS pointer"}


class DataError(Exception):
    """The message says what was found, what was expected, and what to do."""


class Split(NamedTuple):
    xs: list            # per modality (N, length, width) float32
    mask: np.ndarray    # (m, N, length) bool, False where a step is missing
    y: np.ndarray       # (N,) float32, (N,) int64 classes, or (N, k) of 0. and 1.


class Dataset(NamedTuple):
    name: str
    synthetic: bool
    spec: Spec          # of these data: their own streams, widths and samples
    splits: dict        # "train", "valid", "test" -> Split
    preparation: dict   # plain values from which `prepare` makes model input
    notes: list         # what differs from the published set, or is not used


def load(name, path, length=None, task=None):
    """Read a `Dataset` from a file, or raise DataError. Nothing in it is executed.

    name: a key of SPECS, or "own". path: the file; for brca and rosmap the folder.
    length: steps of a sample; None: 20 for vectors, else as many as the longest stream
    has frames, but at most 50; streams of `own` that share a clock stay as they are.
    task: one of `Dataset.spec.tasks`; None: the first of them.
    """
    try:
        raw, spec, notes = _read(name, Path(path), task)
        own = spec.layout == "own"
        frames = {x.shape[1] for streams, _ in raw.values() for _, x, _ in streams}
        told = {np.ndim(n) for streams, _ in raw.values() for _, _, n in streams}
        aligned = len(frames) == 1 and (own or not told & {1, 2})  # 3 axes: a mask
        usual = max(frames) if own and aligned else min(50, max(frames))
        if spec.layout in VECTORS:
            aligned, usual = False, 20
        length = length or usual
        whole = own and aligned and frames == {length}  # streams stay as they are
        preparation = {"layout": spec.layout, "length": length, "aligned": aligned,
                       "whole": whole, "widths": list(spec.widths)}
        if own and not aligned:
            notes.append("streams of different numbers of frames are stretched to one")
        splits = {s: Split(*_to_steps(streams, preparation), y)
                  for s, (streams, y) in raw.items()}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    _fit(splits, preparation)
    return Dataset(name, False, spec, splits, preparation, notes)


def _read(name, path, task):
    """All splits as in `_take_splits`, checked; their `Spec`; notes."""
    layout = "own" if name == "own" else SPECS[name].layout
    readers = {"mmsa": _mmsa, "mogonet": _mogonet, "mmimdb": _mmimdb, "own": _own}
    if layout == "mogonet" and path.is_dir():
        path = path / "labels_tr.csv"
    if not path.is_file():
        advice = how_to_get(name) if name in SPECS else ""
        raise DataError(f"there is no {FORMATS[layout]} here. {advice}")
    with open(path, "rb") as file:
        start = file.read(100).lstrip()
    for signature, kind in STARTS.items():
        if start.startswith(signature) and (layout, kind) != ("own", "a zip archive"):
            raise DataError(f"is {kind}, expected: {FORMATS[layout]}")

    raw, spec, unused = readers[layout](path, name, task)
    notes = [f"not used: {key}" for key in unused]
    task = task or spec.tasks[0]
    if task not in spec.tasks:
        raise DataError(f"has no labels for {task}, only for {spec.tasks[0]}")
    widths = tuple(x.shape[-1] for _, x, _ in raw["train"][0])
    for s, (streams, y) in raw.items():
        y = _labels(y, spec, task, s)
        _check(streams, len(y), layout, widths)
        raw[s] = streams, y
    samples = tuple(len(y) for _, y in raw.values())

    largest = max(np.abs(y).max() for _, y in raw.values())
    if task == "regression" and largest < spec.scale / 2:
        notes.append(f"labels: at most {largest:.3g} in size, published {spec.scale:g}")
    for m, width, usual in zip(spec.modalities, widths, spec.widths):
        if width != usual:
            notes.append(f"{m}: {width} features, published {usual}")
    if spec.samples not in (samples, ()):
        notes.append(f"{samples} samples, published {spec.samples}")
    return raw, spec._replace(widths=widths, samples=samples), notes


def default_path(name):
    """Where the dataset is looked for if no path is given."""
    return Path("data") / name / SPECS[name].file


def how_to_get(name):
    """Where to download the dataset and where to put it, as a sentence."""
    spec = SPECS[name]
    return (f"Get {spec.file} from {SOURCES[spec.layout]}, and put it into "
            f"{default_path(name).parent}, or name it with --data.")


# ---------------------------------------- checks
@contextlib.contextmanager
def _reading(what):
    """Around code that only reads: damaged bytes can raise nearly anything."""
    try:
        yield
    except (DataError, MemoryError, ImportError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:140]
        raise DataError(f"is not a complete {what} ({reason}): get it anew") from None


def _take(tables, key):
    """Take an array of numbers out of the tables; lengths may be missing."""
    if key not in tables and key.endswith("_lengths"):
        return None
    if key not in tables:
        raise DataError(f"has no {key}; others: {', '.join(tables)[:80] or 'none'}")
    table = tables.pop(key)
    with _reading(f"array {key}"):
        if not isinstance(table, np.ndarray):
            table = _array(table, key)
    if table.dtype.kind not in "biuf" or table.ndim == 0:
        raise DataError(f"{key} is {table.dtype} of shape {table.shape}, not numbers")
    return table


def _take_splits(tables, modalities, labels):
    """Split -> a list of (name, stream, its lengths or None), and the labels."""
    raw = {}
    for s in SPLITS:
        streams = []
        for name in [f"{s}/{m}" for m in modalities]:
            x = _take(tables, name)
            streams.append((name, x, _take(tables, f"{name}_lengths")))
        raw[s] = streams, _take(tables, f"{s}/{labels}")
    return raw


def _labels(y, spec, task, s):
    """Labels as in `Split.y`: numbers, classes, or several labels of 0 and 1."""
    if y.shape[1:] == (1,) and spec.layout in ("mmsa", "mogonet"):
        y = y[:, 0]
    columns, dtype = (), np.float32
    if task == "regression":
        limit = 1.001 * spec.scale or SENTINEL
        right = np.abs(y) <= limit
        expected = f"a number of at most {limit:.3g} in size"
    elif spec.layout == "mmimdb" or (spec.layout == "own" and y.ndim == 2):
        columns = (spec.classes,)
        right = np.isin(y, (0, 1))
        expected = f"{spec.classes} columns of 0 and 1"
    else:
        dtype = np.int64
        right = (y >= 0) & (y < spec.classes) & (np.floor(y) == y)
        expected = f"a class from 0 to {spec.classes - 1}"
    if y.shape[1:] != columns or not right.all():
        raise DataError(f"the labels of {s} have shape {y.shape} and values like "
                        f"{np.unique(y[~right])[:5]}, expected {expected} per sample")
    return y.astype(dtype)


def _check(streams, samples, layout, widths, frames=()):
    """Refuse streams that do not fit the labels, the widths, or each other."""
    axes = 2 if layout in VECTORS else 3
    for (name, x, _), width in zip(streams, widths):
        fits = x.shape == (samples, *(frames or x.shape[1:-1]), width)
        if not fits or x.ndim != axes or 0 in x.shape:
            shape = (samples, *(frames or ["frames"][:axes - 2]), width)
            raise DataError(f"{name} has shape {x.shape}, expected {samples} samples, "
                            f"none of them empty, like {shape}")


# ---------------------------------------- a pickle, read but not run
class _Stub:
    """Stands for an object that the file asks for, and only notes how."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class _MappedFile(mmap.mmap):
    """A file in a memory map: long reads are views, big arrays stay on disk."""

    def read(self, size):
        start = self.tell()
        self.seek(start + size)  # an error where the file ends before
        if size > 4096:
            return memoryview(self)[start:start + size]
        return self[start:start + size]


class _Reader(pickle._Unpickler):
    """Python's unpickler, in its pure-Python form, made harmless.

    It makes plain containers, and stubs for NumPy's classes, which a file could give
    forged pointers. Tuples become lists, which cannot be keys of a dict: the hash of a
    deeply nested tuple would exhaust the stack.
    """
    STUBS = {name: type(name, (_Stub,), {}) for name in (
        "dtype", "ndarray", "_reconstruct", "scalar", "_frombuffer", "encode")}

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.STUBS:
            raise DataError(f"asks for {module}.{name}, which no dataset needs: it may "
                            "be hostile, and nothing in it was run")
        return self.STUBS[name]

    def join(self, count):
        self.stack[-count:] = [self.stack[-count:]]

    dispatch = dict(pickle._Unpickler.dispatch)  # opcode -> the method that obeys it
    dispatch[pickle.EMPTY_TUPLE[0]] = pickle._Unpickler.load_empty_list
    dispatch[pickle.TUPLE1[0]] = lambda self: self.join(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self.join(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self.join(3)
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8  # a view will do


def _array(value, name):
    """The array that stubs or a flat list describe; a view of the file."""
    kind = type(value).__name__
    if kind == "list":
        numbers = [_array(v, name)[()] if isinstance(v, _Stub) else v for v in value]
        if not all(isinstance(v, (int, float, np.number)) for v in numbers):
            raise DataError(f"{name} is ragged or not numeric, expected numbers")
        return np.array(numbers, np.float64)
    shape, order = (), "C"
    if kind == "scalar":
        dtype, content = value.arguments
    elif kind == "_frombuffer":
        content, dtype, shape, order, *axes = value.arguments
    elif kind == "_reconstruct":
        _, shape, dtype, fortran, content = value.state
        order = "F" if fortran else "C"
    else:
        raise DataError(f"{name} is a {kind}, expected an array")

    code, byte_order = dtype.arguments[0], dtype.state[1]
    dtype = np.dtype(code).newbyteorder(byte_order)
    if dtype.kind not in "biuf":
        raise DataError(f"{name} is of type {code}, expected numbers")
    if isinstance(content, _Stub):  # protocols 0 to 2 write bytes as encode(text)
        content = content.arguments[0].encode("latin1")
    array = np.frombuffer(content, dtype)
    if order == "K":  # stored with its axes in another order
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


# ---------------------------------------- the four formats
def _mmsa(path, name, task):
    with _reading("MMSA pickle, expected a dict of splits"), open(path, "rb") as file:
        mapped = _MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = _Reader(mapped).load()
        tables = {f"{s}/{key}": x for s in SPLITS for key, x in content[s].items()}

    task = task or "regression"
    has_classes = any(key.endswith("/classification_labels") for key in tables)
    for s in SPLITS:
        if f"{s}/text_bert" in tables:
            tables[f"{s}/text_lengths"] = tables.pop(f"{s}/text_bert")
        if task == "classification" and not has_classes:
            y = _take(tables, f"{s}/regression_labels")
            tables[f"{s}/classification_labels"] = np.sign(y) + 1
    raw = _take_splits(tables, MODALITIES, f"{task}_labels")

    unused = [key for key in content if key not in (*SPLITS, "config")]
    for key in list(tables):
        with contextlib.suppress(DataError):  # what is no array is no stream
            if _take(tables, key).ndim == 3:
                unused.append(key)
    return raw, SPECS[name], unused


def _mogonet(path, name, task):
    files = {}
    for file in sorted(path.parent.glob("*_t[re].csv")):
        with _reading(f"table {file.name}"), warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty file is only a warning
            x = np.loadtxt(file, delimiter=",", ndmin=2, encoding="utf-8-sig")
        index = len(x) > 2 and x.shape[1] > 1 and (np.diff(x[:, 0]) == 1).all()
        if index or not np.isfinite(x).all():
            raise DataError(f"{file.name} has NaN or infinite values, or its first "
                            "column is an index, which counts the rows: remove them")
        files[file.name] = x

    tables = {}
    valid = _stratified(_take(dict(files), "labels_tr.csv")[:, 0])
    for key, m in (*zip("123", OMICS), ("labels", "y")):
        train = _take(files, f"{key}_tr.csv")
        tables[f"test/{m}"] = _take(files, f"{key}_te.csv")
        with _reading(FORMATS["mogonet"]):  # where the numbers of rows differ
            tables[f"train/{m}"] = train[~valid]
            tables[f"valid/{m}"] = train[valid]
    return _take_splits(tables, OMICS, "y"), SPECS[name], files


def _stratified(y):
    """(N,) bool: a random fifth of each class, always the same."""
    rng = np.random.default_rng(0)
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        chosen[rows[:round(0.2 * len(rows))]] = True
    return chosen


def _mmimdb(path, name, task):
    import h5py  # only this dataset needs it
    spec = SPECS[name]
    tables = {}
    with _reading(FORMATS["mmimdb"]), h5py.File(path, "r") as file:
        for key in ("features", "vgg_features", "genres"):
            x = file[key][()]
            if len(x) != sum(spec.samples):
                raise DataError(f"{key} has {len(x)} rows, not {sum(spec.samples)}")
            for s, part in zip(SPLITS, np.split(x, np.cumsum(spec.samples)[:-1])):
                tables[f"{s}/{key}"] = part
    return _take_splits(tables, ("features", "vgg_features"), "genres"), spec, []


def _own(path, name, task):
    """The spec is made from the file; `_read` adds widths and samples."""
    with _reading(FORMATS["own"]), open(path, "rb") as opened:
        file = np.load(opened, allow_pickle=False)
        tables = {key: file[key] for key in file.files}
    names = [key[6:] for key in tables if key.startswith("train/")]
    names = tuple(m for m in names if m != "y" and not m.endswith("_lengths"))
    if not names:
        raise DataError(f"has no train/<stream>, only {', '.join(tables)[:80]}")
    raw = _take_splits(tables, names, "y")

    y = raw["train"][1]
    task, classes = "classification", y.shape[-1]  # of (N, k) labels
    if y.ndim == 1 and y.dtype.kind == "f":
        task, classes = "regression", 0
    elif y.ndim == 1:
        largest = [np.nan_to_num(y).max(initial=1) for _, y in raw.values()]
        classes = 1 + int(min(max(largest), len(y)))  # an id is no class
    spec = Spec("own", path.name, names, (), (), classes, tasks=(task,))
    return raw, spec, tables


# ---------------------------------------- from arrays to model input
def prepare(streams, preparation, lengths=None):
    """Turn raw arrays of new samples into model input: xs and mask as in `Split`.

    streams: an array for each of `Dataset.spec.modalities` in turn, (N, frames, width)
    or (N, width). preparation: that of the training data. lengths: None, or for each
    stream None, its numbers of real frames (N,), or a mask like `text_bert`.
    """
    widths = preparation["widths"]
    lengths = [None] * len(streams) if lengths is None else lengths
    if not len(streams) == len(lengths) == len(widths):
        raise DataError(f"got {len(streams)} streams and {len(lengths)} lengths, "
                        f"expected {len(widths)} of each")
    raw = [(f"stream {i}", np.atleast_1d(x), told)
           for i, (x, told) in enumerate(zip(streams, lengths))]
    frames = raw[0][1].shape[1:2] if preparation["aligned"] else ()
    if preparation["whole"]:
        frames = (preparation["length"],)
    _check(raw, len(raw[0][1]), preparation["layout"], widths, frames)
    xs, mask = _to_steps(raw, preparation)
    _standardise(xs, mask, preparation)
    return xs, mask


def _to_steps(streams, preparation):
    """xs and mask as in `Split`, not yet standardised."""
    layout, length = preparation["layout"], preparation["length"]
    xs, masks = [], []
    if layout in VECTORS:
        for _, x, _ in streams:
            width = -(-x.shape[1] // length)
            x = np.pad(_finite(x), ((0, 0), (0, length * width - x.shape[1])))
            xs.append(x.reshape(len(x), length, width).astype(np.float32))
        return xs, np.ones((len(xs), len(x), length), bool)

    zeros_too = layout == "own" and preparation["aligned"]
    real = [_real_frames(*stream, zeros_too) for stream in streams]
    clocks = real
    if preparation["aligned"]:
        clocks = [np.logical_or.reduce(real) | preparation["whole"]] * len(real)

    for (_, x, told), clock, inside in zip(streams, clocks, real):
        if told is None:  # frames of zeros between others are real
            inside = inside | inside.any(1, keepdims=True)
        x, mask = _resample(x, clock, inside, length)
        xs.append(x)
        masks.append(mask)
    return xs, np.stack(masks)


def _finite(x):
    """0 replaces NaN, infinite values, and those that stand for them."""
    return np.where(np.abs(x) < SENTINEL, x, 0)


def _real_frames(name, x, lengths, zeros_too):
    """(N, frames) bool: which frames are real, of lengths as in `prepare`."""
    samples, frames, _ = x.shape
    shape = np.shape(lengths)
    if shape == (samples, 3, frames):
        return lengths[:, 1] != 0
    if shape == (samples, frames, 3):
        return lengths[:, :, 1] != 0
    nonzero = np.array([_finite(sample).any(1) for sample in x])
    if lengths is None:
        return nonzero | zeros_too

    lengths = np.asarray(lengths)
    if lengths.size == samples and (lengths >= 0).all() and (lengths % 1 == 0).all():
        at_start = np.arange(frames) < lengths.reshape(-1, 1)
        at_end = np.arange(frames, 0, -1) <= lengths.reshape(-1, 1)
        for real in (at_start, at_end):
            if not (nonzero & ~real).any():
                return real
    raise DataError(f"the lengths of {name} are {lengths.ravel()[:5]} ..., expected "
                    f"{samples} whole numbers from 0 or an attention mask "
                    f"{samples, 3, frames}; or it is not zero outside the frames")


def _resample(x, clock, real, length):
    """Segment means (N, length, width), and in which segments are real frames.

    x: (N, frames, width). clock: (N, frames) bool. The r frames from its first to its
    last True are cut, segment j begins at floor(j r / length) and has one frame at
    least. real: (N, frames) bool, the frames of which the means are taken.
    """
    x = np.ascontiguousarray(x)  # samples are taken one by one
    out = np.zeros((len(x), length, x.shape[2]), np.float32)
    counts = np.zeros((len(x), length), int)
    for i in np.flatnonzero(clock.any(1)):
        first, last = np.flatnonzero(clock[i])[[0, -1]]
        inside = real[i, first:last + 1]
        frames = np.where(inside[:, None], _finite(x[i, first:last + 1]), 0)
        begins = np.arange(length) * len(frames) // length
        counts[i] = np.add.reduceat(inside, begins, dtype=int)
        sums = np.add.reduceat(frames.astype(np.float64), begins)
        out[i] = sums / np.maximum(counts[i], 1)[:, None]
    return out, counts > 0


def _fit(splits, preparation):
    """Standardise by the statistics of train, and put them into `preparation`."""
    axes = 0 if preparation["layout"] in VECTORS else (0, 1)
    preparation |= {"mean": [], "deviation": []}
    for x, real in zip(splits["train"].xs, splits["train"].mask):
        count = np.maximum(real.sum(axes), 1)[..., None]
        rows = np.flatnonzero(real.any(1))
        blocks = np.array_split(rows, 1 + x[0].size * len(rows) // BLOCK_ELEMENTS)
        mean = sum(x[block].sum(axes, dtype=np.float64) for block in blocks) / count
        variance = sum(((x[block] - mean) ** 2 * real[block][..., None]).sum(axes)
                       for block in blocks) / count
        deviation = np.sqrt(variance)
        deviation[deviation < 1e-6] = 1.0  # a constant feature becomes 0
        preparation["mean"].append(mean.tolist())
        preparation["deviation"].append(deviation.tolist())
    for split in splits.values():
        _standardise(split.xs, split.mask, preparation)


def _standardise(xs, mask, preparation):  # in place
    for i, x in enumerate(xs):
        x -= np.array(preparation["mean"][i], np.float32)
        x /= np.array(preparation["deviation"][i], np.float32)
        x *= mask[i][..., None]


def with_missing(dataset, rate, seed=0):
    """In place, set each element to 0 with probability `rate` (Table 12)."""
    rng = np.random.default_rng(seed)
    for split in dataset.splits.values():
        for x in split.xs:
            for row in x:  # row by row: less memory
                row[rng.random(row.shape, dtype=np.float32) < rate] = 0


# ---------------------------------------- the stand-in
def synthetic(name, length=None, samples=None, seed=0, task=None):
    """Made-up data of the shapes of `name`, to be solved only by binding two streams.

    The second modality shows pairs of opposite signs, 1 and -1, in random order. A few
    frames after some of them the first replies with a sign of its own, a fair coin, and
    the third shows that it does. The label is the mean product of a sign and its reply,
    times `Spec.scale`, or the number of positive products; label j of mmimdb is 1 if
    product j modulo 3 is positive.

    length: steps of a sample; None: 20 for vectors, else 50. samples: how many in
    train, valid and test; None: as many as are published.
    """
    samples = tuple(samples or SPECS[name].samples)
    spec = SPECS[name]._replace(samples=samples)
    widths = list(spec.widths)
    if spec.layout in VECTORS:
        length = length or 20
        widths = [-(-width // length) for width in widths]
    length = length or 50

    rng = np.random.default_rng(seed)
    patterns = [rng.choice([-1.0, 1.0], LATENT) for _ in widths]
    matrices = [rng.standard_normal((LATENT, width)) for width in widths]
    splits = {}
    for s, count in zip(SPLITS, samples):
        shown, y = _events(rng, count, length, spec, task or spec.tasks[0])
        xs = []
        for strength, pattern, matrix in zip(shown, patterns, matrices):
            noise = 0.25 * rng.standard_normal((count, length, LATENT))
            latent = strength[..., None] * pattern + noise
            xs.append(latent.astype(np.float32) @ matrix.astype(np.float32))
            for row in xs[-1]:  # row by row: less memory
                row += 0.05 * rng.standard_normal(row.shape, np.float32)
        splits[s] = Split(xs, np.ones((len(xs), count, length), bool), y)
    preparation = dict(layout="own", length=length, aligned=True, whole=True,
                       widths=widths)
    _fit(splits, preparation)
    return Dataset(name, True, spec, splits, preparation, [])


def _events(rng, count, length, spec, task):
    """What each modality shows (count, length), and the labels as in `Split.y`."""
    pairs, replies = 2, 3
    if task == "classification" and spec.layout != "mmimdb":
        pairs = replies = spec.classes - 1  # one reply to each pair
    slot = length / (2 * pairs)  # each sign has its own slot
    duration = max(1, int(slot / 4))
    delays = max(1, min(2, int(slot) - 2 * duration + 1))
    begins = max(1, int(slot) - 2 * duration - delays + 1)

    sign = rng.choice([-1.0, 1.0], (count, pairs))
    order = rng.permuted(np.tile(np.arange(2 * pairs), (count, 1)), axis=1)
    sign = np.take_along_axis(np.concatenate([sign, -sign], 1), order, 1)
    begin = rng.integers(0, begins, order.shape)
    begin += (slot * np.arange(2 * pairs)).astype(int)
    answered = order < replies  # (count, 2 pairs)
    reply = np.zeros(order.shape)
    reply[answered] = rng.choice([-1.0, 1.0], count * replies)
    later = begin + duration
    later[answered] += rng.integers(0, delays, count * replies)

    shown = []
    for values, start in ((reply, later), (sign, begin), (np.abs(reply), later)):
        start = np.minimum(start, length - duration)[..., None]
        now = (start <= np.arange(length)) & (np.arange(length) < start + duration)
        shown.append((values[..., None] * now).sum(1))
    products = (sign * reply)[answered].reshape(count, replies)
    if task == "regression":
        return shown, (spec.scale * products.mean(1)).astype(np.float32)
    if spec.layout == "mmimdb":
        chosen = products[:, np.arange(spec.classes) % replies]
        return shown, (chosen > 0).astype(np.float32)
    return shown, (products > 0).sum(1)
