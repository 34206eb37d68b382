"""Every benchmark case: what is loaded, and with which arguments.

A builder takes the number of batches of an epoch, so that a test can ask for three of them and a
full run for some hundreds. Everything a worker needs is at module level, as `spawn` requires.
Samples come out of a small pool made beforehand: except in the JPEG cases there is next to no work
in them, which leaves the loader itself to be measured.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

Setup = tuple[Dataset[Any], dict[str, Any]]

START_METHOD = "fork"
"""Of every worker here, and said so: Python's default differs by system and release."""


class Unavailable(Exception):
    """A case needs something that is not installed here."""


@dataclass(frozen=True)
class Case:
    name: str
    description: str
    batches: int
    """Batches of an epoch in a full run: about 0.3 s of the stock loader on two cores."""
    build: Callable[[int], Setup]
    workers: int = 0
    """As the arguments have it; 0 is the main process."""
    real_work: bool = False
    """At least 0.1 ms of work per sample: here the loader has no excuse for a measurable loss."""
    fresh: bool = False
    """Workers start with every epoch, torch's default: the whole epoch is timed, start and end."""
    epochs: int = 1
    """Epochs of the loader that are timed as one, each from its start, where one alone is short."""
    goal: float | None = None
    """The bar of :class:`safeloader.SafeDataLoader` as it comes, where it is not the usual one."""

    @property
    def floor(self) -> float:
        """The share of the stock loader's speed that is the least to be accepted of any contender.

        Where the bar is lower still, nobody who does more is held to more.
        """
        usual = 0.99 if self.real_work else 0.95
        return usual if self.goal is None else min(usual, self.goal)

    @property
    def bar(self) -> float:
        """The least to be accepted of the safe loader as it comes."""
        return self.floor if self.goal is None else self.goal

    @property
    def whole(self) -> bool:
        """The start of an epoch is timed too."""
        return self.fresh or self.epochs > 1

    @property
    def start_method(self) -> str:
        """Of the workers; a dash where there are none."""
        return START_METHOD if self.workers else "-"

    @property
    def lives(self) -> str:
        """Where samples are fetched, and how long workers live."""
        if not self.workers:
            return "main"
        return f"{self.workers} {self.lasting}"

    @property
    def lasting(self) -> str:
        return "fresh" if self.fresh else "persistent"


def _workers(count: int) -> dict[str, Any]:
    if START_METHOD not in multiprocessing.get_all_start_methods():
        raise Unavailable(f"this system starts no process by {START_METHOD}")
    # Workers that persist keep the start of processes out of the epochs that are timed.
    return {
        "num_workers": count,
        "persistent_workers": True,
        "multiprocessing_context": START_METHOD,
    }


def _fresh(batches: int, case: Callable[[int], Setup]) -> Setup:
    dataset, kwargs = case(batches)
    return dataset, kwargs | {"persistent_workers": False}


def _with_numpy_random(batches: int, case: Callable[[int], Setup]) -> Setup:
    # Else each of the stock loader's forked workers loads it as torch seeds it.
    importlib.import_module("numpy.random")
    return case(batches)


# ------------------------------------------------------------------------------------ tensors


class PoolDataset(Dataset[Tensor]):
    """Tensors of one shape; index `i` gives the pool's tensor `i % pool`."""

    def __init__(self, length: int, shape: tuple[int, ...], pool: int) -> None:
        self.length = length
        self.pool = torch.randn(pool, *shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.pool[index % len(self.pool)]


class RecordDataset(Dataset[dict[str, float]]):
    """Rows of a table as dicts of twelve numbers, as records of a CSV file come."""

    def __init__(self, length: int) -> None:
        self.length = length
        draw = random.Random(1)
        self.records = [{f"column{n}": draw.random() for n in range(12)} for _ in range(509)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, float]:
        return self.records[index % len(self.records)]


class BatchedFetchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Answers for a whole batch at once, as datasets backed by a table or a database do."""

    def __init__(self, length: int) -> None:
        self.rows = torch.randn(length, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index], torch.tensor(index)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        chosen = torch.tensor(indices)
        return list(zip(self.rows[chosen], chosen, strict=True))


class ChunkDataset(Dataset[Tensor]):
    """Each sample is a batch already, read as a copy, as from a file; for `batch_size=None`."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.pool = torch.randn(61, 32, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.chunks

    def __getitem__(self, index: int) -> Tensor:
        return self.pool[index % len(self.pool)].clone()


class ShardedStream(IterableDataset[tuple[Tensor, int]]):
    """A stream of which every worker reads its own share."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.pool = torch.randn(251, 32, generator=torch.Generator().manual_seed(1))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, self.length, step):
            yield self.pool[index % len(self.pool)], index


def _tensor_dataset_main(batches: int) -> Setup:
    length = 64 * batches
    rows = torch.randn(length, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(rows, torch.arange(length)), {"batch_size": 64, "shuffle": True}


def _dicts_main(batches: int) -> Setup:
    return RecordDataset(256 * batches), {"batch_size": 256, "shuffle": True}


def _ints_main(batches: int) -> Setup:
    # A range is a dataset: its samples are its own indices, the cheapest that there are.
    integers: Any = range(64 * batches)
    return integers, {"batch_size": 64, "shuffle": True}


def _stored_main(batches: int, split: bool) -> Setup:
    length = 64 * batches
    stored: Any = list(torch.randn(length, 8, generator=torch.Generator().manual_seed(1)))
    return Subset(stored, list(range(length))[::-1]) if split else stored, {"batch_size": 64}


def _tiny(batches: int, workers: int) -> Setup:
    dataset = PoolDataset(4 * batches, (8,), pool=61)
    kwargs = {"batch_size": 4, "shuffle": True}
    return dataset, kwargs | (_workers(workers) if workers else {})


def _getitems_main(batches: int) -> Setup:
    return BatchedFetchDataset(64 * batches), {"batch_size": 64, "shuffle": True}


def _small(batches: int, workers: int) -> Setup:
    dataset = PoolDataset(32 * batches, (8,), pool=1021)
    return dataset, {"batch_size": 32, "shuffle": True, **_workers(workers)}


def _medium(batches: int, workers: int) -> Setup:
    dataset = PoolDataset(64 * batches, (3, 64, 64), pool=67)
    return dataset, {"batch_size": 64, "shuffle": True, **_workers(workers)}


def _large(batches: int, workers: int) -> Setup:
    dataset = PoolDataset(64 * batches, (3, 224, 224), pool=17)
    return dataset, {"batch_size": 64, "shuffle": True, **_workers(workers)}


def _no_batching(batches: int) -> Setup:
    return ChunkDataset(batches), {"batch_size": None, "shuffle": True, **_workers(2)}


def _stream(batches: int) -> Setup:
    return ShardedStream(32 * batches), {"batch_size": 32, **_workers(2)}


# --------------------------------------------------------------------------------------- JPEG


JPEG_NAMES = ("china", "flower")


@functools.cache
def _jpeg_folder() -> tempfile.TemporaryDirectory[str]:
    """Photographs as JPEG files, cut from scikit-learn's two sample images; once per process.

    The cache holds the `TemporaryDirectory`, which removes itself when the program ends.
    """
    # Only the location of the files is wanted, so the import of scikit-learn (seconds) is spared.
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("scikit-learn is not installed; its sample images are needed")
    if importlib.util.find_spec("PIL") is None:
        raise Unavailable("pillow is not installed")
    from PIL import Image

    folder = tempfile.TemporaryDirectory(prefix="safeloader-benchmark-")
    draw = random.Random(1)
    images = Path(found.submodule_search_locations[0]) / "datasets" / "images"
    for name in JPEG_NAMES:
        (Path(folder.name) / name).mkdir()
        with Image.open(images / f"{name}.jpg") as photograph:
            for number in range(32):
                left = draw.randrange(photograph.width - 256)
                top = draw.randrange(photograph.height - 256)
                crop = photograph.crop((left, top, left + 256, top + 256))
                crop.save(Path(folder.name) / name / f"{number:02}.jpg", quality=90)
    return folder


class JpegDataset(Dataset[tuple[Tensor, int]]):
    """Decode, crop and flip at random, normalise: what image training does to every sample."""

    CROP = 224

    def __init__(self, length: int) -> None:
        self.length = length
        self.paths = sorted(Path(_jpeg_folder().name).glob("*/*.jpg"))
        self.mean = np.array([0.485, 0.456, 0.406], np.float32) * 255
        self.scale = 1 / (np.array([0.229, 0.224, 0.225], np.float32) * 255)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # torch's generator, because the loader seeds it in every worker and the main process alike.
        drawn = torch.randint(0, 2**31, (3,)).tolist()
        return torch.from_numpy(self.decoded(index, drawn)), index

    def decoded(self, index: int, drawn: Sequence[int]) -> np.ndarray[Any, Any]:
        """The image, cut and flipped as three large numbers say."""
        from PIL import Image

        with Image.open(self.paths[index % len(self.paths)]) as image:
            pixels = np.asarray(image.convert("RGB"))
        top, left, flip = drawn
        top %= pixels.shape[0] - self.CROP + 1
        left %= pixels.shape[1] - self.CROP + 1
        crop = pixels[top : top + self.CROP, left : left + self.CROP]
        if flip % 2:
            crop = crop[:, ::-1]
        normalised = (crop - self.mean) * self.scale
        return normalised.transpose(2, 0, 1).copy()


class FolderDataset(JpegDataset):
    """The same work, from a folder for each class, cut and flipped by the index alone.

    No random numbers: loaders that seed their workers in other ways give the same batches.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.labels = [sorted(JPEG_NAMES).index(path.parent.name) for path in self.paths]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.pixels(index)
        return torch.from_numpy(pixels), label

    def pixels(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        """A sample without torch."""
        cut = (index * 7, index * 13, index // len(self.paths))
        return self.decoded(index, cut), self.labels[index % len(self.paths)]


def _jpeg(batches: int, workers: int) -> Setup:
    kwargs = {"batch_size": 32, "shuffle": True}
    return JpegDataset(32 * batches), kwargs | (_workers(workers) if workers else {})


def _folder(batches: int) -> Setup:
    return FolderDataset(32 * batches), {"batch_size": 32, "shuffle": True, **_workers(2)}


# ------------------------------------------------------------------------- structured batches


class TextDataset(Dataset[dict[str, Any]]):
    """Sentences of 4 to 120 words as token numbers, with the text they came from."""

    def __init__(self, length: int) -> None:
        self.length = length
        draw = random.Random(1)
        self.sentences = [
            [draw.randrange(1, 30_000) for _ in range(min(120, 4 + int(draw.expovariate(1 / 24))))]
            for _ in range(509)
        ]
        self.texts = [" ".join(f"w{token}" for token in tokens) for tokens in self.sentences]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = index % len(self.sentences)
        return {"tokens": self.sentences[which], "text": self.texts[which], "label": index % 4}


def collate_padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad token lists to the longest of the batch, with a mask of what is real."""
    tokens = [torch.tensor(sample["tokens"]) for sample in samples]
    lengths = torch.tensor([len(each) for each in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return {
        "input_ids": padded,
        "attention_mask": torch.arange(padded.shape[1]) < lengths[:, None],
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "texts": [sample["text"] for sample in samples],
    }


class StringDataset(Dataset[Tensor]):
    """Sentences of 4 to 120 words, made into token numbers when they are asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        draw = random.Random(1)
        self.vocabulary = {f"word{n}": n for n in range(1, 5000)}
        words = list(self.vocabulary)
        self.sentences = [
            " ".join(draw.choices(words, k=min(120, 4 + int(draw.expovariate(1 / 24)))))
            for _ in range(509)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.tokens(index))

    def tokens(self, index: int) -> list[int]:
        """A sample without torch."""
        sentence = self.sentences[index % len(self.sentences)]
        return [self.vocabulary[word] for word in sentence.split()]


def collate_tokens(samples: list[Tensor]) -> dict[str, Tensor]:
    """Pad token numbers to the longest of the batch, with a mask of what is real."""
    lengths = torch.tensor([len(each) for each in samples])
    padded = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask}


class NestedDataset(Dataset[dict[str, Any]]):
    """Dicts in dicts, lists of tensors, numbers and strings, for the default collate."""

    def __init__(self, length: int) -> None:
        self.length = length
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(127, 3, 32, 32, generator=draw)
        self.views = torch.randn(127, 2, 16, generator=draw)
        self.boxes = torch.rand(127, 4, generator=draw)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = index % len(self.images)
        return {
            "image": self.images[which],
            "views": [self.views[which, 0], self.views[which, 1]],
            "meta": {
                "id": index,
                "name": f"sample {index}",
                "where": {"box": self.boxes[which], "scale": which / 127},
            },
        }


class DetectionDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """An image and a varying number of objects in it."""

    def __init__(self, length: int) -> None:
        self.length = length
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(31, 3, 64, 64, generator=draw)
        self.boxes = torch.rand(20, 4, generator=draw)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        objects = 1 + index % len(self.boxes)
        target = {
            "boxes": self.boxes[:objects].clone(),
            "labels": torch.arange(objects),
            "area": torch.full((objects,), 0.5),
            "image_id": torch.tensor(index),
        }
        return self.images[index % len(self.images)], target


def collate_detection(
    samples: list[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Stack the images and list the targets: 1 + 4 x 12 = 49 tensors for a batch of 12."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def _text(batches: int) -> Setup:
    kwargs = {"batch_size": 32, "shuffle": True, "collate_fn": collate_padded, **_workers(2)}
    return TextDataset(32 * batches), kwargs


def _strings(batches: int) -> Setup:
    kwargs = {"batch_size": 32, "shuffle": True, "collate_fn": collate_tokens, **_workers(2)}
    return StringDataset(32 * batches), kwargs


def _nested(batches: int) -> Setup:
    return NestedDataset(32 * batches), {"batch_size": 32, "shuffle": True, **_workers(2)}


def _detection(batches: int) -> Setup:
    kwargs = {"batch_size": 12, "shuffle": True, "collate_fn": collate_detection, **_workers(2)}
    return DetectionDataset(12 * batches), kwargs


# -------------------------------------------------------------------------------------- table

_partial = functools.partial

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("tensor-main", "TensorDataset, batch 64, main process", 1000, _tensor_dataset_main),
        Case("getitems-main", "__getitems__, batch 64, main process", 1000, _getitems_main),
        # The same data, held to what the columns of a table allow.
        Case(
            "columns-main",
            "TensorDataset, batch 64, main process",
            1000,
            _tensor_dataset_main,
            goal=5,
        ),
        Case(
            "dicts-main", "dicts of 12 floats, batch 256, main process", 50, _dicts_main, goal=1.0
        ),
        Case("ints-main", "integers, batch 64, main process", 1500, _ints_main, goal=0.9),
        Case(
            "stored-main",
            "float32[8] from a list, batch 64, main process",
            1000,
            _partial(_stored_main, split=False),
            goal=0.7,
        ),
        Case(
            "split-main",
            "float32[8] from a list under a Subset, batch 64, main process",
            1000,
            _partial(_stored_main, split=True),
            goal=0.7,
        ),
        Case(
            "epochs-main",
            "200 epochs of 4 batches of 4 x float32[8], main process",
            4,
            _partial(_tiny, workers=0),
            epochs=200,
            goal=0.8,
        ),
        Case("small-1w", "32 x float32[8], 1 worker", 300, _partial(_small, workers=1), 1),
        Case("small-2w", "32 x float32[8], 2 workers", 300, _partial(_small, workers=2), 2),
        Case("medium-1w", "64 x 3x64x64, 1 worker", 100, _partial(_medium, workers=1), 1),
        Case("medium-2w", "64 x 3x64x64, 2 workers", 100, _partial(_medium, workers=2), 2),
        Case("large-1w", "64 x 3x224x224, 1 worker", 12, _partial(_large, workers=1), 1),
        Case("large-2w", "64 x 3x224x224, 2 workers", 16, _partial(_large, workers=2), 2),
        Case(
            "jpeg-main",
            "JPEG decoding and augmentation, batch 32, main process",
            6,
            _partial(_jpeg, workers=0),
            real_work=True,
        ),
        Case(
            "jpeg-2w",
            "JPEG decoding and augmentation, batch 32, 2 workers",
            12,
            _partial(_jpeg, workers=2),
            2,
            real_work=True,
        ),
        Case("text-2w", "text of varying length, padding collate, 2 workers", 120, _text, 2),
        Case(
            "strings-2w", "strings to token numbers, padding collate, 2 workers", 120, _strings, 2
        ),
        Case(
            "folder-2w",
            "JPEG files of a folder, no random numbers, batch 32, 2 workers",
            12,
            _folder,
            2,
            real_work=True,
        ),
        Case(
            "tiny-2w",
            "20 epochs of 4 batches of 4 x float32[8], 2 workers",
            4,
            _partial(_tiny, workers=2),
            2,
            epochs=20,
        ),
        Case("nested-2w", "nested dicts, 2 workers", 100, _nested, 2),
        Case("detection-2w", "49 tensors a batch, own collate, 2 workers", 20, _detection, 2),
        Case("no-batching-2w", "batch_size=None, 2 workers", 300, _no_batching, 2),
        Case("stream-2w", "IterableDataset sharded by worker, 2 workers", 200, _stream, 2),
        Case(
            "small-2w-fresh",
            "48 batches of 32 x float32[8], 2 fresh workers, start and end included",
            48,
            _partial(_fresh, case=_partial(_small, workers=2)),
            2,
            fresh=True,
        ),
        Case(
            "medium-2w-fresh",
            "50 batches of 64 x 3x64x64, 2 fresh workers, start and end included",
            50,
            _partial(_fresh, case=_partial(_medium, workers=2)),
            2,
            fresh=True,
            goal=5,
        ),
        Case(
            "large-2w-fresh",
            "24 batches of 64 x 3x224x224, 2 fresh workers, start and end included",
            24,
            _partial(_fresh, case=_partial(_large, workers=2)),
            2,
            fresh=True,
            goal=6,
        ),
        Case(
            "jpeg-2w-fresh",
            "12 batches of 32 JPEG files, 2 fresh workers, start and end included",
            12,
            _partial(_fresh, case=_partial(_jpeg, workers=2)),
            2,
            real_work=True,
            fresh=True,
            goal=1.45,
        ),
        Case(
            "tiny-2w-fresh",
            "4 batches of 4 x float32[8], 2 fresh workers, start and end included",
            4,
            _partial(_fresh, case=_partial(_tiny, workers=2)),
            2,
            fresh=True,
            goal=1.3,
        ),
        Case(
            "tiny-2w-fresh-numpy",
            "the same in a program that has loaded numpy.random",
            4,
            _partial(_with_numpy_random, case=_partial(_fresh, case=_partial(_tiny, workers=2))),
            2,
            fresh=True,
        ),
        Case(
            "tiny-8w-fresh",
            "4 batches of 4 x float32[8], 8 fresh workers, start and end included",
            4,
            _partial(_fresh, case=_partial(_tiny, workers=8)),
            8,
            fresh=True,
            goal=1.2,
        ),
        Case(
            "strings-2w-fresh",
            "48 batches of strings to token numbers, 2 fresh workers, start and end included",
            48,
            _partial(_fresh, case=_strings),
            2,
            fresh=True,
        ),
        Case(
            "folder-2w-fresh",
            "12 batches of JPEG files of a folder, 2 fresh workers, start and end included",
            12,
            _partial(_fresh, case=_folder),
            2,
            real_work=True,
            fresh=True,
        ),
    )
}
