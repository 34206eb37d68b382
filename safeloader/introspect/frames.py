"""Where in the user's code an exception was raised, and what stood in its locals. Runs in: both.

The frame that tells most is the innermost one of the user's own code: not ours, not torch's, not a
library's. Its locals are described as the dataset's attributes are: bounded, without secrets, and
without running any code of the user's.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from safeloader.introspect.dataset_state import described
from safeloader.introspect.texts import is_path, key_text, without_secrets
from safeloader.introspect.values import cut, fields, inherits, module_of

OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
_THIRD_PARTY = re.compile(r"[\\/](?:site|dist)-packages[\\/]")
_MADE = ("<frozen ", "<__array_function__", "<attrs ")  # code that no file holds, and no user wrote
_INNER = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<lambda>")
_DULL = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
LOCALS_MAX = 30
LOCALS_MAX_BYTES = 4000  # of JSON: a failure crosses to main with its batch
_STEPS_MAX = 8  # of an expression that is followed


class Raised(NamedTuple):
    """One frame of a traceback: where it stands, and by which expression it went on or raised."""

    frame: types.FrameType
    line: int
    at: int  # the instruction


def is_users(file: str) -> bool:
    """Say whether a file is the user's own code, by where it lies.

    >>> is_users("/home/me/scans.py"), is_users(os.__file__), is_users(torch.__file__)
    (True, False, False)
    """
    if file.startswith((OURS, *_MADE)) or _THIRD_PARTY.search(file):
        return False
    return not file.startswith((_TORCH, _STDLIB))


def is_users_class(cls: type) -> bool:
    """Say whether a class is from the user's own code; one whose module has no file is.

    >>> is_users_class(Raised), is_users_class(torch.Generator)
    (False, False)
    """
    if module_of(cls).partition(".")[0] in sys.builtin_module_names:
        return False
    file = _file_of(cls)
    return not file or is_users(file)


def is_third_party(cls: type) -> bool:
    """Say whether a class is from an installed library, which the standard library is not.

    >>> is_third_party(Raised), is_third_party(re.Pattern)
    (False, False)
    """
    file = _file_of(cls)
    return _THIRD_PARTY.search(file) is not None and not file.startswith(OURS)


def _file_of(cls: type) -> str:
    module = sys.modules.get(module_of(cls))
    file = vars(module).get("__file__") if type(module) is types.ModuleType else None
    return file if type(file) is str else ""


def frames_of(exc: BaseException) -> list[Raised]:
    """Return the frames that an exception went through, the outermost first."""
    found = []
    tb = exc.__traceback__
    while tb is not None:
        found.append(Raised(tb.tb_frame, tb.tb_lineno, tb.tb_lasti))
        tb = tb.tb_next
    return found


def user_frames(exc: BaseException) -> list[Raised]:
    """Return the frames of the user's code, the innermost first.

    Where there is none (the dataset is a library's), the outermost that is neither ours, torch's
    nor the standard library's.
    """
    all_of_them = frames_of(exc)
    own = [each for each in all_of_them if is_users(each.frame.f_code.co_filename)]
    if own:
        return own[::-1]
    library = (
        each
        for each in all_of_them
        if _THIRD_PARTY.search(file := each.frame.f_code.co_filename)
        and not file.startswith((OURS, _TORCH))
    )
    return [*library][:1]


def user_frame(exc: BaseException, dataset: object = None) -> dict[str, Any] | None:
    """Describe the user's frame in which an exception was raised; None where there is none.

    Args:
        exc: with its traceback, in the process where it was raised.
        dataset: left out of the locals: it is described elsewhere.

    Returns:
        A dict that is JSON, of some 4 KB at most: ``file``, ``line``, ``function`` and ``locals``,
        by name a dict as of an attribute in ``dataset_state``, those that tell most first.

    >>> def load(path):
    ...     image = None
    ...     return image.size
    >>> try:
    ...     load("scans/137.png")
    ... except AttributeError as error:
    ...     found = user_frame(error)
    >>> found["function"], {name: each["repr"] for name, each in found["locals"].items()}
    ('load', {'path': "'scans/137.png'", 'image': 'None'})
    """
    found = user_frames(exc)
    if not found:
        return None
    frame, line, _ = found[0]
    held, name = dict(_locals(frame)), frame.f_code.co_name
    for outer in found[1:]:  # a comprehension is part of the function around it
        if name not in _INNER or outer.frame.f_code.co_filename != frame.f_code.co_filename:
            break
        name = outer.frame.f_code.co_name
        held = dict(_locals(outer.frame)) | held
    spoken = set(re.findall(r"\w+", linecache.getline(frame.f_code.co_filename, line)))
    told = [n for n in held if not inherits(type(held[n]), *_DULL)]
    names = [n for n in told if dataset is None or held[n] is not dataset]
    names.sort(key=lambda n: (n in ("self", "cls"), not is_path(held[n]), n not in spoken))
    values = without_secrets(names, [held[name] for name in names])
    return {
        "file": cut(frame.f_code.co_filename, 400),
        "line": line,
        "function": cut(name),
        "locals": described([*zip(names, values, strict=True)][:LOCALS_MAX], LOCALS_MAX_BYTES),
    }


def paths_in(exc: BaseException) -> Iterator[tuple[str, Any, str]]:
    """Yield what looks like a path or URL in the locals of the user's frames, the innermost first.

    Each as its name, itself, and where it stands: ``"__getitem__ (scans.py:31)"``. What is used in
    the line that raised comes first, then what was set last.
    """
    for frame, line, _ in user_frames(exc):
        code = frame.f_code
        where = f"{code.co_name} ({os.path.basename(code.co_filename)}:{line})"
        spoken = set(re.findall(r"\w+", linecache.getline(code.co_filename, line)))
        held = dict(_locals(frame))
        names, values = [*held], without_secrets([*held], [*held.values()])
        found = [pair for pair in zip(names, values, strict=True) if is_path(pair[1])][::-1]
        for name, value in sorted(found, key=lambda pair: pair[0] not in spoken):
            yield name, value, where


def subscripted(exc: BaseException) -> tuple[Any, Any] | None:
    """Return what was asked for what, where the user's innermost frame raised in ``x[key]``.

    Read from the expression that was being evaluated; None where it is another, or runs code. What
    was asked is None where it is gone.

    >>> files = ["a", "b"]
    >>> def third():
    ...     return files[2]
    >>> try:
    ...     third()
    ... except IndexError as error:
    ...     print(subscripted(error))  # the source of a doctest is not in any file
    None
    """
    found = user_frames(exc)
    if not found:
        return None
    frame, _, at = found[0]
    positions = [*frame.f_code.co_positions()][at // 2]
    first, last, begin, end = positions
    if first is None or last is None or begin is None or end is None:
        return None
    lines = [linecache.getline(frame.f_code.co_filename, n) for n in range(first, last + 1)]
    if not all(lines):
        return None
    raw = [line.encode() for line in lines]
    raw[-1] = raw[-1][:end]
    raw[0] = raw[0][begin:]
    try:
        tree = ast.parse(b"".join(raw).strip().decode(), mode="eval").body
        if not isinstance(tree, ast.Subscript):
            return None
        held = dict(_locals(frame))
        # From Python 3.12 on the names of a comprehension are gone when it has raised.
        gone = isinstance(tree.slice, ast.Name) and tree.slice.id not in held
        return _value(tree.value, held), None if gone else _value(tree.slice, held)
    except (SyntaxError, ValueError, LookupError):
        return None


def _value(node: ast.expr, held: dict[str, Any], depth: int = 0) -> Any:
    """What an expression of names, attributes and constants stands for.

    Raises:
        LookupError: if it is another, or its value is not to be had without running code.
    """
    if depth > _STEPS_MAX:
        raise LookupError
    if isinstance(node, ast.Name):
        return held[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        if node.attr == "iloc":  # of a table: its rows, by number
            return _value(node.value, held, depth + 1)
        return dict(fields(_value(node.value, held, depth + 1)))[node.attr]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, held, depth + 1)
        if type(value) is int:
            return -value
    raise LookupError(key_text(type(node).__name__))


def _locals(frame: types.FrameType) -> Iterator[tuple[str, Any]]:
    """The locals of a function; of a class body or a module, whose names a mapping of the user's
    may hold, none."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return
    for name, value in list(dict.items(dict(frame.f_locals))):
        if name.isidentifier() and not name.startswith("__"):
            yield name, value
