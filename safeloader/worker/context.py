"""Who fetches, what for, and how it is noted and sent. Runs in: worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from safeloader.introspect.seeds import Seeder
from safeloader.introspect.suspects import Inherited
from safeloader.supervision import flight_recorder
from safeloader.transport.packing import Packer
from safeloader.transport.stream_progress import StreamProgress
from safeloader.worker.dataset_states import StatesPlan
from safeloader.worker.policy import Policy


def private_row() -> memoryview:
    """Cells for a fetcher without a flight recorder: nobody else reads them."""
    return memoryview(bytearray(8 * flight_recorder.ROW)).cast("q")


@dataclasses.dataclass(frozen=True)
class FetchContext:
    """Where a fetcher stands; main begins it, and each worker completes its own.

    Attributes:
        worker_id: None in the main process, where batches are not pickled.
        progress: where streams note how far they are.
        key: the user's, which gives samples an identity.
        checks: what each sample is to pass.
        seeder: what seeds the generators, with ``seed=``.
        start_state: the dataset as it was when the worker started; None where it is to look itself.
        policy: what to do about samples that fail.
        cells: this worker's row of the flight recorder, if there is one.
        checksum: whether the leaves of each batch are fingerprinted before it is sent.
        packer: what pickles the batches, in a worker.
        raised: in the main process, where the exception of a failed batch is left for the iterator.
            The batch must not carry it: frames that its traceback leads back to hold the batch.
        length: the dataset's as main knew it when the epoch began; None if it has none.
        inherited: what was warned of as the workers were forked.
        states: of a loader that keeps its place, how those of its dataset are kept.
        apart: whether each sample is to be timed for itself, for a trace of samples.
    """

    worker_id: int | None = None
    progress: StreamProgress | None = None
    key: Callable[[Any], Any] | None = None
    checks: tuple[Callable[[Any, Any], object], ...] = ()
    seeder: Seeder | None = None
    start_state: dict[str, Any] | None = None
    policy: Policy = dataclasses.field(default_factory=Policy)
    cells: memoryview | None = None
    checksum: bool = False
    packer: Packer = dataclasses.field(default_factory=Packer)
    raised: list[BaseException] | None = None
    length: int | None = None
    inherited: tuple[Inherited, ...] = ()
    states: StatesPlan | None = None
    apart: bool = False
