"""What a run tells, as values: epochs, batches, what became of an index. Runs in: main."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from safeloader.delivery.audit_part import AuditPart, from_text
from safeloader.introspect.shard import Shard
from safeloader.provenance.index_texts import of_json, without_hash
from safeloader.report.folder import LoaderRecords


@dataclasses.dataclass(frozen=True)
class RunEpoch:
    """An epoch of one loader.

    Attributes:
        loader: which.
        epoch: its number, from 0 in each loader.
        began: in seconds since 1970.
        ended: the same; None while it runs, or where it was cut off.
        audit: what :meth:`safeloader.EpochAudit.to_dict` tells, with the first 1000 indices of each
            class; None while it runs, or where it was cut off.
        name: of the loader; two may share a recorder, and so a folder.
        purpose: what its sampler draws other than each index once: ``""`` for nothing,
            ``"replacement"``, ``"subset"``, or the class of a sampler that is not known; None in
            a folder that was written before this was.
        shard: the share of its sampler; None where it has none, or that is not known.
        resumed: ``batches`` and ``left_out`` of what an earlier run had handed over, and ``from``,
            which says whose: the id of its ``run``, its ``folder`` in that, its ``epoch``; None
            where it began at its beginning, or that is not known.
        part: what the rank told of the epoch as it ended; None where it did not.
    """

    loader: LoaderRecords
    epoch: int
    began: float
    ended: float | None
    audit: dict[str, Any] | None
    name: str
    purpose: str | None = None
    shard: Shard | None = None
    resumed: dict[str, Any] | None = None
    part: AuditPart | None = dataclasses.field(default=None, repr=False)

    @property
    def ok(self) -> bool | None:
        """What the audit says; None where there is none, or nothing was checked."""
        return None if self.audit is None else self.audit.get("ok")


@dataclasses.dataclass(frozen=True)
class RunBatch:
    """A batch that was handed over.

    Attributes:
        attempt, rank: of the process.
        loader: its name and line.
        folder: the path of what its loader wrote.
        step: how many batches that loader had handed over before.
        epoch, batch: their numbers, from 0.
        worker: number of the worker that made it; None in the main process.
        pid: of that worker.
        asked_ns: when the loop asked for it, in ns since 1970.
        wait_ns: how long it waited.
        start_ns: when the first fetch began, in ns since 1970.
        collate_ns: how long collation took.
        indices: of the samples: ints; texts, where the dataset's indices are no ints; in a stream
            the ordinals within the worker's stream.
        fetch_ns: how long each sample took to fetch, to a part in 500.
        sources: where samples come from, for those indices of which that was kept.
    """

    attempt: int
    rank: int
    loader: str
    folder: str
    step: int
    epoch: int
    batch: int
    worker: int | None
    pid: int
    asked_ns: int
    wait_ns: int
    start_ns: int
    collate_ns: int
    indices: tuple[Any, ...]
    fetch_ns: tuple[float, ...]
    sources: dict[Any, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sighting:
    """What became of an index, once.

    Attributes:
        what: ``"delivered"``, ``"skipped"``, ``"replaced"`` (another sample came in its place),
            ``"late"`` (it came when asked for again; it is delivered as well), ``"failed"``.
        attempt, rank, loader, folder: as in :class:`RunBatch`.
        epoch, batch, position: where; None where a failure does not say.
        step, worker, asked_ns, fetch_ns: as in :class:`RunBatch`, of what was delivered; else None.
        reason: why it was left out or failed; empty if it was not.
        path: the file of the failure; empty elsewhere.
    """

    what: str
    attempt: int
    rank: int
    loader: str
    folder: str
    epoch: int | None
    batch: int | None
    position: int | None
    step: int | None = None
    worker: int | None = None
    asked_ns: int | None = None
    fetch_ns: float | None = None
    reason: str = ""
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


# ── made of what a loader wrote ──────────────────────────────────────────────────────────────────


def epochs_of(loader: LoaderRecords) -> Iterator[RunEpoch]:
    """The epochs of a loader, in the order in which they began."""
    found: dict[Any, RunEpoch] = {}
    for line in loader.lines("epochs.jsonl"):
        epoch, audit, moment = line.get("epoch"), line.get("audit"), line.get("time", 0.0)
        if not isinstance(epoch, int):
            continue
        before = found.get(epoch)
        began = moment if before is None else before.began
        name = str(line.get("loader", loader.name))
        ended = moment if audit else None
        known = RunEpoch(loader, epoch, began, ended, audit or None, name)
        found[epoch] = dataclasses.replace(known, **_told(line, before))
    yield from found.values()


def _told(line: dict[str, Any], before: RunEpoch | None) -> dict[str, Any]:
    """What a line says of the sampler, of the state gone on from, and to other ranks."""
    names = ("purpose", "shard", "resumed", "part")
    known = {} if before is None else {name: getattr(before, name) for name in names}
    sampler, resumed = line.get("sampler"), line.get("resumed")
    if isinstance(sampler, dict):
        known["purpose"] = str(sampler.get("purpose", ""))
        known["shard"] = _shard(sampler.get("shard"))
    if isinstance(resumed, dict) and isinstance(resumed.get("batches"), int):
        known["resumed"] = resumed
    if isinstance(raw := line.get("part"), str):
        try:
            known["part"] = from_text(raw)
        except ValueError:  # of another release: the audit tells enough
            known["part"] = None
    return known


def _shard(told: Any) -> Shard | None:
    try:
        return Shard(**told) if isinstance(told, dict) else None
    except TypeError:
        return None


def batches_of(loader: LoaderRecords, table: Any) -> Iterator[RunBatch]:
    """The rows of a table with all columns."""
    for row in table.to_pylist():
        texts = row.pop("index_text")
        if texts is not None:
            row["indices"] = texts
        row["indices"], row["fetch_ns"] = tuple(row["indices"]), tuple(row["fetch_ns"])
        row["worker"] = None if row["worker"] < 0 else row["worker"]
        yield RunBatch(loader.attempt, loader.rank, loader.name, str(loader.path), **row)


def deliveries_of(loader: LoaderRecords, index: int | str) -> Iterator[Sighting]:
    """Where an index was delivered."""
    for table, rows, positions in loader.positions(index):
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            (batch,) = batches_of(loader, table.slice(row, 1))
            yield Sighting(
                "delivered",
                *(loader.attempt, loader.rank, loader.name, str(loader.path)),
                *(batch.epoch, batch.batch, position, batch.step, batch.worker, batch.asked_ns),
                fetch_ns=batch.fetch_ns[position],
            )


def incidents_of(loader: LoaderRecords, index: int | str) -> Iterator[Sighting]:
    """Where an index was left out, replaced or late, and where it failed."""
    here = loader.attempt, loader.rank, loader.name, str(loader.path)
    left_out = set()
    for line in loader.lines("incidents.jsonl"):
        if line.get("index") == index:
            place = line.get("epoch"), line.get("batch"), line.get("position")
            left_out.add(place[:2])
            yield Sighting(str(line.get("what")), *here, *place, reason=str(line.get("reason")))
    for found in loader.failures():
        failure = found["failure"]
        place = failure.get("epoch"), failure.get("batch"), failure.get("position")
        if is_of(failure, index) and place[:2] not in left_out:
            reason = f"{failure.get('exception_type')}: {failure.get('message')}"
            yield Sighting("failed", *here, *place, reason=reason, path=found["path"])


def is_of(failure: dict[str, Any], index: int | str) -> bool:
    """Whether a failure is of an index, as that stands in the batches."""
    its = failure.get("index")
    if its is None:
        return False
    return index in (of_json(its), its) or (type(index) is str and without_hash(index) == its)


def place_fields() -> list[Any]:
    """The columns that say which loader a row is of."""
    import pyarrow as pa

    return [("attempt", pa.int16()), ("rank", pa.int32()), ("loader", pa.int32())]


def placed(loader: LoaderRecords, table: Any) -> Any:
    """A table with these columns before its own."""
    import pyarrow as pa

    values = (loader.attempt, loader.rank, loader.number)
    for k, ((name, kind), value) in enumerate(zip(place_fields(), values, strict=True)):
        column = pa.repeat(pa.scalar(value, kind), table.num_rows)
        table = table.add_column(k, pa.field(name, kind), column)
    return table
