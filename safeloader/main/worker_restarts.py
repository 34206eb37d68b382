"""A new pool in the place of one that died (``on_crash="restart"``). Runs in: main."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import bounded
from safeloader.main.drawing import RecordingSampler
from safeloader.main.worker_pool import WorkerPool, blueprint_of
from safeloader.supervision.diagnosis import WorkerLocation

if TYPE_CHECKING:
    from safeloader.loader import SafeDataLoader

MOST_RESTARTS = 10  # in an epoch
_BEFORE_ANY_TASK = ("starting", "init", "open")


class WorkerRestarts:
    """Decides whether to go on after workers died, and does.

    A sample at which a worker dies twice in a row is left out of its batch. The pool that died is
    replaced whole: batches that were finished and not handed over are made again.
    """

    def __init__(self, blueprint: SafeDataLoader[Any]) -> None:
        self._blueprint = blueprint
        self._log = LoaderLog(blueprint.dataset)
        self._restarts = 0
        self._before_any_task = 0
        self._last: set[tuple[int, int | None]] = set()

    @classmethod
    def for_loader(cls, loader: SafeDataLoader[Any]) -> WorkerRestarts | None:
        """One for an epoch of ``loader``; None if it is not to be restarted."""
        if loader.on_crash != "restart" or not loader.num_workers:
            return None
        return cls(blueprint_of(loader))

    def should_restart(
        self, failure: Failure, at: Sequence[WorkerLocation | None], sampler: RecordingSampler
    ) -> bool:
        """Whether to try again; the tasks at which workers died are marked for it."""
        if self._restarts >= MOST_RESTARTS:
            self._log.error(
                "the workers died %d times in this epoch: giving up", self._restarts + 1
            )
            return False
        if all(where is not None and where.position.phase in _BEFORE_ANY_TASK for where in at):
            self._before_any_task += 1
            if self._before_any_task > 1:
                self._log.error("the workers died twice before they were at any batch: giving up")
                return False
        died_at: set[tuple[int, int | None]] = set()
        left_out = []
        for where in at:
            if where is None or where.position.seq is None:
                continue
            at_once = where.position.phase == "fetch at once" and not sampler.batched
            place = (where.position.seq, 0 if at_once else where.position.position)
            died_at.add(place)
            again = place in self._last and place[1] is not None
            left_out.append(sampler.change(place[0], excluded=place[1] if again else None))
        self._last = died_at
        self._restarts += 1
        self._log.warning(
            "%s Restarting the workers (%d of at most %d times in an epoch). %s",
            failure.message,
            self._restarts,
            MOST_RESTARTS,
            bounded(failure.hint.partition("\n")[0], 300),
        )
        for names in filter(None, left_out):
            index = index_text(names if len(names) > 1 else names[0])
            self._log.warning("index %s killed its worker twice and is left out", index)
        return True

    def revive(self, session: WorkerPool) -> None:
        """Start the new pool."""
        session.revive(self._blueprint)
