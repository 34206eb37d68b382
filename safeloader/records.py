"""What a loader knows of its batches: the same for each that is recorded. Runs in: main."""

from __future__ import annotations

from typing import Any

from safeloader.delivery.audit import EpochAudit
from safeloader.errors import SafeLoaderError
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.failures.replay import replay
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.table import BatchRecord, Provenance, record_of
from safeloader.transport.stats import TransportStats


class Records:
    """What is read from a loader's notebook.

    Attributes:
        recorder: the notebook; None before it is wanted.
        dataset: what the loader reads.
    """

    recorder: Recorder | None = None
    dataset: Any

    def _recorder_on_demand(self) -> Recorder:
        if self.recorder is None:
            self.recorder = Recorder()
        return self.recorder

    def replay(self, what: SafeLoaderError | Failure | Any) -> Any:
        """``dataset[index]`` once more, here, under the random numbers it failed with.

        See :func:`safeloader.replay`.
        """
        return replay(what, self.dataset)

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
    def transport_stats(self) -> TransportStats:
        """How the batches crossed from the workers, since the loader was made."""
        return self._recorder_on_demand().transport.stats()
