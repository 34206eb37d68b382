"""Data frames and columnar tables: their shape, columns, index and single cells. Runs in: both.

Of pandas, polars and Arrow, none of which is imported here: a table of theirs can only be met where
the program has imported them. What is read is the header, by the library's own descriptors, past
any subclass of the user's; nothing is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from safeloader.introspect.values import inherits, module_of

_COLUMNS_MAX = 64  # looked at of one table
# By the top package: the classes of tables with columns, and of single columns.
_FRAMES = {"pandas": ("DataFrame",), "polars": ("DataFrame",), "pyarrow": ("Table", "RecordBatch")}
_SERIES = {"pandas": ("Series",), "polars": ("Series",), "pyarrow": ("Array", "ChunkedArray")}


def table_facts(value: object) -> dict[str, Any] | None:
    """Return shape, columns (the first ones) and index of a table; None for anything else.

    ``shape`` is a list; ``columns`` are names; ``index`` is pandas' own: its type and name, and its
    first and last label where it has any. A single column has ``dtype`` in the place of
    ``columns``.

    >>> table_facts([1, 2])
    """
    package, base, framed = _kind(value)
    if base is None:
        return None
    facts: dict[str, Any] = {}
    with suppress(Exception):  # a release that has it under another name
        if package == "pyarrow":
            if framed:
                names = list(_get(base, "schema", value).names)
                facts["shape"] = [_get(base, "num_rows", value), len(names)]
                facts["columns"] = names[:_COLUMNS_MAX]
            else:
                facts["shape"] = [base.__len__(value)]
                facts["dtype"] = str(_get(base, "type", value))
        elif package == "polars":
            facts["shape"] = [int(size) for size in _get(base, "shape", value)]
            if framed:
                facts["columns"] = list(_get(base, "columns", value)[:_COLUMNS_MAX])
            else:
                facts["dtype"] = str(_get(base, "dtype", value))
        else:  # by the axes: the shape asks the object for them, which may be of another class
            index = _get(base, "index", value)
            facts["shape"] = [len(index)]
            if framed:
                columns = _get(base, "columns", value)
                facts["shape"].append(len(columns))
                facts["columns"] = list(columns[:_COLUMNS_MAX])
            else:
                facts["dtype"] = str(_get(base, "dtype", value))
            ends = (index[0], index[-1]) if len(index) else ()
            facts["index"] = (type(index).__name__, index.name, *ends)
    return facts


def table_name(value: object) -> str:
    """Return the public name of a table's class: ``"pandas.DataFrame"``; "" of anything else."""
    package, base, _ = _kind(value)
    if base is None:
        return ""
    return f"{package}.{base.__name__}"


def table_rows(value: object) -> int | None:
    """Return how many rows a table or column has; None for anything else."""
    shape = (table_facts(value) or {}).get("shape")
    return shape[0] if shape else None


def cells(value: Any, at: int) -> Iterator[tuple[str, Any]]:
    """Yield the cells of one row that are texts, each after how it is reached from the table.

    Columns of numbers are not read: they name no file. Nor is a subclass of the user's.
    """
    package, base, framed = _kind(value)
    if base is None or (package != "pyarrow" and type(value) is not base):
        return
    with suppress(Exception):
        if package == "pandas" and framed:
            for place, (name, kind) in enumerate(value.dtypes.iloc[:_COLUMNS_MAX].items()):
                if kind.kind not in "biufcmM":
                    yield f"[{name!r}].iloc[{at}]", value.iat[at, place]
        elif package == "pandas":
            yield f".iloc[{at}]", value.iat[at]
        elif package == "polars" and framed:
            for name, kind in list(value.schema.items())[:_COLUMNS_MAX]:
                if str(kind) in ("String", "Utf8", "Categorical"):
                    yield f"[{at}, {name!r}]", value.item(at, name)
        elif package == "polars":
            yield f"[{at}]", value.item(at)
        elif framed:
            for name, field in zip(value.schema.names, value.schema.types, strict=True):
                if str(field) in ("string", "large_string", "string_view"):
                    yield f"[{name!r}][{at}]", value.column(name)[at].as_py()
                elif str(field).startswith("struct<") and "path: string" in str(field):
                    yield f"[{name!r}][{at}]['path']", value.column(name)[at].as_py()["path"]
        else:
            yield f"[{at}]", value[at].as_py()


def _kind(value: object) -> tuple[str, Any, bool]:
    """The package, the class of it that the value is of, and whether that has columns."""
    for cls in type.__dict__["__mro__"].__get__(type(value)):
        package = module_of(cls).partition(".")[0]
        if package not in _FRAMES:
            continue
        module = sys.modules.get(package)
        for framed, table in ((True, _FRAMES), (False, _SERIES)):
            for name in table[package]:
                base = getattr(module, name, None)
                if isinstance(base, type) and inherits(type(value), base):
                    return package, base, framed
    return "", None, False


def _get(base: Any, name: str, value: object) -> Any:
    """An attribute as the library's own class has it, whatever a subclass made of it."""
    found = next(vars(cls)[name] for cls in base.__mro__ if name in vars(cls))
    return found.__get__(value, base)
