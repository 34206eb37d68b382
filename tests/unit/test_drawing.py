"""Every draw is numbered and noted, none is made ahead, and the user's sampler is left as it is."""

from __future__ import annotations

import copy
import itertools
import pickle
import tracemalloc
from asyncio import CancelledError
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from safeloader import Failure
from safeloader.delivery.indices import Packed, pack, restored, unpack
from safeloader.introspect.seeds import EpochSeed
from safeloader.main.drawing import RecordingSampler, proven_length
from safeloader.transport.messages import SamplerFault, Task


class Log:
    """Told of the draws."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, tuple[Any, ...]]] = []
        self.failures: list[tuple[int, Exception]] = []
        self.told: list[Failure] = []
        self.dropped: list[tuple[Any, ...]] = []
        self.lost: list[tuple[Any, ...]] = []

    def drawn(self, seq: int, indices: Packed) -> None:
        self.draws.append((seq, unpack(indices)))

    def draw_failed(
        self, seq: int, failure: Failure, exc: Exception, lost: Sequence[Any] = ()
    ) -> None:
        assert failure.phase == "sampler"
        if lost:
            self.draws.append((seq, tuple(lost)))
        self.failures.append((seq, exc))
        self.told.append(failure)

    def draw_interrupted(self, lost: Sequence[Any]) -> None:
        self.lost.append(tuple(lost))

    def draws_ended(self, dropped: Sequence[Any]) -> None:
        self.dropped.append(tuple(dropped))

    def at_fault(self, part: str, exc: Exception) -> None:
        raise exc

    def opened(self, seq: int) -> None:
        return None


class FaultLog(Log):
    """Goes on after a fault of the package's own, as an epoch does."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[tuple[str, Exception]] = []

    def at_fault(self, part: str, exc: Exception) -> None:
        self.faults.append((part, exc))


def recording(
    sampler: Any, *, batched: bool = True, stream: bool = False, **options: bool
) -> tuple[RecordingSampler, Log]:
    made = RecordingSampler(sampler, batched=batched, stream=stream, **options)
    log = Log()
    made.log = log
    return made, log


def drawn(sampler: Any, **options: bool) -> tuple[list[Task], Log]:
    made, log = recording(sampler, **options)
    return list(made), log


REPEATS_IT = "list(loader.batch_sampler or loader.sampler) in the main process repeats it"


class Counting:
    """Says how far it was asked."""

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.asked = 0

    def __iter__(self) -> Iterator[int]:
        for index in range(self.length):
            self.asked += 1
            yield index

    def __len__(self) -> int:
        return self.length


# ── what torch gets, and what is noted ───────────────────────────────────────────────────────────


def test_draws_are_numbered_noted_and_handed_on_untouched() -> None:
    batches = [[3, 1], (2, 0), torch.tensor([4, 5]), np.array([6]), range(7, 9), ["a"]]
    sampler, log = recording(batches)
    tasks = list(sampler)
    assert [task.seq for task in tasks] == [0, 1, 2, 3, 4, 5]
    sent = tasks.pop(2).index  # a tensor is sent as shared memory, so a copy is sent
    drawn = batches.pop(2)
    assert sent is not drawn
    assert torch.equal(sent, drawn)
    assert all(task.index is batch for task, batch in zip(tasks, batches, strict=True))
    assert log.draws == [
        (0, (3, 1)),
        (1, (2, 0)),
        (2, (4, 5)),
        (3, (6,)),
        (4, (7, 8)),
        (5, ("a",)),
    ]
    assert log.dropped == [()]


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    source = Counting()
    sampler, log = recording(BatchSampler(source, 3, drop_last=False))
    tasks = iter(sampler)
    assert (source.asked, log.draws) == (0, [])
    for number in (1, 2, 3):
        next(tasks)
        assert source.asked == 3 * number
        assert len(log.draws) == number


def test_drop_last_draws_nothing_ahead_either() -> None:
    source = Counting(8)
    sampler, log = recording(BatchSampler(source, 3, drop_last=True))
    tasks = iter(sampler)
    next(tasks)
    assert source.asked == 3
    next(tasks)
    assert (source.asked, log.dropped) == (6, [])
    assert next(tasks, None) is None
    assert (source.asked, log.dropped) == (8, [(6, 7)])


def test_random_generators_move_as_they_do_without_the_recording() -> None:
    def drawn(record: bool, drop_last: bool) -> Any:
        torch.manual_seed(5)
        sampler: Any = BatchSampler(RandomSampler(range(10)), 4, drop_last=drop_last)
        if record:
            sampler, _ = recording(sampler)
        batches = [item.index if record else item for item in sampler]
        return batches, torch.rand(1).item()

    for drop_last in (False, True):
        assert drawn(True, drop_last) == drawn(False, drop_last)


def test_numbers_go_on_from_epoch_to_epoch() -> None:
    sampler, first = recording([[0], [1]])
    assert [task.seq for task in sampler] == [0, 1]
    second = Log()
    sampler.log = second
    assert [task.seq for task in sampler] == [2, 3]
    assert [seq for seq, _ in first.draws] == [0, 1]
    assert [seq for seq, _ in second.draws] == [2, 3]


def test_an_iterator_keeps_the_log_of_its_own_epoch() -> None:
    sampler, first = recording([[0], [1]])
    tasks = iter(sampler)
    next(tasks)
    sampler.log = Log()
    next(tasks)
    assert [seq for seq, _ in first.draws] == [0, 1]


def test_batches_that_are_iterators_arrive_whole() -> None:
    sampler, log = recording([iter([1, 2]), (n for n in (3, 4)), map(int, "56")])
    assert [list(task.index) for task in sampler] == [[1, 2], [3, 4], [5, 6]]
    assert log.draws == [(0, (1, 2)), (1, (3, 4)), (2, (5, 6))]


def test_without_batching_each_draw_is_one_index_or_a_list_of_them() -> None:
    sampler, log = recording([3, (1, 2), [4, 5], "ab"], batched=False)
    assert [task.index for task in sampler] == [3, (1, 2), [4, 5], "ab"]
    assert log.draws == [(0, (3,)), (1, ((1, 2),)), (2, (4, 5)), (3, ("ab",))]


def test_the_draws_of_a_stream_carry_no_indices() -> None:
    sampler, log = recording(itertools.repeat([None, None], 2), stream=True)
    assert [task.index for task in sampler] == [[None, None], [None, None]]
    assert log.draws == [(0, ()), (1, ())]


def test_only_in_the_main_process_a_draw_carries_its_identities() -> None:
    for in_main in (True, False):
        (one, other), _ = drawn([[3, 1], ["a"]], in_main=in_main)
        assert one == Task(0, [3, 1], packed=pack([3, 1]) if in_main else None)
        assert other == Task(1, ["a"], packed=("a",) if in_main else None)


@pytest.mark.parametrize("in_main", [True, False])
@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("_noting", "the list of what is dropped"),
        ("pack", "the ledger"),
        ("snapshots", "the list of earlier draws"),
    ],
)
def test_a_fault_of_our_own_is_told_with_its_part_and_every_draw_is_made(
    broken: str, part: str, in_main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("of our own")

    def fails(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(f"safeloader.main.drawing.{broken}", fails)
    made, _ = recording([[0], [1]], lends=True, in_main=in_main)
    log = made.log = FaultLog()  # type: ignore[assignment]
    tasks = list(made)
    assert [(task.seq, task.index) for task in tasks] == [(0, [0]), (1, [1])]
    assert set(log.faults) == {(part, fault)}
    if broken == "pack":
        assert [task.packed for task in tasks] == [None, None]


# ── length and attributes ────────────────────────────────────────────────────────────────────────


def test_length_is_the_samplers() -> None:
    assert len(recording(BatchSampler(range(10), 3, drop_last=True))[0]) == 3
    with pytest.raises(TypeError):
        len(recording(n for n in [[0]])[0])


def test_attributes_of_the_sampler_answer() -> None:
    inner = BatchSampler(range(10), 3, drop_last=True)
    sampler, _ = recording(inner)
    assert sampler.batch_size == 3
    assert sampler.drop_last is True
    assert not hasattr(sampler, "no_such_thing")


def test_it_can_be_copied_and_pickled_like_its_sampler() -> None:
    sampler = RecordingSampler([[0], [1]], batched=True, stream=False)
    for again in (copy.copy(sampler), copy.deepcopy(sampler)):
        again.log = Log()
        assert [task.index for task in again] == [[0], [1]]
    assert len(pickle.loads(pickle.dumps(sampler))) == 2


class OneOfAKind:
    """A sampler that is its own copy."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1]])

    def __deepcopy__(self, memo: dict[int, Any]) -> OneOfAKind:
        return self


def test_a_copy_goes_on_recording_however_its_sampler_is_copied() -> None:
    made, _ = recording(OneOfAKind())
    del made.log
    again = copy.deepcopy(made)
    assert type(again) is RecordingSampler
    assert again is not made


def test_while_it_is_being_made_it_has_no_attributes_of_a_sampler() -> None:
    with pytest.raises(AttributeError, match="batch_size"):
        RecordingSampler.__new__(RecordingSampler).batch_size


# ── what drop_last drops ─────────────────────────────────────────────────────────────────────────


class Derived(BatchSampler):
    """Overrides everything but ``__iter__``."""

    def __init__(self, sampler: Any, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=True)
        self.epoch = 4

    def __len__(self) -> int:
        return 99


class OwnIter(BatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        yield [7, 7]
        yield from super().__iter__()


class Uncopyable(BatchSampler):
    def __copy__(self) -> Any:
        raise TypeError("one of a kind")


class FrozenSampler(BatchSampler):
    """Its sampler is a property without a setter once it is made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "drop_last" in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)


MAKES: list[Any] = [
    Derived,
    lambda s, n: BatchSampler(s, n, drop_last=True),
    lambda s, n: Uncopyable(s, n, drop_last=True),
    lambda s, n: FrozenSampler(s, n, drop_last=True),
]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(("length", "dropped"), [(7, (6,)), (8, (6, 7)), (9, ()), (2, (0, 1))])
def test_the_tail_of_drop_last_is_told(make: Any, length: int, dropped: tuple[int, ...]) -> None:
    sampler, log = recording(make(SequentialSampler(range(length)), 3))
    batches = [task.index for task in sampler]
    assert batches == [[k, k + 1, k + 2] for k in range(0, length - 2, 3)]
    assert log.dropped == [dropped]


def test_without_drop_last_there_is_no_tail() -> None:
    sampler, log = recording(BatchSampler(range(7), 3, drop_last=False))
    assert [task.index for task in sampler][-1] == [6]
    assert log.dropped == [()]


def test_batch_samplers_that_go_their_own_way_are_left_alone() -> None:
    sampler, log = recording(OwnIter(range(5), 2, True))
    assert [task.index for task in sampler] == list(OwnIter(range(5), 2, True))
    assert log.dropped == [()]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("inner", [range(9), SequentialSampler(range(9)), RandomSampler(range(9))])
def test_batches_change_their_size_where_the_loop_asks_for_another(
    inner: Any, drop_last: bool, seeded: bool
) -> None:
    batches = BatchSampler(inner, 2, drop_last)
    sampler, log = recording(batches)
    sampler.begin(log, EpochSeed(1, 0) if seeded else None)
    drawn = [list(_growing(batches, given)) for given in (batches, (t.index for t in sampler))]
    assert drawn[1] == drawn[0]
    assert drop_last or drawn[0] == [2, 3, 3, 1]


def _growing(batches: BatchSampler, given: Iterable[Any]) -> Iterator[int]:
    batches.batch_size = 2
    for batch in given:
        yield len(batch)
        batches.batch_size = 3


def test_the_users_sampler_is_not_changed() -> None:
    source = Counting(7)
    inner = Derived(source, 3)
    before = dict(vars(inner))
    sampler, _ = recording(inner)
    for _ in range(2):
        list(sampler)
    assert vars(inner) == before
    assert inner.sampler is source
    assert source.asked == 14
    assert list(inner) == [[0, 1, 2], [3, 4, 5]]


def test_state_that_the_sampler_changes_is_seen_in_the_next_epoch() -> None:
    inner = Derived(SequentialSampler(range(4)), 3)
    sampler, log = recording(inner)
    list(sampler)
    inner.sampler = SequentialSampler(range(5))
    list(sampler)
    assert log.dropped == [(3,), (3, 4)]


# ── samplers that raise ──────────────────────────────────────────────────────────────────────────


def test_a_sampler_that_raises_is_told_in_the_place_of_its_batch_and_then_ends() -> None:
    fault = KeyError("no such stratum")

    def batches() -> Iterator[list[int]]:
        yield [0]
        raise fault

    sampler, log = recording(batches())
    tasks = list(sampler)
    assert [task.seq for task in tasks] == [0, 1]
    assert type(tasks[1].index) is SamplerFault
    assert log.failures == [(1, fault)]
    assert log.draws == [(0, (0,))]
    assert log.dropped == [()]  # the sampler is at its end, and dropped nothing


def test_the_failure_of_a_sampler_says_how_to_repeat_it() -> None:
    def batches() -> Iterator[list[int]]:
        raise KeyError("no such stratum")
        yield []

    sampler, log = recording(batches())
    list(sampler)
    (failure,) = log.told
    assert failure.hint == REPEATS_IT
    assert "Caught" not in str(failure)  # as torch words what comes from a worker


def test_a_draw_that_cannot_be_sent_fails_in_the_place_of_its_batch() -> None:
    sampler, log = recording([[0], [1]])
    *_, task = sampler
    try:
        raise TypeError("cannot be pickled")
    except TypeError as exc:
        fault = exc
    assert sampler.refused(task, fault) == Task(1, SamplerFault())
    assert log.failures == [(1, fault)]
    assert fault.__traceback__ is None  # its frames would hold queues of torch's beyond their end
    (failure,) = log.told
    assert (failure.exception_type, failure.message) == ("TypeError", "cannot be pickled")
    assert failure.hint == f"the index drawn cannot be sent to a worker\n{REPEATS_IT}"


def test_a_sampler_that_cannot_even_start() -> None:
    class Unstartable:
        def __iter__(self) -> Iterator[Any]:
            raise KeyError("no strata at all")

    sampler, log = recording(Unstartable())
    (task,) = sampler
    assert type(task.index) is SamplerFault
    ((seq, exc),) = log.failures
    assert (seq, exc.args) == (0, ("no strata at all",))


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_no_fault_of_the_sampler(fatal: type[BaseException]) -> None:
    def batches() -> Iterator[list[int]]:
        raise fatal
        yield []

    sampler, log = recording(batches())
    with pytest.raises(fatal):
        next(iter(sampler))
    assert log.failures == []


def test_a_fault_while_the_next_batch_is_gathered_leaves_earlier_ones_whole() -> None:
    class Breaks:
        def __iter__(self) -> Iterator[int]:
            yield from (0, 1, 2)
            raise ValueError("broken")

        def __len__(self) -> int:
            return 6

    for drop_last in (True, False):
        inner: Any = BatchSampler(Breaks(), 2, drop_last)  # type: ignore[arg-type]
        sampler, log = recording(inner)
        assert [task.index for task in sampler] == [[0, 1], SamplerFault()]
        # What was drawn for the batch that failed is known by its number, and is in no other class.
        assert log.draws == [(0, (0, 1)), (1, (2,))]
        assert [seq for seq, _ in log.failures] == [1]
        assert log.dropped == [()]


class Stumbles:
    """An iterator that raises at the third index, and goes on."""

    def __init__(self, fault: BaseException) -> None:
        self.fault = fault
        self.at = 0

    def __iter__(self) -> Stumbles:
        return self

    def __next__(self) -> int:
        self.at += 1
        if self.at == 3:
            raise self.fault
        if self.at > 6:
            raise StopIteration
        return self.at


def test_a_sampler_that_goes_on_after_an_error_is_drawn_from_to_its_end() -> None:
    fault = OSError("for a moment")
    sampler, log = recording(Stumbles(fault), batched=False)
    assert [task.index for task in sampler] == [1, 2, SamplerFault(), 4, 5, 6]
    assert log.failures == [(2, fault)]
    assert log.lost == []  # nothing was interrupted
    assert log.dropped == [()]


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, GeneratorExit, SystemExit, CancelledError])
def test_an_interrupt_is_raised_at_once_and_the_sampler_goes_on(fatal: Any) -> None:
    sampler, log = recording(Stumbles(fatal()), batched=False)
    tasks = iter(sampler)
    assert [next(tasks).index, next(tasks).index] == [1, 2]
    with pytest.raises(fatal):
        next(tasks)
    assert log.lost == [()]
    assert [(task.seq, task.index) for task in tasks] == [(2, 4), (3, 5), (4, 6)]
    assert log.dropped == [()]
    assert log.failures == []


@pytest.mark.parametrize("drop_last", [True, False])
def test_what_was_drawn_for_a_batch_that_was_interrupted_is_told_once(drop_last: bool) -> None:
    inner: Any = BatchSampler(Stumbles(KeyboardInterrupt()), 4, drop_last)  # type: ignore[arg-type]
    sampler, log = recording(inner)
    tasks = iter(sampler)
    with pytest.raises(KeyboardInterrupt):
        next(tasks)
    assert log.lost == [(1, 2)]
    assert list(tasks) == []  # as with the stock loader: torch's batch sampler is at its end
    assert log.lost[0] == (1, 2)
    assert {index for lost in log.lost[1:] for index in lost} == set()
    assert log.dropped == [()]


@pytest.mark.parametrize("keep_open", [True, False])
def test_an_interrupt_leaves_the_open_tasks_whole(keep_open: bool) -> None:
    made = RecordingSampler(
        Stumbles(KeyboardInterrupt()), batched=False, stream=False, keep_open=keep_open
    )
    made.log = Log()
    tasks = iter(made)
    assert [next(tasks).seq, next(tasks).seq] == [0, 1]
    made.answered(0)
    again = tasks
    if keep_open:
        with made.beginning_with_open():
            again = iter(made)
        assert next(again) == Task(1, 2)
    with pytest.raises(KeyboardInterrupt):
        next(again)
    assert [task.index for task in again] == [4, 5, 6]


# ── tasks kept open ──────────────────────────────────────────────────────────────────────────────


def refilled(*fillings: Any) -> Iterator[Any]:
    index = fillings[0]
    for filling in copy.deepcopy(fillings):
        index[:] = filling
        yield index


FILLINGS: list[Any] = [
    ([0, 1], [2, 3]),
    ([[0], [1]], [[2], [3]]),
    (["a", "b"], ["c", "d"]),
    (np.array([0, 1]), np.array([2, 3])),
    (torch.tensor([0, 1]), torch.tensor([2, 3])),
    (bytearray(b"ab"), bytearray(b"cd")),
]


@pytest.mark.parametrize("fillings", FILLINGS, ids=lambda each: type(each[0]).__name__)
@pytest.mark.parametrize("batched", [True, False])
def test_open_tasks_keep_what_was_drawn(fillings: Any, batched: bool) -> None:
    expected = copy.deepcopy(list(fillings))
    made = RecordingSampler(refilled(*fillings), batched=batched, stream=False, keep_open=True)
    made.log = Log()
    assert len(list(made)) == 2
    with made.beginning_with_open():
        kept = [task.index for task in made]
    assert [pack(index) for index in kept] == [pack(index) for index in expected]
    assert [type(index) for index in kept] == [type(index) for index in expected]


def test_a_list_inside_is_refilled_as_well() -> None:
    inner = [0]
    outer = [inner, inner]

    def draws() -> Iterator[Any]:
        for number in range(3):
            inner[0] = number
            yield outer

    made = RecordingSampler(draws(), batched=True, stream=False, keep_open=True)
    made.log = Log()
    list(made)
    with made.beginning_with_open():
        assert [task.index for task in made] == [[[n], [n]] for n in range(3)]


def test_a_small_view_is_kept_without_the_memory_it_is_of() -> None:
    drawn = torch.arange(200_000)
    views = iter(drawn[:50])
    made = RecordingSampler(views, batched=False, stream=False, keep_open=True, lends=True)
    made.log = Log()
    tracemalloc.start()
    try:
        tasks = list(made)
        assert tracemalloc.get_traced_memory()[1] < drawn.nbytes  # and not fifty times as much
    finally:
        tracemalloc.stop()
    assert [int(restored(each)) for each in tasks[-1].donors] == list(range(48, 28, -1))


def test_what_a_failed_start_left_open_is_not_given_to_the_next_epoch() -> None:
    made = RecordingSampler([3, 4], batched=False, stream=False, keep_open=True)
    made.log = Log()
    next(iter(made))
    with pytest.raises(KeyboardInterrupt), made.beginning_with_open():
        raise KeyboardInterrupt
    assert [task.index for task in made] == [3, 4]


class CannotBeCopied:
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("one of a kind")


def test_an_index_that_cannot_be_copied_is_kept_as_it_is() -> None:
    index = CannotBeCopied()
    made, _ = recording([index], batched=False, keep_open=True)
    list(made)
    with made.beginning_with_open():
        (task,) = made
    assert task.index is index


# ── tasks at which a worker died ─────────────────────────────────────────────────────────────────


def started(*draws: Any, batched: bool = True) -> RecordingSampler:
    """All of ``draws`` are with the workers."""
    made, _ = recording(draws, batched=batched, keep_open=True, lends=True)
    list(made)
    return made


def given_again(made: RecordingSampler) -> list[Task]:
    """What a new pool of workers is given."""
    with made.beginning_with_open():
        return list(made)


def test_a_batch_that_killed_a_worker_is_asked_for_one_by_one_and_whole() -> None:
    made = started([5, 6], [7])
    assert made.change(0, excluded=None) == ()
    asked, other = given_again(made)
    assert asked == Task(0, [5, 6], one_by_one=True)
    assert other == Task(1, [7], donors=(6, 5))


@pytest.mark.parametrize("batch", [["a", "b", "c"], ("a", "b", "c")])
def test_a_sample_that_kills_its_workers_is_left_out_of_its_batch(batch: Any) -> None:
    made = started(batch)
    assert made.change(0, excluded=1) == ("b",)
    assert given_again(made) == [Task(0, batch, (1,), one_by_one=True)]
    assert made.change(0, excluded=0) == ("a",)
    assert given_again(made) == [Task(0, batch, (1, 0), one_by_one=True)]


@pytest.mark.parametrize(
    ("index", "left_out"), [(3, (3,)), ("ab", ("ab",)), ((1, 2), ((1, 2),)), ([4, 5], (4, 5))]
)
def test_without_batching_all_that_was_drawn_at_once_is_left_out(index: Any, left_out: Any) -> None:
    made = started(index, batched=False)
    assert made.change(0, excluded=0) == left_out
    assert given_again(made) == [Task(0, index, (0,), one_by_one=True)]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("names", [[5, 6, 7, 8], ["a", "b", "c", "d"]])
def test_what_killed_its_workers_stands_in_for_no_other_sample(
    names: list[Any], batched: bool
) -> None:
    first, second, third, fourth = names
    draws: list[Any] = [[first, second], [third], [fourth]] if batched else names[1:]
    made, _ = recording(draws, batched=batched, keep_open=True, lends=True)
    tasks = iter(made)
    assert next(tasks).donors == ()
    before = [restored(donor) for donor in next(tasks).donors]
    assert before == ([second, first] if batched else [second])
    assert made.change(0, excluded=1 if batched else 0) == (second,)
    own = [first] if batched else []
    assert [restored(donor) for donor in next(tasks).donors] == [third, *own]
    donors = [[restored(donor) for donor in task.donors] for task in given_again(made)]
    assert donors == [[], own, [third, *own]]


@pytest.mark.parametrize("names", [[5, 6, 7, 8], ["a", "b", "c", "d"]])
def test_a_donor_that_kills_its_workers_stands_in_no_more(names: list[Any]) -> None:
    first, second, third, fourth = names
    made = started([first, second], [third], [fourth])
    assert made.change(1, excluded=1) == (second,)  # the position after the batch's own
    _, asked, last = given_again(made)
    assert asked == Task(1, [third], one_by_one=True, donors=asked.donors)
    assert [restored(donor) for donor in asked.donors] == [first]
    assert [restored(donor) for donor in last.donors] == [third, first]


def test_a_position_beyond_the_batch_and_its_donors_leaves_out_nothing() -> None:
    made = started([5, 6], [7])
    assert made.change(1, excluded=3) == ()
    assert given_again(made)[1] == Task(1, [7], one_by_one=True, donors=(6, 5))


def test_a_task_that_was_answered_is_not_changed() -> None:
    made = started([5], [6])
    made.answered(0)
    assert made.change(0, excluded=0) == ()
    assert given_again(made) == [Task(1, [6], donors=(5,))]


def test_a_new_epoch_lends_what_killed_workers_in_the_one_before() -> None:
    made = started([5], [6])
    made.change(0, excluded=0)
    assert [task.donors for task in made] == [(), (5,)]


def test_a_draw_that_failed_is_lent_nothing_and_stands_in_for_nothing() -> None:
    made, _ = recording(Stumbles(OSError("for a moment")), batched=False, lends=True)
    donors = [task.donors for task in made]
    assert donors == [(), (1,), (), (2, 1), (4, 2, 1), (5, 4, 2, 1)]


# ── whether a length proves anything ─────────────────────────────────────────────────────────────


class Announces(BatchSampler):
    def __len__(self) -> int:
        return 4


class AnnouncesOne(SequentialSampler):
    def __len__(self) -> int:
        return 1


PROVEN: list[tuple[Any, int | None]] = [
    (SequentialSampler(range(7)), 7),
    (RandomSampler(range(7), replacement=True, num_samples=9), 9),
    (BatchSampler(SequentialSampler(range(7)), 3, drop_last=False), 3),
    (BatchSampler(RandomSampler(range(7)), 3, drop_last=True), 2),
    (BatchSampler(DistributedSampler(range(7), 2, 0), 3, drop_last=False), 2),  # type: ignore[arg-type]
    (Announces(SequentialSampler(range(80)), 4, drop_last=False), None),
    (BatchSampler(AnnouncesOne(range(9)), 4, drop_last=False), None),
    (AnnouncesOne(range(9)), None),
    (range(9), None),
    ([[1], [2]], None),
]


@pytest.mark.parametrize(("sampler", "length"), PROVEN)
def test_only_torchs_own_samplers_have_a_proven_length(sampler: Any, length: int | None) -> None:
    assert proven_length(sampler) == length
    if length is not None:
        assert len(list(sampler)) == length
