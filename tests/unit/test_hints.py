"""What a hint says of an index: its range, its file, its number under a Subset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from safeloader import CollateError, SafeDataLoader
from safeloader.worker.hints import hint_for
from safeloader.worker.repair import ON_ERROR_FAULT

LENGTH = 40
FILES = [f"img/{number}.jpg" for number in range(LENGTH)]
MISSING = FileNotFoundError(2, "No such file or directory", "/data/img/37.jpg")
TRUNCATED = OSError("image file is truncated (3 bytes not processed)")  # as Pillow says it


class Holding(Dataset[Any]):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __len__(self) -> int:
        pytest.fail("the user's code was called")


class Forbidden(list[Any]):
    def __getitem__(self, at: Any) -> Any:
        pytest.fail("the user's code was called")

    __len__ = __iter__ = __getitem__  # type: ignore[assignment]


def hint(exc: Exception, dataset: Any, index: int = 37) -> list[str]:
    return hint_for(exc, "sample", index, "", dataset, LENGTH).splitlines()[:-1]


@pytest.mark.parametrize("exc", [MISSING, TRUNCATED, ValueError("bad header in img/37.jpg")])
@pytest.mark.parametrize(
    ("held", "shown"),
    [
        (FILES, "'img/37.jpg'"),
        (tuple(FILES), "'img/37.jpg'"),
        (np.array(FILES), "str_('img/37.jpg')"),
        ([Path(file) for file in FILES], "PosixPath('img/37.jpg')"),
        ([(file, 3) for file in FILES], "('img/37.jpg', 3)"),
    ],
    ids=["list", "tuple", "array", "paths", "as ImageFolder has it"],
)
def test_the_file_of_an_index_is_named(held: Any, shown: str, exc: Exception) -> None:
    (said,) = hint(exc, Holding(labels=["cat"] * LENGTH, files=held, copies=held))
    assert said.startswith("dataset.files[37] = ")
    assert said.endswith(shown)


def test_under_a_subset_too() -> None:
    said = hint(MISSING, Subset(Holding(files=FILES), range(30, 40)), 7)
    assert said == [
        "index 7 of the Subset is index 37 of the dataset under it, dataset.dataset",
        "dataset.dataset.files[37] = 'img/37.jpg'",
    ]


@pytest.mark.parametrize(
    ("exc", "held"),
    [
        (TRUNCATED, {"files": FILES[:-1]}),  # not one for each sample
        (TRUNCATED, {"losses": [0.5] * LENGTH}),  # tell nobody which sample it is
        (TRUNCATED, {"files": np.array(FILES).reshape(2, -1)}),
        (TRUNCATED, {"files": Forbidden()}),
        (TRUNCATED, {"passwords": FILES}),
        (MISSING, {"files": FILES[:37]}),
    ],
)
def test_nothing_is_said_where_nothing_is_known(exc: Exception, held: dict[str, Any]) -> None:
    assert hint(exc, Holding(**held)) == []


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"files": FILES, "labels": ["cat"] * LENGTH}, "dataset.files[37] = 'img/37.jpg'"),
        ({"labels": ["cat"] * LENGTH, "files": FILES}, "dataset.files[37] = 'img/37.jpg'"),
        ({"labels": ["cat"] * LENGTH}, "dataset.labels[37] = 'cat'"),
        ({"numbers": list(range(LENGTH))}, "dataset.numbers[37] = 37"),
        ({"pairs": [("cat", 0.5)] * LENGTH}, "dataset.pairs[37] = ('cat', 0.5)"),
    ],
)
def test_whatever_is_raised_the_entry_of_the_sample_is_named(held: Any, said: str) -> None:
    assert hint(ValueError("bad header"), Holding(**held)) == [said]


class Says(Holding):
    def __safeloader_source__(self, index: int) -> str:
        if index == 5:
            raise KeyError(index)
        return f"s3://bucket/{index}.jpg"


def test_a_dataset_that_says_where_its_samples_come_from_is_asked() -> None:
    told = "source of the sample: 's3://bucket/37.jpg'"
    assert hint(ValueError("x"), Says(files=FILES)) == [told]
    assert hint(ValueError("x"), Subset(Says(files=FILES), range(30, 40)), 7)[1:] == [told]
    assert hint(ValueError("x"), Says(files=FILES), 5) == []  # a hint must not hide the error


OUT_OF_RANGE = IndexError("list index out of range")


def test_an_index_outside_is_the_samplers() -> None:
    (said,) = hint(OUT_OF_RANGE, Holding(), 40)
    assert "outside the dataset (length 40): look at the sampler" in said


def raised_by(get: Any, *args: Any) -> Exception:
    try:
        get(*args)
    except Exception as exc:
        return exc
    pytest.fail("nothing was raised")


class Lying(Holding):
    """Its length is 40, and it holds less."""

    def direct(self, index: int) -> Any:
        return self.items[index]

    def by_an_alias(self, index: int) -> Any:
        held = self.items
        return held[index]

    def in_a_list(self, indices: list[int]) -> Any:
        return [self.items[each] for each in indices]

    def of_an_empty_tensor(self, index: int) -> Any:
        boxes = torch.zeros(0)
        return boxes[0]

    def of_another_list(self, index: int) -> Any:
        return self.classes[7]

    def of_a_shorter_part(self, index: int) -> Any:
        return self.items[3][index]

    def raises_itself(self, index: int) -> Any:
        raise IndexError("the image has no face")


SHORT = [[0]] * 30


@pytest.mark.parametrize(
    ("get", "asked"), [("direct", 37), ("by_an_alias", 37), ("in_a_list", [3, 37])]
)
@pytest.mark.parametrize("items", [SHORT, np.zeros((30, 2)), torch.zeros(30, 2)], ids=type)
def test_an_index_error_of_what_the_dataset_holds_shows_that_its_length_is_too_long(
    items: Any, get: str, asked: Any
) -> None:
    dataset = Lying(items=items, classes=["cat", "dog"])
    (said,) = hint(raised_by(getattr(dataset, get), asked), dataset)
    assert said == (
        "dataset.items has 30 entries, and the dataset's length is 40: __len__ says more than "
        "there is"
    )


@pytest.mark.parametrize(
    "get", ["of_an_empty_tensor", "of_a_shorter_part", "raises_itself", "of_another_list"]
)
def test_an_index_error_of_something_else_says_nothing_of_the_length(get: str) -> None:
    dataset = Lying(items=[[0]] * 40, classes=["cat", "dog"], cache=[])
    said = hint(raised_by(getattr(dataset, get), 37), dataset)
    assert not [line for line in said if "__len__" in line]


def test_a_sample_of_a_stream_is_repeated_in_its_workers_share() -> None:
    """In the main process a dataset shared out by ``get_worker_info()`` gives other samples."""
    (line,) = hint_for(KeyError("image"), "sample", (1, 68), "").splitlines()
    assert line.startswith("sample 68 (from 0) of worker 1's stream")
    assert "given worker 1's share by hand" in line


def test_a_pair_drawn_for_a_map_style_dataset_is_no_sample_of_a_stream() -> None:
    (line,) = hint_for(KeyError("image"), "sample", (1, 68), "", Holding()).splitlines()
    assert line.startswith("safeloader.replay(error, loader.dataset) repeats the call here")


def test_a_fault_of_on_error_is_no_fault_of_the_sample() -> None:
    for phase in ("sample", "collate"):
        told = hint_for(ValueError("x"), phase, 3, ON_ERROR_FAULT).splitlines()
        assert told[0] == ON_ERROR_FAULT
        assert told[-1].startswith("mend the callable given as on_error=")


@pytest.mark.parametrize("index", [3, -5])
def test_under_a_concatenation_the_part_and_its_index_are_named(index: int) -> None:
    whole: Any = ConcatDataset([range(2), Subset(range(9), [8, 7, 6]), range(3)])  # type: ignore[list-item]
    line = hint(ValueError("x"), whole, index)[0]
    told = f"index {index} of the ConcatDataset is index 7 of the dataset under it"
    assert line == f"{told}, dataset.datasets[1].dataset"


def test_what_was_found_may_end_with_the_next_step_and_the_file_does_not() -> None:
    found = "it cannot be pickled: sample['meta']: _thread.lock\nleave it out"
    told = hint_for(TypeError("x"), "transport", 37, found, Holding(files=FILES), LENGTH)
    assert told.splitlines()[0] == "it cannot be pickled: sample['meta']: _thread.lock"
    assert "dataset.files[37] = 'img/37.jpg'" in told
    assert told.splitlines()[-1] == "leave it out"


def padded_to_four(samples: list[Any]) -> torch.Tensor:
    out = torch.zeros(len(samples), 4)
    for place, sample in enumerate(samples):
        out[place, : len(sample)] = sample
    return out


def test_where_a_collate_function_of_the_users_raises_it_is_looked_at() -> None:
    samples = [torch.ones(1 + k % 6) for k in range(8)]
    steps = []
    for collate_fn in (padded_to_four, None):
        with pytest.raises(CollateError, match="the samples differ in shape") as caught:
            list(SafeDataLoader(samples, batch_size=8, collate_fn=collate_fn))
        steps.append(str(caught.value).splitlines()[-1])
    assert re.fullmatch(
        r"  next: look at padded_to_four \(test_hints\.py:\d+\), which raised on .*", steps[0]
    )
    assert steps[1] == "  next: mend the sample, or have collate_fn= take it"
