"""Seeds the generators before each sample, batch and collation. Runs in: worker.

::

    SeededFetcher ── MapFetcher ──► ValidatedItems ──► SeededItems ──► dataset
        begins a batch       collation, seeded first       begins a sample

Only a loader with ``seed=`` has these: without, not a call is between. ``validate=``, ``key=`` and
``on_error`` run after the sample, under whatever stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from safeloader.introspect.random_state import Apart
from safeloader.introspect.seeds import NOW, BatchSeed, Seeder, sample_is, sample_now
from safeloader.transport.messages import Task
from safeloader.worker.context import FetchContext


class SeededItems:
    """``dataset[index]`` of a map-style dataset, seeded first; hot path."""

    def __init__(self, dataset: Any, seeder: Seeder) -> None:
        self._dataset = dataset
        self._begins = seeder.sample

    def __getitem__(self, index: Any) -> Any:
        self._begins(index)
        return self._dataset[index]


class ToldItems:
    """The same with ``seed_per="batch"``: only :func:`sample_rng` is told; hot path."""

    def __init__(self, dataset: Any, seeder: Seeder) -> None:
        self._dataset = dataset
        self._seeder = seeder

    def __getitem__(self, index: Any) -> Any:
        NOW[0] = self._seeder.key, index
        return self._dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        return self._dataset.__getitems__(indices)


def seeded_items(dataset: Any, seeder: Seeder) -> SeededItems | ToldItems:
    """What samples are asked of in the place of ``dataset``."""
    return (SeededItems if seeder.per == "sample" else ToldItems)(dataset, seeder)


class SeededStream(Iterator[Any]):
    """A worker's stream, seeded first; ``index`` tells that of the sample which is asked for."""

    def __init__(self, stream: Iterator[Any], seeder: Seeder, index: Callable[[], Any]) -> None:
        self._stream = stream
        self._begins = seeder.sample
        self._index = index

    def __next__(self) -> Any:
        self._begins(self._index())
        return next(self._stream)


class SeededFetcher:
    """Has each batch made under the seed that its task carries.

    Args:
        make: makes the fetcher; of a stream that asks the dataset for its iterator, so it is called
            at the first task, which tells the epoch, and under a seed too.
        context: where it stands.
    """

    def __init__(self, make: Callable[[], Any], context: FetchContext) -> None:
        assert context.seeder is not None
        self._seeder = context.seeder
        self._worker = context.worker_id or 0
        self._make: Callable[[], Any] | None = make
        self._fetcher: Any = None
        if context.progress is None or context.worker_id is None:
            self._fetcher = make()

    def fetch(self, task: Task) -> Any:
        """The batch, as the fetcher makes it."""
        assert task.seed is not None
        seed, before = BatchSeed(*task.seed), sample_now()
        seeder = self._seeder
        try:
            seeder.begin(seed.seed, seed.epoch)
            if self._fetcher is None:
                seeder.stream(self._worker)
                self._fetcher = self._make() if self._make else None
            seeder.batch(self._fetcher.seeded_by(seed))
            return self._fetcher.fetch(task)
        finally:
            sample_is(before)


class SeededInMain(SeededFetcher):
    """In the main process: its generators stand apart meanwhile, whatever a batch comes to."""

    def __init__(self, make: Callable[[], Any], context: FetchContext) -> None:
        super().__init__(make, context)
        self._apart = Apart()

    def fetch(self, task: Task) -> Any:
        """As :class:`SeededFetcher` has it."""
        kept = self._apart.keep()
        try:
            return super().fetch(task)
        finally:
            self._apart.put_back(kept)


def seeded_in_main(fetcher: Any, context: FetchContext) -> SeededInMain:
    """``fetcher``, in a process whose generators are not the loader's own."""
    return SeededInMain(lambda: fetcher, context)
