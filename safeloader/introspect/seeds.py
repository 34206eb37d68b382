"""The numbers that ``seed=`` gives each sample, batch and epoch. Runs in: both.

::

    seed, epoch ──► EpochSeed.key ── of an index, a batch, the order ──► 160 bits ──► generators

What comes out depends on these alone: on no worker and nothing that was drawn before. Each number
is a BLAKE2b digest (RFC 7693, as ``hashlib`` has it) of what it is for, under the epoch's key: 64
bits seed python's generator, 32 numpy's and 32 of 64 torch's, which take no more. So within one
library two samples of a large epoch may share a stream; :func:`sample_rng`, of 128 bits, does not.
"""

from __future__ import annotations

import enum
import io
import pickle
import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from struct import Struct
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from safeloader.introspect.signals import raised_by_signal

SeedPer = Literal["sample", "batch"]
_KEY_BYTES = 16
_SEEDS = Struct("<QIQ")  # python's, numpy's, torch's

# What a number is for: samples and batches are counted alike.
_SAMPLE, _COLLATION, _BATCH, _STREAM, _ORDER, _RNG = (
    b"sample",
    b"collation",
    b"batch",
    b"stream",
    b"order",
    b"rng",
)


class EpochSeed(NamedTuple):
    """What all random numbers of an epoch are made from; picklable.

    Attributes:
        seed: the user's.
        epoch: the loader's own count, from 0.
        per: whether the generators are seeded for each sample, or for each batch.
        rank: of the process. Batches are numbered by each rank for itself, and no two share their
            numbers; a sample is the same on any rank.

    Example:
        >>> EpochSeed(11, 0).order() == EpochSeed(11, 0).order()
        True
        >>> EpochSeed(11, 0).order() == EpochSeed(11, 1).order()
        False
    """

    seed: int
    epoch: int
    per: SeedPer = "sample"
    rank: int = 0

    @property
    def key(self) -> bytes:
        """The epoch's: each of its numbers is made under it."""
        told = f"{self.seed} {self.epoch}".encode()
        return blake2b(told, digest_size=_KEY_BYTES, person=b"safeloader epoch").digest()

    def order(self) -> int:
        """What seeds the generator that a sampler draws from: 64 bits."""
        return int.from_bytes(_digest(self.key, _ORDER, b"", 8), "little", signed=True)

    def of_batch(self, number: int) -> BatchSeed:
        """What a worker has to know for batch ``number``."""
        return BatchSeed(self.seed, self.epoch, number, self.rank)

    def fields_of_batch(self, number: int) -> tuple[int, int, int, int]:
        """The same as a plain tuple, whose class need not cross; hot path."""
        return self.seed, self.epoch, number, self.rank


class BatchSeed(NamedTuple):
    """What the random numbers of a batch are made from; it goes with each task."""

    seed: int
    epoch: int
    batch: int
    rank: int = 0

    @property
    def bytes(self) -> bytes:
        """What stands for the batch; those of rank 0 as if there were no ranks."""
        return b"%d of %d" % (self.batch, self.rank) if self.rank else b"%d" % self.batch


class SeededAs(NamedTuple):
    """What a sample's numbers were made from, kept with its failure."""

    batch: BatchSeed
    per: SeedPer


def _digest(key: bytes, purpose: bytes, what: bytes, size: int) -> bytes:
    return blake2b(what, digest_size=size, key=key, person=purpose).digest()


def bytes_of(index: Any) -> bytes:
    """What stands for an index, in each process the same, however the sampler wraps the number.

    >>> bytes_of(3) == bytes_of(np.int64(3)) == bytes_of(torch.tensor(3))
    True
    >>> bytes_of("a"), bytes_of([1, "b"])
    (b"'a'", b"(1, 'b')")
    """
    if type(index) is int:
        return b"%d" % index
    try:
        return repr(_plain(index)).encode("utf-8", "surrogatepass")
    except Exception as exc:  # what cannot be pickled comes to no worker
        if raised_by_signal(exc):
            raise
        return type(index).__qualname__.encode()


def _plain(index: Any) -> Any:
    """Numbers, texts and tuples of these; of an object its pickle."""
    kind = type(index)
    if kind in (str, bytes, float, complex, type(None)):
        return index
    if issubclass(kind, tuple | list):
        return tuple(map(_plain, index))
    if issubclass(kind, int | np.integer):
        return int(index)
    if issubclass(kind, enum.Enum):
        return kind.__qualname__, index.name
    if issubclass(kind, np.generic | np.ndarray | torch.Tensor):
        return _plain(index.tolist())
    if kind is dict:
        return ("dict", *((_plain(key), _plain(value)) for key, value in index.items()))
    if kind is slice:
        return "slice", index.start, index.stop, index.step
    if issubclass(kind, set | frozenset):  # texts lie in another order in each process
        return ("set", *sorted(map(bytes_of, index)))
    raw = io.BytesIO()
    _ByClassName(raw, 4).dump(index)
    return raw.getvalue()


class _ByClassName(pickle.Pickler):
    """Leaves modules out: a script's own is ``__main__`` here, ``__mp_main__`` where spawned."""

    def persistent_id(self, thing: object) -> str | None:
        """A class by its name, and all else as it is."""
        return thing.__qualname__ if isinstance(thing, type) else None


def batch_of_stream(row: int, first: int) -> bytes:
    """What stands for a batch of a worker's stream: its place there.

    Which of the epoch's batches it is depends, near the end of the streams, on who comes first.
    """
    return b"%d %d" % (row, first)


class Seeder:
    """Seeds the global generators of this process, for one loader; hot path: 7 us a seeding.

    Args:
        per: whether for each sample and each collation, or for each batch.

    Attributes:
        key: the epoch's.
    """

    def __init__(self, per: SeedPer) -> None:
        self.per = per
        self._each = per == "sample"
        self._of: tuple[int, int] | None = None  # seed and epoch
        self.key = self._batch = b""
        self._keyed: dict[bytes, Any] = {}  # by purpose, a digest that has its key

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.per,)

    def begin(self, seed: int, epoch: int) -> None:
        """What follows is of this epoch."""
        if self._of != (seed, epoch):
            self.key = key = EpochSeed(seed, epoch).key
            self._keyed = {
                purpose: blake2b(digest_size=_SEEDS.size, key=key, person=purpose)
                for purpose in (_SAMPLE, _COLLATION, _BATCH, _STREAM)
            }
            self._of = seed, epoch

    def batch(self, what: bytes) -> None:
        """A batch begins, of which there is no other ``what`` in the epoch."""
        self._batch = what
        NOW[0] = None
        if not self._each:
            self._seed(_BATCH, what)

    def sample(self, index: Any) -> None:
        """A sample is about to be fetched; hot path."""
        NOW[0] = self.key, index
        if self._each:
            self._seed(_SAMPLE, b"%d" % index if type(index) is int else bytes_of(index))

    def collation(self) -> None:
        """The samples of the batch are there, and are about to be collated."""
        NOW[0] = None
        if self._each:
            self._seed(_COLLATION, self._batch)

    def stream(self, worker: int) -> None:
        """The dataset is about to be asked for its iterator."""
        NOW[0] = None
        self._seed(_STREAM, b"%d" % worker)

    def _seed(self, purpose: bytes, what: bytes) -> None:
        keyed = self._keyed[purpose].copy()  # that takes half as long as anew
        keyed.update(what)
        _seed(keyed.digest())

    def of_stream(self, row: int, number: int, size: int) -> None:
        """A sample that a worker's stream gave in an earlier run is about to be read again.

        Args:
            row: the worker.
            number: of the sample, in its stream.
            size: of its batches.
        """
        if number % size == 0:
            self.batch(batch_of_stream(row, number))
        self.sample((row, number))

    def before_collation(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``collate``, with the generators seeded first."""

        def seeded(samples: Any) -> Any:
            self.collation()
            return collate(samples)

        return seeded


# Not by way of `random.seed`, which looks at the kind of number first: that takes a third as long.
_shared: Any = getattr(random.seed, "__self__", None)
_seed_shared: Any = super(random.Random, _shared).seed if _shared is not None else random.seed


_unpack, _seed_torch = _SEEDS.unpack, torch.default_generator.manual_seed


def _seed(digest: bytes) -> None:
    python, numpy, of_torch = _unpack(digest)
    _seed_shared(python)
    if _shared is not None:
        _shared.gauss_next = None
    _seed_torch(of_torch)
    try:
        np.random.seed(numpy)
    except TypeError:  # the program put a generator of another kind in its place
        return


# The epoch's key and the index of the sample that is being fetched; a list, to be written into.
NOW: list[tuple[bytes, Any] | None] = [None]


def sample_now() -> tuple[bytes, Any] | None:
    """What :func:`sample_rng` goes by; None where no sample is being fetched."""
    return NOW[0]


def sample_is(now: tuple[bytes, Any] | None) -> None:
    """Put it back: a dataset may hold a loader of its own, which fetches in between."""
    NOW[0] = now


def called_in(seed: int, dataset: Any, index: Any) -> Any:
    """``dataset[index]`` with the :func:`sample_rng` of epoch 0; nothing is seeded."""
    before = sample_now()
    sample_is((EpochSeed(seed, 0).key, index))
    try:
        return dataset[index]
    finally:
        sample_is(before)


def iterated_in(seed: int, dataset: Any) -> Iterator[Any]:
    """The samples of a stream, in the same way."""
    key, before = EpochSeed(seed, 0).key, sample_now()
    stream = iter(dataset)
    number = 0
    while True:
        sample_is((key, (0, number)))
        try:
            sample = next(stream)
        except StopIteration:
            return
        finally:
            sample_is(before)
        yield sample
        number += 1


def sample_rng() -> np.random.Generator:
    """A NumPy generator of the sample that is being fetched, made from seed, epoch and index.

    For what is drawn within ``__getitem__`` of a dataset (of a stream, within ``__next__``) under a
    loader with ``seed=``. Each call gives a new one, which begins anew: call it once a sample. It
    gives the same numbers on whatever worker, rank or machine, at any batch size and with any
    ``seed_per=``. It is a Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
    2011) with a key of 128 bits, so no two samples share a stream.

    Returns:
        The generator.

    Raises:
        RuntimeError: where no sample is being fetched by a loader with ``seed=``, or a batch is
            made in one call (``__getitems__``).

    Example:
        >>> from safeloader import SafeDataLoader, sample_rng
        >>> class Noise:
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return sample_rng().integers(100)
        >>> one = [batch.tolist() for batch in SafeDataLoader(Noise(), batch_size=4, seed=11)]
        >>> two = [batch.tolist() for batch in SafeDataLoader(Noise(), batch_size=2, seed=11)]
        >>> one[0] == two[0] + two[1]
        True
    """
    now = NOW[0]
    if now is None:
        raise RuntimeError(
            "sample_rng() belongs to a sample that a loader with seed= is fetching, and there is "
            "none here: call it in __getitem__ (not in __getitems__ or collate_fn) under a loader "
            "with seed=; loader.replay(index, epoch=0) calls dataset[index] with it"
        )
    key, index = now
    number = int.from_bytes(_digest(key, _RNG, bytes_of(index), _KEY_BYTES), "little")
    return np.random.Generator(np.random.Philox(key=number))
