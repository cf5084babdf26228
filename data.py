"""The datasets: files as they are published -> arrays of one common length, standardised.

`load(name, path)` reads a real dataset; `synthetic(name)` makes a stand-in of the same shapes for a
machine that has none. Both return a `Dataset`.

mosi, mosei, sims, simsv2: an MMSA pickle, a dict of splits `train`, `valid`, `test`. A split holds
`text`, `audio`, `vision` (N, L, width), `regression_labels` (N,), and perhaps `text_bert`
(N, 3, L), `audio_lengths`, `vision_lengths`, `classification_labels` (N,). Clip by clip,

    inf, NaN -> 0  ->  the real frames, padding at either end cut off  ->  `length` segment means

brca, rosmap: a MOGONET folder, `1_tr.csv 1_te.csv 2_.. 3_.. labels_tr.csv labels_te.csv`, three
views of each patient, a row each. A fifth of the training rows, drawn per class, serves as valid.
mmimdb: `multimodal_imdb.hdf5` of `features` (N, 300), `vgg_features` (N, 4096), `genres` (N, 23).
In these a sample is one vector per modality and no sequence: it is cut into `tokens` steps of equal
width, the last ones filled up with zeros.

Everywhere: each feature is standardised by its mean and deviation over the training split.

A pickle can run any program when it is loaded the usual way. `_Reader` cannot: it builds NumPy
arrays, scalars and plain containers, and does not look up any other name.
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


class Spec(NamedTuple):
    """What is published under a name. The stand-in copies it; a real file speaks for itself."""
    layout: str              # how it is stored, a key of LAYOUTS
    file: str
    modalities: tuple
    widths: tuple            # of each modality
    clips: tuple             # train, valid, test
    classes: int             # of the classification task; 23 labels at once in mmimdb
    scale: float = 0.        # the labels of the regression task lie in [-scale, scale]; 0: no such

    @property
    def tasks(self):
        """The default comes first."""
        return ("regression", "classification") if self.scale else ("classification",)


SPECS = {
    "mosi": Spec("mmsa", "unaligned_50.pkl", MODALITIES, (768, 5, 20), (1284, 229, 686), 3, 3.),
    "mosei": Spec("mmsa", "unaligned_50.pkl", MODALITIES, (768, 74, 35), (16326, 1871, 4659), 3,
                  3.),
    "sims": Spec("mmsa", "unaligned_39.pkl", MODALITIES, (768, 33, 709), (1368, 456, 457), 3, 1.),
    "simsv2": Spec("mmsa", "unaligned.pkl", MODALITIES, (768, 25, 177), (2722, 647, 1034), 3, 1.),
    "brca": Spec("mogonet", "labels_tr.csv", OMICS, (1000, 1000, 503), (490, 122, 263), 5),
    "rosmap": Spec("mogonet", "labels_tr.csv", OMICS, (200, 200, 200), (196, 49, 106), 2),
    "mmimdb": Spec("mmimdb", "multimodal_imdb.hdf5", ("text", "image"), (300, 4096),
                   (15552, 2608, 7799), 23)}
TOKENS = 20


class DataError(Exception):
    """A file that cannot be used. The message says what was found, what was expected, what to do.
    """


class Split(NamedTuple):
    xs: list                 # per modality (N, length, width) float32
    mask: np.ndarray         # (m, N, length) bool, False where a clip lacks a modality
    y: np.ndarray            # (N,) float32, (N,) int64 classes, or (N, 23) float32 of 0 and 1


class Dataset(NamedTuple):
    name: str
    synthetic: bool
    splits: dict             # "train", "valid", "test" -> Split


def load(name, path, length=None, task=None, tokens=TOKENS):
    """Read the file or folder at `path`.

    length: steps of the MMSA sets, None is min(50, longest stream); tokens: steps of the others.
    task: one of SPECS[name].tasks, None is the first.
    Raises DataError, in one sentence, for anything that is not such a dataset; runs nothing in it.
    """
    spec, path = SPECS[name], Path(path)
    task = task or spec.tasks[0]
    path = _find(name, path)
    what, read = LAYOUTS[spec.layout]
    try:
        return Dataset(name, False, read(path, spec, task, length, tokens))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (PermissionError, ImportError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except Exception as error:          # damage can surface as nearly any exception
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0]
        raise DataError(f"{path} is not a complete {what} ({reason}): fetch it again and compare "
                        "it with what its publisher says of it") from None


def default_path(name):
    return Path("data") / name / SPECS[name].file


def how_to_get(name):
    layout, file = SPECS[name].layout, SPECS[name].file
    steps = {"mmsa": f"download its feature file {file} by the links on the page of the MMSA "
                     "project (https://github.com/thuiar/MMSA, section Datasets)",
             "mogonet": f"copy the folder {name.upper()} of https://github.com/txWang/MOGONET",
             "mmimdb": f"download {file} by the link on https://github.com/johnarevalo/gmu-mmimdb"}
    return (f"To train on the real {name.upper()}, {steps[layout]} to {default_path(name).parent}, "
            "or name it with --data.")


def _find(name, path):
    if SPECS[name].layout == "mogonet":
        return path.parent if path.name == SPECS[name].file else path
    if path.is_dir():
        file = SPECS[name].file
        kind = Path(file).suffix
        files = sorted(path.glob(file)) or sorted(path.glob("*" + kind))
        if len(files) != 1:
            raise DataError(f"{path} holds {len(files)} {kind} files, expected {file}: name the "
                            "file itself")
        return files[0]
    if not path.is_file():
        raise DataError(f"there is no file {path}. {how_to_get(name)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: fetch it again")
    return path


# ----------------------------------------------------------------------------- reading a pickle
def _reconstruct(subtype, shape, code):
    return _Array()


class _DType:
    """Stands in for numpy.dtype, whose own __setstate__ would let a file forge pointers."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>|=]?([?bBhHiIlLqQefdg]|[biufcSUOmM][0-9]{1,9})", code):
            raise DataError(f"holds an array of type {code[:40]}, expected plain numbers or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):                           # all that is used is the byte order
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for ndarray while a pickle is read: its state becomes a view, nothing is copied."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw, dtype, shape, order="C"):
    dtype = dtype.dtype
    if dtype.hasobject:
        return np.fromiter(raw, object, len(raw)).reshape(shape, order=order)
    raw = raw.encode("latin1") if isinstance(raw, str) else raw          # pickled by Python 2
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _scalar(dtype, raw):
    return _from_buffer(raw, dtype, ())[()]


def _encode(text, encoding):
    return text.encode("latin1")         # how protocol 2 writes bytes, whatever codec it asks for


def _plain(load, part, kinds):
    """The opcode `load`, refused unless that part of the stack is of these kinds."""
    def checked(reader):
        if not all(isinstance(v, kinds) for v in reader.stack[part]):
            raise DataError("nests objects as no dataset does: the file may be hostile, nothing in "
                            "it was run; fetch it from its publisher")
        load(reader)
    return checked


class _Reader(pickle._Unpickler):
    """The pure-Python unpickler over a memory map: big arrays stay on disk until they are used."""

    NAMES = {("_codecs", "encode"): _encode}
    for _core in ("numpy.core", "numpy._core"):
        NAMES |= {(_core + ".multiarray", "_reconstruct"): _reconstruct,
                  (_core + ".multiarray", "scalar"): _scalar,
                  (_core + ".numeric", "_frombuffer"): _from_buffer}
    NAMES |= {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _DType}
    _was, _key = pickle._Unpickler.dispatch, (str, bytes, int, float)
    dispatch = _was | {
        pickle.BYTEARRAY8[0]: _was[pickle.BINBYTES8[0]],                 # a view serves as well
        pickle.BUILD[0]: _plain(_was[pickle.BUILD[0]], slice(-2, -1), (_Array, _DType)),
        pickle.SETITEM[0]: _plain(_was[pickle.SETITEM[0]], slice(-2, -1), _key),
        pickle.SETITEMS[0]: _plain(_was[pickle.SETITEMS[0]], slice(0, None, 2), _key),
        pickle.DICT[0]: _plain(_was[pickle.DICT[0]], slice(0, None, 2), _key)}
    for _set in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):   # would hash deep tuples
        del dispatch[_set[0]]

    def __init__(self, mapped):
        self.mapped, self.position = memoryview(mapped), 0
        super().__init__(self, encoding="latin1")

    def find_class(self, module, name):
        if (module, name) not in self.NAMES:
            raise DataError(f"asks for {module}.{name}, which no dataset needs: the file may be "
                            "hostile, nothing in it was run; fetch it from its publisher, or store "
                            "NumPy arrays if you made it")
        return self.NAMES[module, name]

    def read(self, size=-1):
        piece = self.mapped[self.position:self.position + size]
        if len(piece) != size:
            raise EOFError("it ends too early")
        self.position += size
        return piece if size > 4096 else bytes(piece)

    def readline(self):
        end = self.mapped.obj.find(b"\n", self.position) + 1
        return self.read(max(end - self.position, 0))

    def readinto(self, buffer):
        buffer[:] = self.read(len(buffer))
        return len(buffer)


def _array(value, name):
    """A numeric array out of what stood in the pickle: an array, or a flat list of numbers."""
    value = value.array if isinstance(value, _Array) else value
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.hasobject):
        flat = value if isinstance(value, list) else list(value.flat)
        if not all(isinstance(v, (int, float, np.number)) for v in flat):
            raise DataError(f"{name} is ragged or not numeric, expected an array of numbers")
        value = np.array(flat, np.float64).reshape(getattr(value, "shape", -1))
    if not isinstance(value, np.ndarray):
        raise DataError(f"{name} is a {type(value).__name__}, expected an array of numbers")
    if value.dtype.kind not in "biuf":
        raise DataError(f"{name} is of type {value.dtype}, expected numbers")
    return value


# ----------------------------------------------------------------------------- MMSA
def _mmsa(path, spec, task, length, tokens):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = _Reader(mapped).load()
    if not isinstance(content, dict) or not all(isinstance(content.get(s), dict) for s in SPLITS):
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"found {str(found)[:80]}, expected a dict of splits {', '.join(SPLITS)}")
    raw = {s: [_features(content[s], s, m) for m in MODALITIES] for s in SPLITS}
    for m, *same in zip(MODALITIES, *raw.values()):
        if len({x.shape[2] for x in same}) > 1:
            raise DataError(f"{m} has widths {[x.shape[2] for x in same]} in the splits, not one")
    length = length or min(50, max(x.shape[1] for split in raw.values() for x in split))
    own, splits = any("classification_labels" in content[s] for s in SPLITS), {}
    for s in SPLITS:
        y, xs, present = _labels(content[s], s, task, spec.classes, spec.scale, own), [], []
        for m, x in zip(MODALITIES, raw[s]):
            if len(x) != len(y):
                raise DataError(f"{s}/{m} has {len(x)} clips and there are {len(y)} labels")
            x, real = _resample(x, _given_frames(content[s], s, m, x), length)
            if hasattr(mapped, "madvise"):                   # the file's pages have done their work
                mapped.madvise(mmap.MADV_DONTNEED)
            xs.append(x)
            present.append(real)
        splits[s] = Split(xs, np.repeat(np.stack(present)[:, :, None], length, 2), y)
    standardise(splits)
    return splits


def _features(split, s, m):
    if m not in split:
        raise DataError(f"split {s} has no {m!r}, only {str(list(split))[:80]}")
    x = _array(split[m], f"{s}/{m}")
    if x.ndim != 3 or 0 in x.shape:
        raise DataError(f"{s}/{m} has shape {x.shape}, expected (clips, frames, width), none 0")
    return x


def _labels(split, s, task, classes, scale, own):
    if "regression_labels" not in split:
        raise DataError(f"split {s} has no 'regression_labels', only {str(list(split))[:80]}")
    with np.errstate(over="ignore"):
        y = _array(split["regression_labels"], f"{s}/regression_labels").astype(np.float32)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise DataError(f"{s}/regression_labels has shape {y.shape}, expected (clips,)")
    if not np.isfinite(y).all():
        raise DataError(f"{s}/regression_labels holds {np.sum(~np.isfinite(y))} values that are "
                        "NaN or infinite, expected numbers: remove those clips")
    if len(y) and np.abs(y).max() > 1.001 * scale:
        raise DataError(f"{s}/regression_labels reach {np.abs(y).max():.4g}, expected at most "
                        f"{scale:g}: is this the file of another dataset?")
    if task == "regression":
        return y
    if not own:
        return np.sign(y).astype(np.int64) + 1               # negative, neutral, positive
    if "classification_labels" not in split:
        raise DataError(f"split {s} has no 'classification_labels', and another split has")
    y = _array(split["classification_labels"], f"{s}/classification_labels")
    return _classes(y, classes, f"{s}/classification_labels")


def _classes(y, classes, name):
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or not np.isin(y, np.arange(classes)).all():
        raise DataError(f"{name} has shape {y.shape} and values {np.unique(y)[:9]}, expected one "
                        f"class from 0 to {classes - 1} per sample")
    return y.astype(np.int64)


def _given_frames(split, s, m, x):
    """(N, frames) bool where the file itself says which frames are real, else None."""
    if m == "text" and "text_bert" in split:
        bert = _array(split["text_bert"], f"{s}/text_bert")
        if bert.shape == (len(x), 3, x.shape[1]):
            return bert[:, 1] != 0                                       # the attention mask
    if m != "text" and f"{m}_lengths" in split:
        lengths = _array(split[f"{m}_lengths"], f"{s}/{m}_lengths").reshape(-1)
        if len(lengths) != len(x):
            raise DataError(f"{s}/{m}_lengths has {len(lengths)} entries for {len(x)} clips")
        return np.arange(x.shape[1]) < lengths[:, None]
    return None


def _resample(x, given, length):
    """(N, frames, width) -> (N, length, width) segment means, and (N,) whether anything was real.

    A clip of r real frames is cut into `length` segments at floor(j r / length); where r < length
    a segment is the one frame it falls on, so frames repeat.
    """
    clips, frames, width = x.shape
    out, present = np.empty((clips, length, width), np.float32), np.empty(clips, bool)
    block = max(1, (1 << 22) // (frames * width))            # bounds the work space to some 100 MB
    for i in range(0, clips, block):
        piece = _finite(x[i:i + block].astype(np.float64))
        real = (piece != 0).any(2) if given is None else given[i:i + block]
        start, stop = real.argmax(1), frames - real[:, ::-1].argmax(1)
        present[i:i + block] = real.any(1)
        edges = start[:, None] + np.arange(length + 1) * (stop - start)[:, None] // length
        first, last = edges[:, :-1], np.maximum(edges[:, 1:], edges[:, :-1] + 1)
        total = np.pad(piece.cumsum(1), ((0, 0), (1, 0), (0, 0)))
        means = (np.take_along_axis(total, last[..., None], 1)
                 - np.take_along_axis(total, first[..., None], 1)) / (last - first)[..., None]
        out[i:i + block] = np.where(real.any(1)[:, None, None], means, 0)
    return out, present


def _finite(x):
    """0 in place of NaN, infinities and what would become infinite in float32."""
    return np.where(np.abs(x) <= np.finfo(np.float32).max, x, 0)


def standardise(splits):
    """In place: zero mean, unit deviation of each feature over the real training steps."""
    for i, x in enumerate(splits["train"].xs):
        rows = np.flatnonzero(splits["train"].mask[i].any(1))
        count = max(1, len(rows) * x.shape[1])
        parts = np.array_split(rows, 1 + x[0].size * len(rows) // (1 << 22))
        mean = sum(x[p].sum((0, 1), dtype=np.float64) for p in parts) / count
        square = sum(((x[p] - mean) ** 2).sum((0, 1)) for p in parts) / count
        deviation = np.sqrt(square)
        deviation[deviation < 1e-6] = 1.                     # a constant feature stays constant
        for split in splits.values():
            split.xs[i] -= mean.astype(np.float32)
            split.xs[i] /= deviation.astype(np.float32)
            split.xs[i] *= split.mask[i][..., None]


# ----------------------------------------------------------------------------- vectors
def _mogonet(path, spec, task, length, tokens):
    if not path.is_dir():
        raise DataError("is no folder, expected one with 1_tr.csv ... labels_te.csv")
    names = [f"{view}_{part}" for part in ("tr", "te") for view in (1, 2, 3, "labels")]
    missing = [name + ".csv" for name in names if not (path / (name + ".csv")).is_file()]
    if missing:
        raise DataError(f"has no {', '.join(missing)}, expected 1_tr.csv, 1_te.csv, 2_..., 3_..., "
                        "labels_tr.csv, labels_te.csv")
    tables = {name: _csv(path / (name + ".csv")) for name in names}
    y = {part: _classes(tables["labels_" + part], spec.classes, f"labels_{part}.csv")
         for part in ("tr", "te")}
    for view in (1, 2, 3):
        shapes = {part: tables[f"{view}_{part}"].shape for part in y}
        if shapes["tr"][1] != shapes["te"][1] or any(shapes[p][0] != len(y[p]) for p in y):
            raise DataError(f"{view}_tr.csv and {view}_te.csv have shapes {shapes['tr']} and "
                            f"{shapes['te']}, expected one width, and {len(y['tr'])} and "
                            f"{len(y['te'])} rows as the labels have")
    valid = _stratified(y["tr"])
    if not valid.any():
        raise DataError(f"has {len(valid)} training rows, too few of each class to keep a fifth "
                        "for validation")
    rows = {"train": ("tr", ~valid), "valid": ("tr", valid), "test": ("te", slice(None))}
    return _cut({s: ([tables[f"{view}_{part}"][r] for view in (1, 2, 3)], y[part][r])
                 for s, (part, r) in rows.items()}, tokens)


def _csv(file):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")                   # an empty file is only a warning
            table = np.loadtxt(file, np.float64, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except (ValueError, UserWarning) as error:
        raise DataError(f"{file.name} is empty, ragged or not numeric "
                        f"({str(error).split(';')[0][:80]}), expected rows of numbers between "
                        "commas") from None
    if not np.isfinite(table).all():
        raise DataError(f"{file.name} holds values that are NaN or infinite, expected numbers")
    return table


def _stratified(y, share=0.2, seed=0):
    """(N,) bool: this share of the rows of each class, drawn at random but always the same."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(y), bool)
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        chosen[rows[:round(share * len(rows))]] = True
    return chosen


def _mmimdb(path, spec, task, length, tokens):
    import h5py
    with h5py.File(path, "r") as file:
        raw = {}
        for name in ("features", "vgg_features", "genres"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise DataError(f"has no {name!r}, only {str(list(file))[:80]}")
            if file[name].ndim != 2 or 0 in file[name].shape or \
                    file[name].dtype.kind not in "biuf":
                raise DataError(f"{name} is {file[name].dtype} of shape {file[name].shape}, "
                                "expected a table of numbers")
            raw[name] = file[name][:]
    genres, rows = raw.pop("genres"), sum(spec.clips)
    if not np.isin(genres, (0, 1)).all() or genres.shape[1] != spec.classes:
        raise DataError(f"genres has {genres.shape[1]} columns and values {np.unique(genres)[:9]}, "
                        f"expected {spec.classes} columns of 0 and 1")
    if any(len(x) != rows for x in (*raw.values(), genres)):
        counts = [len(x) for x in (*raw.values(), genres)]
        raise DataError(f"features, vgg_features and genres have {counts} rows, expected {rows} "
                        f"each: {' + '.join(map(str, spec.clips))} for {', '.join(SPLITS)}")
    bounds = np.cumsum((0, *spec.clips))
    return _cut({s: ([x[i:j] for x in raw.values()], genres[i:j].astype(np.float32))
                 for s, i, j in zip(SPLITS, bounds, bounds[1:])}, tokens)


def _cut(parts, tokens):
    """Per split a list of (N, width) and y -> splits of (N, tokens, ceil(width / tokens))."""
    splits = {}
    for s, (xs, y) in parts.items():
        xs = [_finite(x)[:, None].astype(np.float32) for x in xs]
        splits[s] = Split(xs, np.ones((len(xs), len(y), 1), bool), y)
    standardise(splits)
    for split in splits.values():
        for i, x in enumerate(split.xs):
            width = -(-x.shape[2] // tokens)
            x = np.pad(x[:, 0], ((0, 0), (0, tokens * width - x.shape[2])))
            split.xs[i] = x.reshape(len(x), tokens, width)
    return {s: split._replace(mask=split.mask.repeat(tokens, 2)) for s, split in splits.items()}


LAYOUTS = {"mmsa": ("MMSA pickle", _mmsa), "mogonet": ("MOGONET folder", _mogonet),
           "mmimdb": ("HDF5 file of MM-IMDB", _mmimdb)}


def with_missing(dataset, rate, seed=0):
    """Zero, that is the mean, in place of each input element with probability `rate` (Table 12)."""
    rng = np.random.default_rng(seed)
    for split in dataset.splits.values():
        for x in split.xs:
            for row in x:                                    # row by row bounds the work space
                row[rng.random(row.shape, dtype=np.float32) < rate] = 0


# ----------------------------------------------------------------------------- the stand-in
def synthetic(name, length=None, clips=None, seed=0, task=None, tokens=TOKENS):
    """Made-up data of the shapes of `name`, solvable only by binding two modalities in time.

    Each clip has events. In each, the second modality shows a sign for a while, and a few frames
    later the first shows one; what counts is the product of the two. Either sign alone is a fair
    coin, and no sum of them over time or modalities tells more. A third modality marks where the
    first speaks. The rest: noise. Regression: the mean product, of 3 events. Classification: how
    many products are positive, of one event less than there are classes. mmimdb: label j is whether
    the product of event j modulo 3 is positive.
    """
    spec, rng, splits = SPECS[name], np.random.default_rng(seed), {}
    task = task or spec.tasks[0]
    if spec.layout == "mmsa":
        widths, length = spec.widths, length or 50
    else:
        widths, length = [-(-width // tokens) for width in spec.widths], tokens
    several = spec.layout == "mmimdb"
    events = 3 if task == "regression" or several else spec.classes - 1
    patterns = [rng.standard_normal(width) for width in widths]
    slot = length / events
    duration = max(1, int(slot / 3))
    for s, count in zip(SPLITS, clips or spec.clips):
        xs = [rng.standard_normal((count, length, w), dtype=np.float32) / 2 for w in widths]
        sign, answer = rng.choice([-1., 1.], (2, count, events))
        first = (slot * np.arange(events)).astype(int)
        first = first + rng.integers(0, max(1, int(slot) - 2 * duration - 3), (count, events))
        later = first + duration + rng.integers(0, 4, (count, events))
        for x, pattern, begin, value in zip(xs, patterns, (later, first, later),
                                            (answer, sign, np.abs(answer))):
            for frames in (np.minimum(begin + j, length - 1) for j in range(duration)):
                for k in range(events):
                    x[np.arange(count), frames[:, k]] += value[:, k, None] * pattern
        product = sign * answer
        if several:
            y = (product[:, np.arange(spec.classes) % events] > 0).astype(np.float32)
        elif task == "classification":
            y = (product > 0).sum(1)
        else:
            y = (spec.scale * product.mean(1)).astype(np.float32)
        splits[s] = Split(xs, np.ones((len(xs), count, length), bool), y)
    standardise(splits)
    return Dataset(name, True, splits)
