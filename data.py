"""The datasets: published files become arrays of one common length, standardised.

mosi, mosei, sims, simsv2: a pickle of the MMSA project. A dict of the splits train,
    valid, test; in each `text`, `audio`, `vision` (N, frames, width), and labels. It
    may tell which frames are real: by `text_lengths`, `audio_lengths`, `vision_lengths`
    (N,), and by the middle row of `text_bert` (N, 3, frames), the attention mask.
brca, rosmap: a MOGONET folder of tables, 1_tr.csv, 1_te.csv, 2_tr.csv, labels_te.csv
    and so on: three views of each patient, a row per patient, no header. A fifth of the
    training rows of each class becomes the validation split.
mmimdb: an HDF5 file with `features`, `vgg_features` and `genres`.
own: a NumPy file (.npz) of your own arrays: `train/<stream>` (N, frames, width) for
    each stream, `train/y`, perhaps `train/<stream>_lengths` (N,); likewise `valid/...`
    and `test/...`. `y` is (N,) floats for regression, (N,) integers from 0 for classes,
    or (N, k) of 0 and 1 for k labels.

Streams are resampled to `length` steps, each the mean of a segment of the real frames.
Where a file does not say which frames are real, zeros at both ends are padding. Streams
share one clock if all have one number of frames (and, in a pickle, no lengths): they
are then cut at the same frames, and step j is the same moment in each. Vectors are cut
into steps of equal width. Missing numbers become 0, and each feature gets mean 0 and
deviation 1 over the real steps of the training split.
"""
import contextlib
import mmap
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test")
MODALITIES = ("text", "audio", "vision")
OMICS = ("mrna", "methylation", "mirna")
SENTIMENT = ("regression", "classification")
VECTORS = ("mogonet", "mmimdb")     # layouts whose samples are vectors
VECTOR_STEPS = 20
BLOCK_ELEMENTS = 1 << 22            # worked on at once: some 50 MB with the copies
SENTINEL = np.float64(1e30)         # no feature is that large


class Spec(NamedTuple):
    """What is published under a name, or was found in a file."""
    layout: str         # how it is stored: a key of FORMATS
    file: str
    modalities: tuple
    widths: tuple       # number of features per modality
    samples: tuple      # number of samples in train, valid, test
    classes: int        # number of classes, or of labels that hold at the same time
    scale: float = 0.0  # regression labels lie in [-scale, scale]; 0: not known
    tasks: tuple = ("classification",)      # what it has labels for, the default first


SPECS = {
    "mosi": Spec("mmsa", "unaligned_50.pkl", MODALITIES, widths=(768, 5, 20),
                 samples=(1284, 229, 686), classes=3, scale=3.0, tasks=SENTIMENT),
    "mosei": Spec("mmsa", "unaligned_50.pkl", MODALITIES, widths=(768, 74, 35),
                  samples=(16326, 1871, 4659), classes=3, scale=3.0, tasks=SENTIMENT),
    "sims": Spec("mmsa", "unaligned_39.pkl", MODALITIES, widths=(768, 33, 709),
                 samples=(1368, 456, 457), classes=3, scale=1.0, tasks=SENTIMENT),
    "simsv2": Spec("mmsa", "unaligned.pkl", MODALITIES, widths=(768, 25, 177),
                   samples=(2722, 647, 1034), classes=3, scale=1.0, tasks=SENTIMENT),
    "brca": Spec("mogonet", "labels_tr.csv", OMICS, widths=(1000, 1000, 503),
                 samples=(490, 122, 263), classes=5),
    "rosmap": Spec("mogonet", "labels_tr.csv", OMICS, widths=(200, 200, 200),
                   samples=(196, 49, 106), classes=2),
    "mmimdb": Spec("mmimdb", "multimodal_imdb.hdf5", ("text", "image"),
                   widths=(300, 4096), samples=(15552, 2608, 7799), classes=23),
}
FORMATS = {"mmsa": "MMSA pickle", "mogonet": "MOGONET folder",
           "mmimdb": "HDF5 file of MM-IMDB", "own": "NumPy file (.npz)"}
SOURCES = {"mmsa": "the links on https://github.com/thuiar/MMSA, section Datasets",
           "mogonet": "https://github.com/txWang/MOGONET",
           "mmimdb": "the link on https://github.com/johnarevalo/gmu-mmimdb"}
ZIP = b"PK\x03\x04"
STARTS = {ZIP: "a zip archive, as torch.save writes it", b"<": "an HTML page",
          b"\x1f\x8b": "compressed by gzip, to be unpacked first",
          b"version https://git-lfs": "a Git LFS pointer: run git lfs pull"}


class DataError(Exception):
    """The message says what was found, what was expected, and what to do."""


class Split(NamedTuple):
    xs: list            # per modality (N, length, width) float32
    mask: np.ndarray    # (m, N, length) bool, False where a sample lacks a modality
    y: np.ndarray       # (N,) float32, (N,) int64 classes, or (N, k) of 0. and 1.


class Dataset(NamedTuple):
    name: str
    synthetic: bool
    spec: Spec          # of these data: their own streams, widths and samples
    splits: dict        # "train", "valid", "test" -> Split
    preparation: dict   # plain values from which `prepare` makes model input
    notes: list         # sentences: what differs from the published set or is not used


class _Raw(NamedTuple):
    """A split as it stands in the file."""
    streams: list       # per modality (N, frames, width), or vectors (N, width)
    lengths: list       # per modality (N,), an attention mask (N, 3, frames), or None
    y: np.ndarray


def load(name, path, length=None, task=None):
    """Read a real dataset and return it as a `Dataset`.

    name: a key of SPECS, or "own". path: the file; for brca and rosmap the folder.
    length: steps of a sample; None: 20 for vectors, else as many as the longest stream
    has frames, but at most 50; streams of `own` that share a clock stay as they are.
    task: one of `Dataset.spec.tasks`; None: the first of them.

    Raises DataError, whose message is one sentence, for everything that is not such a
    dataset. Nothing in the file is executed.
    """
    layout = "own" if name == "own" else SPECS[name].layout
    readers = {"mmsa": _mmsa, "mogonet": _mogonet, "mmimdb": _mmimdb, "own": _own}
    path = Path(path)
    try:
        _check_file(path, name, layout)
        raw, published, notes = readers[layout](path, name, task)
        if task not in (None, *published.tasks):
            raise DataError(f"has no labels for {task}, only for {published.tasks[0]}")
        widths = _check(raw, published.modalities, layout)
        samples = tuple(len(raw[s].y) for s in SPLITS)
        spec = published._replace(widths=tuple(widths), samples=samples)
        splits, preparation = _prepare_splits(raw, spec, length)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None

    for m, width, usual in zip(spec.modalities, widths, published.widths):
        if width != usual:
            notes.append(f"{m}: {width} features, published {usual}")
    if published.samples not in (samples, ()):
        notes.append(f"{samples} samples, published {published.samples}")
    return Dataset(name, False, spec, splits, preparation, notes)


def default_path(name):
    """Where the dataset is looked for if no path is given."""
    return Path("data") / name / SPECS[name].file


def how_to_get(name):
    """A sentence that tells where to download the dataset and where to put it."""
    spec = SPECS[name]
    what = "its folder" if spec.layout == "mogonet" else spec.file
    return (f"To train on the real {name.upper()}, get {what} from "
            f"{SOURCES[spec.layout]}, and put it into {default_path(name).parent}, or "
            "name it with --data.")


# --------------------------------------------------- what can go wrong with a file
def _check_file(path, name, layout):
    """Refuse what is no file at all, or starts like a file of another kind."""
    if layout == "mogonet":
        path = path / "labels_tr.csv" if path.is_dir() else path
    if not path.is_file():
        advice = how_to_get(name) if name in SPECS else ""
        raise DataError(f"there is no {FORMATS[layout]} here. {advice}")
    with open(path, "rb") as file:
        start = file.read(100).lstrip()
    for signature, kind in STARTS.items():
        if start.startswith(signature) and (layout, signature) != ("own", ZIP):
            raise DataError(f"is {kind}, expected: {FORMATS[layout]}")


@contextlib.contextmanager
def _reading(what):
    """Around code that only reads: damaged bytes can cause nearly any exception."""
    try:
        yield
    except (DataError, MemoryError, ImportError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0][:120]
        raise DataError(f"is not a complete {what} ({reason}): download it again and "
                        "compare it with what its publisher says about it") from None


def _take(tables, key, optional=False):
    """Take an array of numbers out of what a file holds."""
    if optional and key not in tables:
        return None
    if key not in tables:
        raise DataError(f"has no {key}, only {', '.join(tables)[:80]}")
    table = tables.pop(key)
    with _reading(f"array {key}"):
        if not isinstance(table, np.ndarray):
            table = _array(table, key)
    if table.dtype.kind not in "biuf" or table.ndim == 0:
        raise DataError(f"{key} is {table.dtype} of shape {table.shape}, expected an "
                        "array of numbers")
    return table


def _check(raw, modalities, layout):
    """Refuse streams that do not fit each other or the labels; return their widths."""
    axes = 2 if layout in VECTORS else 3
    for i, m in enumerate(modalities):
        width = next(iter(raw.values())).streams[i].shape[-1:]
        for s, split in raw.items():
            x = split.streams[i]
            fits = len(x) == len(split.y) and x.shape[-1:] == width
            if x.ndim != axes or 0 in x.shape or not fits:
                raise DataError(f"{s}/{m} has shape {x.shape}, expected {axes} axes, "
                                f"{len(split.y)} samples as in its labels, and "
                                f"{width} features as in all splits")
    return [x.shape[-1] for x in split.streams]


def _labels(y, spec, task, name):
    """Labels as in `Split.y`: numbers, classes, or several labels of 0 and 1."""
    if y.shape[1:] == (1,) and spec.layout != "own":
        y = y[:, 0]
    axes, dtype = 1, np.int64
    right = np.isin(y, range(spec.classes))
    expected = f"a class from 0 to {spec.classes - 1}"
    if task == "regression":
        dtype = np.float32
        limit = 1.001 * spec.scale or SENTINEL
        right = np.abs(y) <= limit
        expected = f"a number of at most {limit:.3g} in size"
    elif spec.layout in ("mmimdb", "own") and y.ndim == 2:
        axes, dtype = 2, np.float32
        right = np.isin(y, (0, 1)) & (y.shape[1] == spec.classes)
        expected = f"{spec.classes} columns of 0 and 1"
    if y.ndim != axes or not right.all():
        raise DataError(f"{name} has shape {y.shape} and values like "
                        f"{np.unique(y[~right])[:5]}, expected {expected} per sample")
    return y.astype(dtype)


# --------------------------------------------------- a pickle, read without running it
class _Stub:
    """Stands for an object that the file asks for: it notes how, and makes nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class _MappedFile(mmap.mmap):
    """A file in a memory map. Long reads are views, so that big arrays stay on disk."""

    def read(self, size):
        start = self.tell()
        self.seek(size, os.SEEK_CUR)            # an error where the file ends before
        if size > 4096:
            return memoryview(self)[start:start + size]
        return self[start:start + size]


class _Reader(pickle._Unpickler):
    """The unpickler of Python's library in its pure-Python form, made harmless.

    It makes plain containers, and a stub for each of the names by which arrays are
    pickled. NumPy's own classes are not called: by dtype.__setstate__ a file could
    forge pointers. Tuples become lists, which cannot be keys of a dict: the hash of a
    deeply nested tuple would exhaust the stack.
    """
    STUBS = {name: type(name, (_Stub,), {}) for name in (
        "dtype", "ndarray", "_reconstruct", "scalar", "_frombuffer", "encode")}

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.STUBS:
            raise DataError(f"asks for {module}.{name}, which no dataset needs: the "
                            "file may be hostile, nothing in it was run; store NumPy "
                            "arrays if you made it")
        return self.STUBS[name]

    def join(self, count):
        self.stack[-count:] = [self.stack[-count:]]

    dispatch = dict(pickle._Unpickler.dispatch)     # opcode -> the method that obeys it
    dispatch[pickle.EMPTY_TUPLE[0]] = pickle._Unpickler.load_empty_list
    dispatch[pickle.TUPLE1[0]] = lambda self: self.join(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self.join(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self.join(3)
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8   # a view will do


def _array(value, name):
    """The numeric array that stubs, or a flat list, describe; a view of the file."""
    kind = type(value).__name__
    if kind == "list":
        numbers = [_array(v, name)[()] if isinstance(v, _Stub) else v for v in value]
        if not all(isinstance(v, (int, float, np.number)) for v in numbers):
            raise DataError(f"{name} is ragged or not numeric, expected numbers")
        return np.array(numbers, np.float64)
    shape, order, axes = (), "C", None
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
    if not re.fullmatch("[biuf][0-9]{1,2}", code):
        raise DataError(f"{name} is of type {code[:40]}, expected numbers")
    if isinstance(content, _Stub):      # protocol 2 writes bytes as encode(text)
        content = content.arguments[0]
    if isinstance(content, str):
        content = content.encode("latin1")
    array = np.frombuffer(content, np.dtype(code).newbyteorder(byte_order))
    if order == "K":                    # stored with its axes in another order
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


# --------------------------------------------------- mosi, mosei, sims, simsv2
def _mmsa(path, name, task):
    with _reading(FORMATS["mmsa"]), open(path, "rb") as file:
        mapped = _MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = _Reader(mapped, encoding="latin1").load()
    if not isinstance(content, dict):
        raise DataError(f"found a {type(content).__name__}, expected a dict of splits")
    tables = {f"{s}/{key}": value for s in SPLITS if isinstance(content.get(s), dict)
              for key, value in content[s].items()}
    has_classes = any(key.endswith("/classification_labels") for key in tables)

    spec = SPECS[name]
    raw, largest = {}, 0
    for s in SPLITS:
        streams = [_take(tables, f"{s}/{m}") for m in MODALITIES]
        lengths = [_take(tables, f"{s}/{m}_lengths", True) for m in MODALITIES]
        if f"{s}/text_bert" in tables:
            lengths[0] = _take(tables, f"{s}/text_bert")
        key = f"{s}/regression_labels"
        y = _labels(_take(tables, key), spec, "regression", key)
        largest = max(largest, np.abs(y).max(initial=0))
        if task == "classification":
            y = np.sign(y).astype(np.int64) + 1     # negative, neutral, positive
            if has_classes:
                key = f"{s}/classification_labels"
                y = _labels(_take(tables, key), spec, task, key)
        raw[s] = _Raw(streams, lengths, y)

    unused = [key for key in content if key not in (*SPLITS, "config")]
    for key in list(tables):
        with contextlib.suppress(DataError):        # what is no array is no stream
            if _take(tables, key).ndim == 3:
                unused.append(key)
    notes = [f"not used: {key}" for key in unused]
    if largest < spec.scale / 2:
        notes.append(f"labels: at most {largest:.3g} in size, published {spec.scale:g}")
    return raw, spec, notes


# --------------------------------------------------- brca, rosmap, mmimdb, own
def _mogonet(path, name, task):
    spec = SPECS[name]
    if path.is_file():
        path = path.parent
    tables = {file.name: _csv(file) for file in sorted(path.glob("*_t[re].csv"))}
    raw = {}
    for s, part in (("train", "tr"), ("test", "te")):
        views = [_take(tables, f"{view}_{part}.csv") for view in "123"]
        key = f"labels_{part}.csv"
        y = _labels(_take(tables, key), spec, "classification", key)
        for first in (0, 1):
            rows = np.arange(len(y)) + first
            if any(np.array_equal(table[:, 0], rows) for table in views):
                raise DataError(f"a table of {s} begins with an index, a column that "
                                f"counts rows from {first}: remove it from all tables")
        raw[s] = _Raw(views, [None] * 3, y)
    _check(raw, OMICS, "mogonet")

    streams, lengths, y = raw["train"]
    valid = _stratified(y)
    if not valid.any():
        raise DataError(f"has {len(y)} training rows, too few to set a fifth aside")
    for s, rows in (("train", ~valid), ("valid", valid)):
        raw[s] = _Raw([x[rows] for x in streams], lengths, y[rows])
    return raw, spec, [f"not used: {file}" for file in tables]


def _csv(file):
    """(rows, columns) float64"""
    with _reading(f"table {file.name}"), warnings.catch_warnings():
        warnings.simplefilter("error")              # an empty file is only a warning
        table = np.loadtxt(file, delimiter=",", ndmin=2, encoding="utf-8-sig")
    if not np.isfinite(table).all():
        raise DataError(f"{file.name} has NaN or infinite values, expected numbers")
    return table


def _stratified(y, share=0.2, seed=0):
    """(N,) bool: this share of the rows of each class, random but always the same."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        chosen[rows[:round(share * len(rows))]] = True
    return chosen


def _mmimdb(path, name, task):
    import h5py                                     # only this dataset needs it
    spec = SPECS[name]
    keys = ("features", "vgg_features", "genres")
    with _reading(FORMATS["mmimdb"]), h5py.File(path, "r") as file:
        tables = {key: file[key][()] for key in keys if key in file}
    tables = [_take(tables, key) for key in keys]
    rows = [len(table) for table in tables]
    if set(rows) != {sum(spec.samples)}:
        raise DataError(f"{', '.join(keys)} have {rows} rows, expected "
                        f"{sum(spec.samples)}: {spec.samples} for {', '.join(SPLITS)}")
    raw = {}
    ends = np.cumsum(spec.samples)[:-1]
    for s, *vectors, genres in zip(SPLITS, *(np.split(x, ends) for x in tables)):
        y = _labels(genres, spec, "classification", "genres")
        raw[s] = _Raw(vectors, [None, None], y)
    return raw, spec, []


def _own(path, name, task):
    """The spec of an own file is made from it; `load` adds what is missing."""
    with _reading(FORMATS["own"]), open(path, "rb") as opened:
        file = np.load(opened, allow_pickle=False)
        tables = {key: file[key] for key in file.files}
    names = [key[6:] for key in tables if key.startswith("train/")]
    names = tuple(m for m in names if m != "y" and not m.endswith("_lengths"))
    if not names:
        raise DataError(f"has no train/<stream>, only {', '.join(tables)[:80]}")
    ys = [_take(tables, f"{s}/y") for s in SPLITS]
    task, classes = "classification", ys[0].shape[-1]       # of (N, k) labels
    if ys[0].ndim == 1 and ys[0].dtype.kind == "f":
        task, classes = "regression", 0
    elif ys[0].ndim == 1:
        classes = 1 + max(int(np.nan_to_num(y).max(initial=1)) for y in ys)
    spec = Spec("own", path.name, names, (), (), classes, tasks=(task,))

    raw = {}
    for s, y in zip(SPLITS, ys):
        streams = [_take(tables, f"{s}/{m}") for m in names]
        lengths = [_take(tables, f"{s}/{m}_lengths", True) for m in names]
        raw[s] = _Raw(streams, lengths, _labels(y, spec, task, f"{s}/y"))
    return raw, spec, [f"not used: {key}" for key in tables]


# --------------------------------------------------- from arrays to model input
def prepare(streams, preparation, lengths=None):
    """Turn raw arrays of new samples into model input: xs and mask as in `Split`.

    streams: an array per modality, in the order of `Dataset.spec.modalities`,
    (N, frames, width), or (N, width) for vectors. preparation: that of the training
    data. lengths: None, or for each modality None, the numbers of real frames (N,), or
    an attention mask (N, 3, frames) like `text_bert`.
    """
    streams = [np.atleast_1d(x) for x in streams]
    lengths = lengths or [None] * len(streams)
    lengths = [n if n is None else np.asarray(n) for n in lengths]
    names = [f"stream {i}" for i in range(len(streams))]
    raw = _Raw(streams, lengths, streams[0])
    widths = _check({"new": raw}, names, preparation["layout"])
    clocks = {x.shape[1] for x in streams if preparation["aligned"]}
    fits = widths == preparation["widths"] and len(lengths) == len(widths)
    if not fits or len(clocks) > 1:
        raise DataError(f"got streams of shapes {[x.shape for x in streams]} and "
                        f"{len(lengths)} lengths, expected {preparation['widths']} "
                        "features, as many lengths, and one number of frames where the "
                        "streams share a clock")
    xs, mask = _to_steps(raw, names, preparation)
    _standardise(xs, mask, preparation)
    return xs, mask


def _prepare_splits(raw, spec, length):
    """All splits as model input, and the `preparation` that made them so."""
    aligned = False
    if spec.layout in VECTORS:
        length = length or VECTOR_STEPS
    else:
        frames = {x.shape[1] for split in raw.values() for x in split.streams}
        counted = any(np.ndim(n) in (1, 2) for split in raw.values()
                      for n in split.lengths)
        own = spec.layout == "own"
        aligned = len(frames) == 1 and (own or not counted)
        if not length:
            length = max(frames) if own and aligned else min(50, max(frames))

    preparation = {"layout": spec.layout, "length": length, "aligned": aligned,
                   "widths": list(spec.widths)}
    splits = {}
    for s in SPLITS:
        names = [f"{s}/{m}" for m in spec.modalities]
        splits[s] = Split(*_to_steps(raw[s], names, preparation), raw[s].y)
    preparation.update(_statistics(splits["train"], spec.layout in VECTORS))
    for split in splits.values():
        _standardise(split.xs, split.mask, preparation)
    return splits, preparation


def _to_steps(raw, names, preparation):
    """xs and mask as in `Split`, not yet standardised."""
    layout, length = preparation["layout"], preparation["length"]
    if layout in VECTORS:
        xs = [_cut(x, length) for x in raw.streams]
        return xs, np.ones((len(xs), *xs[0].shape[:2]), bool)

    lengths = raw.lengths
    if layout == "own" and preparation["aligned"]:
        every = np.ones(raw.streams[0].shape[:2])
        lengths = [every if told is None else told for told in lengths]
    real = [_real_frames(*stream) for stream in zip(raw.streams, lengths, names)]
    clocks = [_span(frames) for frames in real]
    if preparation["aligned"]:
        clocks = [_span(np.logical_or.reduce(real))] * len(real)
        if layout == "own" and real[0].shape[1] == length:
            clocks = [np.ones(real[0].shape, bool)] * len(real)     # as they are

    xs, masks = [], []
    for x, told, frames, clock in zip(raw.streams, lengths, real, clocks):
        if told is None:                    # frames of zeros between others are real
            frames = clock & frames.any(1, keepdims=True)
        x, mask = _resample(x, clock, frames, length)
        xs.append(x)
        masks.append(mask)
    return xs, np.stack(masks)


def _cut(x, length):
    """(N, width) -> (N, length, width of a step), the end filled with zeros"""
    width = -(-x.shape[1] // length)
    x = np.pad(_finite(x), ((0, 0), (0, length * width - x.shape[1])))
    return x.reshape(len(x), length, width).astype(np.float32)


def _finite(x):
    """0 replaces NaN, infinite values, and those that stand for them."""
    return np.where(np.abs(x) < SENTINEL, x, 0)


def _real_frames(x, lengths, name):
    """(N, frames) bool: which frames are real, of lengths as in `prepare`.

    Padding may stand at the end or in front; with lengths (N,) it must be zero.
    """
    samples, frames, _ = x.shape
    shape = np.shape(lengths)
    if shape == (samples, 3, frames):
        return lengths[:, 1] != 0
    if shape == (samples, frames, 3):
        return lengths[:, :, 1] != 0
    if shape == (samples, frames):
        return lengths != 0
    nonzero = np.array([_finite(sample).any(1) for sample in x])
    if lengths is None:
        return nonzero

    whole = (lengths >= 0) & (lengths % 1 == 0)
    if lengths.size != samples or not whole.all():
        raise DataError(f"the lengths of {name} have shape {shape} and values like "
                        f"{lengths[~whole][:5]}, expected {samples} whole numbers from "
                        f"0, or an attention mask ({samples}, 3, {frames})")
    lengths = np.minimum(lengths, frames).reshape(-1, 1)
    at_start = np.arange(frames) < lengths
    for real in (at_start, at_start[:, ::-1]):
        if not (nonzero & ~real).any():
            return real
    raise DataError(f"{name} is not zero outside the frames of its lengths, counted "
                    "from either end: pad with zeros, or correct the lengths")


def _span(real):
    """(N, frames) bool: the frames from the first to the last real one"""
    begun = np.logical_or.accumulate(real, 1)
    return begun & np.logical_or.accumulate(real[:, ::-1], 1)[:, ::-1]


def _resample(x, clock, real, length):
    """Segment means (N, length, width), and in which segments are real frames.

    x: (N, frames, width). clock: (N, frames) bool, the frames that are cut into
    segments. real: (N, frames) bool, those of them of which the means are taken.

    Of r frames, segment j begins at frame floor(j r / length). If r < length, each
    segment is one frame, so that frames repeat.
    """
    x = np.ascontiguousarray(x)             # samples are taken one by one
    out = np.zeros((len(x), length, x.shape[2]), np.float32)
    counts = np.zeros((len(x), length), int)
    for i in np.flatnonzero(clock.any(1)):
        inside = real[i, clock[i]]
        frames = _finite(x[i, clock[i]]).astype(np.float64)
        frames[~inside] = 0
        begins = np.arange(length) * len(frames) // length
        counts[i] = np.add.reduceat(inside, begins, dtype=int)
        sums = np.add.reduceat(frames, begins)
        out[i] = sums / np.maximum(counts[i], 1)[:, None]
    return out, counts > 0


def _statistics(train, of_steps):
    """Mean and deviation of each feature over train's real steps, as lists.

    of_steps: each step has its own, since the steps of a vector are other features.
    """
    axes = 0 if of_steps else (0, 1)
    statistics = {"mean": [], "deviation": []}
    for x, real in zip(train.xs, train.mask):
        rows = np.flatnonzero(real.any(1))
        count = max(1, len(rows) if of_steps else real.sum())
        blocks = np.array_split(rows, 1 + x[0].size * len(rows) // BLOCK_ELEMENTS)
        mean = sum(x[rows].sum(axes, dtype=np.float64) for rows in blocks) / count
        variance = sum(((x[rows] - mean) ** 2 * real[rows][..., None]).sum(axes)
                       for rows in blocks) / count
        deviation = np.sqrt(variance)
        deviation[deviation < 1e-6] = 1.0           # a constant feature becomes 0
        statistics["mean"].append(mean.tolist())
        statistics["deviation"].append(deviation.tolist())
    return statistics


def _standardise(xs, mask, preparation):
    """In place"""
    for i, x in enumerate(xs):
        x -= np.array(preparation["mean"][i], np.float32)
        x /= np.array(preparation["deviation"][i], np.float32)
        x *= mask[i][..., None]


def with_missing(dataset, rate, seed=0):
    """Set each input element to 0, its mean, with probability `rate`, in place.

    The same seed takes the same elements. Table 12 of the paper does this.
    """
    rng = np.random.default_rng(seed)
    for split in dataset.splits.values():
        for x in split.xs:
            for row in x:                   # row by row, to bound the work space
                row[rng.random(row.shape, dtype=np.float32) < rate] = 0


# --------------------------------------------------- the stand-in
LATENT = 8              # directions that carry a stream of the stand-in
LATENT_NOISE = 0.25     # of each direction, in which a sign is 1 or -1
WHITE_NOISE = 0.05      # of each feature

# The second modality shows pairs of opposite signs, 1 and -1, in random order, each for
# some frames. A few frames after some of them, the first modality replies with a sign
# of its own, a fair coin, and the third one shows that it does. Only the products of a
# sign and its reply count, and neither one stream nor sums over time tell them.
#
# A stream has few directions, as real features have: LATENT numbers per frame are
# mapped to its features by a random matrix, and each feature gets a little noise.
def synthetic(name, length=None, samples=None, seed=0, task=None):
    """Made-up data of the shapes of `name`, to be solved only by binding two streams.

    regression: the label is the mean of 3 products of a sign and its reply, times
    `Spec.scale`. classification: how many products are positive, one product less than
    there are classes. mmimdb: label j is 1 if product j modulo 3 is positive.

    length: steps of a sample; None: 20 for vectors, else 50. samples: how many in
    train, valid and test; None: as many as are published.
    """
    samples = tuple(samples or SPECS[name].samples)
    spec = SPECS[name]._replace(samples=samples)
    task = task or spec.tasks[0]
    widths = spec.widths
    if spec.layout in VECTORS:
        length = length or VECTOR_STEPS
        widths = [-(-width // length) for width in widths]
    length = length or 50
    pairs, replies = 2, 3
    if task == "classification" and spec.layout != "mmimdb":
        pairs = replies = spec.classes - 1      # one reply to each pair

    rng = np.random.default_rng(seed)
    patterns = [rng.choice([-1.0, 1.0], LATENT) for _ in widths]
    matrices = [rng.standard_normal((LATENT, width)) for width in widths]
    splits = {}
    for s, count in zip(SPLITS, samples):
        shown, products = _signs(rng, count, length, pairs, replies)
        xs = []
        for pattern, matrix, strength in zip(patterns, matrices, shown):
            xs.append(_stream(rng, strength, pattern, matrix))
        mask = np.ones((len(xs), count, length), bool)
        splits[s] = Split(xs, mask, _answers(products, spec, task))
    preparation = {"layout": "own", "length": length, "aligned": True,
                   "widths": list(widths)}
    preparation.update(_statistics(splits["train"], False))
    for split in splits.values():
        _standardise(split.xs, split.mask, preparation)
    return Dataset(name, True, spec, splits, preparation, [])


def _signs(rng, count, length, pairs, replies):
    """What the modalities show (count, length), and the products (count, replies)."""
    slot = length / (2 * pairs)             # each sign has its own part of the time
    duration = max(1, int(slot / 4))
    delays = max(1, min(2, int(slot) - 2 * duration + 1))
    begins = max(1, int(slot) - 2 * duration - delays + 1)

    sign = rng.choice([-1.0, 1.0], (count, pairs))
    sign = np.concatenate([sign, -sign], 1)
    order = rng.permuted(np.tile(np.arange(2 * pairs), (count, 1)), axis=1)
    sign = np.take_along_axis(sign, order, 1)
    answered = order < replies              # (count, 2 pairs)
    begin = (slot * np.arange(2 * pairs)).astype(int)
    begin = begin + rng.integers(0, begins, order.shape)

    asked = sign[answered].reshape(count, replies)
    reply = rng.choice([-1.0, 1.0], (count, replies))
    delay = duration + rng.integers(0, delays, (count, replies))
    later = begin[answered].reshape(count, replies) + delay

    def show(values, start):
        start = np.minimum(start, length - duration)[..., None]
        frames = np.arange(length)
        now = (start <= frames) & (frames < start + duration)   # (count, signs, length)
        return (values[..., None] * now).sum(1)

    shown = show(reply, later), show(sign, begin), show(np.abs(reply), later)
    return shown, asked * reply


def _stream(rng, strength, pattern, matrix):
    """strength (count, length) -> features (count, length, width) float32"""
    noise = LATENT_NOISE * rng.standard_normal((*strength.shape, LATENT))
    latent = strength[..., None] * pattern + noise
    x = latent.astype(np.float32) @ matrix.astype(np.float32)
    for row in x:                           # row by row, to bound the work space
        row += WHITE_NOISE * rng.standard_normal(row.shape, np.float32)
    return x


def _answers(products, spec, task):
    """The labels as in `Split.y` out of the products (count, replies)."""
    positive = products > 0
    if spec.layout == "mmimdb":
        chosen = np.arange(spec.classes) % products.shape[1]
        return positive[:, chosen].astype(np.float32)
    if task == "classification":
        return positive.sum(1)
    return (spec.scale * products.mean(1)).astype(np.float32)
