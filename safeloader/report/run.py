"""The folder of a run, read: epochs, audits, failures, steps, indices. Runs in: main.

It reads the folder and nothing else, and needs no torch. The run may go on meanwhile, may have been
killed, or come from another machine; what is torn, dropped or missing stands in
:attr:`RunFolder.notes` and is never an error.

::

    from safeloader.report.run import RunFolder

    run = RunFolder("runs/exp1")
    run.loaders                      # each loader of each process: attempt, rank, name, state
    run.epochs()                     # with their audits; None where an epoch was cut off
    run.step(41337)                  # the batches of a step, on all ranks
    run.index(123)                   # where and when an index was delivered, skipped, failed
    run.failures(), run.incidents()
    run.workers()                    # memory, CPU and work of main and workers, a pyarrow.Table
    run.transport()                  # slots, and by which way batches came
    run.loaders[0].totals()          # batches, samples and waiting of each epoch
    run.loaders[0].recent(100)       # the newest batches, as a pyarrow.Table
    for loader, table in run.tables(["epoch", "indices"]):
        ...                          # all batches, piece by piece, as pyarrow.Table

"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safeloader.provenance.run_format import INSTALL, one_line
from safeloader.report.folder import LoaderRecords
from safeloader.report.records import (
    RunBatch,
    RunEpoch,
    Sighting,
    batches_of,
    deliveries_of,
    epochs_of,
    incidents_of,
    place_fields,
    placed,
)
from safeloader.report.stored import RUN, object_in


class NotARunFolder(ValueError):
    """There is no run in the folder."""


class RunFolder:
    """A run.

    Args:
        path: its folder.

    Attributes:
        path: its folder.
        id: the run's id.
        info: what ``run.json`` says: ``id``, ``command``, ``started``, ``versions``.
        attempts: the numbers of its attempts.
        loaders: what each loader of each process wrote, by attempt, rank and time.

    Raises:
        NotARunFolder: if there is no run in it.
        ImportError: if pyarrow is missing.

    Example:
        >>> import tempfile
        >>> from safeloader import SafeDataLoader
        >>> run_dir = tempfile.TemporaryDirectory()
        >>> loader = SafeDataLoader(list(range(6)), batch_size=2, run_dir=run_dir.name)
        >>> batches = list(loader)
        >>> run = RunFolder(run_dir.name)  # at any time, in any process
        >>> [epoch.audit["delivered"] for epoch in run.epochs()]
        [6]
        >>> run.step(1)[0].indices, run.index(5)[0].batch
        ((2, 3), 2)
        >>> run_dir.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            import pyarrow  # noqa: F401
        except ImportError as exc:
            raise ImportError(f"reading a run needs pyarrow: {INSTALL}") from exc
        try:
            self.info: dict[str, Any] = object_in(self.path / "run.json", RUN)
            self.id = str(self.info["id"])
        except FileNotFoundError:
            raise NotARunFolder(
                f"{self.path} is no folder of a run: there is no run.json in it. Give what "
                "run_dir=, SAFELOADER_RUN or --run were given"
            ) from None
        except NotADirectoryError:
            raise NotARunFolder(f"{self.path} is no folder, but a file") from None
        except (OSError, ValueError) as exc:
            raise NotARunFolder(
                f"{self.path}/run.json was not written by safeloader: {one_line(exc)}"
            ) from exc
        except KeyError:
            raise NotARunFolder(
                f"{self.path}/run.json was not written by safeloader: it names no run"
            ) from None
        self.attempts: list[int] = []
        self.loaders: list[LoaderRecords] = []
        self.refresh()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, {len(self.attempts)} attempts)"

    def refresh(self) -> None:
        """Look for attempts, ranks and loaders that came since."""
        known = {each.path: each for each in self.loaders if each.info}  # else it was not written
        found: list[LoaderRecords] = []
        self.attempts = [number for number, _ in _numbered(self.path, "attempt")]
        for attempt, folder in _numbered(self.path, "attempt"):
            for rank, ranks in _numbered(folder, "rank"):
                its = [
                    known.get(path) or LoaderRecords(path, attempt, rank, 0)
                    for path in _folders(ranks)
                ]
                found += sorted(its, key=lambda each: (each.info.get("began", 0.0), each.path))
        for number, each in enumerate(found):
            each.number = number
        self.loaders = found

    @property
    def ranks(self) -> list[int]:
        """The ranks that wrote anything."""
        return sorted({each.rank for each in self.loaders})

    @property
    def notes(self) -> list[str]:
        """What is torn, dropped or lost, in a sentence each, as far as it was met so far."""
        return [note for each in self.loaders for note in each.notes]

    def _of(self, attempt: int | None, rank: int | None) -> list[LoaderRecords]:
        return [
            each
            for each in self.loaders
            if attempt in (None, each.attempt) and rank in (None, each.rank)
        ]

    # what happened ──────────────────────────────────────────────────────────────────────────────

    def epochs(self, attempt: int | None = None, rank: int | None = None) -> list[RunEpoch]:
        """The epochs of all loaders, in the order of these, each with its audit."""
        return [epoch for each in self._of(attempt, rank) for epoch in epochs_of(each)]

    def failures(self) -> list[dict[str, Any]]:
        """What failed: ``failure`` (see :class:`safeloader.Failure`), ``report`` (its text),
        ``time``, ``path`` (the file), ``attempt``, ``rank``, ``loader``."""
        return [
            found | {"attempt": each.attempt, "rank": each.rank, "loader": each.name}
            for each in self.loaders
            for found in each.failures()
        ]

    def incidents(self) -> list[dict[str, Any]]:
        """Samples left out, replaced or late: ``epoch``, ``batch``, ``position``, ``index``,
        ``what``, ``reason``, ``attempt``, ``rank``, ``loader``."""
        return [
            found | {"attempt": each.attempt, "rank": each.rank, "loader": each.name}
            for each in self.loaders
            for found in each.lines("incidents.jsonl")
        ]

    def dropped(self) -> list[dict[str, Any]]:
        """What went for ``run_max_bytes=``: ``segment``, ``steps``, ``epochs``, ``bytes``, ..."""
        return [
            found | {"attempt": each.attempt, "rank": each.rank, "loader": each.name}
            for each in self.loaders
            for found in each.lines("dropped.jsonl")
        ]

    def sources(self, indices: Iterable[Any] | None = None) -> dict[Any, str]:
        """Where samples come from, by index, as far as that was kept.

        Of samples that failed, were left out or are the slowest; of all with ``run_sources=True``.
        Where loaders of several datasets have one index, the last one is told; see
        :meth:`LoaderRecords.sources_of <safeloader.report.folder.LoaderRecords.sources_of>`.

        Args:
            indices: of which alone; by default of all, which may be millions.
        """
        found: dict[Any, str] = {}
        wanted = None if indices is None else set(indices)
        for each in self.loaders:
            found |= dict(each.sources()) if wanted is None else each.sources_of(wanted)
        return found

    # tables ─────────────────────────────────────────────────────────────────────────────────────

    def tables(
        self,
        columns: Sequence[str] | None = None,
        *,
        where: Any = None,
        attempt: int | None = None,
        rank: int | None = None,
    ) -> Iterator[tuple[LoaderRecords, Any]]:
        """The batches of the run, piece by piece: a loader, and a ``pyarrow.Table`` of its batches.

        A row is a batch: ``step``, ``epoch``, ``batch``, ``worker`` (-1: main), ``pid``,
        ``asked_ns``, ``wait_ns``, ``start_ns``, ``collate_ns``, and the lists ``indices``,
        ``fetch_ns`` and, where indices are no ints, ``index_text``.

        Args:
            columns: which; by default all.
            where: ``pyarrow.compute.field("epoch") == 3``, say: the rows that are wanted.
            attempt: of which alone.
            rank: of which alone.
        """
        for each in self._of(attempt, rank):
            for table in each.pieces(columns, where):
                yield each, table

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        where: Any = None,
        attempt: int | None = None,
        rank: int | None = None,
    ) -> Any:
        """The same as one ``pyarrow.Table``, with columns ``attempt``, ``rank`` and ``loader``.

        ``loader`` is the number in :attr:`loaders`. A run of a billion samples does not fit into
        memory: ask for few columns, or go by :meth:`tables`.
        """
        import pyarrow as pa

        from safeloader.provenance.run_format import schema

        named = [schema().field(name) for name in columns or schema().names]
        parts = [
            placed(each, table)
            for each, table in self.tables(columns, where=where, attempt=attempt, rank=rank)
        ]
        return (
            pa.concat_tables(parts) if parts else pa.schema([*place_fields(), *named]).empty_table()
        )

    def workers(self, attempt: int | None = None, rank: int | None = None) -> Any:
        """What main and the workers used, every few seconds: a ``pyarrow.Table``.

        Columns: ``attempt``, ``rank``, ``loader``, ``time_ns`` (since 1970), ``worker`` (-1: main),
        ``pid``, ``rss_bytes``, ``pss_bytes``, ``uss_bytes`` (-1: not known), and, counted from the
        beginning, ``cpu_ns``, ``busy_ns``, ``wait_ns``, ``batches``, ``samples``.
        """
        import pyarrow as pa

        from safeloader.provenance.worker_log import worker_schema

        parts = [placed(each, each.workers()) for each in self._of(attempt, rank)]
        return (
            pa.concat_tables(parts)
            if parts
            else pa.schema([*place_fields(), *worker_schema()]).empty_table()
        )

    def transport(
        self, attempt: int | None = None, rank: int | None = None
    ) -> list[dict[str, Any]]:
        """How batches crossed from the workers, every few seconds, oldest first in each loader.

        Each has ``attempt``, ``rank``, ``loader`` (its number), ``time`` (s since 1970), ``slots``
        and ``slot_bytes`` mapped then, and, counted from the beginning, ``batches`` by each way
        (see ``loader.transport_stats``) and ``fallbacks``: why some were not in a slot;
        ``shm_used`` and ``shm_bytes`` of ``/dev/shm``, where there is one.
        """
        return [
            line | {"attempt": each.attempt, "rank": each.rank, "loader": each.number}
            for each in self._of(attempt, rank)
            for line in each.lines("transport.jsonl")
        ]

    # questions ──────────────────────────────────────────────────────────────────────────────────

    def step(self, step: int, attempt: int | None = None) -> list[RunBatch]:
        """The batches of a step on all ranks, by attempt and rank.

        Where the program marked its steps (``loader.mark``), these; in an attempt without marks,
        the batch that each loader handed over as its ``step``-th, from 0.
        """
        import pyarrow.compute as pc

        found: list[RunBatch] = []
        marked = {each.attempt for each in self.loaders if each.has_marks}
        for each in self._of(attempt, None):
            if each.attempt not in marked:
                where = pc.field("step") == step
            else:
                where = None
                for epoch, batch in each.marked(step):
                    one = (pc.field("epoch") == epoch) & (pc.field("batch") == batch)
                    where = one if where is None else where | one
                if where is None:
                    continue
            for table in each.pieces(None, where):
                found += batches_of(each, table)
        return self._with_sources(found)

    def _with_sources(self, batches: list[RunBatch]) -> list[RunBatch]:
        """The batches with the sources that their own loaders' datasets have, on any rank."""
        wanted = {index for each in batches for index in each.indices}
        known: dict[str, dict[Any, str]] = {}
        for name in {each.loader for each in batches}:
            known[name] = {}
            for loader in self.loaders:
                if loader.name == name:
                    known[name] |= loader.sources_of(wanted)
        told = ({k: known[each.loader].get(k, "") for k in each.indices} for each in batches)
        return [
            dataclasses.replace(each, sources={k: said for k, said in its.items() if said})
            for each, its in zip(batches, told, strict=True)
        ]

    def sources_by_loader(self, wanted: set[Any]) -> dict[str, dict[Any, str]]:
        """Where samples come from, as far as that was kept, by the loader's name, then by index.

        Loaders of one name share a dataset, on all ranks; those for training and validation do not.
        """
        found: dict[str, dict[Any, str]] = {}
        for each in self.loaders:
            its = found.setdefault(each.name, {})
            its |= each.sources_of(wanted)
        return found

    def index(self, index: int | str) -> list[Sighting]:
        """Where and when an index was delivered, skipped, replaced or failed, by loader and time.

        Args:
            index: an int; a text where the dataset's indices are no ints: of a tuple, say, what
                Python shows of it.
        """
        found: list[Sighting] = []
        for each in self.loaders:
            for form in dict.fromkeys((index, str(index))):  # among texts an int is one too
                found += deliveries_of(each, form)
                found += incidents_of(each, form)
        return found


def _numbered(folder: Path, word: str) -> list[tuple[int, Path]]:
    """The folders ``word=N`` in a folder, by their numbers."""
    found = []
    for path in _folders(folder):
        name, _, number = path.name.partition("=")
        if name == word and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def _folders(path: Path) -> list[Path]:
    """The folders in a folder; no links."""
    try:
        with os.scandir(path) as entries:
            return sorted(Path(each) for each in entries if each.is_dir(follow_symlinks=False))
    except OSError:
        return []
