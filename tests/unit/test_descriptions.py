"""A description shows what a person would look at, and leaves out no more than it says."""

from __future__ import annotations

import re
import sys
import types
from collections import namedtuple
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.introspect.dataset_state import describe
from safeloader.introspect.tables import cells, table_facts, table_name, table_rows
from safeloader.introspect.texts import bounded_text, indices_text
from safeloader.introspect.values import bounded

ROWS = {"path": ["a.png", "b.png", "c.png"], "label": [1, 2, 3]}


class Sample(NamedTuple):
    image: int
    label: int


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(ROWS)
    said = "pandas.DataFrame [3, 2]; columns 'path', 'label'; RangeIndex from 0 to 2"
    assert bounded_text(table) == said
    by_path = "pandas.DataFrame [3, 1]; columns 'label'; Index 'path' from 'a.png' to 'c.png'"
    assert bounded_text(table.set_index("path")) == by_path
    assert bounded_text(table["label"]) == "pandas.Series int64 [3]; RangeIndex from 0 to 2"
    assert bounded_text(table[:0]).endswith("RangeIndex, empty")
    assert [*cells(table, 1)] == [("['path'].iloc[1]", "b.png")]
    assert [*cells(table["path"], 1)] == [(".iloc[1]", "b.png")]


def test_polars() -> None:
    polars = pytest.importorskip("polars")
    table = polars.DataFrame(ROWS)
    assert bounded_text(table) == "polars.DataFrame [3, 2]; columns 'path', 'label'"
    assert bounded_text(table["path"]) == "polars.Series String [3]"
    assert [*cells(table, 1)] == [("[1, 'path']", "b.png")]
    assert [*cells(table["path"], 1)] == [("[1]", "b.png")]


def test_arrow() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(ROWS)
    assert bounded_text(table) == "pyarrow.Table [3, 2]; columns 'path', 'label'"
    assert bounded_text(pyarrow.array([1, 2])) == "pyarrow.Array int64 [2]"
    assert [*cells(table, 1)] == [("['path'][1]", "b.png")]
    assert [*cells(table["path"], 1)] == [("[1]", "b.png")]
    images = pyarrow.table({"image": [{"bytes": b"", "path": "a.png"}]})
    assert [*cells(images, 0)] == [("['image'][0]['path']", "a.png")]


class Index(list[Any]):
    name: Any = None


class Kind:
    def __init__(self, kind: str) -> None:
        self.kind = kind


class Frame:
    """As much of a data frame of pandas as is read; made where pandas is not installed."""

    def __init__(self, rows: dict[str, list[Any]]) -> None:
        self._rows = rows

    columns = property(lambda self: [*self._rows])
    index = property(lambda self: Index(range(3)))

    @property
    def dtypes(self) -> Any:
        kinds = {"path": Kind("O"), "label": Kind("i")}
        return types.SimpleNamespace(iloc=_Head(kinds))

    @property
    def iat(self) -> Any:
        return {(at, 0): each for at, each in enumerate(self._rows["path"])}


class _Head:
    def __init__(self, kinds: Any) -> None:
        self._kinds = kinds

    def __getitem__(self, part: slice) -> Any:
        return self._kinds


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> Frame:
    module = types.ModuleType("pandas")
    cls: Any = type("DataFrame", (Frame,), {"__module__": "pandas.core.frame"})
    module.DataFrame = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", module)
    return cls(ROWS)  # type: ignore[no-any-return]


def test_a_table_is_told_by_shape_columns_and_index(frame: Frame) -> None:
    said = "pandas.DataFrame [3, 2]; columns 'path', 'label'; Index from 0 to 2"
    assert bounded_text(frame) == said
    assert table_name(frame) == "pandas.DataFrame"
    assert table_rows(frame) == 3
    assert [*cells(frame, 1)] == [("['path'].iloc[1]", "b.png")]
    holding = types.SimpleNamespace(table=frame)
    told = describe(holding)["attributes"]["table"]
    assert told["shape"] == [3, 2]
    assert told["repr"] == said


def test_a_subclass_of_a_table_is_read_past_its_own_code(frame: Frame) -> None:
    class Mine(type(frame)):  # type: ignore[misc]
        columns = index = dtypes = iat = property(lambda self: pytest.fail("it was called"))

    assert bounded_text(Mine(ROWS)).startswith("pandas.DataFrame [3, 2]; columns 'path'")
    assert [*cells(Mine(ROWS), 1)] == []


@pytest.mark.parametrize("value", [[1, 2], {"columns": [1]}, "pandas.DataFrame", None])
def test_other_things_are_no_tables(value: Any) -> None:
    assert table_facts(value) is None
    assert table_name(value) == ""
    assert [*cells(value, 0)] == []


# ── named tuples ─────────────────────────────────────────────────────────────────────────────────


def test_a_named_tuple_shows_its_field_names() -> None:
    assert bounded_text(Sample(1, 2)).endswith("Sample(image=1, label=2)")
    assert bounded_text([[Sample(1, 2)]]).endswith("Sample of 2 (image, label)]]")
    many = namedtuple("many", [f"field{n}" for n in range(9)])
    assert bounded_text([[many(*range(9))]]).endswith("field4, ... 4 more)]]")


# ── what is left out ─────────────────────────────────────────────────────────────────────────────


@given(st.text(max_size=300), st.integers(40, 200))
def test_a_middle_left_out_is_longer_than_what_says_so(text: str, limit: int) -> None:
    told = bounded(text, limit)
    assert len(told) <= limit
    if said := re.search(r" \.\.\. (\d+) characters left out \.\.\. ", told):
        assert int(said[1]) > len(said[0])


@given(st.lists(st.integers(0, 10**7), max_size=30), st.booleans())
def test_indices_left_out_would_have_taken_more_room(indices: list[int], counted: bool) -> None:
    told = indices_text(indices, counted=counted)
    if len(told.partition("...")[0]) < len(told):
        assert len(told) < len(str(indices)) + 1


@given(st.one_of(st.lists(st.integers(0, 10**7)), st.text("ab"), st.sets(st.integers(0, 99))))
def test_so_would_elements_and_characters(value: Any) -> None:
    if "..." in (told := bounded_text(value)):
        assert len(told) <= len(repr(value))
