"""The programs of the gallery: each brings one kind of text about, for real, and is small and fast.

What lasts long elsewhere (5 s until workers are ready, a minute without a batch, memory that grows)
is made short by setting the constant of the module that waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import logging
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

import safeloader
from safeloader import GlobalBatchSampler, SafeDataLoader, checks
from safeloader.examining import looks, speed
from safeloader.global_batches import Tail
from safeloader.main import looks as main_looks
from safeloader.main import reporting_workers
from safeloader.provenance import batch_log
from safeloader.supervision import growth, kept_batches

Run = Callable[[], object]


class Program(NamedTuple):
    """A program of the gallery, and where its text stands."""

    section: str
    title: str
    name: str
    run: Run


PROGRAMS: list[Program] = []
_section = [""]


def section(title: str) -> None:
    """What follows stands under this title."""
    _section[0] = title


def shown(title: str) -> Callable[[Run], Run]:
    """A program whose text stands in the page under ``title``."""

    def note(run: Run) -> Run:
        PROGRAMS.append(Program(_section[0], title, getattr(run, "__name__", title), run))
        return run

    return note


def read(dataset: Any, epochs: int = 1, **more: Any) -> SafeDataLoader[Any]:
    """Iterate a loader over ``dataset``."""
    loader: SafeDataLoader[Any] = SafeDataLoader(dataset, **{"batch_size": 4} | more)
    for _ in range(epochs):
        for _ in loader:
            pass
    return loader


def refused(*calls: Callable[[], object]) -> None:
    """What each call raises, a line each."""
    for call in calls:
        try:
            call()
        except Exception as exc:
            print(f"{type(exc).__name__}: {exc}")
        else:
            print("nothing was raised")


BAD = 5


class Photos(Dataset[Any]):
    """Sixteen small samples; at index 5 what a subclass does in ``bad`` is done."""

    def __init__(self, length: int = 16) -> None:
        self.files = [f"photos/{k:03d}.jpg" for k in range(length)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.bad(index) if index == BAD else self.good(index)

    def good(self, index: int) -> Any:
        return {"image": torch.full((3,), float(index)), "label": index}

    def bad(self, index: int) -> Any:
        return self.good(index)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Samples that fail")


class LostField(Photos):
    def bad(self, index: int) -> Any:
        record = {"label": 3}
        return record["image"]


@shown("a record has lost a field; two workers")
def field() -> None:
    read(LostField(), num_workers=2)


@shown("the same, num_workers=0")
def field_in_main() -> None:
    read(LostField())


class LostFile(Photos):
    def bad(self, index: int) -> Any:
        with open(self.files[index], "rb") as file:
            return file.read()


@shown("a file is missing")
def missing_file() -> None:
    read(LostFile(), num_workers=2)


class Stops(Photos):
    def bad(self, index: int) -> Any:
        return next(iter(()))


@shown("a StopIteration leaks out of __getitem__")
def stop_iteration() -> None:
    read(Stops(), num_workers=2)


class TooLong(Dataset[Any]):
    def __init__(self) -> None:
        self.files = ["a.jpg", "b.jpg", "c.jpg"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return len(self.files[index])


@shown("__len__ says more than there is")
def too_long() -> None:
    read(TooLong(), num_workers=1)


class Numbers(Dataset[Any]):
    def __init__(self, length: int = 16) -> None:
        self.items = list(range(length))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> int:
        return self.items[index]


@shown("a sampler draws an index that the dataset does not have")
def outside() -> None:
    read(Numbers(), sampler=[1, 2, 16], num_workers=1)


@shown("a dataset grows after its persistent workers have started")
def grew() -> None:
    dataset = Numbers(8)
    loader = SafeDataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    list(loader)
    dataset.items += range(8, 16)
    list(loader)


@shown("under a Subset")
def subset() -> None:
    read(Subset(LostField(), [2, 3, 4, 5]), num_workers=1)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for k in range(8):
            yield 1 / (k - 6)


@shown("a stream (IterableDataset) raises")
def stream_raises() -> None:
    read(Stream(), num_workers=1)


class Full(Photos):
    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def bad(self, index: int) -> Any:
        raise OSError(self.code, os.strerror(self.code), self.files[index])


@shown("too many open files")
def too_many_files() -> None:
    read(Full(errno.EMFILE), num_workers=1)


@shown("a full disk")
def full_disk() -> None:
    read(Full(errno.ENOSPC), num_workers=1)


class Large(Photos):
    def bad(self, index: int) -> Any:
        raise MemoryError


@shown("a MemoryError")
def memory_error() -> None:
    read(Large(), num_workers=1)


class Together(Photos):
    def __getitems__(self, indices: list[int]) -> Any:
        return [{"image": [][index], "label": index} for index in indices]


@shown("__getitems__ fails where dataset[i] does not")
def getitems_fails() -> None:
    read(Together(), num_workers=1)


class Database(Photos):
    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect("labels.db")
        self.connection.execute("create table if not exists labels (id int, label int)")

    def good(self, index: int) -> Any:
        return self.connection.execute("select count(*) from labels").fetchone()[0]

    def bad(self, index: int) -> Any:
        if get_worker_info() is not None:  # as the library has it, sooner or later
            raise sqlite3.DatabaseError("database disk image is malformed")
        return self.good(index)


@shown("a database connection of the dataset is inherited by the workers, and fails there")
def connection() -> None:
    read(Database(), num_workers=1)


class Archive(Photos):
    def __init__(self) -> None:
        super().__init__()
        with zipfile.ZipFile("photos.zip", "w") as archive:
            for name in self.files:
                archive.writestr(name, os.urandom(2000))
        self.archive = zipfile.ZipFile("photos.zip")

    def good(self, index: int) -> Any:
        return torch.frombuffer(bytearray(self.archive.read(self.files[index])), dtype=torch.uint8)


def bad_start(worker: int) -> None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/scratch/cache")


@shown("worker_init_fn raises")
def init() -> None:
    read(Photos(), num_workers=2, worker_init_fn=bad_start)


class Draws(Sampler[int]):
    def __init__(self, said: int, gave: int, error: bool = False) -> None:
        self.said, self.gave, self.error = said, gave, error

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[int]:
        yield from range(self.gave)
        if self.error:
            raise KeyError("weights")


@shown("the sampler raises")
def sampler_raises() -> None:
    read(Photos(), sampler=Draws(16, 6, error=True), num_workers=1)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Batches that fail")


class OtherShape(Photos):
    def bad(self, index: int) -> Any:
        return {"image": torch.zeros(4), "label": index}


@shown("one sample has another shape")
def shape() -> None:
    read(OtherShape(), num_workers=2)


class OtherKeys(Photos):
    def bad(self, index: int) -> Any:
        return {"label": index}


@shown("one sample lacks a key")
def key_is_missing() -> None:
    read(OtherKeys(), num_workers=2)


class Nothing(Photos):
    def bad(self, index: int) -> Any:
        return None


@shown("one sample is None")
def none() -> None:
    read(Nothing(), num_workers=2)


class Ragged(Photos):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(index + 1)


@shown("every sample has a shape of its own")
def ragged() -> None:
    read(Ragged(), num_workers=2)


def bad_collate(samples: list[Any]) -> Any:
    return torch.stack([each["image"] for each in samples]) @ torch.zeros(2)


@shown("collate_fn raises")
def collate() -> None:
    read(Photos(), num_workers=2, collate_fn=bad_collate)


def as_list(samples: list[Any]) -> list[Any]:
    return samples


class Locked(Photos):
    def bad(self, index: int) -> Any:
        return {"image": torch.zeros(3), "meta": [threading.Lock()]}


@shown("a sample holds what cannot be pickled")
def unpicklable() -> None:
    read(Locked(), num_workers=2, collate_fn=as_list)


class Scaled(Photos):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda value: value / 255


@shown("the dataset holds a lambda; spawn")
def unpicklable_dataset() -> None:
    read(Scaled(), num_workers=1, multiprocessing_context="spawn")


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("validate=")


class NotFinite(Photos):
    def bad(self, index: int) -> Any:
        return {"image": torch.tensor([0.5, float("nan"), float("inf")]), "label": index}


@shown("checks.finite(): a NaN")
def finite() -> None:
    read(NotFinite(), num_workers=1, validate=checks.finite())


@shown("checks.schema(): one sample is another than the first")
def schema() -> None:
    read(OtherShape(), num_workers=1, validate=checks.schema())


@shown("checks.schema(like=...): none is as it should be")
def schema_like() -> None:
    like = {"image": torch.zeros(3, 8, 8), "label": 0}
    read(Photos(), num_workers=1, validate=checks.schema(like=like))


class ByWorker(Photos):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return torch.zeros(2 if info is None or info.id else 3)


@shown("checks.schema(): the workers' samples differ")
def schema_of_workers() -> None:
    read(ByWorker(), num_workers=2, validate=checks.schema())


@shown("checks.in_range(0, 1, at='image')")
def in_range() -> None:
    read(Photos(), num_workers=1, validate=checks.in_range(0, 1, at="image"))


class Twice(Photos):
    def __getitem__(self, index: int) -> Any:
        return {"id": index % 12}


def identity(sample: Any) -> Any:
    return sample["id"]


@shown("checks.unique(key): two indices give one key")
def unique() -> None:
    read(Twice(), num_workers=2, validate=checks.unique(identity))


def refuses(sample: Any, index: int) -> None:
    if sample["label"] == BAD:
        raise ValueError("label 5 is reserved")


@shown("a check of one's own raises; on_error='skip'")
def own_check() -> None:
    loader = read(Photos(), num_workers=1, validate=refuses, on_error="skip")
    print(loader.audit)


def bad_key(sample: Any) -> Any:
    return sample["identity"]


@shown("key= raises")
def key_raises() -> None:
    read(Photos(), num_workers=1, key=bad_key)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Workers that die or hang")


class Killed(Photos):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def bad(self, index: int) -> Any:
        os.kill(os.getpid(), self.number)
        time.sleep(60)


@shown("a worker is killed (SIGKILL)")
def killed() -> None:
    read(Killed(signal.SIGKILL), num_workers=1)


@shown("a worker is told to end (SIGTERM)")
def terminated() -> None:
    read(Killed(signal.SIGTERM), num_workers=1)


class Crashes(Photos):
    def bad(self, index: int) -> Any:
        return ctypes.string_at(0)


@shown("a native library crashes (SIGSEGV)")
def crashes() -> None:
    read(Crashes(), num_workers=1)


class Exits(Photos):
    def bad(self, index: int) -> Any:
        sys.exit(3)


@shown("sys.exit() in __getitem__")
def exits() -> None:
    read(Exits(), num_workers=1)


class Leaves(Photos):
    def bad(self, index: int) -> Any:
        os._exit(3)


@shown("os._exit() in __getitem__")
def leaves() -> None:
    read(Leaves(), num_workers=1)


class Sleeps(Photos):
    def bad(self, index: int) -> Any:
        time.sleep(60)


@shown("a worker hangs; timeout=1")
def hangs() -> None:
    read(Sleeps(), num_workers=1, timeout=1)


class Waits(Photos):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def bad(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.good(index)


@shown("no batch comes for a while; stall_after=0.5, no timeout=")
def stalls() -> None:
    read(Waits(1.9), num_workers=1, stall_after=0.5)


class Deadlocked(Photos):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def bad(self, index: int) -> Any:
        with self.lock:
            return self.good(index)


@shown("a lock that another thread holds is inherited by the workers; timeout=1")
def deadlock() -> None:
    dataset = Deadlocked()
    with dataset.lock:
        read(dataset, num_workers=1, timeout=1)


NO_GUARD = """
import torch
from safeloader import SafeDataLoader

for batch in SafeDataLoader(
    [torch.zeros(1)] * 8, num_workers=1, multiprocessing_context="spawn"
):
    pass
"""


def ran(text: str, *before: str) -> None:
    """A program of its own, and the end of what it says."""
    Path("train.py").write_text(text)
    words = [sys.executable, *before, "train.py"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    print(said[max(0, said.rfind("safeloader.errors")) :])


@shown("spawn, and no if __name__ == '__main__'")
def no_guard() -> None:
    ran(NO_GUARD)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("What was drawn is not what came")


class Fewer(Photos):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices if index != BAD]


@shown("__getitems__ gives 3 samples for 4 indices")
def fewer() -> None:
    read(Fewer(), num_workers=1)


class Keys(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for k in range(12):
            yield {"id": f"key {k}"}


@shown("a stream that every worker reads whole; key=")
def same_keys() -> None:
    read(Keys(), num_workers=2, key=identity, batch_size=8)


@shown("the same; verify='warn'")
def same_keys_warned() -> None:
    loader = read(Keys(), num_workers=2, key=identity, verify="warn", batch_size=8)
    print(loader.audit)


class Again(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for k in (0, 1, 2, 1):
            yield {"id": k}


@shown("a stream in which one worker gives a key twice; key=")
def one_worker_twice() -> None:
    read(Again(), num_workers=1, key=identity)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Going on in spite of it")


@shown("on_error='skip'")
def skip() -> None:
    print(read(LostField(), num_workers=2, on_error="skip").audit)


@shown("on_error='replace'")
def replace() -> None:
    print(read(LostField(), num_workers=2, on_error="replace").audit)


@shown("on_error='skip', and a whole batch fails")
def skip_batch() -> None:
    print(read(Subset(LostField(), [0, 1, 5]), batch_size=1, on_error="skip").audit)


class Flaky(Photos):
    tries = 0

    def bad(self, index: int) -> Any:
        self.tries += 1
        if self.tries < 2:
            raise ConnectionError("the share did not answer")
        return self.good(index)


@shown("retries=1: it comes the second time")
def late() -> None:
    print(read(Flaky(), num_workers=1, retries=1).audit)


@shown("retries=1, and it does not come")
def retried() -> None:
    read(LostField(), num_workers=1, retries=1)


class Several(Photos):
    def __getitem__(self, index: int) -> Any:
        if index % 4 == 1:
            raise ValueError("unreadable")
        return index


@shown("more than max_skipped=2 fail")
def too_many() -> None:
    read(Several(), on_error="skip", max_skipped=2)


class AllBad(Photos):
    def __getitem__(self, index: int) -> Any:
        raise ValueError("unreadable")


@shown("twenty in a row fail")
def in_a_row() -> None:
    read(AllBad(40), on_error="skip", max_skipped=1000)


@shown("on_error='replace', and all of a batch fail")
def no_donor() -> None:
    read(AllBad(), on_error="replace")


def bad_decision(failure: Any) -> Any:
    return 1 / 0


@shown("the callable given as on_error= raises")
def on_error_raises() -> None:
    read(LostField(), on_error=bad_decision)


class DiesOnce(Photos):
    def bad(self, index: int) -> Any:
        if not os.path.exists("died"):
            Path("died").touch()
            os._exit(1)
        return self.good(index)


@shown("on_crash='restart': a worker dies once")
def restart() -> None:
    read(DiesOnce(), num_workers=1, on_crash="restart")


@shown("on_crash='restart': a sample kills its worker twice")
def kills_twice() -> None:
    print(read(Leaves(), num_workers=1, on_crash="restart").audit)


class DiesOften(Photos):
    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            os._exit(1)
        return index


@shown("on_crash='restart': workers die wherever they are")
def gives_up() -> None:
    read(DiesOften(64), num_workers=1, on_crash="restart", batch_size=8)


@shown("on_failure_dump='failures'")
def dumped() -> None:
    read(LostField(), num_workers=1, on_failure_dump="failures", on_error="skip")


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Warnings at the start")


class Owns(Photos):
    def __init__(self, **owned: Any) -> None:
        super().__init__()
        vars(self).update(owned)


@shown("the dataset holds a random generator")
def generator() -> None:
    read(Drawing(rng=np.random.default_rng(3)), num_workers=2)


@shown("the same under seed=, num_workers=0")
def generator_beside_seed() -> None:
    read(Drawing(rng=np.random.default_rng(3)), seed=11)


class Drawing(Owns):
    rng: Any

    def good(self, index: int) -> Any:
        return self.rng.random()


@shown("the dataset holds an open ZIP archive")
def archive() -> None:
    read(Owns(archive=Archive().archive), num_workers=2)


@shown("the dataset holds a file that is open, and read in the workers")
def open_file() -> None:
    Path("frames.bin").write_bytes(bytes(16_000))
    read(Frames(), num_workers=2, batch_size=1)


class Frames(Photos):
    def __init__(self) -> None:
        super().__init__()
        self.file = open("frames.bin", "rb", buffering=0)  # noqa: SIM115

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.02)  # so that the workers take turns
        self.file.seek(1000 * index)
        return len(self.file.read(1000))


class Base(Photos):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self.good(index) for index in indices]


class Augmented(Base):
    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        sample["image"] = sample["image"].flip(0)
        return sample


@shown("a class whose __getitem__ augments, and whose __getitems__ is inherited")
def two_ways() -> None:
    read(Augmented())


class Known(IterableDataset[Any]):
    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Any]:
        yield from range(12)


@shown("a stream with a __len__ that every worker reads whole")
def stream_with_length() -> None:
    print(read(Known(), num_workers=2).audit)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Data that is wrong")


class Reshuffles(Numbers):
    done = False

    def __getitem__(self, index: int) -> int:
        if not self.done:
            self.done = True
            random.Random(torch.initial_seed()).shuffle(self.items)
        return self.items[index]


@shown("each worker shuffles its copy of the dataset")
def reshuffles() -> None:
    read(Reshuffles(24), num_workers=2)


@shown("the same, with key=")
def reshuffles_keyed() -> None:
    read(Reshuffles(24), num_workers=2, key=int)


class Drops(Numbers):
    def __getitem__(self, index: int) -> int:
        info = get_worker_info()
        if info is not None and info.id == 0 and len(self.items) == 24:
            self.items.pop()
        return self.items[index % len(self.items)]


@shown("one worker takes an element out of its copy")
def drops() -> None:
    read(Drops(24), num_workers=2)


class Lists(Numbers):
    def __init__(self) -> None:
        super().__init__(24)
        self.items = list(range(24))

    def __getitem__(self, index: int) -> int:
        return self.items[index]


def shuffles_items(worker: int) -> None:
    random.seed(worker)
    random.shuffle(get_worker_info().dataset.items)  # type: ignore[union-attr]


@shown("worker_init_fn shuffles what the dataset holds")
def shuffled_at_the_start() -> None:
    read(Lists(), num_workers=2, worker_init_fn=shuffles_items)


@shown("dataset.items is set anew, and the workers persist")
def set_anew() -> None:
    dataset = Lists()
    loader = SafeDataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    list(loader)
    dataset.items = dataset.items[::-1]
    list(loader)


class OfEpoch(Numbers):
    epoch = 0

    def __init__(self) -> None:
        super().__init__(24)
        self.epoch = 0

    def __getitem__(self, index: int) -> int:
        return 1000 * self.epoch + index


class SetsEpoch(Sampler[int]):
    def __init__(self, dataset: OfEpoch) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        self.dataset.epoch += 1
        yield from range(24)


@shown("the sampler sets dataset.epoch after the fork")
def epoch_behind() -> None:
    dataset = OfEpoch()
    read(dataset, num_workers=2, sampler=SetsEpoch(dataset))


@shown("dataset.epoch is set, and the workers persist")
def epoch_persistent() -> None:
    dataset = OfEpoch()
    loader = SafeDataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        dataset.epoch = epoch
        list(loader)


class Random(Numbers):
    def __init__(self, seed: int | None = None) -> None:
        super().__init__(24)
        self.seed = seed

    def __getitem__(self, index: int) -> float:
        if self.seed is not None:
            random.seed(self.seed)
        return random.random()


def seed_alike(worker: int) -> None:
    random.seed(7)


@shown("worker_init_fn seeds all workers alike")
def seeded_alike() -> None:
    read(Random(), num_workers=2, worker_init_fn=seed_alike, shuffle=True)


@shown("the same, one worker, two epochs")
def seeded_each_epoch() -> None:
    read(Random(), 2, num_workers=1, worker_init_fn=seed_alike, shuffle=True)


@shown("__getitem__ seeds by a fixed number")
def seeded_in_getitem() -> None:
    read(Random(seed=5), num_workers=2, shuffle=True)


class Whole(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for k in range(40):
            yield {"text": f"word {k}"}


@shown("a stream without __len__ and key= that every worker reads whole")
def same_stream() -> None:
    print(read(Whole(), num_workers=2).audit)


class InPlace(Numbers):
    def __init__(self) -> None:
        super().__init__(24)
        self.images = torch.ones(24, 3)

    def __getitem__(self, index: int) -> Any:
        image = self.images[index]
        image *= 2
        return image


@shown("a transform writes into its dataset")
def in_place() -> None:
    read(InPlace(), 2)


class PastTheEnd(Frames):
    def __getitem__(self, index: int) -> Any:
        if len(self.file.read(3000)) < 3000:
            raise ValueError("invalid data")
        return index


@shown("workers share a file's position, and one fails")
def position() -> None:
    reporting_workers.ANSWER_S = 30.0
    Path("frames.bin").write_bytes(bytes(12_000))
    frames = PastTheEnd()
    one = {"batch_size": 1, "prefetch_factor": 1}
    read(frames, num_workers=2, sampler=in_turn(frames.file), **one)


def in_turn(file: Any) -> Any:
    """Draw each index once the one before it was read, so that always the same sample fails."""
    for index in range(16):
        while file.tell() < min(3000 * index, 12_000):
            time.sleep(0.01)
        yield index


class Caches(Numbers):
    def __init__(self) -> None:
        super().__init__(48)
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        return self.cache.setdefault(index, float(index))


@shown("workers fill a cache, and lose it with each epoch")
def lost_cache() -> None:
    read(Caches(), 3, num_workers=2)


class Leaks(Numbers):
    def __init__(self, named: bool) -> None:
        super().__init__(256)
        self.kept: list[Any] = []
        self.named = named

    def __getitem__(self, index: int) -> int:
        (self.kept if self.named else _kept).append(bytearray(1 << 20))
        return index


_kept: list[Any] = []


@shown("a worker's memory grows, and a list of the dataset with it")
def memory() -> None:
    growth.GREW_MIN = 24 << 20
    read(Leaks(named=True), num_workers=1)


@shown("a worker's memory grows, and nothing of the dataset with it")
def memory_elsewhere() -> None:
    growth.GREW_MIN = 24 << 20
    read(Leaks(named=False), num_workers=1)


@shown("the loop keeps every batch")
def kept() -> None:
    vars(kept_batches)["_memory_bytes"] = lambda: 200_000
    loader = SafeDataLoader([torch.zeros(1000) for _ in range(300)], batch_size=4)
    print(len(list(loader)), "batches")


class Rows(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.rows = [{"file": f"{k:08d}.jpg"} for k in range(20_000)]


@shown("workers take more than 5 s to start; spawn")
def slow_spawn() -> None:
    growth.SLOW_START_S = 0.0
    read(Rows(), num_workers=2, multiprocessing_context="spawn")


@shown("the same; fork, worker_init_fn")
def slow_fork() -> None:
    growth.SLOW_START_S = 0.0
    read(Rows(), num_workers=2, worker_init_fn=lambda _: time.sleep(2))


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Audits")


@shown("an epoch that runs, and the same at its end; drop_last")
def audit() -> None:
    loader = SafeDataLoader(Numbers(), batch_size=6, drop_last=True, num_workers=1)
    batches = iter(loader)
    next(batches)
    print(loader.audit)
    list(batches)
    print(loader.audit)


@shown("an epoch that the loop left early")
def left_early() -> None:
    loader = SafeDataLoader(Numbers(), batch_size=4, num_workers=1)
    for _ in loader:
        break
    print(loader.audit)


@shown("an epoch that went on after an error")
def failed() -> None:
    loader = SafeDataLoader(LostField(), batch_size=4)
    batches = iter(loader)
    while True:
        try:
            next(batches)
        except StopIteration:
            break
        except KeyError:
            continue
    print(loader.audit)


@shown("an epoch that an error ended")
def ended_by_error() -> None:
    loader = SafeDataLoader(Leaves(), batch_size=4, num_workers=1)
    with contextlib.suppress(safeloader.WorkerCrashError):
        list(loader)
    print(loader.audit)


@shown("a sampler that draws with replacement")
def repeated() -> None:
    print(read(Numbers(), sampler=RandomSampler(Numbers(), replacement=True)).audit)


@shown("a sampler that gives fewer than it says")
def announced() -> None:
    print(read(Numbers(), sampler=Draws(16, 8)).audit)


@shown("len() of a batch sampler says too little")
def announced_less() -> None:
    print(read(Numbers(), batch_size=1, batch_sampler=BatchSampler(Draws(8, 16), 4, False)).audit)


class Settings:
    def __init__(self) -> None:
        vars(self).update({f"name_{n}": f"{n:04d}" * 20 for n in range(90)})


class Configured(Numbers):
    def __init__(self) -> None:
        super().__init__()
        vars(self).update({f"settings_{k}": Settings() for k in range(10)})


@shown("a dataset of so many attributes that its workers' copies are not compared in all")
def not_compared() -> None:
    print(read(Configured(), num_workers=2).audit)


@shown("one rank of four, by its DistributedSampler; set_epoch is never called")
def ranks() -> None:
    dataset = Numbers(18)
    sampler: Any = DistributedSampler(dataset, num_replicas=4, rank=1)
    print(read(dataset, 2, sampler=sampler).audit)


@shown("one rank of two, by GlobalBatchSampler with each tail=")
def global_batches() -> None:
    dataset = Numbers(18)
    for tail in TAILS:
        sampler = GlobalBatchSampler(len(dataset), 8, 1, 2, tail=tail, shuffle=False)
        print(read(dataset, batch_size=1, batch_sampler=sampler).audit)


TAILS: tuple[Tail, ...] = ("drop", "pad", "uneven")


class BatchSamplerShard(BatchSampler):
    """With the attributes of Accelerate's."""

    def __init__(self, batch_sampler: Any, num_processes: int, process_index: int) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = False
        self.even_batches = True

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self.batch_sampler)[self.process_index :: self.num_processes])


@shown("a rank's share that Accelerate shares out once more")
def shared_out_twice() -> None:
    dataset = Numbers(18)
    sampler = BatchSamplerShard(GlobalBatchSampler(18, 6, 1, 2, shuffle=False), 2, 1)
    print(read(dataset, batch_size=1, batch_sampler=sampler).audit)


@shown("a stream, without and with key=")
def stream_audit() -> None:
    print(read(SharedOut(), num_workers=2).audit)
    print(read(SharedOut(), num_workers=2, key=int).audit)


class SharedOut(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        yield from range(info.id if info else 0, 12, info.num_workers if info else 1)


@shown("loader.transport_stats")
def transport() -> None:
    dataset = [torch.zeros(64, 64) for _ in range(32)]
    print(read(dataset, num_workers=1, batch_size=8).transport_stats)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Audits over ranks")


def over_ranks(make: Callable[[int], Any], came: int = 3, most: int = 1000) -> None:
    """Print the audit of three ranks, which are read one after the other in this process."""
    parts = []
    for rank in range(came):
        os.environ.update(RANK=str(rank), WORLD_SIZE="3")
        loader = make(rank)
        for _ in itertools.islice(loader, most if rank == 1 else 1000):
            pass
        parts.append(loader.audit_part())
    print(safeloader.merge_audits(parts))


def dealt_out(rank: int, epoch: int = 0, **more: Any) -> Any:
    """A rank's loader with a ``DistributedSampler``."""
    data = Numbers(100)
    sampler: Any = DistributedSampler(data, 3, rank, **more)
    sampler.set_epoch(epoch)
    return SafeDataLoader(data, batch_size=8, sampler=sampler)


@shown("each index once, with padding, without the last ones, and without samples that failed")
def ranks_ok() -> None:
    over_ranks(dealt_out)
    over_ranks(lambda rank: dealt_out(rank, drop_last=True))
    data = LostField(15)
    over_ranks(
        lambda rank: SafeDataLoader(
            data, sampler=DistributedSampler(data, 3, rank), on_error="skip", trace=False
        )
    )


@shown("no sampler on any rank")
def ranks_share_nothing() -> None:
    over_ranks(lambda rank: SafeDataLoader(Numbers(100), batch_size=8))


@shown("a rank's share that is shared out once more")
def ranks_share_out_twice() -> None:
    def make(rank: int) -> Any:
        mine = Subset(Numbers(100), range(rank, 100, 3))
        return SafeDataLoader(mine, batch_size=8, sampler=DistributedSampler(mine, 3, rank))

    over_ranks(make)


@shown("set_epoch that differs, another seed, and one share on all ranks")
def ranks_other_orders() -> None:
    over_ranks(lambda rank: dealt_out(rank, epoch=rank // 2))
    over_ranks(lambda rank: dealt_out(rank, seed=rank))
    over_ranks(lambda rank: dealt_out(0))


@shown("a rank that stops early, and one that does not come")
def ranks_early_and_absent() -> None:
    over_ranks(dealt_out, most=2)
    over_ranks(dealt_out, came=2)


@shown("a million indices, of which some are lost")
def ranks_long() -> None:
    def make(rank: int) -> Any:
        mine = [index for index in range(rank, 1_000_000, 3) if not 500_000 <= index < 500_030]
        return SafeDataLoader(range(1_000_000), 1000, sampler=mine, collate_fn=len)  # type: ignore[arg-type]  # indexable

    over_ranks(make)


@shown("what cannot be told")
def ranks_unknown() -> None:
    weights = WeightedRandomSampler([1.0] * 100, 100)
    over_ranks(lambda rank: SafeDataLoader(Numbers(100), sampler=weights))
    over_ranks(lambda rank: SafeDataLoader(SharedOut()))
    over_ranks(lambda rank: SafeDataLoader(Numbers(100 + rank)))


@shown("streams with key=, each rank the whole, and each a part")
def ranks_streams() -> None:
    over_ranks(lambda rank: SafeDataLoader(SharedOut(), key=int))
    over_ranks(lambda rank: SafeDataLoader(SharedOut(), key=lambda number: (rank, number)))


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("safeloader.replay")


def error_of(dataset: Any, **more: Any) -> Any:
    """The error that a loader raises, and the loader."""
    loader: SafeDataLoader[Any] = SafeDataLoader(dataset, **{"batch_size": 4} | more)
    try:
        list(loader)
    except safeloader.SafeLoaderError as error:
        return error, loader
    raise AssertionError("it did not fail")


class OnlyInWorker(Photos):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def bad(self, index: int) -> Any:
        self.calls += 1
        if get_worker_info() is not None:
            raise OSError("stale file handle")
        return self.good(index)


@shown("an error, and the sample passes here")
def replay_passes() -> None:
    error, loader = error_of(OnlyInWorker(), num_workers=1)
    loader.replay(error)


@shown("an error of what was warned of at the start, and the sample passes here")
def replay_inherited() -> None:
    error, loader = error_of(Database(), num_workers=1)
    print("the replay:")
    loader.replay(error)


class Slow(Photos):
    def bad(self, index: int) -> Any:
        if get_worker_info() is not None:
            time.sleep(60)
        return self.good(index)


@shown("an error of a worker that hung")
def replay_hung() -> None:
    error, loader = error_of(Slow(), num_workers=1, timeout=1)
    loader.replay(error)


@shown("an index; a delivered sample")
def replay_index() -> None:
    loader = read(Random(), num_workers=1)
    loader.replay(3)
    loader.replay(3, epoch=0)
    loader.replay(loader.last_batch, position=1)


@shown("what it refuses")
def replay_refuses() -> None:
    loader = read(Numbers())
    stream = read(SharedOut())
    failed, _ = error_of(Ragged())
    Path("notes.json").write_text("[1]")
    refused(
        lambda: loader.replay(KeyError("image")),
        lambda: loader.replay({"index": 3}),
        lambda: loader.replay(Path("notes.json")),
        lambda: loader.replay(loader.last_batch),
        lambda: loader.replay(loader.last_batch, position=99),
        lambda: loader.replay(3, epoch=7),
        lambda: loader.replay(3, position=1),
        lambda: loader.replay(failed, epoch=1),
        lambda: loader.replay(failed),
        lambda: safeloader.replay(loader.last_batch, loader.dataset),
        lambda: stream.replay(3),
    )


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("trace=True")


@shown("an epoch in which one sample is skipped")
def trace() -> None:
    read(LostField(8), trace=True, on_error="skip", num_workers=1)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Arguments that are refused")


def loader_with(dataset: Any = None, **given: Any) -> Callable[[], object]:
    """Makes a loader with these arguments and begins an epoch."""
    return lambda: iter(SafeDataLoader(Numbers() if dataset is None else dataset, **given))


@shown("keywords of SafeDataLoader")
def keywords() -> None:
    Path("taken").touch()
    refused(
        loader_with(verify="strict"),
        loader_with(trace=3),
        loader_with(trace="taken"),
        loader_with(key=3),
        loader_with(key=int, validate=checks.unique(int)),
        loader_with(validate=[3]),
        loader_with(on_error="ignore"),
        loader_with(retries=-1),
        loader_with(max_skipped=1.5),
        loader_with(on_crash="ignore"),
        loader_with(Whole(), on_crash="restart"),
        loader_with(stall_after=-1),
        loader_with(on_failure_dump="taken"),
        loader_with(transport="fast"),
        loader_with(checksum=1),
        loader_with(seed=-1),
        loader_with(seed_per="epoch"),
        loader_with(seed=1, generator=torch.Generator()),
        loader_with(seed=1, sampler=RandomSampler(Numbers(), generator=torch.Generator())),
        loader_with(Together(), seed=1),
        lambda: SafeDataLoader(Numbers()).set_epoch(-1),
        safeloader.sample_rng,
        loader_with(recorder="run"),
        loader_with(on_eror="skip"),
    )


@shown("SAFELOADER=no in the environment")
def switch() -> None:
    os.environ["SAFELOADER"] = "no"
    read(Numbers())


@shown("checks")
def bad_checks() -> None:
    refused(
        lambda: checks.in_range(3, 1),
        lambda: checks.in_range("a", 1),  # type: ignore[arg-type]
        lambda: checks.unique(3),  # type: ignore[arg-type]
        lambda: read(Photos(), validate=checks.in_range(0, 1, at="images")),
    )


@shown("the records")
def records() -> None:
    loader = read(Numbers())
    refused(
        lambda: loader.provenance.batch(99),
        lambda: loader.provenance.save("epoch.xls"),
        lambda: loader.metrics(last=0),
        lambda: safeloader.Recorder(-1),
    )


@shown("GlobalBatchSampler")
def bad_shares() -> None:
    def sampler_with(**given: Any) -> Callable[[], object]:
        return lambda: iter(GlobalBatchSampler(**{"length": 100, "global_batch": 32} | given))

    refused(
        sampler_with(length=-1),
        sampler_with(global_batch=True),
        sampler_with(world=6),
        sampler_with(rank=4, world=4),
        sampler_with(rank=1),
        sampler_with(world=4),
        sampler_with(tail="keep"),
        sampler_with(shuffle="yes"),
        sampler_with(seed=-1),
        lambda: GlobalBatchSampler(100, 32).set_epoch(-1),
        lambda: GlobalBatchSampler(100, 32).batches(start=-1),
        lambda: GlobalBatchSampler(100, 32).global_indices(3),
    )


@shown("instrument")
def instrument() -> None:
    refused(
        lambda: safeloader.instrument(3),
        lambda: safeloader.instrument(DataLoader(Numbers()), on_error="ignore"),
    )


@shown("two threads in next() of one iterator")
def two_threads() -> None:
    loader = SafeDataLoader(Waits(1.0), batch_size=4, num_workers=1)
    batches = iter(loader)
    next(batches)
    other = threading.Thread(target=lambda: next(batches), name="logger")
    other.start()
    time.sleep(0.3)
    with contextlib.suppress(StopIteration):
        next(batches)


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Faults that are not the dataset's")


def fails(*_: object) -> Any:
    raise ZeroDivisionError("a fault of this package, put there for this page")


@shown("a part of safeloader itself fails")
def own_fault() -> None:
    vars(main_looks)["findings"] = fails
    read(Numbers())


class Breaks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("no connection to the log server")


@shown("a logging handler raises")
def handler() -> None:
    logger = logging.getLogger("safeloader")
    logger.handlers = [Breaks()]
    read(LostField(), on_error="skip")


BY_A_FRAMEWORK = """
import logging
from safeloader import SafeDataLoader

logging.basicConfig(format="%(levelname)s %(message)s")
loader = SafeDataLoader(list(range(8)))
"""


@shown("a loader that is never used, as where a framework makes it again")
def never_used() -> None:
    Path("train.py").write_text(BY_A_FRAMEWORK)
    done = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr)


@shown("a torch that it does not know")
def unknown_torch() -> None:
    del torch.utils.data._utils.worker._worker_loop
    read(Numbers())


@shown("the same; verify='raise'")
def unknown_torch_refused() -> None:
    del torch.utils.data._utils.worker._worker_loop
    read(Numbers(), verify="raise")


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("safeloader.doctor")


def examined(dataset: Any, seconds: float = 12.0, **more: Any) -> None:
    """What the doctor says of a loader, without the speeds: those are the machine's."""
    looks.LOOKS = looks.LOOKS[:-1]
    loader: DataLoader[Any] = DataLoader(dataset, **{"batch_size": 4} | more)
    print(safeloader.doctor(loader, seconds=seconds))


@shown("a sound dataset, with its table")
def doctor_sound() -> None:
    # Few settings, and time enough for each: which are tried is the machine's as well.
    vars(speed).update(counts=lambda cores, own: [0, 2], _PREFETCH=(), _ROUNDS=3, _MOST=0)
    print(safeloader.doctor(DataLoader(Photos(64), batch_size=4), seconds=100))


@shown("a transform writes into its dataset")
def doctor_in_place() -> None:
    examined(InPlace())


@shown("__len__ is too long")
def doctor_long() -> None:
    examined(TooLong())


@shown("__getitem__ seeds by a fixed number")
def doctor_seeds() -> None:
    examined(Random(seed=5))


@shown("every worker reads the whole stream")
def doctor_stream() -> None:
    examined(Whole(), num_workers=2)


@shown("a sample kills its process")
def doctor_dies() -> None:
    examined(Leaves())


@shown("a sample raises; a lambda; an open archive")
def doctor_several() -> None:
    dataset = LostField()
    vars(dataset).update(scale=lambda value: value, archive=Archive().archive)
    examined(dataset, num_workers=2)


class Disagrees(Photos):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self.good(index) | {"image": torch.zeros(3)} for index in indices]


@shown("__getitems__ and __getitem__ do not agree")
def doctor_getitems() -> None:
    examined(Disagrees())


@shown("a sample waits for ever")
def doctor_hangs() -> None:
    examined(Sleeps(), seconds=6)


@shown("a sample that no worker can send")
def doctor_unsendable() -> None:
    vars(speed).update(counts=lambda cores, own: [0, 1], _PREFETCH=(), _ROUNDS=1, _MOST=0)
    loader = SafeDataLoader(Locked(), batch_size=4, num_workers=1, collate_fn=list)
    report = safeloader.doctor(loader, seconds=60)
    [found] = [each for each in report.findings if each.kind == "unsendable"]
    print(found.answer, found.evidence, found.advice, sep="\n")


class SetsUp(Photos):
    def __getitem__(self, index: int) -> Any:
        time.sleep(60)


@shown("what is set up at first use takes longer than there is time")
def doctor_slow() -> None:
    examined(SetsUp(), seconds=3)


def sleeps(worker: int) -> None:
    time.sleep(60)


@shown("the same, in each worker")
def doctor_slow_workers() -> None:
    examined(Photos(), seconds=6, num_workers=2, worker_init_fn=sleeps)


@shown("set_epoch does not reach the workers; a generator that they share")
def doctor_copies() -> None:
    dataset = Epochs()
    examined(dataset, num_workers=2, persistent_workers=True)


class Epochs(OfEpoch):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return self.epoch + self.rng.random()


class Once(IterableDataset[Any]):
    def __init__(self) -> None:
        self.lines = iter(range(20))

    def __iter__(self) -> Iterator[Any]:
        yield from self.lines


@shown("a stream that can be read once")
def doctor_once() -> None:
    examined(Once())


@shown("what it refuses")
def doctor_refuses() -> None:
    refused(lambda: safeloader.doctor(3), lambda: safeloader.doctor([1, 2], seconds=-1))
    for target in ("train.py", "nothing.py:make_loader", "a b:make_loader"):
        command("doctor", target)


def command(*words: str) -> None:
    """What ``python -m safeloader`` says."""
    done = subprocess.run(
        [sys.executable, "-m", "safeloader", *words], capture_output=True, text=True, check=False
    )
    print((done.stdout + done.stderr).rstrip())


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("python -m safeloader run")

TRAIN = """
from torch.utils.data import DataLoader

for batch in DataLoader(list(range(16)), batch_size=4, shuffle=True):
    pass
unused = DataLoader(list(range(8)))
"""


@shown("a program, at its end")
def launched() -> None:
    Path("train.py").write_text(TRAIN)
    command("run", "train.py")


@shown("--expect-ranks 2, and one process")
def expected_ranks() -> None:
    Path("train.py").write_text(TRAIN)
    command("run", "--expect-ranks", "2", "train.py")


@shown("what it refuses")
def launcher_refuses() -> None:
    Path("taken").touch()
    command("run")
    command("run", "no-such-program")
    command("run", "--retries", "-1", "train.py")
    command("run", "--run", "taken", "train.py")
    command("run", "python", "-I", "train.py")


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("The folder of a run")


@shown("another run is alive in it")
def run_taken() -> None:
    Path("train.py").write_text(INTO_A_RUN)
    read(Photos(), run_dir="run")
    del os.environ["SAFELOADER_ATTEMPT"]  # what a process begins is of its run
    script("train.py")
    command("run", "--run", "run", "train.py")


@shown("it holds something else")
def run_of_another_kind() -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("[]")
    read(Photos(), run_dir="run")


@contextlib.contextmanager
def no_file_grows() -> Iterator[None]:
    """No file grows any more: ``ulimit -f``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@shown("a disk that is full from the beginning")
def run_on_full_disk() -> None:
    Path("run").mkdir()
    with no_file_grows():
        read(Photos(), run_dir="run")


@shown("a disk that becomes full")
def run_on_disk_that_fills() -> None:
    batch_log.FLUSH_NS = batch_log.FIRST_NS = 0
    loader = SafeDataLoader(Photos(), batch_size=4, run_dir="run")
    batches = iter(loader)
    next(batches)
    with no_file_grows():
        print(f"{len(list(batches))} batches came after that")


@shown("it is removed while the run goes on")
def run_removed() -> None:
    batch_log.FLUSH_NS = batch_log.FIRST_NS = 0
    batches = iter(SafeDataLoader(Photos(), batch_size=4, run_dir="run"))
    next(batches)
    shutil.rmtree("run")
    print(f"{len(list(batches))} batches came after that")


@shown("pyarrow is missing")
def run_without_pyarrow() -> None:
    sys.modules["pyarrow"] = None  # type: ignore[assignment]
    refused(lambda: read(Photos(), run_dir="run"))
    os.environ["SAFELOADER_RUN"] = "run"
    read(Photos())


@shown("what run_dir= and loader.mark refuse")
def run_refuses() -> None:
    loader = SafeDataLoader([1, 2])
    refused(
        lambda: SafeDataLoader([1], run_dir=3),  # type: ignore[arg-type]
        lambda: SafeDataLoader([1], run_dir="run", run_max_bytes=1000),
        lambda: SafeDataLoader([1], run_max_bytes="1 GB"),  # type: ignore[arg-type]
        lambda: loader.mark(0),
        lambda: loader.mark(-1),
        lambda: loader.mark("17"),  # type: ignore[arg-type]
        lambda: loader.mark(17, "3"),  # type: ignore[arg-type]
    )


# ─────────────────────────────────────────────────────────────────────────────────────────────────
section("Commands over a run")

INTO_A_RUN = """
import os
import random

from safeloader import SafeDataLoader


class Photos:
    def __init__(self):
        self.files = [f"photos/{k:03d}.jpg" for k in range(16)]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        turned = random.randrange(360)
        if index == 5:
            raise OSError(f"{self.files[index]} turned by {turned} is truncated")
        return index


def sound():
    return list(range(16))


if __name__ == "__main__":
    random.seed(0)
    loader = SafeDataLoader(Photos(), batch_size=4, on_error="skip", run_dir="run")
    step = 0
    for epoch in range(2):
        for batch in loader:
            if "UNMARKED" not in os.environ:
                loader.mark(step)
            step += 1
"""


def script(name: str, **environment: str) -> None:
    """Run a program; what it says of itself."""
    done = subprocess.run(
        [sys.executable, name],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print((done.stdout + done.stderr).rstrip())


def of_rank(rank: int) -> dict[str, str]:
    """The environment of one of two ranks of a job."""
    job = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    return job | {"TORCHELASTIC_RESTART_COUNT": "0", "RANK": str(rank), "WORLD_SIZE": "2"}


def run_of(**environment: str) -> None:
    """A run in the folder ``run``; what it says is not shown."""
    Path("train.py").write_text(INTO_A_RUN)
    with contextlib.redirect_stdout(io.StringIO()):
        script("train.py", **environment)


def asked(*words: str, lines: int | None = None) -> None:
    """A command and what it says, with its exit status where that is not 0; so many lines of it."""
    done = subprocess.run(
        [sys.executable, "-m", "safeloader", *words], capture_output=True, text=True, check=False
    )
    status = f" (exit status {done.returncode})" if done.returncode else ""
    shown = [f"…/{os.path.basename(each)}" if each.count("/") > 2 else each for each in words]
    print(f"$ python -m safeloader {' '.join(shown)}{status}")
    said = (done.stdout + done.stderr).rstrip().splitlines()
    print("\n".join(narrow(said[:lines])))


def narrow(lines: list[str]) -> Iterator[str]:
    """Tables with narrow columns: what is measured decides how wide they are."""
    in_table = False
    for line, after in itertools.pairwise([*lines, ""]):
        is_rule = line.startswith("──")
        in_table = after.startswith("──") or (in_table and (is_rule or "   " in line.strip()))
        yield "───" if is_rule else re.sub(" {3,}", "   ", line) if in_table else line


@shown("audit: each index came exactly once, or was left out for a reason")
def audit_fine() -> None:
    run_of()
    asked("audit", "run")


@shown("audit: both ranks read all of it")
def audit_twice() -> None:
    for rank in range(2):
        run_of(**of_rank(rank))
    asked("audit", "run")


@shown("step: the samples of an optimizer's step")
def steps_of_a_run() -> None:
    run_of()
    asked("step", "run", "5")
    asked("step", "run", "99")


@shown("step: nothing was marked")
def steps_unmarked() -> None:
    run_of(UNMARKED="1")
    asked("step", "run", "2")


@shown("index: what became of one")
def index_of_a_run() -> None:
    run_of()
    for index in ("3", "5", "99"):
        asked("index", "run", index)


@shown("replay: a failing sample once more")
def replay_of_a_file() -> None:
    run_of()
    failure = str(min(Path("run").rglob("failure-*.json")))
    asked("replay", failure, "train.py:Photos")
    asked("replay", failure, "train.py:sound")


@shown("what they refuse")
def commands_refuse() -> None:
    read(Photos(), run_dir="run")
    Path("there.json").write_text("[]")
    asked("shwo", "run", lines=1)
    asked("show")
    asked("show", "nothing")
    asked("show", ".")
    asked("step", "run", "x")
    asked("audit", "run", "--attempt", "7")
    asked("trace", "run", "-o", "there.json")
    asked("report", "nothing")
    asked("replay", "none.json", "train.py:make_dataset")
    asked("replay", "there.json", "train.py:make_dataset")


@shown("a library that is missing")
def commands_without_libraries() -> None:
    read(Photos(), run_dir="run")
    for missing, words in (
        ("typer", "show run"),
        ("pyarrow", "audit run"),
        ("plotly", "report run"),
    ):
        program = f"import sys\nsys.modules[{missing!r}] = None\nfrom safeloader import __main__\n"
        program += f"sys.exit(__main__.main({words.split()!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        print((done.stdout + done.stderr).rstrip())
