"""What to do about what a worker cannot inherit, or cannot be sent: one table. Runs in: both.

A handle is told about in three places: where it cannot be pickled (spawn), where it does not
survive a fork, and where a worker hangs or fails over it. They say the same, and what they say
cures all three: open it in the worker, on first use. Nobody is sent from one start method to the
other with an object that bears neither. The table is written for a dataset that is asked by index;
:func:`suited` makes of each what fits a stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from safeloader.introspect.values import mro_of, type_name

_FIRST_USE = "on first use in __getitem__"
LAZILY = (
    f"open or make it in the worker, {_FIRST_USE} or in worker_init_fn "
    "(get_worker_info().dataset); until then keep None here"
)
OPEN_THERE = f"open it in the worker, {_FIRST_USE}, and set it to None in __init__"
BY_PATH = (
    f"open it in the worker, by path (np.load(path, mmap_mode='r') {_FIRST_USE}), or hold an array "
    "as a torch tensor, which is shared and not sent"
)
_SHARES = "give each worker its share by get_worker_info()"


class Hazard(NamedTuple):
    """Why something does not survive a fork, and what to do about it."""

    why: str
    cure: str


CONNECTION = Hazard(
    "after a fork all use this one connection: replies get mixed up or lost", LAZILY
)
HANDLE = Hazard("its library rules out use after a fork: reads can fail, hang or be wrong", LAZILY)
VIDEO = Hazard(
    "forked processes share its read position, and have none of its decoder's threads: frames can "
    "be wrong, or reading hangs",
    LAZILY,
)
FILE = Hazard(
    "forked processes share one read position: what one reads, the others skip",
    f"{LAZILY}; or read it by os.pread or np.memmap",
)
CUDA = Hazard("CUDA cannot be re-initialized in a forked process", "keep what is here on the CPU")
LOCK = Hazard("held now: the copy in the worker will never be released", LAZILY)
THREAD = Hazard(
    "threads do not exist in a forked process: what waits for one waits for ever", LAZILY
)
NATIVE = Hazard(
    "what its library keeps outside Python, as threads, locks and read positions, is not the "
    "worker's own",
    LAZILY,
)
GENERATOR = Hazard("a copy in the same state", "seed it per worker")  # in full: fork_hazards
WAITED_FOR = (LOCK.why, THREAD.why)

# By top package and own name, as what lies between moves with releases. (``Environment`` is lmdb's
# compiled one, which tells no module.)
_CLASSES: tuple[tuple[Hazard, str], ...] = (
    (GENERATOR, "numpy.Generator numpy.RandomState numpy.BitGenerator"),
    (GENERATOR, "random.Random torch.Generator"),
    (CONNECTION, "asyncpg.Connection pymongo.MongoClient botocore.BaseClient"),
    (CONNECTION, "boto3.ServiceResource grpc.Channel fsspec.AsyncFileSystem"),
    (CONNECTION, "psycopg2.connection psycopg.BaseConnection pymysql.Connection"),
    (CONNECTION, "MySQLdb.connection mysql.MySQLConnectionAbstract"),
    (CONNECTION, "sqlite3.Connection _socket.socket"),
    (HANDLE, "lmdb.Environment Environment _duckdb.DuckDBPyConnection h5py.HLObject"),
    (VIDEO, "cv2.VideoCapture decord.VideoReader decord.AudioReader"),
    (FILE, "_io.FileIO"),
    (CUDA, "torch.Tensor"),
    (LOCK, "_thread.lock _thread.RLock"),
    (THREAD, "threading.Condition threading.Thread multiprocessing.DummyProcess"),
)
HAZARDS = {name: hazard for hazard, names in _CLASSES for name in names.split()}
_SOURCES = (CONNECTION, HANDLE, VIDEO, FILE)
_HANDLES = (*_SOURCES, LOCK, THREAD)

# What only pickling minds: a forked worker has each as it is.
MODULE_LEVEL = "define it at module level"
FUNCTION = "define it at module level; functools.partial binds arguments"
LIST_FIRST = "make a list of it, list(...), before it is sent"
IMPORT_THERE = "import it where it is used, and leave it out in __getstate__"
DETACH = "call .detach() on it, or compute it under torch.no_grad()"
TO_CPU = "copy it to the CPU, .cpu(), first"
FLAT = "keep its parts in one flat list, referring to each other by their places in it"
MP_CONTEXT = "make it by the context that starts the workers: get_context('spawn').Lock()"
PART_OF_DATASET = (
    "only a process that is being started can be given it: make it part of the dataset"
)
NOT_IN_BATCH = "leave it out, or give what was read from it in its place"
MEND_HOOK = "mend its {hook}, or leave it out in __getstate__ of what holds it"
# Behind the advice on what a fork would carry over soundly.
FORK_DOES_WITHOUT = "multiprocessing_context='fork' does without pickling"


def class_key(cls: type) -> str:
    """The top package and own name of a class, as the tables have it.

    >>> class_key(re.Pattern)
    're.Pattern'
    """
    return re.sub(r"\..*\.", ".", type_name(cls))


def is_handle(cls: type) -> bool:
    """Say whether what a class makes is to be opened in the worker, whatever starts it.

    >>> import socket
    >>> is_handle(socket.socket), is_handle(re.Pattern)
    (True, False)
    """
    return _is_one_of(cls, _HANDLES)


def _is_one_of(cls: type, hazards: Iterable[Hazard]) -> bool:
    known = (HAZARDS.get(class_key(each)) for each in mro_of(cls))
    return any(hazard is each for hazard in known for each in hazards)


def is_read_from(cls: type) -> bool:
    """Say whether samples are read from what a class makes, from its beginning by each worker.

    >>> import socket
    >>> is_read_from(socket.socket), is_read_from(re.Pattern)
    (True, False)
    """
    return _is_one_of(cls, _SOURCES)


def suited(advice: str, *, stream: bool, shared: bool = False) -> str:
    """Give a sentence of advice as it suits the kind of the dataset.

    A stream has no ``__getitem__``: what is opened, is opened in ``__iter__``. Workers that each
    open what all read from then read all of it, unless each is given a part.

    Args:
        advice: from this table; what names no method is given back as it is.
        stream: whether the dataset is an ``IterableDataset``.
        shared: whether several workers read from what is spoken of.

    >>> suited(OPEN_THERE, stream=True, shared=True).partition(";")[0]
    'open it in the worker, in __iter__, and set it to None in __init__'
    >>> suited(OPEN_THERE, stream=False, shared=True) == OPEN_THERE
    True
    """
    if not stream or _FIRST_USE not in advice:
        return advice
    return advice.replace(_FIRST_USE, "in __iter__") + f"; and {_SHARES}" * shared


def next_step(advice: str) -> str:
    """Put a sentence of advice as it stands behind ``next: ``.

    >>> next_step("Leave it out.")
    'leave it out'
    """
    return advice[:1].lower() + advice[1:].rstrip(".")


# ---- threads of libraries

# By the name that the kernel has for the thread (15 characters): whose it is.
_THREADS = (
    (r"polars-\d+", "polars"),
    (r"av:.*", "PyAV (FFmpeg)"),
    (r"tokio-.*", "tokio (the runtime of libraries written in Rust)"),
    (r"rayon-.*", "rayon (the pool of libraries written in Rust)"),
    (r"(?:arrow|cpu|io)-pool.*|arrow-.*", "Arrow"),
    (r"tf_.*|tfrt.*|TF_.*", "TensorFlow"),
    (r"grpc.*|event_engine|resolver-execut|default-execut", "gRPC"),
    (r"omp[-_].*|libgomp.*|OMP.*", "OpenMP"),
    (r"openblas.*|mkl.*", "BLAS"),
    (r"cuda.*", "CUDA"),
    (r"fsspecIO", "fsspec"),
    (r"zarr_.*", "zarr"),
    (r"dali.*|\[?DALI.*", "DALI"),
    (r"duckdb.*", "duckdb"),
)
_THREAD = re.compile("|".join(f"({pattern})" for pattern, _ in _THREADS))
# What the top package of a frame, or the name in a line, says of whose code hangs.
_OWN_NAMES = {
    "av": "PyAV (FFmpeg)",
    "cv2": "OpenCV",
    "fsspec": "fsspec",
    "grpc": "gRPC",
    "pa": "Arrow",
    "pl": "polars",
    "polars": "polars",
    "pyarrow": "Arrow",
    "tensorflow": "TensorFlow",
    "tf": "TensorFlow",
    "zarr": "zarr",
    "duckdb": "duckdb",
}
_OPENCV = "cv2.setNumThreads(0) before the workers start, or in worker_init_fn"


def library_of_thread(name: str) -> str:
    """Name the library that a native thread is of, by the thread's name; "" of an unknown one.

    >>> [library_of_thread(name) for name in ("polars-3", "av:mpeg4:df0", "python")]
    ['polars', 'PyAV (FFmpeg)', '']
    """
    found = _THREAD.fullmatch(name)
    return _THREADS[found.lastindex - 1][1] if found and found.lastindex else ""


def library_called(package: str) -> str:
    """Name a library as people do, by its package, or by the alias that programs import it as.

    >>> library_called("cv2"), library_called("decord"), library_called("pl")
    ('OpenCV', 'decord', 'polars')
    """
    return _OWN_NAMES.get(package, package)


def aliases() -> Iterable[str]:
    """The names by which native libraries are called in a line of a program."""
    return _OWN_NAMES


def without_threads(library: str) -> str:
    """What to do about a library whose threads did not survive the fork."""
    if library == "OpenCV":
        return f"{_OPENCV}; or multiprocessing_context='forkserver'"
    return (
        f"use {library.partition(' (')[0]} in the workers alone, not before they start; or "
        "multiprocessing_context='forkserver', which starts workers without what ran here"
    )
