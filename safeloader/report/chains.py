"""Which epochs of a run belong together, over ranks and attempts. Runs in: main."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from safeloader.report.folder import LoaderRecords
from safeloader.report.records import RunEpoch, epochs_of
from safeloader.report.run import RunFolder

_LEFT_OUT = ("skipped", "replaced")


class LoaderLines:
    """What a loader wrote in lines, read once for all of its epochs: each open is slow where the
    file system is far away."""

    def __init__(self, loader: LoaderRecords) -> None:
        self._loader = loader

    @functools.cached_property
    def incidents(self) -> dict[Any, list[dict[str, Any]]]:
        """By epoch, what was left out, replaced or late."""
        found: dict[Any, list[dict[str, Any]]] = {}
        for line in self._loader.lines("incidents.jsonl"):
            found.setdefault(line.get("epoch"), []).append(line)
        return found

    @functools.cached_property
    def dropped(self) -> set[int]:
        """The epochs of which batches went for ``run_max_bytes=``."""
        lines = self._loader.lines("dropped.jsonl")
        return {epoch for line in lines for epoch in _range(line)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Batches of one rank: from ``first`` on, and before ``end`` where that is not None."""

    loader: LoaderRecords
    lines: LoaderLines
    epoch: int
    first: int
    end: int | None = None


@dataclasses.dataclass
class Part:
    """One rank of an epoch.

    Attributes:
        loader, epoch: which, with its audit.
        lines: of the loader.
        batches: how many it handed over.
        first: the number of the first one; above 0 where it went on with another epoch.
    """

    loader: LoaderRecords
    epoch: RunEpoch
    lines: LoaderLines
    batches: int = 0
    first: int = 0

    @property
    def audit(self) -> dict[str, Any] | None:
        """What it says itself; None while it runs, or where it was cut off."""
        return self.epoch.audit

    @property
    def resumed(self) -> dict[str, Any] | None:
        """What is known of the state that it went on from; None where nothing is."""
        return self.epoch.resumed

    @property
    def left_early(self) -> bool:
        """Whether the program left it before its end."""
        return self.audit is not None and not self.audit.get("complete")

    @property
    def end(self) -> int:
        """The number of the batch behind its last one."""
        return self.first + self.batches


class Cohort:
    """One epoch of one loader on all ranks of an attempt.

    Attributes:
        name: of the loader, with its line.
        attempt: the one that had it last.
        epoch: its number there.
        parts: by rank.
        before: the epoch that it went on with.
        again: how many batches of that one were handed over again.
        lost: why what came before it is not known; empty as a rule.
    """

    def __init__(self, name: str, attempt: int, epoch: int) -> None:
        self.name, self.attempt, self.epoch = name, attempt, epoch
        self.parts: dict[int, Part] = {}
        self.before: Cohort | None = None
        self.again = 0
        self.lost = ""

    @property
    def resumed(self) -> bool:
        """Whether it went on with another epoch."""
        return any(part.first for part in self.parts.values())

    @property
    def audits(self) -> list[dict[str, Any]]:
        """Those of the ranks that have one."""
        return [part.audit for part in self.parts.values() if part.audit is not None]

    @property
    def attempts(self) -> tuple[int, ...]:
        """Those that handed over its batches."""
        before = self.before.attempts if self.before else ()
        return tuple(dict.fromkeys((*before, self.attempt)))

    @functools.cached_property
    def world(self) -> int:
        """How many ranks there should be."""
        known = [part.loader.info.get("world_size") or 1 for part in self.parts.values()]
        return max(*known, len(self.parts), 1)

    @property
    def length(self) -> int | None:
        """Of the dataset."""
        known = [part.loader.info.get("length") for part in self.parts.values()]
        return known[0] if known and isinstance(known[0], int) else None

    @property
    def stream(self) -> bool:
        """Whether its samples have no index."""
        if self.audits:
            return any(audit.get("stream") for audit in self.audits)
        return self.length is None

    @property
    def shared_out(self) -> bool:
        """Whether the sampler of any rank draws a share."""
        known = (part.epoch.shard is not None for part in self.parts.values())
        return any(known) or any(audit.get("shard") is not None for audit in self.audits)

    @property
    def batches(self) -> int:
        """How many each rank handed over, at least, with those before."""
        return max((part.end for part in self.parts.values()), default=0)

    @functools.cached_property
    def state(self) -> str:
        """``"whole"``, ``"left early"``, ``"running"`` or ``"cut off"``."""
        open_ = [part for part in self.parts.values() if part.audit is None]
        # Whose machine has been silent for a minute may be dead, and is not said to go on.
        if any(part.loader.state == "running" for part in open_):
            return "running"
        if open_:
            return "cut off"
        return "left early" if any(p.left_early for p in self.parts.values()) else "whole"

    def pieces(self, ends: dict[int, int] | None = None) -> Iterator[tuple[int, Piece]]:
        """All batches that count, by rank; before ``ends`` where a later epoch went on there."""
        if self.before is not None:
            firsts = {rank: part.first for rank, part in self.parts.items()}
            if ends is not None:  # it went on from an older state than this one began with
                most = max(ends.values())
                firsts = {rank: min(at, ends.get(rank, most)) for rank, at in firsts.items()}
            yield from self.before.pieces(firsts)
        for rank, part in self.parts.items():
            end = None if ends is None else ends.get(rank, max(ends.values()))
            yield rank, Piece(part.loader, part.lines, part.epoch.epoch, part.first, end)

    @functools.cached_property
    def left_out(self) -> dict[Any, tuple[str, int]]:
        """Indices that a rank skipped, replaced or dropped: what it did, and the rank."""
        found: dict[Any, tuple[str, int]] = {}
        for rank, piece in self.pieces():
            for line in piece.lines.incidents.get(piece.epoch, ()):
                if line.get("what") in _LEFT_OUT:
                    batch = line.get("batch")
                    inside = isinstance(batch, int) and (piece.end is None or batch < piece.end)
                    if inside and isinstance(line.get("index"), int | str):
                        found[line["index"]] = str(line["what"]), rank
        for rank, part in self.parts.items():
            for what in (*_LEFT_OUT, "dropped"):
                for index in (part.audit or {}).get(what, ()):
                    if isinstance(index, int | str):
                        found.setdefault(index, (what, rank))
        return found

    @property
    def unlisted(self) -> dict[str, int]:
        """How many more of a class there are than an audit lists."""
        found: dict[str, int] = {}
        for audit in self.audits:
            for what in (*_LEFT_OUT, "dropped"):
                more = audit.get("counts", {}).get(what, 0) - len(audit.get(what, ()))
                if more > 0:
                    found[what] = found.get(what, 0) + more
        return found


def cohorts_of(run: RunFolder, attempt: int | None = None) -> list[Cohort]:
    """The epochs of a run in the order in which they began; those gone on with are in the later."""
    found: dict[tuple[int, str, int, int], Cohort] = {}
    for loader, number in _numbered_alike(run):
        if attempt not in (None, loader.attempt):
            continue
        lines = LoaderLines(loader)
        spans = _spans(loader, lines)
        for epoch in epochs_of(loader):
            key = loader.attempt, loader.name, number, epoch.epoch
            cohort = found.setdefault(key, Cohort(loader.name, loader.attempt, epoch.epoch))
            low, count = spans.get(epoch.epoch, (0, 0))
            told = (epoch.resumed or {}).get("batches") or (epoch.audit or {}).get("resumed_at")
            cohort.parts[loader.rank] = Part(loader, epoch, lines, count, told or low)
    ordered = sorted(found.values(), key=_began)
    return _linked([each for each in ordered if each.batches or _drew(each)], run, attempt)


def _drew(cohort: Cohort) -> bool:
    """Whether anything was asked for: not of an iterator that nobody took a batch from."""
    return any(audit.get("drawn") for audit in cohort.audits)


def _began(cohort: Cohort) -> tuple[int, float]:
    return cohort.attempt, min(part.epoch.began for part in cohort.parts.values())


def _numbered_alike(run: RunFolder) -> Iterator[tuple[LoaderRecords, int]]:
    """The loaders, each with its number among those of the same name of its process's rank."""
    seen: dict[tuple[int, int, str], int] = {}
    for loader in run.loaders:
        key = loader.attempt, loader.rank, loader.name
        seen[key] = seen.get(key, -1) + 1
        yield loader, seen[key]


def _spans(loader: LoaderRecords, lines: LoaderLines) -> dict[int, tuple[int, int]]:
    """Of each epoch the number of its first batch, and how many there are."""
    import numpy as np

    found: dict[int, tuple[int, int]] = {}
    for table in loader.pieces(["epoch", "batch"]):
        epochs = table["epoch"].to_numpy()
        batches = table["batch"].to_numpy()
        for epoch in np.unique(epochs).tolist():
            its = batches[epochs == epoch]
            low, count = found.get(epoch, (int(its.min()), 0))
            found[epoch] = min(low, int(its.min())), count + len(its)
    return {
        epoch: (0 if epoch in lines.dropped else low, count)
        for epoch, (low, count) in found.items()
    }


def _range(line: dict[str, Any]) -> Iterator[int]:
    epochs = line.get("epochs")
    if isinstance(epochs, list) and len(epochs) == 2:
        yield from range(int(epochs[0]), int(epochs[1]) + 1)


def _linked(cohorts: list[Cohort], run: RunFolder, attempt: int | None) -> list[Cohort]:
    """Each epoch that went on with another has that one before it, which is then no more told."""
    successor: dict[int, Cohort] = {}
    for at, cohort in enumerate(cohorts):
        if not cohort.resumed:
            continue
        firsts = {rank: part.first for rank, part in cohort.parts.items()}
        first = max(firsts.values())
        told = [part.resumed for part in cohort.parts.values() if part.resumed is not None]
        if told:
            earlier, cohort.lost = _named(told[0].get("from"), cohorts[:at], run, first)
        else:  # the folder was written before states said whose they are
            earlier = next(
                (
                    each
                    for each in reversed(cohorts[:at])
                    if id(each) not in successor and _is_before(each, cohort, first)
                ),
                None,
            )
            if earlier is None:
                cohort.lost = f"it went on at batch {first} with an epoch that is not in this run"
        if earlier is None and attempt is not None:
            cohort.lost = (
                f"it went on at batch {first} with an epoch that is not of attempt {attempt}"
            )
        if earlier is None:
            continue
        while id(earlier) in successor:  # another attempt went on from there, and came to nothing
            earlier = successor[id(earlier)]
        cohort.before = earlier
        successor[id(earlier)] = cohort
        ends = (max(0, p.end - firsts.get(rank, first)) for rank, p in earlier.parts.items())
        cohort.again = earlier.again + sum(ends)
    return [each for each in cohorts if id(each) not in successor]


def _named(
    origin: Any, cohorts: list[Cohort], run: RunFolder, first: int
) -> tuple[Cohort | None, str]:
    """The epoch that a state says it is of; None where it is not here, and a sentence on that."""
    begin = f"it went on at batch {first} with an epoch that is not in this run"
    if not isinstance(origin, dict) or not origin:
        return None, f"{begin}: the state was saved where no run was written"
    if origin.get("run") != run.id:
        return None, f"{begin}, but in run {origin.get('run')}"
    for cohort in cohorts:
        for part in cohort.parts.values():
            folder = part.loader.path.relative_to(run.path).as_posix()
            if (folder, part.epoch.epoch) == (origin.get("folder"), origin.get("epoch")):
                return cohort, ""
    return None, f"{begin} any more: {origin.get('folder')}, epoch {origin.get('epoch')}"


def _is_before(earlier: Cohort, later: Cohort, first: int) -> bool:
    """Whether an epoch may be the one that another went on with."""
    if _plain_name(earlier) != _plain_name(later) or earlier.state == "whole":
        return False
    return earlier.batches >= first


def _plain_name(cohort: Cohort) -> str:
    """Without the line, which is another where the program goes on elsewhere."""
    part = next(iter(cohort.parts.values()))
    return str(part.loader.info.get("name", cohort.name))
