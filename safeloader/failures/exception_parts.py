"""The parts of an exception that cross to another process. Runs in: both.

An exception object is not sent: constructors that want arguments, locks among the attributes, or a
class that cannot be imported would break it on the way. Its class and each of its attributes are
pickled apart, and what does not pickle stays behind alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

_ATTRIBUTE_BYTES = 64 * 1024  # a larger attribute (a batch held by the exception) stays behind

# What the exception itself holds; a property or a ``__getattribute__`` of the user's is not asked.
own_state: Callable[[BaseException], dict[str, Any]] = BaseException.__dict__["__dict__"].__get__


@dataclasses.dataclass(frozen=True)
class ExceptionParts:
    """What is left of an exception after the crossing: its class and attributes, each pickled."""

    lineage: tuple[bytes, ...]
    attributes: tuple[tuple[str, bytes], ...]


def exception_parts_of(exc: BaseException) -> ExceptionParts:
    """Take ``exc`` apart, in the process where it was raised."""
    lineage = []
    for cls in type(exc).__mro__:
        with suppress(Exception):  # a class made inside a function
            lineage.append(pickle.dumps(cls))
        if cls.__module__ == "builtins":
            break
    attributes = []
    for name, value in attributes_of(exc):
        with suppress(Exception):  # a lock, a socket, an exception with a demanding constructor
            pickled = pickle.dumps(value)
            pickle.loads(pickled)  # what dumps may still not load: found here, not in main
            if len(pickled) <= _ATTRIBUTE_BYTES:
                attributes.append((name, pickled))
    return ExceptionParts(tuple(lineage), tuple(attributes))


def attributes_of(exc: BaseException) -> Iterator[tuple[str, Any]]:
    """What the exception carries: args, fields of builtin types (errno), its own attributes."""
    for cls in type(exc).__mro__:
        # Of the user's classes only __slots__: a property would run code.
        builtin = cls.__module__ == "builtins"
        is_field = inspect.isdatadescriptor if builtin else inspect.ismemberdescriptor
        for name, slot in vars(cls).items():
            if is_field(slot) and _is_copied(name):
                with suppress(Exception):  # a field of an exception that was never initialised
                    yield name, slot.__get__(exc)
    own = own_state(exc)
    for name in list(own):
        if isinstance(name, str) and _is_copied(name):
            yield name, own[name]


def _is_copied(name: str) -> bool:
    """Not the machinery (``__class__``, ``__cause__``), nor what an error of ours carries."""
    return name == "__notes__" or not (
        name.startswith("__") or name in ("failure", "_text", "_refused_by")
    )


def first_importable(exception_parts: ExceptionParts | None) -> type[BaseException] | None:
    """The exception's class, or the nearest of its bases that this process can import."""
    for pickled in exception_parts.lineage if exception_parts else ():
        with suppress(Exception):  # not importable in this process: try what it derives from
            found = pickle.loads(pickled)
            if isinstance(found, type) and issubclass(found, BaseException):
                return found
    return None


def crossed(exception_parts: ExceptionParts | None) -> Iterator[tuple[str, Any]]:
    """The attributes that made it across."""
    for name, pickled in exception_parts.attributes if exception_parts else ():
        with suppress(Exception):  # its class is not importable here
            yield name, pickle.loads(pickled)
