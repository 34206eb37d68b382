"""What a process that makes samples noticed about itself. Runs in: both.

A worker leaves its report in the flight recorder: after its first batches, then each time it has
made twice as many, and when an epoch is at its end. Main compares the reports of all workers
(:mod:`~safeloader.supervision.wrong_data`). Without workers main makes one of its own.

Everything in it is plain and bounded: it is pickled into 64 KiB of shared memory
(:mod:`~safeloader.supervision.report_room`).
"""

from __future__ import annotations

from typing import NamedTuple

from safeloader.introspect.copy_state import CopyState
from safeloader.introspect.generator_kinds import Standing

STREAM_SAMPLES = 8  # of a worker's stream that are compared with another worker's


class FirstDraws(NamedTuple):
    """Where a random generator stood at the first two samples of an epoch.

    ``before`` is None of a generator that the first sample made. ``second`` is where it stood
    before the second sample; None where there was none, or both were fetched at once.
    """

    before: Standing | None
    after: Standing
    second: Standing | None = None
    after_second: Standing | None = None


class Opening(NamedTuple):
    """The first samples that a process made in an epoch.

    Attributes:
        epoch: as this process counts, from 0; that of a fresh worker is always 0.
        indices: of the first two samples, as text.
        draws: by the name of the generator, where it stood.
    """

    epoch: int
    indices: tuple[str, ...]
    draws: dict[str, FirstDraws]


class InPlace(NamedTuple):
    """An element of the dataset that fetching it changed.

    Attributes:
        asked_as: the index of the sample, as text.
        path: of the element, as ``dataset.items[0]``.
        was, now: the first number of what changed, or a word for it.
    """

    asked_as: str
    path: str
    was: str
    now: str


class SharedFile(NamedTuple):
    """A file whose read position was inherited, and moved.

    Attributes:
        path: of the file.
        holder: the path of the attribute that holds it; empty if none was found.
        mine: batches in which this process moved it.
        others: times it had moved between two batches of this process.
    """

    path: str
    holder: str
    mine: int
    others: int


class SelfReport(NamedTuple):
    """What one process noticed.

    Attributes:
        pid: of the process.
        epochs: how many it has begun.
        batches: how many it has made, in all epochs.
        start: its copy of the dataset as it came, before ``worker_init_fn``.
        now: the same copy as it is now.
        openings: of its epochs, the first two and the newest.
        stream: digests of the first samples of its stream; None of a sample of an unknown kind.
        in_place: elements that fetching changed.
        filled: by the path of a list, of how many elements that were empty, and how many are not
            empty any more; of those looked at.
        files: read positions that moved.
        memory: after so many batches, anonymous and private bytes; the second None where unknown.
        left_out: how many attributes are in neither copy, as there was no room for them.
        stream_ended: whether there were no more samples of the stream than those.
        unsteady: paths of orders that one sample, not the first, put in another order.
        set_up_lengths: what ``worker_init_fn`` made longer, shorter or anew, and how long.
        set_up_orders: paths of orders that it changed or made.
        seeds: by the name of a generator, the seeds (as of :class:`Standing`) by which it stood
            as this process reported.
    """

    pid: int
    epochs: int
    batches: int
    start: CopyState
    now: CopyState
    openings: tuple[Opening, ...] = ()
    stream: tuple[int | None, ...] = ()
    in_place: tuple[InPlace, ...] = ()
    filled: tuple[tuple[str, int, int], ...] = ()
    files: tuple[SharedFile, ...] = ()
    memory: tuple[tuple[int, int, int | None], ...] = ()
    left_out: int = 0
    stream_ended: bool = False
    unsteady: tuple[str, ...] = ()
    set_up_lengths: dict[str, int] = {}  # noqa: RUF012  # never written to
    set_up_orders: tuple[str, ...] = ()
    seeds: dict[str, tuple[int, ...]] = {}  # noqa: RUF012  # never changed

    @property
    def lengths_at_work(self) -> dict[str, int]:
        """How much each container held as the work began."""
        return self.start.lengths | self.set_up_lengths
