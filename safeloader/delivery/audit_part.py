"""What one rank says of its epoch, small enough to be sent. Runs in: main.

Indices themselves are not in it but for a few: those left out, and those that are padding. All
others are counted and summed up by 256 ranges. Of samples whose identity is no number (``key=`` in
a stream, indices that are names) it has those 256 whose digests are the smallest: the same samples
on two ranks are then among them on both.
"""

from __future__ import annotations

import base64
import dataclasses
import heapq
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from safeloader.delivery.key_chain import is_plain
from safeloader.delivery.ladder import MASK, RUNGS, Delivered, Ladder, Sums, sum_of
from safeloader.delivery.rank_stores import put_value
from safeloader.introspect.shard import Shard

if TYPE_CHECKING:  # who reads the folder of a run loads no torch
    from safeloader.delivery.audit import EpochAudit

LEFT_OUT = ("missing", "failed", "dropped", "skipped", "replaced")
"""Classes of an audit whose indices were drawn, and not handed over as themselves."""
NOT_KNOWN = "unknown"  # a purpose, in folders that were written before it was
LISTED = 100  # indices left out that a part names
_SMALLEST = 256
_VERSION = 1
_LADDER = struct.Struct(f"<Q{RUNGS}I{RUNGS}Q")
_MOST = (1 << 32) - 1  # of a range of a ladder
_TEXT_MAX = 1 << 20  # bytes of a part that is read


class Digests:
    """The digests of some identities: the smallest of them, and how many there are.

    Attributes:
        kind: what was digested, ``"key"`` or ``"index"``.
        total: how many identities.
        smallest: the smallest digests in their order, 256 at most.
    """

    def __init__(self, kind: str, total: int, smallest: Sums) -> None:
        self.kind, self.total, self.smallest = kind, total, smallest

    @classmethod
    def of(cls, kind: str, identities: Iterable[Any]) -> Digests | None:
        """Those of some identities; None where one has no text that is the same everywhere."""
        counted = _Counted(identities)
        try:
            smallest = heapq.nsmallest(_SMALLEST, counted)
        except ValueError:
            return None
        return cls(kind, counted.total, np.array(smallest, np.uint64))

    @property
    def whole(self) -> bool:
        """Whether each digest is among the smallest."""
        return self.total <= len(self.smallest)


class _Counted:
    def __init__(self, identities: Iterable[Any]) -> None:
        self.total = 0
        self._identities = identities

    def __iter__(self) -> Iterator[int]:
        for each in self._identities:
            if not is_plain(each):
                raise ValueError
            self.total += 1
            text = repr(each).encode("utf-8", "surrogatepass")
            yield int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


@dataclasses.dataclass(eq=False, repr=False)
class Beneath:
    """The same indices in the dataset under a ``Subset``.

    Attributes:
        table: a digest of the indices of the Subset: two of one digest are of one split.
        length: of the dataset under it.
        ladder: of the indices in that.
    """

    table: int
    length: int
    ladder: Ladder


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AuditPart:
    """What one rank handed over in an epoch, in about 4 kB, however long the epoch was.

    ``loader.audit_part()`` makes it; :func:`safeloader.merge_audits` puts those of all ranks
    together. It can be pickled, and sent in any way.

    Attributes:
        rank: of the process that it is of.
        world_size: how many ranks there are; None where that is not known.
        epoch: its number, as ``loader.recorder`` counts.
        complete: whether everything the sampler had was handed over or accounted for.
        ok: as ``loader.audit.ok``, of this rank alone.
        drawn: number of samples drawn.
        delivered: number of samples drawn and handed over; what an earlier run had handed over of
            a resumed epoch counts.
        before: how many of these that were.
        counts: of the indices in each class of the audit.
        length: of the dataset; None where that is not known.
        unknown: why nobody can tell which samples these were, in a sentence; empty as a rule.

    Example:
        >>> import pickle
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader(list(range(10)), batch_size=4, drop_last=True)
        >>> batches = list(loader)
        >>> part = loader.audit_part()
        >>> part
        AuditPart(rank=0, epoch=0, complete=True, ok=True, delivered=8 of 10)
        >>> len(pickle.dumps(part)) < 5000
        True
    """

    rank: int
    world_size: int | None
    epoch: int
    complete: bool = False
    ok: bool | None = None
    drawn: int = 0
    delivered: int = 0
    before: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    length: int | None = None
    unknown: str = ""
    # What merging goes by.
    ladder: Ladder | None = None
    shard: Shard | None = None
    padded: tuple[int, ...] = ()  # the last draws, where these are padding
    left_out: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    left_out_sum: int | None = 0  # of the numbers of all of these; None where some are not known
    left_out_before: int = 0  # skipped, replaced or failed in an earlier run of the epoch
    purpose: str = ""  # "replacement", "subset", or the class of a sampler that nobody knows
    dataset: str = ""
    contents: dict[str, int] = dataclasses.field(default_factory=dict)
    beneath: Beneath | None = None
    digests: Digests | None = None

    @classmethod
    def nothing(cls, rank: int, world_size: int | None, why: str) -> AuditPart:
        """That of a rank which knows nothing."""
        return cls(rank, world_size, -1, unknown=why)

    @classmethod
    def of(cls, audit: EpochAudit, rank: int, world_size: int | None, **more: Any) -> AuditPart:
        """That of an epoch; ``more`` are further attributes."""
        left_out: dict[str, tuple[int, ...]] = {}
        total: int | None = 0
        room = LISTED
        for name in LEFT_OUT:
            array = getattr(audit, name)
            known = array.dtype == np.int64 and array.ndim == 1 and array.size
            if not known or array.min() < 0 or array.size < audit.counts.get(name, 0):
                total = None if audit.counts.get(name, 0) else total
            else:
                total = None if total is None else (total + sum_of(array)) & MASK
            if known:
                left_out[name] = tuple(array[:room].tolist())
                room -= len(left_out[name])
        return cls(
            rank,
            world_size,
            audit.epoch,
            audit.complete,
            audit.ok,
            audit.drawn,
            audit.delivered + audit.delivered_before,
            audit.delivered_before,
            {name: number for name, number in audit.counts.items() if number},
            left_out=left_out,
            left_out_sum=total,
            **more,
        )

    @property
    def left_early(self) -> bool:
        """Whether an epoch was begun and did not come to its end."""
        return self.epoch >= 0 and not self.complete

    @property
    def unlisted(self) -> int:
        """How many samples were left out that are not named here."""
        named = sum(map(len, self.left_out.values()))
        return sum(self.counts.get(name, 0) for name in LEFT_OUT) - named

    def put(self, store: Any, key: str) -> bool:
        """Put it into a store of ``torch.distributed`` for whoever asks; waits for no other rank.

        Args:
            store: as ``torch.distributed.TCPStore``; the job's own, or another one.
            key: the same on all ranks, and another one for each epoch. The rank is added to it.

        Returns:
            Whether the store took it. That it did not is told in the log, and is no error.

        Raises:
            TypeError: if ``key`` is no text, or ``store`` has no ``set``.

        Example:
            >>> from torch.distributed import HashStore
            >>> from safeloader import RunAudit, SafeDataLoader
            >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
            >>> batches, store = list(loader), HashStore()
            >>> loader.audit_part().put(store, "audit/0")
            True
            >>> RunAudit.from_store(store, "audit/0", world=1, timeout_s=5).ok
            True
        """
        return put_value(store, key, self.rank, self.to_bytes())

    def __repr__(self) -> str:
        of = "" if self.world_size is None else f" of {self.world_size}"
        why = f", unknown={self.unknown!r}" if self.unknown else ""
        return (
            f"AuditPart(rank={self.rank}{of}, epoch={self.epoch}, complete={self.complete}, "
            f"ok={self.ok}, delivered={self.delivered} of {self.drawn}{why})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return AuditPart.from_bytes, (self.to_bytes(),)

    # as bytes ───────────────────────────────────────────────────────────────────────────────────

    def to_bytes(self) -> bytes:
        """All of it, to be sent: a line of JSON, and then numbers."""
        out = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        blobs: list[bytes] = []
        out["ladder"] = _put(self.ladder, blobs)
        if self.shard is not None:
            out["shard"] = dataclasses.asdict(self.shard)
        if self.beneath is not None:
            under = self.beneath
            out["beneath"] = [under.table, under.length, _put(under.ladder, blobs)]
        if self.digests is not None:
            told = self.digests
            out["digests"] = [told.kind, told.total, len(told.smallest)]
            blobs.append(told.smallest.astype("<u8").tobytes())
        head = json.dumps({"version": _VERSION} | out, separators=(",", ":"))
        return b"\n".join([head.encode(), b"".join(blobs)])

    @classmethod
    def from_bytes(cls, raw: bytes) -> AuditPart:
        """The part again.

        Raises:
            ValueError: for bytes that are no part, or one of another release of safeloader.
        """
        head, _, blob = raw.partition(b"\n")
        try:
            told = json.loads(head)
            version = told.pop("version")
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"this is no AuditPart: {raw[:40]!r}") from None
        if version != _VERSION:
            raise ValueError(
                f"this AuditPart is of another release of safeloader (format {version}, and here "
                f"{_VERSION}): have one release on all ranks"
            )
        blobs = memoryview(blob)
        for name in ("ladder",):
            told[name], blobs = _take(told[name], blobs)
        if told["shard"] is not None:
            told["shard"] = Shard(**told["shard"])
        if told["beneath"] is not None:
            table, length, there = told["beneath"]
            ladder, blobs = _take(there, blobs)
            assert ladder is not None
            told["beneath"] = Beneath(table, length, ladder)
        if told["digests"] is not None:
            kind, total, number = told["digests"]
            smallest = np.frombuffer(blobs, "<u8", number).astype(np.uint64)
            told["digests"] = Digests(kind, total, smallest)
        told["padded"] = tuple(told["padded"])
        told["left_out"] = {name: tuple(each) for name, each in told["left_out"].items()}
        return cls(**told)


def to_text(part: AuditPart) -> str:
    """A part as ASCII, for a line of a run's folder: 3 kB, and less of a small epoch."""
    return base64.b64encode(zlib.compress(part.to_bytes(), 6)).decode()


def from_text(text: str) -> AuditPart:
    """The part again.

    Raises:
        ValueError: for a text that is no part, or one of another release of safeloader.
    """
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text), _TEXT_MAX)
        return AuditPart.from_bytes(raw)
    except (zlib.error, TypeError, KeyError, struct.error) as exc:
        raise ValueError(f"this is no AuditPart: {exc}") from exc


class RankAccounts(NamedTuple):
    """What an epoch has for other ranks.

    Attributes:
        part: its sums.
        delivered: gives the indices handed over, to be asked for range by range; of the dataset
            under a ``Subset`` if it is given True. None where they are not known.
    """

    part: AuditPart
    delivered: Callable[[bool], Delivered | None]


def _put(ladder: Ladder | None, blobs: list[bytes]) -> bool:
    if ladder is None:
        return False
    if ladder.counts.size and int(ladder.counts.max()) > _MOST:
        raise ValueError("a range of an audit's ladder holds more than 2**32 samples")
    numbers = ladder.counts.tolist(), ladder.sums.tolist()
    blobs.append(_LADDER.pack(ladder.width, *numbers[0], *numbers[1]))
    return True


def _take(there: bool, blobs: memoryview) -> tuple[Ladder | None, memoryview]:
    if not there:
        return None, blobs
    width, *numbers = _LADDER.unpack(blobs[: _LADDER.size])
    counts = np.array(numbers[:RUNGS], np.int64)
    sums = np.array(numbers[RUNGS:], np.uint64)
    return Ladder(width, counts, sums), blobs[_LADDER.size :]
