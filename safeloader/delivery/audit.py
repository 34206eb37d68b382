"""What an epoch's ledger found, for a person and for a program. Runs in: main."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeloader.introspect.html_text import Tone, rows_of, table
from safeloader.introspect.ranks import Place
from safeloader.introspect.shard import Shard
from safeloader.introspect.texts import index_text
from safeloader.introspect.underlying import Underlying

IndexArray = npt.NDArray[Any]

_NONE: IndexArray = np.empty(0, dtype=np.int64)
_NONE.flags.writeable = False  # it is in many audits
CLASSES = (
    ("missing", "drawn, but never handed over"),
    ("duplicated", "handed over twice, or one sample under two indices"),
    ("unexpected", "handed over, but never drawn"),
    ("failed", "lost with a batch whose error was raised"),
    ("dropped", "left out by drop_last"),
    ("skipped", "left out because of an error"),
    ("replaced", "another sample came in its place because of an error"),
    ("late", "came when asked for again"),
    ("repeated", "drawn more than once by the sampler"),
    ("unvisited", "never drawn"),
)
_TROUBLES = ("missing", "duplicated", "unexpected", "failed")
_SHOWN = 8
_REASONS_SHOWN = 5
_KEYS_SHOWN = 3
_REASONS = 100  # of which the indices in the dataset under a Subset are looked up
_BATCHES_EACH = 8  # of each worker: with fewer, uneven shares tell nothing


ONE_WORKER_GAVE_BOTH = (
    "one worker gave both: its stream samples with replacement (resampled=True), or has a shard "
    "twice"
)


class SameKey(NamedTuple):
    """Two indices that ``key`` gave one identity: one sample, for all that is known.

    Attributes:
        key: as text.
        first: the index that it was given for first; ``(worker, ordinal)`` in a stream.
        again: the index that it was given for again.
        first_worker: the worker that gave the first; -1 in the main process.
        worker: the worker that gave it again.

    Example:
        >>> print(SameKey("'a'", 4, 7, 0, 1))
        index 7 and index 4 are one sample (key 'a'): worker 0 gave one and worker 1 the other
    """

    key: str
    first: Any
    again: Any
    first_worker: int
    worker: int

    def __str__(self) -> str:
        names = f"index {index_text(self.again)} and index {index_text(self.first)}"
        who = f": worker {self.first_worker} gave one and worker {self.worker} the other"
        return f"{names} are one sample (key {self.key})" + who * (self.first_worker != self.worker)


_none = functools.partial(np.empty, 0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EpochAudit:
    """Drawn against delivered, for one epoch.

    Indices are those of the dataset; in a stream they are ``(worker, ordinal)``, arrays of shape
    (n, 2). Arrays hold the first million indices of their class; ``counts`` is exact. An index of
    -1 is a sample that belongs to no index (``__getitems__`` gave more than it was asked for).

    Attributes:
        epoch: its number, as ``loader.recorder`` counts, from 0.
        complete: whether everything the sampler had was handed over or accounted for. False
            while it runs, and for an epoch that was left early.
        drawn: number of samples drawn so far; in a stream, read by the workers as far as known.
        delivered: number of samples drawn and handed over to the training loop. It got those that
            stand in for ``replaced`` ones beside them.
        missing: drawn, never handed over.
        duplicated: handed over twice; with ``key``, also the second index of one sample.
        unexpected: handed over, never drawn.
        failed: in a batch whose error was raised to the user.
        dropped: left out by ``drop_last``, or what ``dropped_by`` names.
        skipped: left out because of an error, where that was asked for (``on_error``,
            ``on_crash``).
        replaced: not handed over because of an error, another sample stands in its place.
        late: came when they were asked for again (``retries``).
        repeated: drawn more than once by the sampler (with replacement, or padding).
        unvisited: in ``range(len(dataset))`` and never drawn.
        counts: the exact number of indices in each class.
        reasons: why an index was skipped, replaced or late, for the first 1000 of them.
        donors: the index of the sample that stands in for a replaced one, for the first 1000; none
            where an ``on_error`` callable gave it.
        notes: other things worth knowing, such as a worker that delivered nothing.
        delivered_by: how many of the samples delivered came from each worker; empty without
            workers.
        stream: whether the dataset is iterable-style.
        batches: how many batches were handed over.
        batches_drawn: how many the sampler gave; None for a stream.
        announced: how many ``len(loader)`` said as the epoch began; None where that is not known.
        rank: of this process in distributed training, or of the sampler's share; None outside.
        world_size: how many ranks there are; None where that is not known.
        shard: of a sampler that draws one of several shares: the number of this one, and of all.
        elsewhere: in distributed training, how many indices of the dataset were not drawn here:
            they are for other ranks to draw, and ``unvisited`` is empty.
        padding: how many indices all ranks together draw a second time, so that each has as many as
            the others.
        dropped_by: the argument that has indices ``dropped``.
        same_keys: with ``key``, the first 1000 pairs of indices that are one sample: see
            ``duplicated``.
        under: the class of a dataset that only points into others, ``"Subset"`` or
            ``"ConcatDataset"``; else empty.
        under_indices: of the indices that are shown, those in the dataset under it; where it has
            several parts, ``(part, index)``.
        unchecked: what nobody looked at, in a phrase each; ``ok`` says nothing of that.
        noticed: what was seen of wrong data behind right indices, in a sentence each, while this
            epoch ran; ``ok`` says nothing of that. The log says what to do about it.
        resumed_at: at which batch this run went on with an epoch that another had begun; None as a
            rule. ``drawn`` and ``repeated`` are then of both.
        delivered_before: how many samples had been handed over, or accounted for, by then.
        unchecked_since: the batch from which on nothing was checked, because of a fault of
            safeloader's own, which the log tells; None as a rule. Such an epoch is never complete.

    Example:
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader(list(range(10)), batch_size=4, drop_last=True)
        >>> batches = list(loader)
        >>> print(loader.audit)
        epoch 0: complete, ok; 10 drawn, 8 delivered
          dropped: 2, left out by drop_last: 8, 9
        >>> loader.audit.dropped.tolist(), loader.audit.ok
        ([8, 9], True)
    """

    epoch: int
    complete: bool = False
    drawn: int = 0
    delivered: int = 0
    missing: IndexArray = dataclasses.field(default_factory=_none)
    duplicated: IndexArray = dataclasses.field(default_factory=_none)
    unexpected: IndexArray = dataclasses.field(default_factory=_none)
    failed: IndexArray = dataclasses.field(default_factory=_none)
    dropped: IndexArray = dataclasses.field(default_factory=_none)
    skipped: IndexArray = dataclasses.field(default_factory=_none)
    replaced: IndexArray = dataclasses.field(default_factory=_none)
    late: IndexArray = dataclasses.field(default_factory=_none)
    repeated: IndexArray = dataclasses.field(default_factory=_none)
    unvisited: IndexArray = dataclasses.field(default_factory=_none)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reasons: dict[Any, str] = dataclasses.field(default_factory=dict)
    donors: dict[Any, Any] = dataclasses.field(default_factory=dict)
    unchecked_since: int | None = None
    delivered_by: dict[int, int] = dataclasses.field(default_factory=dict)
    stream: bool = False
    batches: int = 0
    batches_drawn: int | None = None
    announced: int | None = None
    rank: int | None = None
    world_size: int | None = None
    shard: tuple[int, int] | None = None
    elsewhere: int = 0
    padding: int = 0
    dropped_by: str = "drop_last"
    same_keys: tuple[SameKey, ...] = ()
    under: str = ""
    under_indices: dict[int, Any] = dataclasses.field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()
    resumed_at: int | None = None
    delivered_before: int = 0

    @property
    def ok(self) -> bool | None:
        """Whether nothing is missing, duplicated, unexpected or failed.

        None where that is not known: see ``unchecked_since``.
        """
        if self.unchecked_since is not None:
            return None
        return not any(self.counts.get(name, 0) for name in _TROUBLES)

    def not_checked(self, since: int, *parts: str) -> EpochAudit:
        """The same where ``parts`` of safeloader's own failed from batch ``since`` on."""
        note = f"{', '.join(parts)} failed: a fault of safeloader's own, which the log tells"
        notes = (*self.notes, note)
        return dataclasses.replace(self, complete=False, notes=notes, unchecked_since=since)

    def cut(self, most: int) -> EpochAudit:
        """The same with at most so many indices of each class, and reasons."""
        first: dict[str, Any] = {}
        for name, _ in CLASSES:
            if (array := getattr(self, name)).size > most:
                first[name] = array[:most].copy()  # of the rest nothing is held
            elif not array.size and array.dtype == np.int64:
                first[name] = _NONE
        for name in ("reasons", "donors", "under_indices"):
            first[name] = dict(islice(getattr(self, name).items(), most // 10))
        return dataclasses.replace(self, same_keys=self.same_keys[: most // 10], **first)

    def naming(self, under: Underlying) -> EpochAudit:
        """The same with what the indices that it shows are in the dataset under the Subset."""
        shown = [*islice(self.reasons, _REASONS)]
        for name, _ in CLASSES:
            shown += getattr(self, name)[:_SHOWN].tolist()
        ints = sorted({index for index in shown if type(index) is int})
        places = {index: under.of(index) for index in ints}
        named = {
            index: place.at if under.parts == 1 else (place.part, place.at)
            for index, place in places.items()
            if place is not None
        }
        return dataclasses.replace(self, under=under.name, under_indices=named)

    def of_rank(self, at: Place, shard: Shard | None) -> EpochAudit:
        """The same of one rank's share: what it did not draw, others may have drawn."""
        known: dict[str, Any] = {"rank": at.rank, "world_size": at.world_size}
        if shard is not None:
            known |= {"shard": (shard.rank, shard.replicas), "padding": shard.padding}
            known["dropped_by"] = shard.drops_by
        if at.world_size != 1 or (shard is not None and shard.replicas > 1):
            counts = self.counts | {"unvisited": 0}
            elsewhere = self.counts.get("unvisited", 0)
            known |= {"unvisited": _none(), "counts": counts, "elsewhere": elsewhere}
        return dataclasses.replace(self, **known)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists that ``json.dumps`` takes; indices that are objects as text."""
        out = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name, _ in CLASSES:
            array = out[name]
            out[name] = array.tolist() if array.dtype != object else [*map(index_text, array)]
        return out | {
            "ok": self.ok,
            "counts": dict(self.counts),
            "notes": list(self.notes),
            "shard": None if self.shard is None else list(self.shard),
            "delivered_by": {str(worker): number for worker, number in self.delivered_by.items()},
            "same_keys": [
                pair._asdict() | {"first": _plain(pair.first), "again": _plain(pair.again)}
                for pair in self.same_keys
            ],
            "under_indices": {
                str(index): _plain(place) for index, place in self.under_indices.items()
            },
            "unchecked": list(self.unchecked),
            "noticed": list(self.noticed),
            "reasons": {index_text(index): reason for index, reason in self.reasons.items()},
            "donors": {index_text(index): _plain(donor) for index, donor in self.donors.items()},
        }

    def __repr__(self) -> str:
        """On one line, without the arrays: a notebook shows this, and they may hold a million."""
        classes = "".join(f", {name}={n}" for name, _ in CLASSES if (n := self.counts.get(name)))
        return (
            f"EpochAudit(epoch={self.epoch}, complete={self.complete}, ok={self.ok}, "
            f"drawn={self.drawn}, delivered={self.delivered}{classes})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the lines of ``str(audit)`` as a table."""
        title, *lines = str(self).split("\n")
        return table(title, rows_of(lines), tone_of(self))

    def __str__(self) -> str:
        state = "complete" if self.complete else "not complete"
        verdict = "ok" if self.ok else "NOT OK"
        if self.unchecked:
            verdict += f" (not checked: {'; '.join(self.unchecked)})"
        if self.noticed and self.ok:
            verdict = f"indices {verdict} (but see what was noticed)"
        if self.unchecked_since is not None:
            verdict = f"not checked since batch {self.unchecked_since}"
        at = Place(self.rank, self.world_size)
        rank = f", {at}" if str(at) else ""
        lines = [
            f"epoch {self.epoch}{rank}: {state}, {verdict}; "
            f"{self.drawn} drawn, {self.delivered} delivered"
        ]
        if replaced := self.counts.get("replaced"):
            lines[0] += f", {replaced} replaced"
        if self.resumed_at is not None:
            lines.append(
                f"  resumed at batch {self.resumed_at}; {self.delivered_before} delivered before"
            )
        for name, meaning in CLASSES:
            if total := self.counts.get(name):
                if name == "dropped":
                    meaning = f"left out by {self.dropped_by}"
                text = self._with_donor if name == "replaced" else index_text
                shown = getattr(self, name)[:_SHOWN].tolist()  # a stream's: (worker, ordinal)
                shown = [tuple(k) if type(k) is list else k for k in shown]
                more = ", ..." if total > _SHOWN else ""
                first = ", ".join(map(text, shown)) + more
                lines.append(f"  {name}: {total}, {meaning}: {first}{self._beneath(*shown)}")
                if name == "duplicated":
                    pairs = self.same_keys[:_KEYS_SHOWN]
                    lines += [f"    {pair}" for pair in pairs]
                    if len(self.same_keys) > len(pairs):
                        lines.append("    and more in audit.same_keys")
                    if self.stream and any(pair.first[0] == pair.again[0] for pair in pairs):
                        lines.append(f"    {ONE_WORKER_GAVE_BOTH}")
        reasons = first_reasons(self.reasons, _REASONS_SHOWN, self._beneath)
        lines += [f"    {line}" for line in reasons]
        lines += self._among_ranks(at)
        lines += self._by_worker()
        if self.complete and not self.counts.get("failed"):
            came = self.batches + (self.resumed_at or 0)
            said = of_batches(self.announced, self.batches_drawn, came)
            lines += [f"  batches: {said}"] if said else []
        lines += [f"  noticed: {said}" for said in self.noticed]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _among_ranks(self, at: Place) -> list[str]:
        """What is for other ranks to draw, and what all of them draw twice."""
        lines = []
        if self.elsewhere:
            share = ""
            if self.shard is not None and self.shard != at:
                share = " (this is share {} of {})".format(*self.shard)
            few = "index" if self.elsewhere == 1 else "indices"
            said = f"{self.elsewhere} {few}, which cannot be checked from here{share}"
            lines.append(f"  for other ranks: {said}")
        if self.padding:
            few, these = ("index is", "it") if self.padding == 1 else ("indices are", "them")
            lines.append(
                f"  padding: {self.padding} {few} drawn twice over all ranks, so that each has as "
                f"many; an evaluation counts {these} twice"
            )
        return lines

    def _by_worker(self) -> list[str]:
        """The samples of each worker, where that tells something: of streams, and of idle ones."""
        numbers = list(self.delivered_by.values())
        few = self.batches < _BATCHES_EACH * len(numbers)
        if len(numbers) < 2 or not (self.stream or (not few and 2 * min(numbers) < max(numbers))):
            return []
        shown = [f"worker {k}: {n}" for k, n in islice(self.delivered_by.items(), _SHOWN)]
        return [f"  samples by {', '.join(shown)}{', ...' * (len(numbers) > _SHOWN)}"]

    def _beneath(self, *indices: Any) -> str:
        """What indices are in the dataset under a Subset, in brackets; empty elsewhere."""
        if not self.under:
            return ""
        places = [self.under_indices.get(each) for each in indices if type(each) is int]
        known = [place for place in places if place is not None]
        if not known:
            return ""
        if type(known[0]) is tuple:
            told = ", ".join(f"index {index} of part {part}" for part, index in known)
            return f" ({told} under the {self.under})"
        return f" (index {', '.join(map(str, known))} of the dataset under the {self.under})"

    def _with_donor(self, index: Any) -> str:
        """A replaced index, with what stands in for it."""
        by = f" (by {index_text(self.donors[index])})" if index in self.donors else ""
        return index_text(index) + by


def tone_of(audit: EpochAudit) -> Tone:
    """How good it is; where something was noticed, indices that are right do not tell."""
    if audit.ok is None or (audit.ok and audit.noticed):
        return "unknown"
    return "good" if audit.ok else "bad"


def of_batches(said: int | None, gave: int | None, handed_over: int | None) -> str:
    """What ``len(loader)`` said, where an epoch that ended by itself gave another number."""
    if said is None:
        return ""
    if gave is not None and said != gave:
        follows = "waits for ever" if gave < said else "stops before the end"
        return (
            f"the sampler says {said} batches and gave {gave}: whoever counts on len(loader) "
            f"{follows}. Have its __len__ say what its __iter__ gives"
        )
    if handed_over is not None and said != handed_over:
        return f"len(loader) says {said}, and {handed_over} were handed over"
    return ""


def first_reasons(
    reasons: dict[Any, str], most: int, beneath: Callable[[Any], str] = lambda index: ""
) -> list[str]:
    """The first ``most`` reasons of an audit, a line each, and how many more there are.

    ``beneath`` says, in brackets, what an index is in the dataset under a Subset.
    """
    first = islice(reasons.items(), most)
    lines = [f"index {index_text(index)}{beneath(index)}: {why}" for index, why in first]
    if len(reasons) > most:
        lines.append(f"and {len(reasons) - most} more in audit.reasons")
    return lines


def _plain(item: Any) -> Any:
    """For JSON: a number, a stream's pair, or text."""
    return list(item) if type(item) is tuple else item if type(item) is int else index_text(item)
