"""Finds a ``__getitem__`` that never runs, as ``__getitems__`` passes it by. Runs in: main.

Torch makes a batch by ``dataset.__getitems__`` where the dataset has one. One that is inherited,
or that a ``__getattr__`` finds in the dataset inside, knows nothing of what the class's own
``__getitem__`` does: its transform never runs, and nothing fails. It is found by looking: no code
of the user's runs, and where the code does not show it, nothing is said.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import Dataset, StackDataset, Subset

from safeloader.introspect.byte_code import codes
from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    definitions,
    fields,
    held_by,
    is_one_of,
    mro_of,
    namespace_of,
    type_name,
)

_MANY, _ONE = "__getitems__", "__getitem__"
_REFUSED = {"_", "__", _MANY}  # constants of a ``__getattr__`` that hands such names not on
_OBJECTS_MAX = 32
_CURE = (
    "Define beside it: def __getitems__(self, indices): return [self[index] for index in indices]"
)


class PassedBy(NamedTuple):
    """A ``__getitem__`` that never runs.

    Attributes:
        path: of the dataset whose it is.
        cls: its class.
        says: the sentence for it, with the cure.
    """

    path: str
    cls: type
    says: str


def passed_by(dataset: object) -> list[PassedBy]:
    """Return the ``__getitem__`` of a dataset, and of those that it asks in turn, that never run.

    Only for a loader that batches by itself: no other asks for ``__getitems__``.

    >>> class Numbers:
    ...     def __getitem__(self, index):
    ...         return index
    ...     def __getitems__(self, indices):
    ...         return list(indices)
    >>> class Negative(Numbers):
    ...     def __getitem__(self, index):
    ...         return -super().__getitem__(index)
    >>> [found.path for found in passed_by(Subset(Negative(), [0, 1]))]
    ['dataset.dataset']
    >>> passed_by(Numbers())
    []
    """
    found: list[PassedBy] = []
    todo = [("dataset", dataset)]
    for path, thing in todo:
        if len(todo) > _OBJECTS_MAX:
            break
        if (how := _how(path, thing)) is not None:
            found.append(PassedBy(path, type(thing), how))
        todo += _asked_by(path, thing)
    return found


def _asked_by(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The datasets that torch's own ask for ``__getitems__``."""
    own = dict(fields(thing))
    if type(thing) is Subset and "dataset" in own:
        yield f"{path}.dataset", own["dataset"]
    if type(thing) is StackDataset and is_one_of(type(own.get("datasets")), tuple, dict):
        for name, part in held_by(own["datasets"], _OBJECTS_MAX):
            yield f"{path}.datasets[{key_text(name)}]", part


def _how(path: str, thing: Any) -> str | None:
    """How its ``__getitem__`` is passed by; None where it is not, or where that is not certain."""
    cls = type(thing)
    lineage = list(mro_of(cls))
    one = next((k for k, each in enumerate(lineage) if _ONE in namespace_of(each)), None)
    many = next((k for k, each in enumerate(lineage) if _MANY in namespace_of(each)), None)
    if one is None or lineage[one] is Dataset or _MANY in dict(fields(thing)):
        return None
    own = namespace_of(lineage[one])[_ONE]
    if type(own) is not types.FunctionType or _hands_on(own.__code__):
        return None
    if many is None:
        if (inner := _found_through_getattr(thing)) is None:
            return None
        source = f"which its __getattr__ finds in {path}.{inner[0]} ({type_name(inner[1])})"
    elif many <= one or _may_ask_for_one(namespace_of(lineage[many])[_MANY]):
        return None
    else:
        source = f"which it inherits from {type_name(lineage[many])}"
    whose = type_name(lineage[one]).rpartition(".")[2]
    return (
        f"{path} ({type_name(cls)}): torch makes its batches by __getitems__, {source}, and never "
        f"calls the __getitem__ of {whose}: what that does, a transform perhaps, does not happen. "
        f"{_CURE}"
    )


def _found_through_getattr(thing: Any, depth: int = 4) -> tuple[str, type] | None:
    """The attribute, and its class, in which a ``__getattr__`` of the user's finds the method."""
    defined = definitions(type(thing), "__getattr__")[:1]
    if not defined or type(defined[0]) is not types.FunctionType:
        return None
    code = defined[0].__code__
    texts = {each for each in _constants(code) if type(each) is str and each != code.co_name}
    if texts & _REFUSED:
        return None
    if "getattr" not in code.co_names and "__getattribute__" not in code.co_names:
        return None
    for name, held in fields(thing):
        named = name in code.co_names or name in texts
        if not named:
            continue
        if any(callable(each) for each in definitions(type(held), _MANY)[:1]):
            return str(name), type(held)
        if depth and (inner := _found_through_getattr(held, depth - 1)):
            return f"{name}.{inner[0]}", inner[1]
    return None


def _constants(code: types.CodeType) -> Iterator[Any]:
    for each in code.co_consts:
        if is_one_of(type(each), tuple, frozenset):
            yield from each
        else:
            yield each


def _hands_on(code: types.CodeType) -> bool:
    """Whether a ``__getitem__`` does nothing but ask another: there is nothing to be passed by."""
    working = ("CALL", "BINARY_OP", "BUILD", "STORE", "COMPARE", "FORMAT", "UNARY")
    return not any(
        step.opname.startswith(working) and step.argrepr != "[]"
        for step in dis.get_instructions(code)
    )


def _may_ask_for_one(function: Any) -> bool:
    """Whether ``__getitems__`` may call the dataset's ``__getitem__``: unless its code shows not.

    It names it, or uses ``self`` otherwise than for its attributes: ``self[index]``.
    """
    if type(function) is not types.FunctionType or not function.__code__.co_argcount:
        return True
    me = function.__code__.co_varnames[0]
    return any(_uses(code, me) for code in codes(function.__code__))


def _uses(code: types.CodeType, me: str) -> bool:
    if _ONE in code.co_names or _ONE in code.co_consts:
        return True
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "NOP")]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        loaded = step.argval if type(step.argval) is tuple else (step.argval,)
        if "LOAD_" not in step.opname or me not in loaded:
            continue
        if step.opname == "LOAD_CLOSURE":  # for the code inside, which is looked at by itself
            continue
        last = loaded[-1] == me and loaded.count(me) == 1
        if not last or after is None or "_ATTR" not in after.opname.replace("_METHOD", "_ATTR"):
            return True
    return False
