"""The datasets: published files become arrays of one common length, standardised.

`load(name, path)` reads a real dataset. `synthetic(name)` makes a stand-in of the same
shapes for a machine that has no data. Both return a `Dataset`.

mosi, mosei, sims, simsv2
    A pickle of the MMSA project: a dict of the splits train, valid and test. A split is
    a dict with `text`, `audio`, `vision` (N, frames, width), `regression_labels` (N,),
    and perhaps `text_bert` (N, 3, frames), whose middle row tells which frames of the
    text are real, `audio_lengths`, `vision_lengths`, `classification_labels` (N,). NaN
    and infinite values become 0, the padding at both ends of a sample is cut off, and
    the frames that remain are resampled to `length` steps, each the mean of a segment.
brca, rosmap
    A MOGONET folder of tables, 1_tr.csv, 1_te.csv, 2_tr.csv ... labels_te.csv: three
    views of each patient, a row per patient, no header. There is no validation split:
    a fifth of the training rows of each class becomes one.
mmimdb
    An HDF5 file with `features` (N, 300), `vgg_features` (N, 4096), `genres` (N, 23).

A sample of the last three sets is one vector per modality and not a sequence. A vector
is cut into `tokens` steps of equal width, and its end is filled up with zeros.

In every dataset each feature is standardised: its mean over the training split is
subtracted, and it is divided by its standard deviation there.

A pickle can run any program while it is loaded. The reader in this file cannot be made
to do so: it builds NumPy arrays, scalars and plain containers, and nothing else.
"""
import mmap
import pickle
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test")
MODALITIES = ("text", "audio", "vision")
OMICS = ("mrna", "methylation", "mirna")
TOKENS = 20
BLOCK_ELEMENTS = 1 << 22    # worked on at once: some 100 MB of float64 and its copies


class Spec(NamedTuple):
    """What is published under a name."""
    layout: str         # how it is stored: "mmsa", "mogonet" or "mmimdb"
    file: str
    modalities: tuple
    widths: tuple       # number of features per modality
    samples: tuple      # number of samples in train, valid, test
    classes: int        # of the classification task; mmimdb: how many labels
    scale: float = 0.0  # regression labels lie in [-scale, scale]; 0: there are none

    @property
    def tasks(self):
        """The tasks that the dataset has labels for, the default first."""
        if self.scale:
            return ("regression", "classification")
        return ("classification",)


SPECS = {
    "mosi": Spec("mmsa", "unaligned_50.pkl", MODALITIES, widths=(768, 5, 20),
                 samples=(1284, 229, 686), classes=3, scale=3.0),
    "mosei": Spec("mmsa", "unaligned_50.pkl", MODALITIES, widths=(768, 74, 35),
                  samples=(16326, 1871, 4659), classes=3, scale=3.0),
    "sims": Spec("mmsa", "unaligned_39.pkl", MODALITIES, widths=(768, 33, 709),
                 samples=(1368, 456, 457), classes=3, scale=1.0),
    "simsv2": Spec("mmsa", "unaligned.pkl", MODALITIES, widths=(768, 25, 177),
                   samples=(2722, 647, 1034), classes=3, scale=1.0),
    "brca": Spec("mogonet", "labels_tr.csv", OMICS, widths=(1000, 1000, 503),
                 samples=(490, 122, 263), classes=5),
    "rosmap": Spec("mogonet", "labels_tr.csv", OMICS, widths=(200, 200, 200),
                   samples=(196, 49, 106), classes=2),
    "mmimdb": Spec("mmimdb", "multimodal_imdb.hdf5", ("text", "image"),
                   widths=(300, 4096), samples=(15552, 2608, 7799), classes=23),
}
LAYOUTS = {"mmsa": "MMSA pickle", "mogonet": "MOGONET folder",
           "mmimdb": "HDF5 file of MM-IMDB"}


class DataError(Exception):
    """The message says what was found, what was expected, and what to do."""


class Split(NamedTuple):
    xs: list            # per modality (N, length, width) float32
    mask: np.ndarray    # (m, N, length) bool, False where a sample lacks a modality
    y: np.ndarray       # (N,) float32, (N,) int64 classes, or (N, 23) of 0. and 1.


class Dataset(NamedTuple):
    name: str
    synthetic: bool
    splits: dict        # "train", "valid", "test" -> Split


def load(name, path, length=None, task=None, tokens=TOKENS):
    """Read a real dataset and return it as a `Dataset`.

    Args:
        name: a key of SPECS.
        path: the file or the folder.
        length: steps of a sample of mosi, mosei, sims and simsv2. None: as many as the
            longest stream of the file has, but at most 50.
        task: one of SPECS[name].tasks. None: the first of them.
        tokens: steps of a sample of brca, rosmap and mmimdb.

    Raises DataError, whose message is one sentence, for everything that is not such a
    dataset. Nothing in the file is executed.
    """
    spec = SPECS[name]
    path = _find(name, Path(path))
    try:
        splits = _read(path, spec, task or spec.tasks[0], length, tokens)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (PermissionError, ImportError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except Exception as error:      # a damaged file can cause nearly any exception
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0]
        raise DataError(f"{path} is not a complete {LAYOUTS[spec.layout]} ({reason}): "
                        "download it again and compare it with what its publisher says "
                        "about it") from None
    return Dataset(name, False, splits)


def default_path(name):
    """Where the dataset is looked for if no path is given."""
    return Path("data") / name / SPECS[name].file


def how_to_get(name):
    """A sentence that tells where to download the dataset and where to put it."""
    layout, file = SPECS[name].layout, SPECS[name].file
    if layout == "mmsa":
        step = (f"download its feature file {file} from the links on the page of the "
                "MMSA project (https://github.com/thuiar/MMSA, section Datasets)")
    elif layout == "mogonet":
        step = f"copy the folder {name.upper()} of https://github.com/txWang/MOGONET"
    else:
        step = (f"download {file} from the link on "
                "https://github.com/johnarevalo/gmu-mmimdb")
    return (f"To train on the real {name.upper()}, {step} to "
            f"{default_path(name).parent}, or name it with --data.")


def _find(name, path):
    """The file, or for MOGONET the folder, that the user means by `path`."""
    file = SPECS[name].file
    if SPECS[name].layout == "mogonet":
        return path.parent if path.name == file else path
    if path.is_dir():
        kind = Path(file).suffix
        found = sorted(path.glob(file)) or sorted(path.glob("*" + kind))
        if len(found) != 1:
            raise DataError(f"{path} contains {len(found)} {kind} files, expected "
                            f"{file}: name the file itself")
        return found[0]
    if not path.is_file():
        raise DataError(f"there is no file {path}. {how_to_get(name)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: download it again")
    return path


def _read(path, spec, task, length, tokens):
    if spec.layout == "mmsa":
        return _mmsa(path, spec, task, length)
    if spec.layout == "mogonet":
        return _mogonet(path, spec, tokens)
    return _mmimdb(path, spec, tokens)


# --------------------------------------------------- a pickle, read without running it
PLAIN_KEYS = (str, bytes, int, float)
HOSTILE = "the file may be hostile, nothing in it was run; get it from its publisher"


class _DType:
    """Replaces numpy.dtype, whose own __setstate__ would let a file forge pointers."""

    def __init__(self, code, *_):
        plain = r"[<>|=]?([?bBhHiIlLqQefdg]|[biufcSUOmM][0-9]{1,9})"
        if not re.fullmatch(plain, code):
            raise DataError(f"has an array of type {code[:40]}, expected plain numbers "
                            "or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        byte_order = state[1]       # the rest of the state is ignored
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Replaces ndarray. `array` is a view of the file: nothing is copied."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _reconstruct(subtype, shape, code):
    return _Array()


def _from_buffer(raw, dtype, shape, order="C"):
    dtype = dtype.dtype
    if dtype.hasobject:
        return np.fromiter(raw, object, len(raw)).reshape(shape, order=order)
    if isinstance(raw, str):        # the pickle was written by Python 2
        raw = raw.encode("latin1")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _scalar(dtype, raw):
    return _from_buffer(raw, dtype, ())[()]


def _encode(text, encoding):
    return text.encode("latin1")    # how protocol 2 writes bytes, whatever it asks for


class _MappedFile:
    """A file in a memory map. Long reads are views, so that big arrays stay on disk."""

    def __init__(self, mapped):
        self.mapped = mapped
        self.view = memoryview(mapped)
        self.position = 0

    def read(self, size):
        piece = self.view[self.position:self.position + size]
        if len(piece) != size:
            raise EOFError("it ends too early")
        self.position += size
        return piece if size > 4096 else bytes(piece)

    def readline(self):
        end = self.mapped.find(b"\n", self.position) + 1
        return self.read(max(end - self.position, 0))

    def readinto(self, buffer):
        buffer[:] = self.read(len(buffer))
        return len(buffer)


class _Reader(pickle._Unpickler):
    """The unpickler of Python's library in its pure-Python form, made harmless.

    It knows the names in NAMES and no others. Only the two classes above have their
    state restored. Keys of a dict must be plain, and there are no sets, because the
    hash of deeply nested tuples would exhaust the stack.
    """
    NAMES = {
        ("_codecs", "encode"): _encode,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _DType,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    }
    dispatch = dict(pickle._Unpickler.dispatch)     # opcode -> the method that obeys it
    del dispatch[pickle.EMPTY_SET[0]]
    del dispatch[pickle.ADDITEMS[0]]
    del dispatch[pickle.FROZENSET[0]]

    def find_class(self, module, name):
        if (module, name) not in self.NAMES:
            raise DataError(f"asks for {module}.{name}, which no dataset needs: "
                            f"{HOSTILE}, or store NumPy arrays if you made it")
        return self.NAMES[module, name]

    def load_build(self):
        self._check(self.stack[-2:-1], (_Array, _DType))
        super().load_build()
    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self):
        self._check(self.stack[-2:-1], PLAIN_KEYS)
        super().load_setitem()
    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        self._check(self.stack[::2], PLAIN_KEYS)
        super().load_setitems()
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self):
        self._check(self.stack[::2], PLAIN_KEYS)
        super().load_dict()
    dispatch[pickle.DICT[0]] = load_dict

    def load_bytearray8(self):
        self.load_binbytes8()       # a view that cannot be changed serves as well
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def _check(self, values, kinds):
        if not all(isinstance(value, kinds) for value in values):
            raise DataError(f"nests objects as no dataset does: {HOSTILE}")


def _array(value, name):
    """A numeric array out of the pickle, stored as an array or a flat list."""
    if isinstance(value, _Array):
        value = value.array
    if isinstance(value, list):
        value = _numbers(value, name)
    if not isinstance(value, np.ndarray):
        raise DataError(f"{name} is a {type(value).__name__}, expected an array")
    if value.dtype.hasobject:
        value = _numbers(list(value.flat), name).reshape(value.shape)
    if value.dtype.kind not in "biuf":
        raise DataError(f"{name} is of type {value.dtype}, expected numbers")
    return value


def _numbers(values, name):
    if not all(isinstance(value, (int, float, np.number)) for value in values):
        raise DataError(f"{name} is ragged or not numeric, expected numbers")
    return np.array(values, np.float64)


# --------------------------------------------------- mosi, mosei, sims, simsv2
def _mmsa(path, spec, task, length):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = _Reader(_MappedFile(mapped), encoding="latin1").load()
    if not isinstance(content, dict):
        raise DataError(f"found a {type(content).__name__}, expected a dict of splits")
    for s in SPLITS:
        if not isinstance(content.get(s), dict):
            raise DataError(f"found {str(list(content))[:80]}, expected a dict with a "
                            f"split {s!r} that is a dict")

    raw = {s: [_features(content[s], s, m) for m in MODALITIES] for s in SPLITS}
    for i, m in enumerate(MODALITIES):
        widths = [raw[s][i].shape[2] for s in SPLITS]
        if len(set(widths)) > 1:
            raise DataError(f"{m} has widths {widths} in the splits, expected one")
    if not length:
        length = min(50, max(x.shape[1] for xs in raw.values() for x in xs))

    has_classes = any("classification_labels" in content[s] for s in SPLITS)
    splits = {}
    for s in SPLITS:
        y = _regression_labels(content[s], s, spec.scale)
        if task == "classification":
            y = _sentiment_classes(content[s], s, y, spec.classes, has_classes)
        splits[s] = _mmsa_split(content[s], s, raw[s], y, length, mapped)
    standardise(splits)
    return splits


def _entry(split, s, name):
    if name not in split:
        raise DataError(f"split {s} has no {name!r}, only {str(list(split))[:80]}")
    return _array(split[name], f"{s}/{name}")


def _features(split, s, m):
    x = _entry(split, s, m)
    if x.ndim != 3 or 0 in x.shape:
        raise DataError(f"{s}/{m} has shape {x.shape}, expected (samples, frames, "
                        "width) without a 0")
    return x


def _regression_labels(split, s, scale):
    """(N,) float32 in [-scale, scale]"""
    name = f"{s}/regression_labels"
    y = _one_column(_entry(split, s, "regression_labels"))
    with np.errstate(over="ignore"):
        y = y.astype(np.float32)
    if y.ndim != 1:
        raise DataError(f"{name} has shape {y.shape}, expected (samples,)")
    if not np.isfinite(y).all():
        raise DataError(f"{name} has {np.sum(~np.isfinite(y))} values that are NaN or "
                        "infinite, expected numbers: remove those samples")
    largest = np.abs(y).max(initial=0)
    if largest > 1.001 * scale:
        raise DataError(f"{name} reach {largest:.4g}, expected at most {scale:g}: is "
                        "this the file of another dataset?")
    return y


def _sentiment_classes(split, s, y, classes, has_classes):
    """(N,) int64: the classes of the file, or if no split has any, the sign of y."""
    if not has_classes:
        return np.sign(y).astype(np.int64) + 1      # negative, neutral, positive
    name = "classification_labels"
    return _classes(_entry(split, s, name), classes, f"{s}/{name}")


def _classes(y, classes, name):
    y = _one_column(y)
    if y.ndim != 1 or not np.isin(y, np.arange(classes)).all():
        raise DataError(f"{name} has shape {y.shape} and values {np.unique(y)[:9]}, "
                        f"expected one class from 0 to {classes - 1} per sample")
    return y.astype(np.int64)


def _one_column(y):
    """(N, 1) -> (N,)"""
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    return y


def _mmsa_split(split, s, raw, y, length, mapped):
    xs, present = [], []
    for m, x in zip(MODALITIES, raw):
        if len(x) != len(y):
            raise DataError(f"{s}/{m} has {len(x)} samples, expected {len(y)}, the "
                            "number of labels")
        x, has_frames = _resample(x, _given_frames(split, s, m, x), length)
        xs.append(x)
        present.append(has_frames)
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)      # these pages are not needed again
    mask = np.stack(present)[:, :, None]
    return Split(xs, np.repeat(mask, length, 2), y)


def _given_frames(split, s, m, x):
    """(N, frames) bool, where the file itself says which frames are real, else None."""
    samples, frames, _ = x.shape
    if m == "text" and "text_bert" in split:
        bert = _entry(split, s, "text_bert")
        if bert.shape == (samples, 3, frames):
            return bert[:, 1] != 0                  # the attention mask
    if m != "text" and f"{m}_lengths" in split:
        lengths = _entry(split, s, f"{m}_lengths").reshape(-1)
        if len(lengths) != samples:
            raise DataError(f"{s}/{m}_lengths has {len(lengths)} entries, expected "
                            f"{samples}")
        return np.arange(frames) < lengths[:, None]
    return None


def _resample(x, given, length):
    """Cut off the padding and resample what remains.

    x: (N, frames, width). given: (N, frames) bool, which frames are real; if None,
    those that are not all zero. Returns segment means (N, length, width), and whether
    any frame was real (N,).

    Of r real frames, segment j begins at frame floor(j r / length). If r < length, each
    segment is one frame, so that frames repeat.
    """
    samples, frames, width = x.shape
    out = np.empty((samples, length, width), np.float32)
    present = np.empty(samples, bool)
    block = max(1, BLOCK_ELEMENTS // (frames * width))
    for i in range(0, samples, block):
        piece = _finite(x[i:i + block].astype(np.float64))
        if given is None:
            real = (piece != 0).any(2)
        else:
            real = given[i:i + block]
        present[i:i + block] = real.any(1)

        start = real.argmax(1)[:, None]
        stop = frames - real[:, ::-1].argmax(1)[:, None]
        edges = start + np.arange(length + 1) * (stop - start) // length
        means = _segment_means(piece, edges)
        out[i:i + block] = np.where(real.any(1)[:, None, None], means, 0)
    return out, present


def _segment_means(x, edges):
    """x (N, frames, width), edges (N, length + 1) -> (N, length, width)"""
    first = edges[:, :-1, None]
    last = np.maximum(edges[:, 1:, None], first + 1)
    running = np.pad(x.cumsum(1), ((0, 0), (1, 0), (0, 0)))
    sums = np.take_along_axis(running, last, 1) - np.take_along_axis(running, first, 1)
    return sums / (last - first)


def _finite(x):
    """0 replaces NaN, infinite values, and those that would be infinite in float32."""
    return np.where(np.abs(x) <= np.finfo(np.float32).max, x, 0)


def standardise(splits):
    """Give each feature mean 0 and deviation 1 over train's real steps, in place."""
    train = splits["train"]
    for i, x in enumerate(train.xs):
        rows = np.flatnonzero(train.mask[i].any(1))
        count = max(1, len(rows) * x.shape[1])
        blocks = np.array_split(rows, 1 + x[0].size * len(rows) // BLOCK_ELEMENTS)
        mean = sum(x[rows].sum((0, 1), dtype=np.float64) for rows in blocks) / count
        variance = sum(((x[rows] - mean) ** 2).sum((0, 1)) for rows in blocks) / count
        deviation = np.sqrt(variance)
        deviation[deviation < 1e-6] = 1.0           # a constant feature becomes 0
        for split in splits.values():
            split.xs[i] -= mean.astype(np.float32)
            split.xs[i] /= deviation.astype(np.float32)
            split.xs[i] *= split.mask[i][..., None]


# --------------------------------------------------- brca, rosmap, mmimdb: vectors
def _mogonet(path, spec, tokens):
    tables = _tables(path)
    y_train = _classes(tables["labels_tr"], spec.classes, "labels_tr.csv")
    y_test = _classes(tables["labels_te"], spec.classes, "labels_te.csv")
    for view in "123":
        got = (tables[f"{view}_tr"].shape, tables[f"{view}_te"].shape)
        width = got[0][1]
        if got != ((len(y_train), width), (len(y_test), width)):
            raise DataError(f"{view}_tr.csv and {view}_te.csv have shapes {got[0]} and "
                            f"{got[1]}, expected one width, and {len(y_train)} and "
                            f"{len(y_test)} rows as the labels have")

    valid = _stratified(y_train)
    if not valid.any():
        raise DataError(f"has {len(valid)} training rows, too few of each class to set "
                        "a fifth aside for validation")
    views = [tables[f"{view}_tr"] for view in "123"]
    return _cut({
        "train": ([x[~valid] for x in views], y_train[~valid]),
        "valid": ([x[valid] for x in views], y_train[valid]),
        "test": ([tables[f"{view}_te"] for view in "123"], y_test),
    }, tokens)


def _tables(path):
    """The eight tables of a MOGONET folder, by their names without `.csv`."""
    if not path.is_dir():
        raise DataError("is no folder, expected one with 1_tr.csv ... labels_te.csv")
    names = [f"{view}_{part}" for part in ("tr", "te") for view in (1, 2, 3, "labels")]
    missing = [f"{name}.csv" for name in names if not (path / f"{name}.csv").is_file()]
    if missing:
        raise DataError(f"has no {', '.join(missing)}, expected 1_tr.csv, 1_te.csv, "
                        "2_..., 3_..., labels_tr.csv, labels_te.csv")
    return {name: _csv(path / f"{name}.csv") for name in names}


def _csv(file):
    """(rows, columns) float64"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")          # an empty file is only a warning
            table = np.loadtxt(file, np.float64, delimiter=",", ndmin=2,
                               encoding="utf-8-sig")
    except (ValueError, UserWarning) as error:
        reason = str(error).split(";")[0][:80]
        raise DataError(f"{file.name} is empty, ragged or not numeric ({reason}), "
                        "expected rows of numbers between commas") from None
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


def _mmimdb(path, spec, tokens):
    tables = _hdf5_tables(path, ("features", "vgg_features", "genres"))
    text, image, genres = tables
    if not np.isin(genres, (0, 1)).all() or genres.shape[1] != spec.classes:
        values = np.unique(genres)[:9]
        raise DataError(f"genres has {genres.shape[1]} columns of {values}"
                        f", expected {spec.classes} columns of 0 and 1")
    rows = [len(table) for table in tables]
    if set(rows) != {sum(spec.samples)}:
        parts = " + ".join(map(str, spec.samples))
        raise DataError(f"features, vgg_features and genres have {rows} rows, expected "
                        f"{sum(spec.samples)} each: {parts} for {', '.join(SPLITS)}")

    parts = {}
    stop = 0
    for s, count in zip(SPLITS, spec.samples):
        rows = slice(stop, stop + count)
        parts[s] = ([text[rows], image[rows]], genres[rows].astype(np.float32))
        stop += count
    return _cut(parts, tokens)


def _hdf5_tables(path, names):
    import h5py                                     # only this dataset needs it
    tables = []
    with h5py.File(path, "r") as file:
        for name in names:
            table = file.get(name)
            if not isinstance(table, h5py.Dataset):
                raise DataError(f"has no {name!r}, only {str(list(file))[:80]}")
            if table.ndim != 2 or 0 in table.shape or table.dtype.kind not in "biuf":
                raise DataError(f"{name} is {table.dtype} of shape {table.shape}, "
                                "expected a table of numbers")
            tables.append(table[:])
    return tables


def _cut(parts, tokens):
    """Standardise vectors and cut each into steps.

    parts: per split a list of (N, width), and y. Returns splits whose xs have the shape
    (N, tokens, ceil(width / tokens)).
    """
    whole = {}
    for s, (vectors, y) in parts.items():
        xs = [_finite(x)[:, None].astype(np.float32) for x in vectors]  # (N, 1, width)
        whole[s] = Split(xs, np.ones((len(xs), len(y), 1), bool), y)
    standardise(whole)

    splits = {}
    for s, (vectors, mask, y) in whole.items():
        xs = []
        for x in vectors:
            width = -(-x.shape[2] // tokens)
            x = np.pad(x[:, 0], ((0, 0), (0, tokens * width - x.shape[2])))
            xs.append(x.reshape(len(x), tokens, width))
        splits[s] = Split(xs, mask.repeat(tokens, 2), y)
    return splits


def with_missing(dataset, rate, seed=0):
    """Set each input element to zero, its mean, with probability `rate`, in place.

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
# of its own, a fair coin, and the third one shows that it does. Only the product of a
# sign and its reply counts. No stream alone tells whether a product is positive. All
# signs of a sample sum to zero, so their sum, multiplied with that of the replies, does
# not tell either: a model must know the last sign when a reply comes.
#
# Like real features, those of a stream have few directions: LATENT numbers per frame,
# signs and noise, are mapped to the features by a random matrix, the same in every
# split, and each feature gets a little noise of its own.


def synthetic(name, length=None, samples=None, seed=0, task=None, tokens=TOKENS):
    """Made-up data of the shapes of `name`, to be solved only by binding two streams.

    regression: the label is the mean of 3 products of a sign and its reply, times
    `Spec.scale`. classification: how many products are positive, one product less than
    there are classes. mmimdb: label j is 1 if product j modulo 3 is positive.

    length, task, tokens: as in `load`, but a length of None is 50. samples: how many in
    train, valid and test, or None for the published numbers. The same seed gives the
    same data.
    """
    spec = SPECS[name]
    task = task or spec.tasks[0]
    length = length or 50
    widths = spec.widths
    if spec.layout != "mmsa":
        length = tokens
        widths = [-(-width // tokens) for width in widths]
    pairs, replies = 2, 3
    if task == "classification" and spec.layout != "mmimdb":
        pairs = replies = spec.classes - 1      # one reply to each pair

    rng = np.random.default_rng(seed)
    patterns = [rng.choice([-1.0, 1.0], LATENT) for _ in widths]
    matrices = [rng.standard_normal((LATENT, width)) for width in widths]
    splits = {}
    for s, count in zip(SPLITS, samples or spec.samples):
        shown, products = _signs(rng, count, length, pairs, replies)
        xs = []
        for pattern, matrix, strength in zip(patterns, matrices, shown):
            xs.append(_stream(rng, strength, pattern, matrix))
        mask = np.ones((len(xs), count, length), bool)
        splits[s] = Split(xs, mask, _answers(products, spec, task))
    standardise(splits)
    return Dataset(name, True, splits)


def _signs(rng, count, length, pairs, replies):
    """What the three modalities show, each (count, length), mostly 0, and the products
    (count, replies).
    """
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
