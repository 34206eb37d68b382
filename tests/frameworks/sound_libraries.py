"""Sound datasets on libraries; the others are in :mod:`tests.frameworks.sound_datasets`.

All data are made here. A library is imported where it is used, since the others do without it.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tests.frameworks.sound_datasets import SIZE, Case, Opened, sound

WITH_LIBRARIES: dict[str, Case] = {}
with_library = functools.partial(sound, into=WITH_LIBRARIES)


# ── tables and arrays ───────────────────────────────────────────────────────────────────────────


def _rows() -> dict[str, list[Any]]:
    return {
        "i": list(range(SIZE)),
        "x": [i / 7 for i in range(SIZE)],
        "text": [f"row {i}" for i in range(SIZE)],
    }


def _hf() -> Any:
    import datasets

    return datasets.Dataset.from_dict(_rows())


@with_library("datasets")
def hf(folder: Path) -> dict[str, Any]:
    return {"dataset": _hf(), "batch_size": 4, "shuffle": True}


@with_library("datasets")
def hf_as_torch(folder: Path) -> dict[str, Any]:
    return {"dataset": _hf().with_format("torch"), "batch_size": 4, "shuffle": True}


@with_library("datasets")
def hf_shuffled_and_mapped(folder: Path) -> dict[str, Any]:
    dataset = _hf().map(_longer).shuffle(seed=1).with_transform(_noisy)
    return {"dataset": dataset, "batch_size": 4, "shuffle": True}


def _longer(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"] + "!", "length": len(row["text"])}


def _noisy(rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {"x": [x + torch.rand(()) for x in rows["x"]], "i": rows["i"]}


@with_library("datasets")
def hf_stream(folder: Path) -> dict[str, Any]:
    return {"dataset": _hf().to_iterable_dataset(num_shards=4), "batch_size": 4}


@with_library("datasets", modes=("fresh", "persistent", "main"))
def hf_stream_shuffled(folder: Path) -> dict[str, Any]:
    dataset = _hf().to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)
    return {"dataset": dataset, "batch_size": 4, "before_epoch": dataset.set_epoch}


@with_library("datasets")
def hf_stream_as_torch(folder: Path) -> dict[str, Any]:
    dataset = _hf().to_iterable_dataset(num_shards=2).map(_longer).with_format("torch")
    return {"dataset": dataset, "batch_size": 4}


@with_library("datasets")
def hf_generator(folder: Path) -> dict[str, Any]:
    import datasets

    dataset = datasets.IterableDataset.from_generator(
        _lines_of, gen_kwargs={"shards": [f"shard {k}" for k in range(4)]}
    )
    return {"dataset": dataset.shuffle(seed=3, buffer_size=4), "batch_size": 4}


def _lines_of(shards: list[str]) -> Any:
    for shard in shards:
        for k in range(8):
            yield {"text": f"{shard}, line {k}", "k": k}


class ArrowTable(Dataset[Any]):
    def __init__(self) -> None:
        import pyarrow

        self.table = pyarrow.table(_rows())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return {name: self.table[name][index].as_py() for name in self.table.column_names}


@with_library("pyarrow")
def arrow_table(folder: Path) -> dict[str, Any]:
    return {"dataset": ArrowTable(), "batch_size": 4, "shuffle": True}


class ParquetFile(Dataset[Any]):
    """Row groups, by a file that each worker opens; the last one is kept."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self.length = pq.ParquetFile(path).metadata.num_rows
        self.file: Any = None
        self.group: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        import pyarrow.parquet as pq

        if self.file is None:
            self.file = pq.ParquetFile(self.path)
        number, row = divmod(index, 6)
        if self.group is None or self.group[0] != number:
            self.group = (number, self.file.read_row_group(number, use_threads=False))
        return self.group[1]["x"][row].as_py(), index


@with_library("pyarrow")
def parquet_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(_rows()), folder / "rows.parquet", row_group_size=6)
    return {"dataset": ParquetFile(folder / "rows.parquet"), "batch_size": 4, "shuffle": True}


class Frame(Dataset[Any]):
    """The commonest dataset there is: a table with paths and labels."""

    def __init__(self) -> None:
        import pandas

        self.frame = pandas.DataFrame(_rows())

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> Any:
        row = self.frame.iloc[index]
        return torch.tensor(row["x"]), row["text"]


@with_library("pandas")
def pandas_frame(folder: Path) -> dict[str, Any]:
    return {"dataset": Frame(), "batch_size": 4, "shuffle": True}


class Polars(Dataset[Any]):
    def __init__(self) -> None:
        import polars

        self.frame = polars.DataFrame(_rows())

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> Any:
        return self.frame.row(index, named=True)


@with_library("polars", modes=("persistent", "main"), spawn=True, fork=False)
def polars_frame(folder: Path) -> dict[str, Any]:
    """Not under fork: polars has threads, and says so itself."""
    return {"dataset": Polars(), "batch_size": 4, "shuffle": True}


class Hdf5(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        import h5py

        self.path = path
        with h5py.File(path, "r") as file:
            self.length = len(file["x"])
        self.file: Any = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        import h5py

        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return torch.from_numpy(self.file["x"][index]), index


@with_library("h5py", spawn=True)
def h5py_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        file["x"] = np.random.rand(SIZE, 3).astype(np.float32)
    return {"dataset": Hdf5(folder / "rows.h5"), "batch_size": 4, "shuffle": True}


class Lmdb(Opened):
    def open(self) -> Any:
        import lmdb

        return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)

    def read(self, index: int) -> bytes:
        with self.reader.begin() as transaction:
            return transaction.get(str(index).encode())  # type: ignore[no-any-return]


@with_library("lmdb", spawn=True)
def lmdb_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    import lmdb

    made = lmdb.open(str(folder / "rows.lmdb"))
    with made.begin(write=True) as transaction:
        for i in range(SIZE):
            transaction.put(str(i).encode(), bytes([i, i + 1]))
    made.close()
    return {"dataset": Lmdb(folder / "rows.lmdb"), "batch_size": 4, "shuffle": True}


class Zarr(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.array: Any = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        import zarr

        if self.array is None:
            self.array = zarr.open_array(self.path, mode="r")
        return torch.from_numpy(np.asarray(self.array[index])), index


@with_library("zarr", modes=("persistent", "main"), spawn=True, fork=False)
def zarr_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    import zarr

    path = folder / "rows.zarr"
    array = zarr.create_array(store=str(path), shape=(SIZE, 4), chunks=(5, 4), dtype="f4")
    array[:] = np.random.rand(SIZE, 4)
    return {"dataset": Zarr(path), "batch_size": 4, "shuffle": True}


# ── images, sound, video ────────────────────────────────────────────────────────────────────────


def _picture(i: int) -> Any:
    return np.full((12, 10, 3), 5 * i, np.uint8)


class Pictures(Dataset[Any]):
    """Files, by PIL."""

    def __init__(self, folder: Path, transform: Any = None) -> None:
        self.paths = sorted(map(str, folder.glob("*.png")))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[index]) as file:
            image = np.array(file.convert("RGB"))
        if self.transform is not None:
            image = self.transform(image=image)["image"]
        return torch.from_numpy(image).permute(2, 0, 1), self.paths[index].rpartition("/")[2]


def _draw(folder: Path) -> None:
    from PIL import Image

    for i in range(SIZE):
        Image.fromarray(_picture(i)).save(folder / f"{i:03d}.png")


@with_library("PIL", spawn=True)
def pil(folder: Path) -> dict[str, Any]:
    _draw(folder)
    return {"dataset": Pictures(folder), "batch_size": 4, "shuffle": True}


class PicturesInMemory(Dataset[Any]):
    """Opened at once and read when they are needed, from memory."""

    def __init__(self) -> None:
        from PIL import Image

        self.images = []
        for i in range(SIZE):
            buffer = io.BytesIO()
            Image.fromarray(_picture(i)).save(buffer, "PNG")
            self.images.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return np.array(Image.open(io.BytesIO(self.images[index])))


@with_library("PIL")
def pil_in_memory(folder: Path) -> dict[str, Any]:
    return {"dataset": PicturesInMemory(), "batch_size": 4, "shuffle": True}


class Augmented(Pictures):
    """The pipeline is made in each worker: its generators would be the same in all otherwise."""

    def __getitem__(self, index: int) -> Any:
        import albumentations as A

        if self.transform is None:
            flip, turn = A.HorizontalFlip(p=0.5), A.Rotate(10, p=0.5)
            self.transform = A.Compose([flip, A.RandomCrop(8, 8), turn])
        return super().__getitem__(index)


@with_library("PIL", "albumentations")
def albumentations_made_in_the_worker(folder: Path) -> dict[str, Any]:
    _draw(folder)
    return {"dataset": Augmented(folder), "batch_size": 4, "shuffle": True, "compared": False}


class ByOpenCV(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(map(str, folder.glob("*.png")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        import cv2

        image = cv2.cvtColor(cv2.imread(self.paths[index]), cv2.COLOR_BGR2RGB)
        return torch.from_numpy(cv2.resize(image, (8, 8)))


@with_library("PIL", "cv2")
def opencv(folder: Path) -> dict[str, Any]:
    _draw(folder)
    return {"dataset": ByOpenCV(folder), "batch_size": 4, "shuffle": True}


def _film(path: Path) -> None:
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(SIZE):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i, np.uint8), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


class FilmByOpenCV(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.film: Any = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        import cv2

        if self.film is None:
            self.film = cv2.VideoCapture(str(self.path))
        self.film.set(cv2.CAP_PROP_POS_FRAMES, index)
        _, image = self.film.read()
        return torch.from_numpy(image), index


@with_library("av", "cv2")
def video_by_opencv_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    _film(folder / "film.mp4")
    return {"dataset": FilmByOpenCV(folder / "film.mp4"), "batch_size": 4, "shuffle": True}


class Film(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.film: Any = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        import av

        if self.film is None:
            self.film = av.open(str(self.path))
            self.film.streams.video[0].thread_type = "NONE"
        self.film.seek(0)
        for number, frame in enumerate(self.film.decode(video=0)):
            if number == index:
                return torch.from_numpy(frame.to_ndarray(format="rgb24")), index
        raise IndexError(index)


@with_library("av")
def video_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    _film(folder / "film.mp4")
    return {"dataset": Film(folder / "film.mp4"), "batch_size": 4, "shuffle": True}


class Sounds(Dataset[Any]):
    """Random pieces of one recording, that each worker opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        import soundfile

        if self.file is None:
            self.file = soundfile.SoundFile(self.path)
        self.file.seek(int(np.random.randint(0, self.file.frames - 64)))
        return torch.from_numpy(self.file.read(64, dtype="float32")), index


@with_library("soundfile")
def sound_opened_in_the_worker(folder: Path) -> dict[str, Any]:
    import soundfile

    soundfile.write(folder / "tone.wav", np.sin(np.arange(4000) / 10), 8000)
    return {"dataset": Sounds(folder / "tone.wav"), "batch_size": 4, "shuffle": True}


# ── text ────────────────────────────────────────────────────────────────────────────────────────


class Tokenized(Dataset[Any]):
    def __init__(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {f"w{i}": i for i in range(SIZE)} | {"[UNK]": SIZE}
        self.tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.texts = [f"w{i} w{(i * 3) % SIZE} never" for i in range(SIZE)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(self.tokenizer.encode(self.texts[index]).ids)


@with_library("tokenizers")
def tokenizer(folder: Path) -> dict[str, Any]:
    return {"dataset": Tokenized(), "batch_size": 4, "shuffle": True}


# ── shards ──────────────────────────────────────────────────────────────────────────────────────


def _shards(folder: Path) -> list[str]:
    import webdataset

    paths = []
    for shard in range(4):
        paths.append(str(folder / f"{shard}.tar"))
        with webdataset.TarWriter(paths[-1]) as out:
            for k in range(10):
                out.write({"__key__": f"{shard}{k:03d}", "txt": f"line {k} of {shard}", "cls": k})
    return paths


@with_library("webdataset")
def webdataset_of_shards(folder: Path) -> dict[str, Any]:
    import webdataset

    dataset = (
        webdataset.WebDataset(_shards(folder), shardshuffle=False)
        .decode()
        .to_tuple("__key__", "txt", "cls")
    )
    return {"dataset": dataset, "batch_size": 4}


@with_library("webdataset")
def webdataset_shuffled(folder: Path) -> dict[str, Any]:
    import webdataset

    dataset = (
        webdataset.WebDataset(_shards(folder), shardshuffle=4, seed=3, detshuffle=True)
        .shuffle(8)
        .decode()
        .to_tuple("__key__", "txt", "cls")
    )
    return {"dataset": dataset, "batch_size": 4, "compared": False}


@with_library("webdataset")
def webdataset_resampled(folder: Path) -> dict[str, Any]:
    import webdataset

    dataset = (
        webdataset.WebDataset(_shards(folder), resampled=True, shardshuffle=False)
        .shuffle(8)
        .decode()
        .to_tuple("__key__", "txt")
        .with_epoch(20)
    )
    return {"dataset": dataset, "batch_size": 4, "compared": False}


# ── graphs, volumes ─────────────────────────────────────────────────────────────────────────────


@with_library("torch_geometric")
def graphs(folder: Path) -> dict[str, Any]:
    from torch_geometric.data import Data

    dataset = [
        Data(x=torch.rand(i % 3 + 2, 4), edge_index=torch.tensor([[0, 1], [1, 0]]), y=i)
        for i in range(SIZE)
    ]
    return {
        "dataset": dataset,
        "batch_size": 4,
        "shuffle": True,
        "collate_fn": _graphs,
    }


def _graphs(samples: list[Any]) -> Any:
    from torch_geometric.data import Batch

    return Batch.from_data_list(samples).to_dict()


@with_library("monai")
def monai_cached(folder: Path) -> dict[str, Any]:
    from monai.data import CacheDataset
    from monai.transforms import Compose, RandFlipd, RandGaussianNoised, ScaleIntensityd

    items = [{"image": np.random.rand(1, 4, 4).astype(np.float32), "k": i} for i in range(SIZE)]
    transform = Compose(
        [ScaleIntensityd("image"), RandFlipd("image", prob=0.5), RandGaussianNoised("image")]
    )
    dataset = CacheDataset(items, transform, progress=False, num_workers=0)
    return {
        "dataset": dataset,
        "batch_size": 4,
        "shuffle": True,
        "worker_init_fn": _monai_worker,
        "compared": False,
    }


def _monai_worker(worker_id: int) -> None:
    from monai.data.utils import worker_init_fn

    worker_init_fn(worker_id)


@with_library("torchio")
def torchio_subjects(folder: Path) -> dict[str, Any]:
    import torchio as tio

    subjects = [
        tio.Subject(scan=tio.ScalarImage(tensor=torch.rand(1, 4, 4, 4)), number=i)
        for i in range(SIZE // 2)
    ]
    transform = tio.Compose([tio.RandomFlip(axes=(0, 1)), tio.RandomNoise(p=0.5)])
    return {
        "dataset": tio.SubjectsDataset(subjects, transform=transform),
        "batch_size": 4,
        "shuffle": True,
        "collate_fn": _scans,
    }


def _scans(subjects: list[Any]) -> Any:
    return torch.stack([each["scan"].data for each in subjects]), [s["number"] for s in subjects]
