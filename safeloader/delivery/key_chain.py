"""A digest of the keys of samples, in their order, by which a stream is known again. Runs in: both.

With ``key=`` a stream without a state of its own can be proved to be the one that it was: what is
read again has to give the digest that was saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

_BYTES = 16
_PLAIN = (int, str, bytes, float, bool, type(None))
BEGIN = bytes(_BYTES)


def chained(digest: bytes | None, keys: Iterable[Any]) -> bytes | None:
    """The digest with more keys; 1 us each. None where one has no text that is the same everywhere.

    >>> chained(chained(BEGIN, ["a", 1]), [(2, "b")]) == chained(BEGIN, ["a", 1, (2, "b")])
    True
    >>> chained(BEGIN, [frozenset("ab")]) is None
    True
    """
    for key in keys:
        if digest is None or not is_plain(key):
            return None
        text = repr(key).encode("utf-8", "surrogatepass")
        digest = blake2b(digest + text, digest_size=_BYTES).digest()
    return digest


def is_plain(key: Any) -> bool:
    """Whether an identity has a text that is the same in every process."""
    return type(key) in _PLAIN or (type(key) is tuple and all(map(is_plain, key)))
