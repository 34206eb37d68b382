"""An index as it stands in the folder of a run, and as somebody asks for it. Runs in: main.

An int of 64 bits is an int there. All others are texts: of a text the text itself, of a tuple of
plain values what Python shows, of others what tells them. No text holds a secret: in its place
stands how the whole begins when it is hashed, so that two that differ only there stay two.

No library is imported here: commands that read do not wait for torch.
"""

from __future__ import annotations

import ast
import hashlib
import re
from typing import Any

from safeloader.introspect.redaction import scrub

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
# What each secret has that `scrub` knows: the others need not be searched.
_MAY_HOLD_SECRET = re.compile(r"[@?&;=]|://|[A-Za-z0-9_-]{20,}|bearer|basic", re.IGNORECASE)


def fits(index: Any) -> bool:
    """Whether an index is an int of 64 bits."""
    return type(index) is int and -(1 << 63) <= index < 1 << 63


def is_plain(value: Any) -> bool:
    """Whether no foreign code has to say what this is."""
    return all(map(is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


def stored_text(text: str) -> str:
    """A text without secrets, that any file can hold.

    Example:
        >>> stored_text("a.png"), stored_text("https://me:x1234@host/a.png")
        ('a.png', 'https://me:[redacted]@host/a.png #a9550cfa')
    """
    if _MAY_HOLD_SECRET.search(text):
        hidden = scrub(text)
        if hidden != text:
            whole = text.encode("utf-8", "surrogatepass")
            text = f"{hidden} #{hashlib.sha256(whole).hexdigest()[:8]}"
    return encodable(text)


def encodable(text: str) -> str:
    """A text that UTF-8 can hold: a file's name may have bytes that are none of it.

    Example:
        >>> print(encodable(f"a{chr(0xDCFF)}.png"))
        a\\udcff.png
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_hash(text: str) -> str:
    """A text as a failure has it, which does not tell secrets apart."""
    return re.sub(r" #[0-9a-f]{8}\Z", "", text)


def text_of_plain(index: Any) -> str:
    """The text of a plain value.

    Example:
        >>> text_of_plain("a.png"), text_of_plain((0, "b")), text_of_plain(1 << 70)
        ('a.png', "(0, 'b')", '1180591620717411303424')
    """
    return stored_text(index if type(index) is str else repr(index))


def of_json(value: Any) -> int | str:
    """The index that stands in a failure, as it stands in the batches.

    Example:
        >>> of_json(7), of_json("a.png"), of_json([0, [1, "b"]])
        (7, 'a.png', "(0, (1, 'b'))")
    """
    if fits(value):
        return int(value)
    return text_of_plain(_hashable(value))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def asked_for(text: str) -> list[int | str]:
    """How an index may stand in the folder that somebody asks for by a text.

    Example:
        >>> asked_for("5"), asked_for("a.png"), asked_for("[0,1]")
        ([5, '5'], ['a.png'], ['[0,1]', '(0, 1)'])
    """
    found: list[int | str] = [stored_text(text)]
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return found
    if type(value) is bool:
        found.append(int(value))
    elif fits(value):
        found.insert(0, value)
    elif is_plain(value := _hashable(value)):
        found.append(text_of_plain(value))
    return list(dict.fromkeys(found))
