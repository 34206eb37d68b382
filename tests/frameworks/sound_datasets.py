"""Sound datasets as people write them, on torch, NumPy and the standard library alone.

Each of ``SOUND`` makes a loader's arguments in a folder of its own; nothing may be said of it.
Those that need a library are in :mod:`tests.frameworks.sound_libraries`.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import multiprocessing as mp
import pickle
import random
import sqlite3
import tarfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
    random_split,
)
from torch.utils.data.datapipes.iter import IterableWrapper
from torch.utils.data.datapipes.map import SequenceWrapper

SIZE = 24
MODES = ("fresh", "persistent", "main")


class Case(NamedTuple):
    """A sound program.

    Attributes:
        make: gives, from an empty folder, the arguments of its loader. Beside those of torch:
            ``before_epoch``, a function of the epoch's number, and ``after_batch``, of a batch.
        needs: the modules that it imports.
        modes: "fresh" and "persistent" workers, and "main": none.
        spawn: whether it is run with spawned workers besides.
        fork: whether its workers may be forked at all.
    """

    make: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    spawn: bool = False
    fork: bool = True


SOUND: dict[str, Case] = {}


def sound(*needs: str, into: dict[str, Case] = SOUND, **how: Any) -> Callable[[Any], Any]:
    """Register what makes the arguments of a sound program's loader."""

    def register(make: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        into[make.__name__] = Case(make, needs, **how)
        return make

    return register


# ── what torch gives ────────────────────────────────────────────────────────────────────────────


@sound(spawn=True)
def tensor_dataset(folder: Path) -> dict[str, Any]:
    return {
        "dataset": TensorDataset(torch.arange(SIZE), torch.rand(SIZE, 3)),
        "batch_size": 4,
        "shuffle": True,
    }


@sound()
def random_split_of_a_tensor_dataset(folder: Path) -> dict[str, Any]:
    train, _ = random_split(TensorDataset(torch.arange(2 * SIZE)), [SIZE, SIZE])
    return {"dataset": train, "batch_size": 4, "shuffle": True}


@sound()
def subset_of_concat(folder: Path) -> dict[str, Any]:
    parts = [TensorDataset(torch.arange(k, k + 20)) for k in (0, 100, 200)]
    whole = ConcatDataset(parts)
    return {"dataset": Subset(whole, list(range(0, 60, 2))), "batch_size": 4, "shuffle": True}


@sound()
def stack_dataset(folder: Path) -> dict[str, Any]:
    return {
        "dataset": StackDataset(x=TensorDataset(torch.rand(SIZE, 2)), y=list(range(SIZE))),
        "batch_size": 4,
        "shuffle": True,
    }


@sound()
def a_list_of_numbers(folder: Path) -> dict[str, Any]:
    return {"dataset": list(range(SIZE)), "batch_size": 4, "shuffle": True}


@sound()
def a_list_of_pairs(folder: Path) -> dict[str, Any]:
    return {
        "dataset": [(torch.full((3,), float(i)), i % 3) for i in range(SIZE)],
        "batch_size": 4,
        "shuffle": True,
    }


@sound()
def a_datapipe(folder: Path) -> dict[str, Any]:
    pipe = IterableWrapper(range(SIZE)).shuffle().sharding_filter().map(_squared)
    return {"dataset": pipe, "batch_size": 4, "shuffle": True}


def _squared(number: int) -> int:
    return number * number


@sound()
def a_map_datapipe(folder: Path) -> dict[str, Any]:
    return {"dataset": SequenceWrapper(list(range(SIZE))).map(_squared), "batch_size": 4}


# ── transforms that draw ────────────────────────────────────────────────────────────────────────


class Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomFlip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1) if torch.rand(()) < self.p else image


class RandomCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        top = random.randint(0, image.shape[-2] - self.size)
        left = np.random.randint(0, image.shape[-1] - self.size + 1)
        return image[..., top : top + self.size, left : left + self.size]


class Normalize:
    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.clone().sub_(self.mean).div_(self.std)


class Images(Dataset[Any]):
    """Images in memory, with the transforms that each framework has."""

    def __init__(self, transform: Any, length: int = SIZE) -> None:
        self.images = torch.rand(length, 1, 8, 8)
        self.labels = [i % 3 for i in range(length)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), self.labels[index]


def _augmented() -> Images:
    return Images(Compose([RandomFlip(), RandomCrop(6), Normalize(0.5, 0.2)]))


def seed_worker(worker_id: int) -> None:
    """As PyTorch's page on reproducibility has it."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


@sound(spawn=True)
def random_transforms(folder: Path) -> dict[str, Any]:
    return {"dataset": _augmented(), "batch_size": 4, "shuffle": True}


@sound()
def the_recipe_for_reproducibility(folder: Path) -> dict[str, Any]:
    return {
        "dataset": _augmented(),
        "batch_size": 4,
        "shuffle": True,
        "worker_init_fn": seed_worker,
        "generator": torch.Generator().manual_seed(0),
    }


class Mixup(Images):
    """Draws a second sample."""

    def __getitem__(self, index: int) -> Any:
        other = random.randrange(len(self))
        weight = np.random.beta(0.4, 0.4)
        return weight * self.images[index] + (1 - weight) * self.images[other], index


@sound()
def mixup(folder: Path) -> dict[str, Any]:
    return {"dataset": Mixup(None), "batch_size": 4, "shuffle": True}


class SeededByIndex(Images):
    """The same random part for a sample in each epoch, on purpose."""

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(1234 + index)
        noise = torch.rand(self.images[index].shape, generator=generator)
        return self.images[index] + noise, np.random.default_rng(index).integers(9)


@sound()
def seeded_by_index(folder: Path) -> dict[str, Any]:
    return {"dataset": SeededByIndex(None), "batch_size": 4, "shuffle": True}


class OwnGeneratorSeededByIndex(Images):
    """One generator, which each sample puts to a place of its own."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rng = torch.Generator()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        self.rng.manual_seed(1000 * self.epoch + index)
        return self.images[index] + torch.rand(1, 8, 8, generator=self.rng), index


def names_its_process(worker_id: int) -> None:
    """A worker_init_fn that seeds nothing."""


@sound(modes=("fresh", "main"))
def own_generator_seeded_by_index(folder: Path) -> dict[str, Any]:
    dataset = OwnGeneratorSeededByIndex()
    return {
        "dataset": dataset,
        "batch_size": 4,
        "shuffle": True,
        "worker_init_fn": names_its_process,
        "before_epoch": dataset.set_epoch,
    }


class GloballySeededByIndex(Images):
    def __getitem__(self, index: int) -> Any:
        random.seed(index)
        torch.manual_seed(index)
        return self.images[index] + torch.rand(1, 8, 8), random.random()


@sound(modes=("fresh", "persistent"))
def globally_seeded_by_index(folder: Path) -> dict[str, Any]:
    return {"dataset": GloballySeededByIndex(None), "batch_size": 4, "shuffle": True}


@sound()
def a_validation_loader_seeded_by_index(folder: Path) -> dict[str, Any]:
    return {"dataset": GloballySeededByIndex(None), "batch_size": 4}


@sound()
def a_validation_loader_that_draws(folder: Path) -> dict[str, Any]:
    return {"dataset": _augmented(), "batch_size": 4}


class OwnGenerator(Images):
    """Makes a generator in the worker, at first use."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rng: np.random.Generator | None = None

    def __getitem__(self, index: int) -> Any:
        if self.rng is None:
            self.rng = np.random.default_rng(torch.initial_seed())
        return self.images[index] + self.rng.random(), index


@sound()
def a_generator_made_in_the_worker(folder: Path) -> dict[str, Any]:
    return {"dataset": OwnGenerator(), "batch_size": 4, "shuffle": True}


# ── what a dataset keeps ────────────────────────────────────────────────────────────────────────


class Cached(Images):
    """A cache that each worker fills."""

    def __init__(self) -> None:
        super().__init__(None)
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = self.images[index].mul(2).sqrt()
        return self.cache[index], index


@sound(modes=("persistent", "main"))
def a_cache(folder: Path) -> dict[str, Any]:
    return {"dataset": Cached(), "batch_size": 4, "shuffle": True}


class CachedInAList(Images):
    def __init__(self) -> None:
        super().__init__(None)
        self.ready: list[Any] = [None] * len(self.images)
        self.done = torch.zeros(len(self.images), dtype=torch.bool)
        self.table = np.zeros((len(self.images), 8), np.float32)

    def __getitem__(self, index: int) -> Any:
        if self.ready[index] is None:
            self.ready[index] = self.images[index].mul(2).sqrt()
            self.table[index] = self.images[index].mean(dim=(0, 1))
            self.done[index] = True
        return self.ready[index], torch.from_numpy(self.table[index]), index


@sound(modes=("persistent", "main"))
def a_cache_in_a_list(folder: Path) -> dict[str, Any]:
    return {"dataset": CachedInAList(), "batch_size": 4, "shuffle": True}


class LeastRecentlyUsed(Images):
    """A bounded cache: what it forgets is no loss."""

    def __init__(self) -> None:
        super().__init__(None)
        self.cache: OrderedDict[int, Any] = OrderedDict()

    def __getitem__(self, index: int) -> Any:
        if index in self.cache:
            self.cache.move_to_end(index)
            return self.cache[index], index
        self.cache[index] = self.images[index] * 2
        if len(self.cache) > 6:
            self.cache.popitem(last=False)
        return self.cache[index], index

    @functools.lru_cache(maxsize=8)  # noqa: B019  # as people write it; the dataset lives as long
    def area(self, index: int) -> int:
        return int(self.images[index].numel())


@sound()
def a_bounded_cache(folder: Path) -> dict[str, Any]:
    return {"dataset": LeastRecentlyUsed(), "batch_size": 4, "shuffle": True}


class History(Images):
    """Keeps its last samples, to paste parts of them into others."""

    def __init__(self) -> None:
        super().__init__(None)
        self.last: deque[Any] = deque(maxlen=SIZE)
        self.recent: list[int] = []

    def __getitem__(self, index: int) -> Any:
        image = self.images[index].clone()
        if self.last:
            image[..., :2, :2] = random.choice(self.last)[..., :2, :2]
        self.last.append(self.images[index])
        self.recent = [*self.recent, index][-SIZE:]
        return image, index


@sound()
def a_history_of_samples(folder: Path) -> dict[str, Any]:
    return {"dataset": History(), "batch_size": 4, "shuffle": True}


class Counted(Images):
    """Counts and times what it does, for its author."""

    def __init__(self) -> None:
        super().__init__(None)
        self.calls, self.seconds, self.last_index = 0, 0.0, None
        self.by_label: Counter[int] = Counter()
        self.visits = [0] * len(self.images)
        self.visited = np.zeros(len(self.images), dtype=np.int64)
        self.marks = torch.zeros(len(self.images), dtype=torch.long)
        self.seen: list[int] | None = None
        self.last_call = [-1] * len(self.images)

    def __getitem__(self, index: int) -> Any:
        began = time.perf_counter()
        if self.seen is None:
            self.seen = [0] * len(self.images)
        self.calls += 1
        self.last_index = index
        self.last_call[index] = self.calls
        self.by_label[self.labels[index]] += 1
        self.visits[index] += 1
        self.visited[index] += 1
        self.marks[index] += 1
        self.seen[index] += 1
        self.seconds += time.perf_counter() - began
        return self.images[index], self.visits[index]


@sound(spawn=True)
def counters(folder: Path) -> dict[str, Any]:
    return {"dataset": Counted(), "batch_size": 4, "shuffle": True}


class CountedByIndex(Images):
    """Counts in dicts that begin empty, and for each sample in a column."""

    def __init__(self) -> None:
        super().__init__(None)
        self.hits: dict[int, int] = {}
        self.met: dict[int, bool] = {}
        self.notes: dict[str, Any] = {}

    def __getitem__(self, index: int) -> Any:
        self.hits[index] = self.hits.get(index, 0) + 1
        self.met[index] = True
        if not self.notes:
            self.notes["drawn"] = [0.0] * len(self.images)
            self.notes["noise"] = np.random.rand(len(self.images))
        self.notes["drawn"][index] = random.random()
        return self.images[index], index


@sound()
def counts_in_dicts(folder: Path) -> dict[str, Any]:
    return {"dataset": CountedByIndex(), "batch_size": 4, "shuffle": True}


class Negatives(Images):
    """Draws another sample from a pool, which it shuffles each time."""

    def __init__(self) -> None:
        super().__init__(None)
        self.pool = list(range(len(self.images)))
        self.rows = np.arange(2 * len(self.images)).reshape(-1, 2)

    def __getitem__(self, index: int) -> Any:
        random.shuffle(self.pool)
        np.random.shuffle(self.rows)
        return self.images[index], self.images[self.pool[0]], int(self.rows[0, 0])


@sound()
def a_pool_that_negatives_are_drawn_from(folder: Path) -> dict[str, Any]:
    return {
        "dataset": Negatives(),
        "batch_size": 4,
        "shuffle": True,
        "worker_init_fn": seed_worker,
    }


class Scaled(Images):
    """Its strength is set in the loop, for the next epoch."""

    def __init__(self) -> None:
        super().__init__(None)
        self.scale = 1.0
        self.batches = 0

    def __getitem__(self, index: int) -> Any:
        return self.images[index] * self.scale, index

    def grow(self, batch: Any) -> None:
        self.batches += 1
        if self.batches % 6 == 5:
            self.scale *= 1.5


@sound(modes=("fresh",), spawn=True)
def a_strength_that_the_loop_sets_for_the_next_epoch(folder: Path) -> dict[str, Any]:
    dataset = Scaled()
    return {"dataset": dataset, "batch_size": 4, "shuffle": True, "after_batch": dataset.grow}


class Logged(Images):
    def __init__(self) -> None:
        super().__init__(None)
        self.logger = logging.getLogger("a dataset of somebody's")
        self.lock = threading.Lock()
        self.local = threading.local()

    def __getitem__(self, index: int) -> Any:
        with self.lock:
            self.local.last = index
            self.logger.debug("sample %d", index)
            return self.images[index], index


@sound()
def locks_and_loggers(folder: Path) -> dict[str, Any]:
    return {"dataset": Logged(), "batch_size": 4, "shuffle": True}


class Shared(Images):
    """Progress of the training, in shared memory."""

    def __init__(self) -> None:
        super().__init__(None)
        self.progress = mp.Value("d", 0.0)
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.sizes = mp.Array("i", [4, 6, 8])

    def __getitem__(self, index: int) -> Any:
        size = self.sizes[int(self.epoch)]
        return self.images[index, 0, 0, 0] * self.progress.value, size

    def begin(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.progress.value = epoch / 10


@sound()
def a_curriculum_in_shared_memory(folder: Path) -> dict[str, Any]:
    dataset = Shared()
    return {"dataset": dataset, "batch_size": 4, "shuffle": True, "before_epoch": dataset.begin}


class Epochs(Images):
    """An epoch number that its code reads, and an order that follows from it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.epoch = 0
        self.order = list(range(len(self.images)))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(epoch)
        ).tolist()

    def __getitem__(self, index: int) -> Any:
        return self.images[self.order[index]], self.epoch


@sound(modes=("fresh", "main"), spawn=True)
def set_epoch_before_each_epoch(folder: Path) -> dict[str, Any]:
    dataset = Epochs()
    return {"dataset": dataset, "batch_size": 4, "before_epoch": dataset.set_epoch}


class Reshuffled(Shared):
    """Each worker makes the order of an epoch, by a seed that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(range(len(self.images)))
        self.ordered_for = -1

    def __getitem__(self, index: int) -> Any:
        if self.ordered_for != int(self.epoch):
            self.ordered_for = int(self.epoch)
            self.order = list(range(len(self.images)))
            random.Random(self.ordered_for).shuffle(self.order)
        return self.images[self.order[index]], self.order[index]


@sound()
def an_order_by_a_seed_that_all_share(folder: Path) -> dict[str, Any]:
    dataset = Reshuffled()
    return {"dataset": dataset, "batch_size": 4, "before_epoch": dataset.begin}


class Records(Dataset[Any]):
    """A list of dicts, with keys that are added in the course of training."""

    def __init__(self) -> None:
        self.items = [
            {"name": f"img_{i}.png", "boxes": torch.rand(2, 4), "visits": 0, "image": None}
            for i in range(SIZE)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if item["image"] is None:
            item["image"] = torch.full((2, 2), float(index))
        item["area"] = float(item["boxes"].prod(dim=1).sum())
        item["visits"] += 1
        return {"image": item["image"], "boxes": item["boxes"], "area": item["area"]}


@sound()
def a_list_of_dicts_with_keys_added(folder: Path) -> dict[str, Any]:
    dataset = Records()

    def mark(epoch: int) -> None:
        for item in dataset.items:
            item["epoch"] = epoch
            item["weight"] = 1 / (epoch + 1)

    return {"dataset": dataset, "batch_size": 4, "shuffle": True, "before_epoch": mark}


class PreparedOnce(Dataset[Any]):
    """What is read is made ready in its place, once."""

    def __init__(self) -> None:
        self.items = [{"pixels": np.full(4, 255.0 - i), "ready": False} for i in range(SIZE)]
        self.words = [[f"w{k}" for k in range(5, 0, -1)] for _ in range(SIZE)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if not item["ready"]:
            item["pixels"] /= 255
            item["ready"] = True
        self.words[index].sort()
        return torch.from_numpy(item["pixels"]), self.words[index][0]


@sound()
def samples_made_ready_in_their_place(folder: Path) -> dict[str, Any]:
    return {"dataset": PreparedOnce(), "batch_size": 4, "shuffle": True}


class ShuffledInPlace(Dataset[Any]):
    """Picks at random by a shuffle of what it holds for a sample."""

    def __init__(self) -> None:
        self.captions = [[f"sample {i} text {k}" for k in range(20)] for i in range(SIZE)]
        self.boxes = {"b": [[{"x": k, "y": i, "z": 0} for k in range(30)] for i in range(SIZE)]}
        self.points = [np.random.rand(100, 3) for _ in range(SIZE)]
        self.clouds = {i: torch.rand(50, 3) for i in range(SIZE)}

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        random.shuffle(self.captions[index])
        random.shuffle(self.boxes["b"][index])
        np.random.shuffle(self.points[index])
        cloud = self.clouds[index]
        cloud[:] = cloud[torch.randperm(len(cloud))]
        box = self.boxes["b"][index][0]["x"]
        return self.captions[index][0], box, self.points[index][:16].copy(), cloud[:16].clone()


@sound()
def shuffles_in_their_place(folder: Path) -> dict[str, Any]:
    return {
        "dataset": ShuffledInPlace(),
        "batch_size": 4,
        "shuffle": True,
        "worker_init_fn": seed_worker,
    }


class Scored(Dataset[Any]):
    """Losses of each sample, which the training loop writes into it."""

    def __init__(self) -> None:
        self.x = torch.rand(SIZE, 2)
        self.losses = torch.zeros(SIZE)
        self.history: list[list[float]] = [[] for _ in range(SIZE)]
        self.hardest = 0.0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return index, self.x[index]

    def write(self, batch: Any) -> None:
        indices, x = batch
        for index, loss in zip(indices.tolist(), x.sum(dim=1).tolist(), strict=True):
            self.losses[index] = loss
            self.history[index].append(loss)
            self.hardest = max(self.hardest, loss)


@sound()
def losses_of_each_sample(folder: Path) -> dict[str, Any]:
    dataset = Scored()
    return {"dataset": dataset, "batch_size": 4, "shuffle": True, "after_batch": dataset.write}


# ── files ───────────────────────────────────────────────────────────────────────────────────────


class Memmap(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self.rows = np.memmap(path, dtype=np.float32, mode="r", shape=(SIZE, 4))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(np.array(self.rows[index])), index


@sound()
def a_memmap(folder: Path) -> dict[str, Any]:
    np.random.rand(SIZE, 4).astype(np.float32).tofile(folder / "rows.bin")
    return {"dataset": Memmap(folder / "rows.bin"), "batch_size": 4, "shuffle": True}


class Opened(Dataset[Any]):
    """A reader that each worker opens at first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader: Any = None

    def __len__(self) -> int:
        return SIZE

    def open(self) -> Any:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        if self.reader is None:
            self.reader = self.open()
        return torch.frombuffer(bytearray(self.read(index)), dtype=torch.uint8), index


def _bytes_of(index: int) -> bytes:
    return bytes([index, index + 1, index + 2])


class Sqlite(Opened):
    def open(self) -> Any:
        return sqlite3.connect(self.path)

    def read(self, index: int) -> bytes:
        (row,) = self.reader.execute("SELECT data FROM samples WHERE id = ?", (index,)).fetchone()
        return row  # type: ignore[no-any-return]


@sound(spawn=True)
def sqlite_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    path = folder / "samples.db"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, data BLOB)")
        rows = [(i, _bytes_of(i)) for i in range(SIZE)]
        made.executemany("INSERT INTO samples VALUES (?, ?)", rows)
    made.close()
    return {"dataset": Sqlite(path), "batch_size": 4, "shuffle": True}


class Zip(Opened):
    def open(self) -> Any:
        return zipfile.ZipFile(self.path)

    def read(self, index: int) -> bytes:
        return self.reader.read(f"{index}.bin")  # type: ignore[no-any-return]


@sound()
def zip_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    path = folder / "samples.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(SIZE):
            file.writestr(f"{i}.bin", _bytes_of(i))
    return {"dataset": Zip(path), "batch_size": 4, "shuffle": True}


class Tar(Opened):
    def open(self) -> Any:
        return tarfile.open(self.path)

    def read(self, index: int) -> bytes:
        return self.reader.extractfile(f"{index}.bin").read()  # type: ignore[no-any-return]


@sound()
def tar_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    path = folder / "samples.tar"
    with tarfile.open(path, "w") as file:
        for i in range(SIZE):
            info = tarfile.TarInfo(f"{i}.bin")
            info.size = 3
            file.addfile(info, io.BytesIO(_bytes_of(i)))
    return {"dataset": Tar(path), "batch_size": 4, "shuffle": True}


class Lines(Opened):
    """One large file, read by offsets."""

    def open(self) -> Any:
        return open(self.path, "rb")

    def read(self, index: int) -> bytes:
        self.reader.seek(3 * index)
        return self.reader.read(3)  # type: ignore[no-any-return]


@sound()
def a_file_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    path = folder / "lines.bin"
    path.write_bytes(b"".join(map(_bytes_of, range(SIZE))))
    return {"dataset": Lines(path), "batch_size": 4, "shuffle": True}


class FileEach(Dataset[Any]):
    """A file a sample."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.paths = sorted(folder.glob("*.pkl"), key=lambda path: int(path.stem))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with self.paths[index].open("rb") as file:
            return pickle.load(file)


@sound()
def a_file_for_each_sample(folder: Path) -> dict[str, Any]:
    for i in range(SIZE):
        (folder / f"{i}.pkl").write_bytes(pickle.dumps({"x": np.full(3, i), "name": f"s{i}"}))
    return {"dataset": FileEach(folder), "batch_size": 4, "shuffle": True}


@sound(modes=("fresh", "persistent"))
def a_file_open_in_main_that_no_worker_reads(folder: Path) -> dict[str, Any]:
    """The loop reads its own file on, beside the workers."""
    path = folder / "log.txt"
    path.write_text("line\n" * 10_000)
    file = path.open("rb", buffering=0)
    return {
        "dataset": _augmented(),
        "batch_size": 4,
        "shuffle": True,
        "after_batch": lambda batch: file.read(100),
        "at_end": file.close,
    }


# ── samplers ────────────────────────────────────────────────────────────────────────────────────


@sound()
def weighted_sampler(folder: Path) -> dict[str, Any]:
    weights = [1.0 + i % 3 for i in range(SIZE)]
    return {
        "dataset": _augmented(),
        "batch_size": 4,
        "sampler": WeightedRandomSampler(weights, SIZE),
    }


@sound()
def a_sampler_with_replacement(folder: Path) -> dict[str, Any]:
    dataset = _augmented()
    sampler = RandomSampler(dataset, replacement=True, num_samples=2 * SIZE)
    return {"dataset": dataset, "batch_size": 4, "sampler": sampler, "drop_last": True}


@sound()
def subset_sampler(folder: Path) -> dict[str, Any]:
    return {
        "dataset": _augmented(),
        "batch_size": 4,
        "sampler": SubsetRandomSampler(list(range(0, SIZE, 2))),
    }


@sound()
def distributed_sampler(folder: Path) -> dict[str, Any]:
    dataset = _augmented()
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=1)
    return {
        "dataset": dataset,
        "batch_size": 4,
        "sampler": sampler,
        "before_epoch": sampler.set_epoch,
    }


class Buckets(Sampler[list[int]]):
    """Batches of like lengths."""

    def __init__(self, lengths: list[int], size: int) -> None:
        self.lengths, self.size = lengths, size

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.lengths)), key=lambda i: (self.lengths[i], random.random()))
        batches = [order[k : k + self.size] for k in range(0, len(order), self.size)]
        random.shuffle(batches)
        return iter(batches)


class Sentences(Dataset[Any]):
    def __init__(self) -> None:
        self.sentences = [list(range(1, 3 + i % 7)) for i in range(SIZE)]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> list[int]:
        return self.sentences[index]


def padded(samples: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, samples))
    return torch.tensor([[*each, *[0] * (longest - len(each))] for each in samples])


@sound()
def buckets_by_length(folder: Path) -> dict[str, Any]:
    dataset = Sentences()
    return {
        "dataset": dataset,
        "batch_sampler": Buckets([len(each) for each in dataset.sentences], 4),
        "collate_fn": padded,
    }


@sound()
def a_batch_sampler(folder: Path) -> dict[str, Any]:
    dataset = _augmented()
    return {"dataset": dataset, "batch_sampler": BatchSampler(RandomSampler(dataset), 4, True)}


class Endless(Sampler[int]):
    """Never ends; the loop counts its steps."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.length, generator=self.generator).tolist()


@sound()
def an_endless_sampler(folder: Path) -> dict[str, Any]:
    return {"dataset": _augmented(), "batch_size": 4, "sampler": Endless(SIZE), "steps": 12}


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


class SplitByWorker(IterableDataset[Any]):
    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in range(first, self.length, step):
            yield {"id": i, "x": torch.rand(2), "text": f"line {i}"}


@sound(spawn=True)
def a_stream_split_by_worker(folder: Path) -> dict[str, Any]:
    return {"dataset": SplitByWorker(), "batch_size": 4}


class SizedStream(SplitByWorker):
    def __len__(self) -> int:
        return self.length


@sound()
def a_stream_with_a_length(folder: Path) -> dict[str, Any]:
    return {"dataset": SizedStream(), "batch_size": 4}


class Shards(IterableDataset[Any]):
    """Files in an order by seed and epoch, shared out among the workers, and a shuffle buffer."""

    def __init__(self, folder: Path, seed: int = 5) -> None:
        self.paths = sorted(folder.glob("*.txt"))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[str]:
        paths = list(self.paths)
        random.Random(self.seed + self.epoch).shuffle(paths)
        info = get_worker_info()
        if info is not None:
            paths = paths[info.id :: info.num_workers]
        rng = random.Random((self.seed, self.epoch, 0 if info is None else info.id).__repr__())
        buffer: list[str] = []
        for path in paths:
            for line in path.read_text().splitlines():
                buffer.append(line)
                if len(buffer) > 6:
                    yield buffer.pop(rng.randrange(len(buffer)))
        yield from buffer


@sound(modes=("fresh", "main"))
def a_stream_of_shards(folder: Path) -> dict[str, Any]:
    for shard in range(4):
        lines = [f"{shard}-{k}" for k in range(10)]
        (folder / f"{shard}.txt").write_text("\n".join(lines))
    dataset = Shards(folder)
    return {"dataset": dataset, "batch_size": 4, "before_epoch": dataset.set_epoch}


class Synthetic(IterableDataset[Any]):
    """Makes samples up, as many as are asked for."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(16):
            yield torch.rand(3), random.random()


@sound()
def a_stream_of_made_up_samples(folder: Path) -> dict[str, Any]:
    return {"dataset": Synthetic(), "batch_size": 4, "worker_init_fn": seed_worker}


class Constant(IterableDataset[Any]):
    """The same sample again and again: a dummy for a benchmark."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(16):
            yield torch.zeros(3), 1


@sound()
def a_stream_of_one_dummy(folder: Path) -> dict[str, Any]:
    return {"dataset": Constant(), "batch_size": 4}


@sound()
def a_chain_of_streams(folder: Path) -> dict[str, Any]:
    return {"dataset": ChainDataset([SplitByWorker(), SplitByWorker(20)]), "batch_size": 4}


class Batched(IterableDataset[Any]):
    """Makes whole batches itself."""

    def __init__(self) -> None:
        self.rows = np.random.rand(48, 3).astype(np.float32)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for k in range(4 * first, len(self.rows), 4 * step):
            yield torch.from_numpy(self.rows[k : k + 4])


@sound()
def a_stream_of_batches(folder: Path) -> dict[str, Any]:
    return {"dataset": Batched(), "batch_size": None}


# ── collating, and what else is given ───────────────────────────────────────────────────────────


class Detection(Dataset[Any]):
    """Images of any size, with any number of boxes."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        image = torch.rand(3, 4 + index % 3, 5)
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        boxes = torch.rand(index % 4, 4)
        return image, {"boxes": boxes, "labels": torch.ones(len(boxes)), "image_id": index}


def together(samples: list[Any]) -> Any:
    return tuple(zip(*samples, strict=True))


@sound(spawn=True)
def detection(folder: Path) -> dict[str, Any]:
    return {"dataset": Detection(), "batch_size": 4, "shuffle": True, "collate_fn": together}


class Wrapper(Dataset[Any]):
    """A dataset around a dataset, that knows of more."""

    def __init__(self, dataset: Any, transform: Any) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return self.transform(image), label


@sound()
def a_wrapper(folder: Path) -> dict[str, Any]:
    return {
        "dataset": Wrapper(_augmented(), RandomFlip()),
        "batch_size": 4,
        "shuffle": True,
    }


class MixCollate:
    """Mixes a batch as it is made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        x, y = default_collate(samples)
        weight = np.random.beta(0.2, 0.2)
        return weight * x + (1 - weight) * x.flip(0), y


@sound()
def a_collate_function_that_draws(folder: Path) -> dict[str, Any]:
    return {
        "dataset": _augmented(),
        "batch_size": 4,
        "shuffle": True,
        "collate_fn": MixCollate(),
        "drop_last": True,
    }


# ── what a module holds ─────────────────────────────────────────────────────────────────────────

JITTER = np.random.default_rng(0)
SHARDS = random.Random(0)


def jittered(value: float) -> float:
    return value + float(JITTER.random())


class Validation(Dataset[Any]):
    """Its transform draws from a module's generator, and is for training."""

    def __init__(self, augment: bool) -> None:
        self.names, self.augment = [f"scans/{index}" for index in range(SIZE)], augment

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> float:
        value = float(self.names[index].split("/")[1])
        return jittered(value) if self.augment else value

    def split(self) -> list[int]:
        return SHARDS.sample(range(SIZE), 4)


@sound(spawn=True)
def validation_without_augmentation(folder: Path) -> dict[str, Any]:
    return {"dataset": Validation(False), "batch_size": 4}


class ShuffledShards(IterableDataset[Any]):
    """All workers put the shards in one order, and each takes its share of it."""

    def __iter__(self) -> Iterator[int]:
        shards = [*range(SIZE)]
        SHARDS.shuffle(shards)
        info = get_worker_info()
        yield from shards if info is None else shards[info.id :: info.num_workers]


@sound(modes=("fresh", "persistent"))
def shards_in_one_order(folder: Path) -> dict[str, Any]:
    return {"dataset": ShuffledShards(), "batch_size": 4}
