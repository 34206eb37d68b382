"""What a loader knows of its batches: the same for each that is recorded. Runs in: main."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.audit_part import AuditPart, RankAccounts
from safeloader.delivery.manifest import BatchContents
from safeloader.errors import SafeLoaderError
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.html_text import escaped
from safeloader.introspect.ranks import place
from safeloader.introspect.seeds import SeededAs
from safeloader.introspect.texts import bounded_text, index_text
from safeloader.provenance.metrics import metrics_of
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.summary import summary_of
from safeloader.provenance.table import BatchRecord, Provenance, record_of
from safeloader.transport.stats import TransportStats


def _natural(name: str, value: Any, wanted: str) -> int:
    """An int, 0 or more; one of numpy's too."""
    said = f"{name} must be {wanted}; got {bounded_text(value)}"
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(said)
    number = operator.index(value)
    if number < 0:
        raise ValueError(said)
    return number


class Records:
    """What is read from a loader's notebook.

    Attributes:
        recorder: the notebook; None before it is wanted.
        dataset: what the loader reads.
    """

    recorder: Recorder | None = None
    dataset: Any

    def __repr__(self) -> str:
        """Dataset, batch size, workers, and which keywords of ours are not as by default."""
        with guarded("the description of a loader", lambda: LoaderLog(None)):
            from safeloader.showing import in_words  # here, as below: few programs ask

            return in_words(self._described(), self)
        return object.__repr__(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the same, with how the newest epoch goes."""
        with guarded("the description of a loader", lambda: LoaderLog(None)):
            from safeloader.showing import in_html

            return in_html(self._described(), self, self.recorder or Recorder())
        return escaped(repr(self))

    def _described(self) -> Any:
        """The loader that is told of."""
        return self

    def _recorder_on_demand(self) -> Recorder:
        if self.recorder is None:
            self.recorder = Recorder()
        return self.recorder

    def replay(
        self,
        what: SafeLoaderError | Failure | BatchRecord | Any,
        *,
        position: int | None = None,
        epoch: int | None = None,
    ) -> Any:
        """``dataset[index]`` once more, here: of a failure under the random numbers it failed with.

        See :func:`safeloader.replay`. A delivered sample is called by its place. Of a loader with
        ``seed=`` it has the random numbers that it had, and is the same, bit for bit, if the
        dataset draws from them alone; else the log says which epoch, batch and worker gave it, and
        that the random numbers it had are not kept.

        Args:
            what: an error, its failure, the file of one (a ``pathlib.Path``), an index, or the
                record of a batch.
            position: with a record, which of its samples, from 0.
            epoch: with an index, the epoch in which it was delivered.

        Returns:
            The sample, if it comes this time.

        Raises:
            LookupError: if no such delivery is known, or it is forgotten by now.
            TypeError: for an iterable dataset; for a record without position, or what does not go
                with the other.
            ValueError: for a failure that names no index.

        Example:
            >>> import logging
            >>> from safeloader import SafeDataLoader
            >>> logging.getLogger("safeloader").setLevel(logging.ERROR)  # what it tells
            >>> loader = SafeDataLoader("abcdef", batch_size=3, shuffle=False)
            >>> batches = list(loader)
            >>> loader.replay(loader.last_batch, position=1), loader.replay(2, epoch=0)
            ('e', 'c')
            >>> logging.getLogger("safeloader").setLevel(logging.NOTSET)
        """
        if isinstance(what, BatchRecord):
            if position is None or epoch is not None:
                raise TypeError(
                    "of a record say which sample: loader.replay(record, position=0), from 0 to "
                    f"{len(what.indices) - 1}; it knows its epoch"
                )
            if not 0 <= position < len(what.indices):
                raise LookupError(
                    f"batch {what.batch} of epoch {what.epoch} has the positions 0 to "
                    f"{len(what.indices) - 1}, and no {position}"
                )
            return self._replay_delivered(what, position)
        if position is not None:
            raise TypeError("position= goes with the record of a batch, as loader.last_batch is")
        if epoch is None:
            from safeloader.failures.replay import replay

            return replay(what, self.dataset)
        row = self._delivered_in(what, epoch)
        return self._replay_delivered(self.provenance.batch(int(row[0]), epoch), int(row[1]))

    def _delivered_in(self, index: Any, epoch: int) -> tuple[int, int]:
        """The batch and position in which an epoch gave ``index``."""
        if isinstance(index, SafeLoaderError | Failure):
            raise TypeError("epoch= goes with an index; a failure knows its own epoch")
        rows = self.provenance.lookup(index)
        for row in rows[rows["epoch"] == epoch][:1]:
            return int(row["batch"]), int(row["position"])
        known = sorted({int(each) for each in rows["epoch"]})
        others = f"it was in epoch {', '.join(map(str, known))}; " if known else ""
        raise LookupError(
            f"index {index_text(index)} is not known to have been delivered in epoch {epoch}: "
            f"{others}the recorder holds {self._recorder_on_demand()!r}. Epochs count from 0 in "
            "each process, after a resume too; to keep more, pass recorder=Recorder(max_bytes=...)"
        )

    def _replay_delivered(self, record: BatchRecord, position: int) -> Any:
        from safeloader.failures.replay import replay, replay_index

        if isinstance(self.dataset, IterableDataset):
            return replay(None, self.dataset)  # which tells what to do instead
        seeded = self._seeded_again(record, position)
        if seeded is not None:
            return seeded()
        by = "in the main process" if record.worker_id is None else f"by worker {record.worker_id}"
        told = (
            f"delivered in epoch {record.epoch}, batch {record.batch}, position {position} {by} "
            f"(pid {record.pid})"
        )
        return replay_index(record.indices[position], self.dataset, told)

    def _seeded_again(self, record: BatchRecord, position: int) -> Callable[[], Any] | None:
        """What makes a delivered sample under the seed it had; None where that is not known."""
        from safeloader.failures.replay import seeded_again, seeded_at_once

        recorder = self._recorder_on_demand()
        facts, found = recorder.facts.of(record.epoch), recorder.find(record.batch, record.epoch)
        if facts is None or facts.seed is None or found is None:
            return None
        manifest, seed = found.manifest, facts.seed
        seeded = SeededAs(seed.of_batch(manifest.seq - facts.seq_of_first), seed.per)
        contents = BatchContents.of(manifest)
        at, asked = contents.positions[position], record.indices[position]
        if manifest.fetched_at_once and at < len(contents.expected):
            if seed.per == "batch" and getattr(self.dataset, "__getitems__", None):
                return partial(seeded_at_once, self.dataset, contents.expected, at, seeded)
            if len(contents.expected) > 1:  # drawn as one list, with ``batch_size=None``
                return None
        return partial(seeded_again, self.dataset, contents.expected[:at], asked, seeded)

    @property
    def last_batch(self) -> BatchRecord | Any:
        """The record of the batch handed over last; None before the first.

        (For type checkers ``| Any`` and not ``| None``: in the loop there is always one.)
        """
        delivery = None if self.recorder is None else self.recorder.last_delivery()
        return None if delivery is None else record_of(delivery)

    @property
    def provenance(self) -> Provenance:
        """The table of the samples delivered."""
        return Provenance(self._recorder_on_demand())

    @property
    def audit(self) -> EpochAudit | Any:
        """Drawn against delivered, of the running or last epoch; None before the first."""
        if self.recorder is None:
            return None
        with guarded("the way to the audit", lambda: LoaderLog(self.dataset)):
            return self.recorder.audit()
        return EpochAudit(self.recorder.epochs - 1).not_checked(0, "the way to the audit")

    @property
    def audits(self) -> list[EpochAudit]:
        """The audits of the newest 256 epochs, oldest first; of a running one as it stands.

        Those of earlier epochs list the first 1000 indices of each class. Their counts are exact.

        Example:
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
            >>> for epoch in range(3):
            ...     for batch in loader:
            ...         pass
            >>> [(audit.epoch, audit.delivered, audit.ok) for audit in loader.audits]
            [(0, 10, True), (1, 10, True), (2, 10, True)]
        """
        if self.recorder is None:
            return []
        with guarded("the earlier audits", lambda: LoaderLog(self.dataset)):
            return self.recorder.audits()
        return []

    def audit_part(self) -> AuditPart:
        """What this rank handed over in the running or last epoch, to be held against other ranks'.

        About 4 kB, however long the epoch was, which any way to another process takes. Nothing is
        asked of other ranks here. It is made from the map of the indices that were drawn: a few
        milliseconds for a million, 0.3 s for 250 million; of a stream with ``key=`` from its keys,
        a microsecond each.

        A rank that knows nothing (no epoch was begun, nothing is recorded) says so in it.

        Example:
            >>> from safeloader import SafeDataLoader, merge_audits
            >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
            >>> batches = list(loader)
            >>> merge_audits([loader.audit_part()])
            RunAudit(ok=True, world=1, delivered=10)
        """
        return self._for_other_ranks().part

    def _for_other_ranks(self) -> RankAccounts:
        """The part, and the way to the indices behind it; never raises."""
        recorder, at = self.recorder, place()
        nothing = partial(AuditPart.nothing, at.rank or 0, at.world_size)
        accounts = None if recorder is None else recorder.history.newest(recorder.epochs - 1)
        if recorder is None or accounts is None:
            why = "no epoch was begun, or nothing is recorded (SAFELOADER=off)"
            return RankAccounts(nothing(why), lambda beneath: None)
        with guarded("the part for other ranks", lambda: LoaderLog(self.dataset)):
            loader = self._drawing_loader()
            sampler = getattr(loader, "batch_sampler", None)
            if sampler is None:
                sampler = getattr(loader, "sampler", None)
            return accounts.to_other_ranks(recorder.epochs - 1, self.dataset, sampler)
        why = "a fault of safeloader's own, which the log tells"
        return RankAccounts(nothing(why), lambda beneath: None)

    def _drawing_loader(self) -> Any:
        """The loader whose records these are."""
        return self

    def metrics(self, last: int | None = None) -> dict[str, float]:
        """How the loading goes, in numbers for any logger: of the epoch begun last.

        =====================  =======  ==========================================================
        name                   unit
        =====================  =======  ==========================================================
        ``epoch``                       its number, from 0
        ``batches``                     handed over
        ``samples``                     handed over
        ``wait_share``         0 to 1   of the time from asking for the first batch (with ``last``:
                                        from getting the one before these) to getting the last one,
                                        how much the training loop waited
        ``samples_per_s``      1/s      handed over in that time
        ``fetch_p50_ms``       ms       half of the samples took at most that long to fetch
        ``fetch_p95_ms``       ms       19 of 20 samples took at most that long to fetch
        ``skipped``                     samples left out because of an error, in the whole epoch
        ``replaced``                    samples that another stands in for, in the whole epoch
        ``worker_memory_mib``  MiB      held by all workers, as each last told, once a second;
                                        pages that are shared count by their share
        =====================  =======  ==========================================================

        What is not known is left out: times before the first batch, memory in the first second and
        without workers. Batches that the recorder has forgotten are not in it.

        Args:
            last: look at this many of the newest batches only; by default at all of the epoch. A
                batch takes some 5 us to look at.

        Example:
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
            >>> batches = list(loader)
            >>> metrics = loader.metrics()
            >>> metrics["batches"], metrics["samples"], metrics["skipped"]
            (3.0, 10.0, 0.0)
            >>> 0 < metrics["wait_share"] <= 1
            True
        """
        return metrics_of(self._recorder_on_demand(), last)

    def summary(self) -> str:
        """The run so far in one line: samples, waiting, skips, the slowest samples, memory.

        Of all epochs, as far as the recorder still holds them: counts of epochs, samples, batches
        and skips are whole, times are of what is held. A program that logs at level INFO has this
        line of each loader at its end.

        Example:
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
            >>> for epoch in range(3):
            ...     for batch in loader:
            ...         pass
            >>> print(loader.summary())  # doctest: +ELLIPSIS
            3 epochs, 30 samples in 9 batches (... a second); waited for data ...% of the time; ...
        """
        recorder = self._recorder_on_demand()
        return summary_of([*recorder.held.values()], recorder.totals, recorder.facts, self.audits)

    def mark(self, step: int, batch: BatchRecord | int | None = None) -> None:
        """Note in the run's folder which batch an optimizer's step is made of.

        ``python -m safeloader step RUN 41337`` then names the samples of that step. A step may be
        made of several batches: mark each. Where nothing is marked, a step is a batch handed over.
        Without ``run_dir=`` or ``SAFELOADER_RUN`` nothing is noted.

        Args:
            step: the optimizer's count, 0 or more.
            batch: the record of the batch, or its number in the newest epoch; by default the batch
                handed over last. A framework that runs a batch ahead gives the one it trains on.

        Raises:
            TypeError: for a step or batch of another kind.
            ValueError: for a negative one.
            LookupError: if no batch was handed over yet.

        Example:
            >>> import tempfile
            >>> from safeloader import SafeDataLoader
            >>> run = tempfile.TemporaryDirectory()
            >>> loader = SafeDataLoader(list(range(6)), batch_size=2, run_dir=run.name)
            >>> for step, batch in enumerate(loader, start=100):
            ...     loader.mark(step)
            >>> run.cleanup()
        """
        if not isinstance(batch, BatchRecord | None):
            batch = _natural("batch", batch, "a BatchRecord, an int, 0 or more, or None")
        step = _natural("step", step, "an int, 0 or more: the optimizer's count")
        recorder = self._recorder_on_demand()
        epoch = recorder.epochs - 1
        if batch is None:
            delivery = recorder.last_delivery()
            if delivery is None:
                raise LookupError(f"step {step} is made of no batch: none was handed over yet")
            epoch, number = delivery.epoch, delivery.batch
        elif isinstance(batch, BatchRecord):
            epoch, number = batch.epoch, batch.batch
        else:
            number = batch
        if recorder.run is not None:
            recorder.run.mark(step, epoch, number)

    @property
    def transport_stats(self) -> TransportStats:
        """How the batches crossed from the workers, since the loader was made."""
        return self._recorder_on_demand().transport.stats()
