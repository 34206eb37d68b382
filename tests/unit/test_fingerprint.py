"""Fingerprints: the same for what arrived as it was sent, and no other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.introspect.fingerprint import Difference, Leaf, difference, fingerprint
from safeloader.transport.slot_reader import changed
from tests.leaf_kinds import KINDS, Cached, Pair, Record, structured

# Without a print: nothing of them can be read, or what they are is not what crosses.
UNREAD = {
    "empty",
    "no rows",
    "no columns",
    "no columns, odd strides",
    "meta",
    "quantized",
    "storage",
    "array empty",
    "reduces its own way",
    "leaves its cache behind",
    "an exception",
    "more objects",
    "a module",
}


@pytest.mark.parametrize("n", [4, 3000])
def test_every_kind_of_leaf_has_prints(n: int) -> None:
    for name, make in KINDS.items():
        fingerprints = fingerprint(make(n), 4)
        assert any(leaf.fingerprints for leaf in fingerprints) == (name not in UNREAD), name
        assert pickle.loads(pickle.dumps(fingerprints)) == fingerprints


def test_they_are_the_same_each_time() -> None:
    for name, make in KINDS.items():
        torch.manual_seed(1)
        batch = make(40)
        assert difference(fingerprint(batch, None), batch, None) is None, name


def of_each_kind() -> dict[str, Any]:
    return {
        "image": torch.arange(24.0).view(4, 6),
        "view": torch.arange(24.0).view(6, 4).t(),
        "array": np.arange(24).reshape(4, 6),
        "records": structured(6)[::3],
        "long": np.arange(4).astype(np.longdouble),
        "pair": Pair(torch.tensor(3), ["cat", "dog"]),
        "record": Record(b"abc", bytearray(b"def")),
        "sparse": torch.eye(4).to_sparse(),
        "number": 1.5,
        "objects": np.array([None, "x"], dtype=object),
    }


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "batch['image']": lambda b: b["image"][2, 1].neg_(),
    "batch['view']": lambda b: b["view"][2, 1].add_(1),
    "batch['array']": lambda b: b["array"].__setitem__((2, 3), -1),
    "batch['records']['c']": lambda b: b["records"]["c"].__setitem__((2, 1), -1),
    "batch['long'].real[1]": lambda b: b["long"].__setitem__(2, 2 + np.longdouble(2) ** -60),
    "batch['pair'].image": lambda b: b["pair"].image.add_(1),
    "batch['pair'].label[1]": lambda b: b["pair"].label.__setitem__(1, "dig"),
    "batch['record'].y": lambda b: b["record"].y.reverse(),
    "batch['sparse'][1]": lambda b: b["sparse"]._values()[2].add_(1),
    "batch['number']": lambda b: b.__setitem__("number", 2.5),
    "batch['objects'][1]": lambda b: b["objects"].__setitem__(1, "y"),
}


@pytest.mark.parametrize("path", CHANGES)
def test_what_changed_is_named_with_its_row(path: str) -> None:
    batch = of_each_kind()
    sent = fingerprint(batch, 4)
    assert difference(sent, copy.deepcopy(batch), 4) is None
    CHANGES[path](batch)
    found = difference(sent, batch, 4)
    assert found is not None
    assert found.path == path
    by_row = isinstance(batch.get(path[7:-2]), torch.Tensor | np.ndarray)
    if by_row or path in ("batch['records']['c']", "batch['long'].real[1]", "batch['sparse'][1]"):
        assert found.rows == (2,)
    else:
        assert found.rows is None


@given(data=st.data())
def test_any_bit_that_flips_is_found(data: st.DataObject) -> None:
    batch = [torch.arange(8 * 5, dtype=torch.int16).view(8, 5), np.arange(8.0)]
    sent = fingerprint(batch, 8)
    at = data.draw(st.integers(0, 79))
    memory = batch[0].view(-1).view(torch.uint8).numpy()  # type: ignore[union-attr]
    memory[at] ^= 1 << data.draw(st.integers(0, 7))
    assert difference(sent, batch, 8) == Difference("batch[0]", (at // 10,))


def test_another_shape_or_type_is_a_difference_of_all_of_it() -> None:
    sent = fingerprint([torch.zeros(4, 2)], 4)
    assert difference(sent, [torch.zeros(2, 4)], 4) == Difference("batch[0]", None)
    assert difference(sent, [torch.zeros(4, 2, dtype=torch.int32)], 4) == Difference(
        "batch[0]", None
    )
    assert difference(sent, [np.zeros((4, 2), np.float32)], 4) == Difference("batch[0]", None)


def test_what_pinning_makes_of_containers_is_no_difference() -> None:
    one = [1, torch.ones(2)]
    batch = {"range": range(3), "twice": [one, one], "user": Cached(torch.ones(3))}
    pinned = {"range": [0, 1, 2], "twice": [list(one), list(one)], "user": Cached(torch.ones(3))}
    assert difference(fingerprint(batch, 3), pinned, 3) is None


def test_what_refers_to_itself_comes_to_an_end() -> None:
    nodes: list[Any] = [[k] for k in range(50)]
    for node in nodes:
        node.extend(nodes)
    assert len(fingerprint(nodes, None)) == 50


def test_a_deep_batch_is_read_to_a_bound() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    assert fingerprint(deep, None) == ()


class Talks(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the user's code ran")


def test_no_code_of_the_users_runs() -> None:
    talks = torch.arange(3.0).as_subclass(Talks)
    assert fingerprint(talks, None) == fingerprint(torch.arange(3.0), None)


def manifest(**fields: Any) -> BatchManifest:
    made = BatchManifest(0, 1, 99, pack([7, 8, 9]), 3, None, b"", False, None)
    return made._replace(**fields)


def test_the_failure_names_the_dataset_index() -> None:
    batch = {"x": torch.zeros(3, 4), "y": 1}
    sent = manifest(fingerprints=fingerprint(batch, 3))
    assert changed(sent, batch) is None
    batch["x"][1:] = 1  # type: ignore[index]
    failure = changed(sent, batch)
    assert failure is not None
    assert (failure.phase, failure.index, failure.position) == ("transport", 8, 1)
    assert failure.indices == (7, 8, 9)
    assert (
        failure.message == "batch['x'] is not what the worker sent, in the samples of dataset "
        "indices 8, 9"
    )


def test_rows_are_counted_without_the_samples_left_out() -> None:
    batch = torch.zeros(2, 4)
    skipped = manifest(
        incidents=(SampleIncident("skipped", 0, "broken"),), fingerprints=fingerprint(batch, 3)
    )
    batch[1] = 1
    failure = changed(skipped, batch)
    assert failure is not None
    assert failure.index is None, "two rows of three samples: which is which cannot be told"
    assert failure.message == "batch is not what the worker sent"


def test_many_rows_are_not_all_listed() -> None:
    batch = torch.zeros(20, 2)
    sent = manifest(indices=pack(list(range(20))), fingerprints=fingerprint(batch, 20))
    batch += 1
    failure = changed(sent, batch)
    assert failure is not None
    assert failure.message.endswith("0, 1, 2, 3, 4, 5, 6, 7 and 12 more")


def test_a_leaf_is_plain_data() -> None:
    (leaf,) = fingerprint(torch.zeros(2, 3), 2)
    assert leaf == Leaf("batch", "tensor torch.float32 (2, 3)", leaf.fingerprints)
    assert leaf.fingerprints[0] == leaf.fingerprints[1]
