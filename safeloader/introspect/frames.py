"""Where in the user's code an exception was raised, and what stood in its locals. Runs in: both.

The frame that tells most is the innermost one of the user's own code: not ours, not torch's, not a
library's. Its locals are described as the dataset's attributes are: bounded, without secrets, and
without running any code of the user's.
"""

from __future__ import annotations

import ast
import inspect
import io
import linecache
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader.introspect.dataset_state import described
from safeloader.introspect.texts import is_path, key_text, without_secrets
from safeloader.introspect.values import (
    container_base,
    cut,
    exception_text,
    fields,
    held_by,
    inherits,
    is_one_of,
    module_of,
)

OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_NUMPY = os.path.join(os.path.dirname(np.__file__), "")
_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
_THIRD_PARTY = re.compile(r"[\\/](?:site|dist)-packages[\\/]")
_MADE = ("<frozen ", "<__array_function__", "<attrs ")  # code that no file holds, and no user wrote
_INNER = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<lambda>")
_DULL = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
LOCALS_MAX = 30
LOCALS_MAX_BYTES = 4000  # of JSON: a failure crosses to main with its batch
_STEPS_MAX = 8  # of an expression that is followed
_PARTS_MAX = 16  # of a local that is a container, for a path to be looked for in it
_FIELDS_MAX = 64
_CAUSES_MAX = 5
_ARCHIVES = ("zipfile", "tarfile", "gzip", "wave")
_TEXT_MAX = 4000  # characters of an exception's text
_TOKENS = re.compile(r"""(?<!\w)['"]([^'"\n]+)['"]|([^\s'"<>(),;=]+[\\/][^\s'"<>(),;]+)""")
_NAMES_FILE = re.compile(r"://|\.(?=\d{0,3}[A-Za-z])[A-Za-z0-9]{1,8}$")  # and no folder
_CODE = re.compile(r"\.(?:py|pyc|pyx|so|dll|dylib|c|cc|cpp|h)$")  # of a program, and no sample's


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


def is_foreign(file: str) -> bool:
    """Say whether a file is neither ours, torch's, NumPy's nor the standard library's.

    >>> is_foreign("/home/me/scans.py"), is_foreign(os.__file__), is_foreign(np.__file__)
    (True, False, False)
    """
    if file.startswith((OURS, _NUMPY)):
        return False
    return is_users(file) or bool(_THIRD_PARTY.search(file) and not file.startswith(_TORCH))


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

    Each as its name, itself, and where it stands: ``"__getitem__ (scans.py:31)"``. A file that is
    open counts, and a path in a small container. Before them comes what the user's code gave to the
    function of a library that raised; in a frame first what is used in the line that raised, then
    what was set last.
    """
    frames = user_frames(exc)
    all_of_them = frames_of(exc)
    after = [k for k, each in enumerate(all_of_them) if frames and each.frame is frames[0].frame]
    for called in all_of_them[after[-1] + 1 : after[-1] + 2] if after else ():
        code = called.frame.f_code
        if not code.co_filename.startswith(OURS):
            given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            held = {name: value for name, value in _locals(called.frame) if name in given}
            yield from _paths_among(held, called)
    for each in frames:
        yield from _paths_among(dict(_locals(each.frame)), each)


def paths_said(exc: BaseException) -> tuple[list[str], list[str]]:
    """Return the paths that an exception, or what it was raised from, carries; those in its texts.

    >>> paths_said(FileNotFoundError(2, "No such file or directory", "j/77.json"))
    (['j/77.json'], ['j/77.json'])
    >>> paths_said(ValueError("cannot identify image file 'scans/7.png' (float32/3.5)"))
    ([], ['scans/7.png'])
    """
    carried, texts = [], []
    for each in causes_of(exc):
        if isinstance(each, OSError):
            for name in (each.filename, each.filename2):
                if inherits(type(name), str) or is_path(name):
                    carried.append(str(name))
        text = exception_text(each)[:_TEXT_MAX]
        for quoted, bare in _TOKENS.findall(text):
            token = quoted or bare.rstrip(".,;:)]}")
            if is_path(token) and _NAMES_FILE.search(token) and not _CODE.search(token):
                texts.append(token)
    return list(filter(None, carried)), texts


def paths_handled(exc: BaseException) -> tuple[list[str], list[str]]:
    """As :func:`paths_said`, of what was being handled when an exception was raised."""
    before = causes_of(exc)[-1].__context__
    return ([], []) if before is None else paths_said(before)


def causes_of(exc: BaseException) -> list[BaseException]:
    """Return an exception and those that it was raised from, by ``from``; at most a few."""
    found = [exc]
    while len(found) < _CAUSES_MAX and (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def _paths_among(held: dict[str, Any], at: Raised) -> Iterator[tuple[str, Any, str]]:
    code = at.frame.f_code
    where = f"{code.co_name} ({os.path.basename(code.co_filename)}:{at.line})"
    spoken = set(re.findall(r"\w+", linecache.getline(code.co_filename, at.line)))
    values = without_secrets([*held], [*held.values()])
    found = []
    for name, value in zip(held, values, strict=True):
        if is_path(value):
            found.append((0, name, name, value))
        elif (file := _open_file(value)) is not None:
            found.append((0, name, f"{name}.{file[0]}", file[1]))
        elif (base := container_base(type(value))) and base.__len__(value) <= _PARTS_MAX:
            parts = held_by(value)
            hidden = without_secrets([k for k, _ in parts], [part for _, part in parts])
            for (key, _), part in zip(parts, hidden, strict=True):
                if is_path(part):
                    found.append((1, name, f"{name}[{key_text(key)}]", part))
    found.reverse()
    for _, _, label, value in sorted(found, key=lambda each: (each[1] not in spoken, each[0])):
        yield label, value, where


def _open_file(value: Any) -> tuple[str, Any] | None:
    """The path that a file, or an image or archive from one, was opened with, and its attribute."""
    attribute, path = "name", None
    if type(value) is io.TextIOWrapper:
        value = value.buffer
    if is_one_of(type(value), io.BufferedReader, io.BufferedRandom, io.BufferedWriter):
        value = value.raw
    if type(value) is io.FileIO:
        path = value.name
    elif is_third_party(type(value)):  # as Pillow's images
        attribute, path = "filename", dict(fields(value, _FIELDS_MAX)).get("filename")
    elif module_of(type(value)) in _ARCHIVES:
        held = dict(fields(value, _FIELDS_MAX))
        attribute = "filename" if "filename" in held else "name"
        path = held.get(attribute)
    return (attribute, path) if is_path(path) else None


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
