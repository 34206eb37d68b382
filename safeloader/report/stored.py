"""The JSON in the folder of a run, each value of the kind that it should be. Runs in: main.

A file may be torn, damaged, or written by somebody else; who reads on need not ask of what kind a
value is. A line that holds another kind is left out as a whole: half of it may be as wrong. A key
that is not known here passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safeloader.provenance.index_texts import of_json

Kind = Callable[[Any], bool]
Kinds = dict[str, Kind]


def parsed(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: if it is none, is nested without end, or holds a number that is none.

    Example:
        >>> parsed('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parsed("[NaN]")
        Traceback (most recent call last):
        ...
        ValueError: NaN is no number of JSON
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _either(*kinds: type) -> Kind:
    return lambda value: type(value) in kinds


def _count(value: Any) -> bool:
    """A number of something, or of a batch, an epoch, a rank."""
    return type(value) is int and 0 <= value < 1 << 63


def _short_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _or_none(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


def _moment(value: Any) -> bool:
    """Seconds since 1970, of a year that a calendar has."""
    return type(value) in (int, float) and 0 <= value < 1e11


def _list_of(kind: Kind) -> Kind:
    return lambda value: type(value) is list and all(map(kind, value))


def _two(kind: Kind) -> Kind:
    return lambda value: type(value) is list and len(value) == 2 and all(map(kind, value))


def _mapping_to(kind: Kind) -> Kind:
    return lambda value: type(value) is dict and all(map(kind, value.values()))


def _fits(kinds: Kinds) -> Kind:
    return lambda value: type(value) is dict and not misfits(value, kinds)


_text, _any = _either(str), lambda value: True
_CLASSES = ("missing", "duplicated", "unexpected", "failed", "dropped", "skipped", "replaced")
_LISTS = (*_CLASSES, "late", "repeated", "unvisited")

_AUDIT: Kinds = {
    **{name: _list_of(_any) for name in _LISTS},
    **{name: _list_of(_text) for name in ("notes", "unchecked", "noticed")},
    **dict.fromkeys(("epoch", "drawn", "delivered", "batches", "elsewhere", "padding"), _count),
    **{name: _or_none(_count) for name in ("batches_drawn", "announced", "resumed_at")},
    **{name: _or_none(_short_count) for name in ("rank", "world_size")},
    **{name: _either(dict) for name in ("reasons", "donors", "under_indices")},
    **{name: _either(bool) for name in ("complete", "stream")},
    "counts": _mapping_to(_count),
    "delivered_by": _mapping_to(_count),
    "shard": _or_none(_two(_short_count)),
    "ok": _or_none(_either(bool)),
}
RUN: Kinds = {"id": _text, "command": _list_of(_text), "started": _text, "versions": _either(dict)}
LOADER: Kinds = {
    **dict.fromkeys(("loader", "name", "line"), _text),
    "length": _or_none(_count),
    "rank": _short_count,
    "world_size": _or_none(_short_count),
    "began": _moment,
    "process": _either(dict),
    "cores": _count,
    "command": _list_of(_text),
    "versions": _either(dict),
    "batches": _either(bool),
}
FAILURE: Kinds = {
    **dict.fromkeys(("phase", "exception_type", "message"), _text),
    **{name: _or_none(_count) for name in ("epoch", "batch", "position", "worker", "rank")},
    "indices": _or_none(_list_of(_any)),
}
DUMP: Kinds = {"failure": _fits(FAILURE), "report": _text, "time": _text}
_ORIGIN: Kinds = {"run": _text, "folder": _text, "epoch": _short_count}
_SHARD: Kinds = {
    **dict.fromkeys(("rank", "replicas"), _short_count),
    **{name: _or_none(_count) for name in ("length", "total", "pads_last")},
    **{name: _or_none(_either(int)) for name in ("epoch", "seed")},
    **dict.fromkeys(("kind", "drops_by"), _text),
}
_OF_LINES: dict[str, Kinds] = {
    "epochs.jsonl": {
        "loader": _text,
        "epoch": _short_count,
        "time": _moment,
        "audit": _or_none(_fits(_AUDIT)),
        "sampler": _or_none(_fits({"purpose": _text, "shard": _or_none(_fits(_SHARD))})),
        "resumed": _or_none(
            _fits({"batches": _count, "left_out": _count, "from": _or_none(_fits(_ORIGIN))})
        ),
    },
    "transport.jsonl": {
        "time": _moment,
        **dict.fromkeys(("slots", "slot_bytes", "shm_used", "shm_bytes"), _count),
        **dict.fromkeys(("batches", "fallbacks"), _mapping_to(_count)),
    },
    "incidents.jsonl": {
        **dict.fromkeys(("epoch", "batch", "position"), _short_count),
        "what": _text,
        "reason": _text,
    },
    "dropped.jsonl": {
        "segment": _count,
        "steps": _two(_count),
        "epochs": _two(_short_count),
        "bytes": _count,
        "time": _moment,
    },
    "sources.jsonl": {"source": _text},
    "marks.jsonl": dict.fromkeys(("step", "epoch", "batch"), _count),
}


def misfits(found: dict[str, Any], kinds: Kinds) -> list[str]:
    """The keys under which there is a value of another kind.

    Example:
        >>> misfits({"index": 3, "source": None, "more": None}, _OF_LINES["sources.jsonl"])
        ['source']
    """
    return [name for name, kind in kinds.items() if name in found and not kind(found[name])]


def object_in(path: Path, kinds: Kinds) -> dict[str, Any]:
    """The JSON object in a file, without the values that are of another kind.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds none.
    """
    found = parsed(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no object")
    wrong = misfits(found, kinds)
    return {name: value for name, value in found.items() if name not in wrong}


class Lines:
    """The objects of a file that has one a line; empty where it is gone.

    An ``index`` in one is an int, a text or None, as in the batches.

    Attributes:
        left_out: why lines are not among them; empty if all are. The last line may be half written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._kinds = path, _OF_LINES.get(path.name, {})
        self.left_out = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        wrong = 0
        try:
            with open(self._path, "rb") as file:
                for line in file:
                    try:
                        found = parsed(line)
                    except ValueError:
                        wrong += line.endswith(b"\n")
                        continue
                    if isinstance(found, dict) and not misfits(found, self._kinds):
                        if found.get("index") is not None:
                            found["index"] = of_json(found["index"])
                        yield found
                    else:
                        wrong += 1
        except FileNotFoundError:
            return
        except OSError as exc:
            self.left_out = f"{self._path} cannot be read: {exc.strerror or exc}"
        if wrong:
            count = "a line" if wrong == 1 else f"{wrong} lines"
            self.left_out = f"{self._path} is damaged: {count} of it could not be read"
