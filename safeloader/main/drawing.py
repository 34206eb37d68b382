"""Numbers and notes every draw of the index sampler. Runs in: main.

Takes what the user's sampler yields and gives torch a :class:`Task`. Nothing is drawn that torch
did not ask for, and nothing is drawn ahead, so random-number generators move as they do under the
stock loader.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import operator
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from safeloader.delivery.indices import (
    Packed,
    copied,
    pack,
    pack_unbatched,
    restored,
    snapshots,
    unpack,
)
from safeloader.delivery.position import Position
from safeloader.delivery.skip_budget import LONGEST_RUN
from safeloader.failures.failure import Failure, failure_of
from safeloader.failures.loader_log import length_of
from safeloader.global_batches import GlobalBatchSampler
from safeloader.introspect.seeds import EpochSeed
from safeloader.main.beginning import TORCHS_OWN, BatchesOf, Watch, beneath_batches
from safeloader.main.epoch import Epoch
from safeloader.transport.messages import SamplerFault, StateRequest, Task

if TYPE_CHECKING:
    from safeloader.main.drawing_again import DrawnAgain, DrawsAgain


@dataclasses.dataclass(eq=False, repr=False)
class RecordingSampler:
    """Stands where torch expects the index sampler, over the one the user gave.

    ``log``, which is told of the draws, is the running epoch. Batches are numbered on from epoch
    to epoch, so that one left over from an earlier epoch is recognised.

    With ``keep_open`` the tasks that were not answered yet are kept, until :meth:`answered` is told
    that they were: within :meth:`beginning_with_open` a new pool of workers is given them, and then
    what was not drawn yet. With ``in_main`` the samples are fetched in this process, and need not
    be identified again. With ``lends`` each task has with it what was drawn last before it.

    Where a loader keeps its place, ``position`` is told of the draws, and ``watch`` of the
    generators that the sampler begins with; before the first draw come ``requests`` for states.
    With a seed, told by :meth:`begin`, stock samplers draw by it, and each task carries it.
    """

    drawn_from: Any
    _: dataclasses.KW_ONLY
    batched: bool
    stream: bool
    keep_open: bool = False
    in_main: bool = False
    lends: bool = False
    log: Epoch = dataclasses.field(init=False)
    position: Position | None = dataclasses.field(init=False, default=None)
    watch: Watch | None = dataclasses.field(init=False, default=None)
    requests: int = dataclasses.field(init=False, default=0)
    _left: tuple[Iterator[Any], list[Any]] | None = dataclasses.field(init=False, default=None)
    _before: list[int | bytes] = dataclasses.field(init=False, default_factory=list)
    _seed: EpochSeed | None = dataclasses.field(init=False, default=None)
    _seq_of_first: int = dataclasses.field(init=False, default=0)
    # Not `itertools.count`, which from Python 3.14 on can be neither copied nor pickled.
    _numbers: Iterator[int] = dataclasses.field(
        init=False, default_factory=lambda: iter(range(sys.maxsize))
    )
    _open: dict[int, Task] = dataclasses.field(init=False, default_factory=dict)
    _rest: Iterator[Task] = dataclasses.field(init=False, default=iter(()))
    # Open, and rest, while a new pool takes them.
    _resumed: Iterator[Task] | None = dataclasses.field(init=False, default=None)
    # Snapshots that are to stand in for nothing.
    _killers: set[int | bytes] = dataclasses.field(init=False, default_factory=set)

    def begin(self, log: Epoch, seed: EpochSeed | None = None, seq_of_first: int = 0) -> None:
        """An epoch is about to begin, in whose draws the first has the number ``seq_of_first``.

        Where the first batches of the epoch are drawn by nobody (an earlier run had them), it is
        that which the first would have: see :attr:`next_seq`.
        """
        self.log, self._seed, self._seq_of_first = log, seed, seq_of_first

    @property
    def next_seq(self) -> int:
        """The number of the next draw."""
        return sys.maxsize - operator.length_hint(self._numbers)

    def batch_number(self, seq: int) -> int:
        """The position of a draw among those of its epoch, which the seed of a batch goes by."""
        number = None if self.position is None else self.position.batch_of(seq)
        return seq - self._seq_of_first if number is None else number

    def _with_seed(self, seed: EpochSeed, task: Task) -> Task:
        # Not by _replace(), which takes three times as long.
        return Task(*task[:-1], seed.fields_of_batch(self.batch_number(task.seq)))

    def __iter__(self) -> Iterator[Task]:
        # No generators here or in what follows: one that an interrupt goes through is at its end.
        if self._resumed is not None:  # torch asks twice before it draws
            return self._resumed
        tasks = self._begin()
        if self._seed is not None:
            tasks = map(functools.partial(self._with_seed, self._seed), tasks)
        if self.lends and not self.stream:
            self._killers.clear()
            drawn: deque[int | bytes] = deque(reversed(self._before), maxlen=LONGEST_RUN)
            tasks = map(functools.partial(self._with_donors, drawn), tasks)
        if self.keep_open:
            self._open.clear()
            tasks = self._rest = map(self._keep, tasks)
        if self.requests:
            tasks = itertools.chain(map(self._request, range(self.requests)), tasks)
        return tasks

    def _request(self, number: int) -> Task:
        """A task that asks a worker for the state of its dataset; it takes no number of a draw."""
        seed = None if self._seed is None else self._seed.fields_of_batch(0)
        return Task(-1 - number, StateRequest(), seed=seed)

    def _keep(self, task: Task) -> Task:
        self._open[task.seq] = task._replace(index=copied(task.index))
        return task

    def _with_donors(self, drawn: deque[int | bytes], task: Task) -> Task:
        """The task with what was drawn last before it: as much as may fail in a row."""
        if type(task.index) is not SamplerFault:
            try:
                task = self._without_killers(task._replace(donors=tuple(drawn)))
                drawn.extendleft(snapshots(task.index if self.batched else [task.index]))
            except Exception as exc:
                self.log.at_fault("the list of earlier draws", exc)
        return task

    def _without_killers(self, task: Task) -> Task:
        return task._replace(donors=tuple(k for k in task.donors if k not in self._killers))

    def refused(self, task: Task, exc: Exception) -> Task:
        """What to send for a task that cannot be pickled: its failure is told in its place."""
        failure, exc = _taken_apart(exc, "the index drawn cannot be sent to a worker")
        self.log.draw_failed(task.seq, failure, exc)
        return Task(task.seq, SamplerFault())

    def answered(self, seq: int) -> None:
        """What became of draw ``seq`` was handed over or raised."""
        self._open.pop(seq, None)

    def change(self, seq: int, *, excluded: int | None) -> tuple[Any, ...]:
        """Have an open task leave out a position, or be fetched one by one to find it (None).

        Gives the identities of what is left out. It stands in for no other sample either.
        """
        task = self._open.get(seq)
        if task is None:
            return ()
        self._open[seq] = task._replace(one_by_one=True)
        asked = unpack(pack(task.index) if self.batched else pack_unbatched(task.index))
        if excluded is None or excluded >= len(asked) + len(task.donors):
            return ()
        if excluded >= len(asked):
            killer = task.donors[excluded - len(asked)]
            self._killers.add(killer)
            return (restored(killer),)
        self._open[seq] = task._replace(one_by_one=True, excluded=(*task.excluded, excluded))
        at = list(task.index)[excluded] if self.batched else task.index
        self._killers.update(snapshots([at]))
        return asked[excluded : excluded + 1] if self.batched else asked

    @contextlib.contextmanager
    def beginning_with_open(self) -> Iterator[None]:
        """Within, a new pool is given the open tasks in their order, then the rest."""
        # Not when they were found: of two workers that died, the other's position would move.
        self._open.update({seq: self._without_killers(task) for seq, task in self._open.items()})
        self._resumed = itertools.chain(list(self._open.values()), self._rest)
        try:
            yield
        finally:
            self._resumed = None

    def keep_place(self, position: Position, watch: Watch | None, requests: int = 0) -> None:
        """The next epoch tells these of its draws."""
        self.position, self.watch, self._left, self._before = position, watch, None, []
        self.requests = requests

    def draw_again(self, draws: DrawsAgain, begin: dict[str, Any]) -> DrawnAgain:
        """Draw what an earlier run handed over; the next epoch begins with what is left."""
        source, tail = self._source()
        drawn = draws.draw(source, tail, begin)
        self._left, self._before = (drawn.rest, tail), drawn.newest
        return drawn

    def begin_with(self, rest: Iterator[Any]) -> None:
        """The next epoch begins with ``rest`` in the place of what was left."""
        assert self._left is not None
        self._left = rest, self._left[1]

    def _source(self) -> tuple[Any, list[Any]]:
        """The sampler to iterate, and in what it notes what it drew since its last batch."""
        tail: list[Any] = []
        try:
            source = self.drawn_from
            if self._seed is not None:
                source = _ordered(source, self._seed)
            return _noting(source, tail), tail
        except Exception as exc:
            self.log.at_fault("the list of what is dropped", exc)
        return self.drawn_from, tail

    def _begin(self) -> Iterator[Task]:
        if self._left is not None:  # torch asks twice before it draws
            return itertools.chain.from_iterable(self._passes(*self._left))
        source, tail = self._source()
        try:
            inner = iter(source) if self.watch is None else self.watch.iterating(source)
        except Exception as exc:
            # Raised here it would leave torch's iterator half made. It is told with the first draw.
            return self._fault(*_taken_apart(exc))
        return itertools.chain.from_iterable(self._passes(inner, tail))

    def _fault(self, failure: Failure, exc: Exception, lost: Sequence[Any] = ()) -> Iterator[Task]:
        """A draw that failed, in the place of the batch that was not drawn; ``lost`` is of it."""
        seq = next(self._numbers)
        self.log.draw_failed(seq, failure, exc, lost)
        yield Task(seq, SamplerFault())

    def _passes(self, inner: Iterator[Any], tail: list[Any]) -> Iterator[Iterator[Task]]:
        """One pass over the sampler; after an interrupt another one over what it still has."""
        ended: list[bool] = []
        while True:
            yield self._tasks(inner, tail, ended)
            if ended:
                return
            self.log.draw_interrupted(tail)
            tail.clear()

    def _tasks(self, inner: Iterator[Any], tail: list[Any], ended: list[bool]) -> Iterator[Task]:
        """One pass over the sampler; hot path (a generator resumes faster than a method runs)."""
        numbers, log, position = self._numbers, self.log, self.position
        batched, stream, in_main = self.batched, self.stream, self.in_main
        while True:
            fault = None
            try:
                index = next(inner)
            except StopIteration:
                ended.append(True)
                log.draws_ended(tail)
                return
            except Exception as exc:
                # Raised here it would tear down the hand-over of an earlier batch (torch draws
                # ahead while it hands one over). It takes the place of the batch not drawn instead.
                fault = self._fault(*_taken_apart(exc), tuple(tail))
            except BaseException:
                log.draw_interrupted(tail)
                tail.clear()
                raise
            if tail:
                tail.clear()
            if fault is not None:
                # Not in the except clause: a suspended frame there would hold the exception.
                yield from fault
                continue  # a generator is at its end now; other iterators may go on
            seq = next(numbers)
            packed: Packed | None = None
            if batched and type(index) is not list and isinstance(index, Iterator):
                index = list(index)  # reading a one-shot iterator here would use it up
            elif not in_main and isinstance(index, Tensor):
                index = index.clone()  # sent as shared memory: the sampler may fill it again
            try:
                packed = b"" if stream else pack(index) if batched else pack_unbatched(index)
                log.drawn(seq, packed)
                if position is not None:
                    position.drawn(seq, packed)
            except Exception as exc:
                log.at_fault("the ledger", exc)
            yield Task(seq, index, (), False, packed) if in_main else Task(seq, index)

    def __len__(self) -> int:
        return len(self.drawn_from)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "drawn_from" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.drawn_from, name)


SAMPLER_HINT = "list(loader.batch_sampler or loader.sampler) in the main process repeats it"


def proven_length(sampler: Any) -> int | None:
    """How many draws ``sampler`` has; None unless its length is true."""
    return length_of(sampler) if length_is_true(sampler) else None


def length_is_true(sampler: Any) -> bool:
    """Whether it is a sampler or batch sampler of torch's or ours, and no subclass.

    What others announce proves nothing: they may have more.
    """
    return type(sampler) is GlobalBatchSampler or type(beneath_batches(sampler)) in TORCHS_OWN


_SHUFFLING = {RandomSampler, SubsetRandomSampler, WeightedRandomSampler}


def shuffling(sampler: Any) -> Any:
    """The stock sampler that draws at random, alone or in a stock batch sampler; or None."""
    inner = beneath_batches(sampler)
    return inner if type(inner) in _SHUFFLING else None


def _ordered(sampler: Any, seed: EpochSeed) -> Any:
    """A copy of a stock sampler that draws by the seed; any other as it is."""
    inner = shuffling(sampler)
    if inner is None:
        return sampler
    drawing = copy.copy(inner)
    drawing.generator = torch.Generator()
    drawing.generator.manual_seed(seed.order())
    if inner is sampler:
        return drawing
    return BatchesOf(drawing, sampler)


def _noting(sampler: Any, tail: list[Any]) -> Any:
    """The sampler to iterate, which has in ``tail`` what it drew since its last batch.

    Torch's batch sampler keeps to itself what it drew for a batch that does not come about: with
    ``drop_last``, and where its sampler raises. Here it draws from a note-taker instead. Batch
    samplers with an ``__iter__`` of their own are left alone: what they drop they alone know. Ours
    tells it.
    """
    if type(sampler) is GlobalBatchSampler:
        return _TellingWhatItDropped(sampler, tail)
    if (
        not isinstance(sampler, BatchSampler)
        or type(sampler).__iter__ is not BatchSampler.__iter__
        or (sampler.drop_last is not True and type(sampler.sampler) in TORCHS_OWN)
    ):
        return sampler
    return BatchesOf(_noted(sampler.sampler, tail), sampler)


@dataclasses.dataclass(frozen=True)
class _TellingWhatItDropped:
    """Our batch sampler, which at its end puts into ``tail`` what it left out."""

    sampler: GlobalBatchSampler
    tail: list[Any]

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.sampler)
        return itertools.chain(batches, self._at_its_end(self.sampler.dropped()))

    def _at_its_end(self, dropped: list[int]) -> Iterator[Any]:
        self.tail.extend(dropped)
        yield from ()


def _noted(sampler: Iterable[Any], tail: list[Any]) -> Iterator[Any]:
    for index in sampler:
        tail.append(index)
        yield index


def _taken_apart(exc: Exception, found: str = "") -> tuple[Failure, Exception]:
    """The failure, and the exception without its frames.

    These lead into torch's constructor. Kept until the error's turn comes, they would hold the
    iterator's queues beyond its end, and their threads would write to pipes that are closed.
    """
    hint = f"{found}\n{SAMPLER_HINT}" if found else SAMPLER_HINT
    failure = failure_of(exc, phase="sampler", where="", hint=hint)
    return failure, exc.with_traceback(None)
