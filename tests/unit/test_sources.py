"""Which file or entry a sample comes from: found without asking the dataset, or said by it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from safeloader import SafeDataLoader, SampleError, WorkerCrashError
from safeloader.worker.sources import source_of

LENGTH = 40
BAD = 13
FILES = [f"scans/{number:04}.png" for number in range(LENGTH)]
BROKEN = ValueError("bad header")


class Holding(Dataset[Any]):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __len__(self) -> int:
        pytest.fail("the user's code was called")


@dataclasses.dataclass
class Row:
    file: Any
    label: int = 0


def source(dataset: Any, index: Any = BAD, exc: Exception = BROKEN) -> str:
    return source_of(dataset, index, exc, LENGTH)


# ── what the dataset holds ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"files": FILES}, "dataset.files[13] = 'scans/0013.png'"),
        ({"urls": [f"s3://b/{n}" for n in range(40)]}, "dataset.urls[13] = 's3://b/13'"),
        (
            {"items": [{"label": 3, "file": file} for file in FILES]},
            "dataset.items[13]['file'] = 'scans/0013.png'",
        ),
        ({"rows": [Row(file) for file in FILES]}, "dataset.rows[13].file = 'scans/0013.png'"),
        (
            {"table": {"label": [0] * LENGTH, "path": FILES}},
            "dataset.table['path'][13] = 'scans/0013.png'",
        ),
        ({"by_number": dict(enumerate(FILES))}, "dataset.by_number[13] = 'scans/0013.png'"),
        ({"inner": Holding(samples=FILES)}, "dataset.inner.samples[13] = 'scans/0013.png'"),
        (
            {"inner": Subset(Holding(samples=FILES), range(LENGTH)[::-1])},
            "dataset.inner.dataset.samples[26] = 'scans/0026.png'",
        ),
        ({"items": [{"a": 1, "b": 2}] * LENGTH}, "dataset.items[13] = {'a': 1, 'b': 2}"),
        ({"labels": np.arange(LENGTH)}, "dataset.labels[13] = int64(13)"),
        ({"labels": np.arange(LENGTH), "names": ["cat"] * LENGTH}, "dataset.names[13] = 'cat'"),
    ],
)
def test_the_entry_of_the_sample_is_named(held: dict[str, Any], said: str) -> None:
    assert source(Holding(**held)).replace("numpy.int64", "int64") == said


def test_a_long_path_is_told_whole() -> None:
    files = [f"/data/{'very-' * 30}long/{number}.png" for number in range(LENGTH)]
    assert files[BAD] in source(Holding(files=files))
    assert files[BAD] in source(Holding(samples=[(file, 1) for file in files]))


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"files": FILES[:-1]},  # not one for each sample
        {"losses": [0.5] * LENGTH},
        {"cache": [None] * LENGTH},
        {"password": FILES},
        {"images": torch.zeros(LENGTH, 3)},
    ],
)
def test_nothing_is_said_where_nothing_tells(held: dict[str, Any]) -> None:
    assert source(Holding(**held)) == ""


def test_a_key_of_another_kind_is_looked_up_where_the_keys_are() -> None:
    dataset = Holding(files={f"k{number}": file for number, file in enumerate(FILES)})
    assert source(dataset, "k13") == "dataset.files['k13'] = 'scans/0013.png'"
    assert source(dataset, ("k13", 160)) == ""


def test_under_a_subset_or_a_concatenation_it_is_the_entry_there() -> None:
    half = Holding(files=FILES)
    assert source(Subset(half, [5, 6, 7]), 1) == "dataset.dataset.files[6] = 'scans/0006.png'"
    with_length = type("WithLength", (Holding,), {"__len__": lambda self: LENGTH})
    both = ConcatDataset([with_length(files=FILES), with_length(files=FILES)])
    assert source(both, 45) == "dataset.datasets[1].files[5] = 'scans/0005.png'"


class Says(Holding):
    def __safeloader_source__(self, index: int) -> str:
        if index == 5:
            raise KeyError(index)
        return f"s3://bucket/{index}.jpg"


def test_a_dataset_that_says_so_is_asked_first() -> None:
    dataset = Says(files=FILES)
    assert source(dataset) == "source of the sample: 's3://bucket/13.jpg'"
    assert source(dataset, 5) == ""


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("pandas", "dataset.table['path'].iloc[13] = 'scans/0013.png'"),
        ("polars", "dataset.table[13, 'path'] = 'scans/0013.png'"),
        ("pyarrow", "dataset.table['path'][13] = 'scans/0013.png'"),
    ],
)
def test_the_row_of_a_table_is_named(library: str, said: str) -> None:
    module = pytest.importorskip(library)
    columns = {"label": list(range(LENGTH)), "path": FILES}
    table = module.table(columns) if library == "pyarrow" else module.DataFrame(columns)
    assert source(Holding(table=table)) == said
    assert source(Holding(table=table[:30])) == ""  # not one for each sample


# ── what the failing frames hold ─────────────────────────────────────────────────────────────────


class Reads(Dataset[Any]):
    """Its list is in another order than its samples."""

    def __init__(self, broken: int = BAD) -> None:
        self.files = FILES
        self.order = [*range(LENGTH)][::-1]
        self.broken = broken

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        folder, path = "/data/scans", "/data/" + self.files[self.order[index]]
        mime = "image/png"
        if index == self.broken:
            raise ValueError(f"cannot decode an {mime}")
        return torch.tensor(len(folder) + len(path))


class Elsewhere(Reads):
    """The file is in no list of the dataset's."""

    def __init__(self) -> None:
        super().__init__()
        self.files = [*"ab" * 20]

    def __getitem__(self, index: int) -> Any:
        url = f"https://host/{index}.png"
        return self._decode(url) if index == BAD else torch.tensor(0)

    def _decode(self, what: str) -> Any:
        size = 0
        return 1 // size


def raised(dataset: Any, index: int = BAD) -> Exception:
    try:
        dataset[index]
    except Exception as exc:
        return exc
    pytest.fail("nothing was raised")


def test_a_path_in_the_locals_tells_which_entry_it_was() -> None:
    dataset = Reads()
    assert source(dataset, exc=raised(dataset)).startswith("path = '/data/scans/0026.png' in __get")


def test_a_path_in_the_locals_is_named_where_no_list_has_it() -> None:
    dataset = Elsewhere()
    said = source(dataset, exc=raised(dataset))
    assert said.startswith("what = 'https://host/13.png' in _decode (test_sources.py:")


# ── which entry the code reads ───────────────────────────────────────────────────────────────────


class Given(Dataset[Any]):
    """Its list is in the order of its samples, or ``order`` says in which."""

    def __init__(self, folder: Path = Path("scans"), length: int = LENGTH) -> None:
        self.files = [f"{folder}/{number:04}.json" for number in range(length)]
        self.order = [*range(length)][::-1]
        self.names = ["cat"] * length

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> Any:
        return json.loads(Path(self.path(index)).read_text())


class Mapped(Given):
    def __getitem__(self, index: int) -> Any:
        with open(self.files[self.order[index]]) as file:
            return json.load(file)


class MappedInside(Given):
    def __getitem__(self, index: int) -> Any:
        return self._read(self.files[self.order[index]])

    def _read(self, given: Any) -> Any:
        given = len(given)
        raise ValueError(f"bad header of {given}")


class MappedByALocal(MappedInside):
    def __getitem__(self, index: int) -> Any:
        at = self.order[int(index)]
        return self._read(self.path(at))


class Pairs(MappedInside):
    def __getitem__(self, index: int) -> Any:
        return self._read(self.files[index // 2])


class Picks(MappedInside):
    """A subset as people write them."""

    def __init__(self) -> None:
        self.inner = Given()
        self.picked = [31, 32, 33]

    def __getitem__(self, index: int) -> Any:
        return self._read(self.inner[self.picked[index]])


def broken() -> Exception:
    return ValueError("bad header")


def told(dataset: Any, index: int = BAD) -> str:
    return source_of(dataset, index, raised(dataset, index), LENGTH)


def test_a_list_that_another_maps_is_asked_as_the_code_asks_it() -> None:
    assert told(MappedInside()) == "dataset.files[26] = 'scans/0026.json'"
    assert told(MappedByALocal()) == "dataset.files[26] = 'scans/0026.json'"
    assert source_of(Picks(), 1, broken(), 3) == "dataset.inner.files[32] = 'scans/0032.json'"


def test_perhaps_is_said_where_the_code_asks_for_something_else() -> None:
    assert told(Pairs()) == "perhaps dataset.files[13] = 'scans/0013.json'"


def test_nothing_speaks_against_a_list_that_is_asked_for_the_index() -> None:
    assert source_of(Given(), BAD, broken(), LENGTH) == "dataset.files[13] = 'scans/0013.json'"
    assert source_of(Subset(Given(), [5, BAD]), 1, broken()) == (
        "dataset.dataset.files[13] = 'scans/0013.json'"
    )


def test_the_open_file_that_a_library_was_given_is_named(tmp_path: Path) -> None:
    dataset = Mapped(tmp_path)
    Path(dataset.files[26]).write_text("{")
    said = told(dataset)
    assert said.startswith(f"fp.name = '{tmp_path}/0026.json' in load (__init__.py:")
    assert said.endswith("; it is dataset.files[26]")


class OtherFile(Given):
    """What it opens is not what its list has."""

    def __getitem__(self, index: int) -> Any:
        return Path(self.files[index].replace("00", "77")).read_bytes()


class RaisedFrom(Given):
    def __getitem__(self, index: int) -> Any:
        try:
            return Path(self.files[index].replace("00", "77")).read_bytes()
        except OSError as error:
            raise ValueError(f"no sample {index}") from error


class RaisedAfter(Given):
    def __getitem__(self, index: int) -> Any:
        try:
            return Path(self.files[index - 1].replace("0012", "7713")).read_bytes()
        except OSError:
            raise ValueError(f"no sample {index}")  # noqa: B904


class Speaks(Given):
    def __getitem__(self, index: int) -> Any:
        raise ValueError(f"cannot read 'scans/{77 + len(self.files[index][:0])}.json'")


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (OtherFile(), "the error names 'scans/7713.json'"),
        (RaisedFrom(), "the error names 'scans/7713.json'"),
        (RaisedAfter(), "the error before it names 'scans/7713.json'"),
        (Speaks(), "the error names 'scans/77.json'"),
        (Given(), "dataset.files[13] = 'scans/0013.json'"),
    ],
)
def test_a_path_that_the_error_speaks_of_is_named_and_not_the_lists(
    dataset: Any, said: str
) -> None:
    assert told(dataset) == said


def test_under_a_subset_and_a_concatenation_too() -> None:
    for dataset in (Subset(OtherFile(), [2, BAD]), ConcatDataset([Given(length=1), OtherFile()])):
        index = 1 if type(dataset) is Subset else BAD + 1
        assert told(dataset, index) == "the error names 'scans/7713.json'"


@pytest.mark.parametrize(
    "text",
    [
        "expected a tensor of torch.float32, got numpy.uint8",
        "see https://pytorch.org/docs/stable/notes/serialization.html",
        "raised in 'package/module.py'",
        "Max retries exceeded (host='example.com')",
        "no such label in 'labels/13.txt'",
    ],
)
def test_what_is_no_path_of_a_sample_speaks_of_none(text: str) -> None:
    said = source_of(Given(), BAD, ValueError(text), LENGTH)
    assert said == "dataset.files[13] = 'scans/0013.json'"


def test_a_path_that_is_part_of_another_is_not_spoken_of() -> None:
    files = [f"{number}.png" for number in range(LENGTH)]
    assert source(Holding(files=files), 1, ValueError("cannot read '11.png'")) == (
        "the error names '11.png'"
    )


# ── one way for all that is said ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_skips_and_on_error_name_the_file_alike(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = "path = '/data/scans/0026.png'"
    with pytest.raises(SampleError) as caught:
        list(SafeDataLoader(Reads(), batch_size=4, num_workers=workers))
    assert expected in caught.value.failure.hint
    told = SafeDataLoader(Reads(), batch_size=4, num_workers=workers, on_error="skip")
    list(told)
    assert expected in str(told.audit)
    assert expected in caplog.text
    asked = SafeDataLoader(Reads(), batch_size=4, num_workers=workers, on_error=decides)
    list(asked)
    assert asked.audit.replaced.tolist() == [BAD]  # given only where the failure named it


def decides(failure: Any) -> Any:
    named = "path = '/data/scans/0026.png'" in failure.hint
    return torch.tensor(0) if named else None


class Kills(Reads):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == BAD:
            os._exit(3)
        return torch.tensor(index)


def test_a_worker_that_died_cannot_say_its_file_and_the_copy_here_can() -> None:
    with pytest.raises(WorkerCrashError) as caught:
        list(SafeDataLoader(Kills(), batch_size=4, num_workers=1))
    assert caught.value.index == BAD
    assert "\n  dataset.files[13] = 'scans/0013.png'\n" in str(caught.value)
    told = SafeDataLoader(Kills(), batch_size=4, num_workers=1, on_error="skip", on_crash="restart")
    list(told)
    assert told.audit.skipped.tolist() == [BAD]
    assert "died at it twice; dataset.files[13] = 'scans/0013.png'" in str(told.audit)


def pads(samples: list[Any]) -> torch.Tensor:
    for sample in samples:
        cache = "/tmp/cache.bin"
        if sample is None:
            raise TypeError(f"nothing to pad for {len(cache)}")
    return torch.tensor(len(samples))


class SomeNone(Reads):
    def __getitem__(self, index: int) -> Any:
        return None if index == BAD else index


def test_the_locals_of_a_collate_function_are_those_of_any_sample() -> None:
    loader = SafeDataLoader(SomeNone(), batch_size=4, collate_fn=pads, on_error="skip")
    list(loader)
    assert loader.audit.skipped.tolist() == [BAD]
    assert "cache" not in str(loader.audit)
    assert "dataset.files[13] = 'scans/0013.png'" in str(loader.audit)


def test_a_sound_epoch_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(Reads(broken=-1), batch_size=4)
    assert len(list(loader)) == 10
    assert "path" not in caplog.text + str(loader.audit)


def test_no_library_of_tables_is_imported() -> None:
    known = {"pandas", "polars", "pyarrow"} & sys.modules.keys()
    assert source(Holding(files=[Path(file) for file in FILES])).endswith("('scans/0013.png')")
    assert {"pandas", "polars", "pyarrow"} & sys.modules.keys() == known
