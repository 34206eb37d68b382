"""Going on in spite of samples that fail: what the batch is made of, and what is noted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.delivery.manifest import SampleIncident
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.random_state import preserved
from safeloader.transport.messages import DeliveredBatch, Task
from safeloader.worker import repair as module
from safeloader.worker.context import FetchContext
from safeloader.worker.policy import SKIP, Policy
from safeloader.worker.repair import BatchRepair, Unrepairable
from safeloader.worker.startup import fetcher_for
from tests import faults


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before further tries, which are not waited for."""
    taken: list[float] = []
    monkeypatch.setattr(module.time, "sleep", taken.append)
    return taken


def repair(on_error: Any = "skip", retries: int = 0) -> BatchRepair:
    def explain(exc: Exception, position: int) -> Failure:
        return failure_of(exc, phase="sample", where="", index=10 + position, position=position)

    return BatchRepair(Policy(on_error, retries), explain)


def gives(*answers: Any) -> Callable[[], Any]:
    """One after the other; exceptions are raised."""
    left = iter(answers)

    def get() -> Any:
        answer = next(left)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return get


def draw() -> tuple[Any, ...]:
    return random.gauss(0, 1), float(np.random.randn()), float(torch.rand(())), random.random()


def test_nothing_happened() -> None:
    made = repair()
    made.have(["a"])
    made.fetch(gives("b"))
    assert (made.batch(), made.incidents, made.asked) == (["a", "b"], None, 2)


@pytest.mark.parametrize("fails", [1, 2, 5])
def test_a_late_sample_is_the_one_that_would_have_come(fails: int) -> None:
    with preserved():
        expected = draw()
        follows = draw()
    left = [None] * fails

    def flaky() -> Any:
        drawn = draw()
        if left:
            left.pop()
            draw()
            raise OSError("flaky")
        return drawn

    made = repair(retries=5)
    with preserved():
        made.fetch(flaky)
        assert made.batch() == [expected]
        assert draw() == follows
    assert made.incidents == (SampleIncident("late", 0, f"came at try {fails + 1}"),)


def test_pauses_grow_to_a_bound(pauses: list[float]) -> None:
    made = repair(retries=9)
    made.fetch(gives(*[OSError()] * 10))
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert made.incidents == (SampleIncident("skipped", 0, "OSError, 10 tries"),)


def test_a_first_try_made_elsewhere_counts(pauses: list[float]) -> None:
    made = repair(retries=1)
    made.fetch(gives("at last"), KeyError("x"))
    assert made.batch() == ["at last"]
    assert made.incidents == (SampleIncident("late", 0, "came at try 2"),)
    made.fetch(gives(KeyError("second")), KeyError("first"))
    assert made.incidents[1] == SampleIncident("skipped", 1, "KeyError: 'second', 2 tries")
    assert len(pauses) == 2


def test_skip() -> None:
    made = repair("skip")
    for answer in ("a", ValueError("bad"), "c", ValueError("bad")):
        made.fetch(gives(answer))
    assert made.batch() == ["a", "c"]
    assert made.asked == 4
    assert made.incidents == (
        SampleIncident("skipped", 1, "ValueError: bad"),
        SampleIncident("skipped", 3, "ValueError: bad"),
    )
    assert made.places == [0, 2]


@pytest.mark.parametrize(
    ("came", "batch", "donors"),
    [
        ("x234", "2234", {0: 1}),
        ("12x4", "1244", {2: 3}),
        ("123x", "1231", {3: 0}),
        ("xx3x", "3333", {0: 2, 1: 2, 3: 2}),
        ("1xx4", "1444", {1: 3, 2: 3}),
    ],
)
def test_replace_takes_the_next_good_sample(came: str, batch: str, donors: dict[int, int]) -> None:
    made = repair("replace")
    for letter in came:
        made.fetch(gives(ValueError("bad") if letter == "x" else letter))
    for _ in range(2):  # asking again changes nothing
        assert "".join(made.batch()) == batch
        incidents = made.incidents or ()
        assert {m.position: m.donor for m in incidents if m.what == "replaced"} == donors
    assert len(incidents) == came.count("x")


def test_a_replacement_that_breaks_the_batch_leaves_with_its_original() -> None:
    made = repair("replace")
    for answer in (1, ValueError("bad"), None, 4):
        made.fetch(gives(answer))
    assert made.batch() == [1, None, None, 4]
    assert made.places == [0, 2, 2, 3]
    made.give_up(2, TypeError("the sample is None"))
    assert made.batch() == [1, 4, 4, 4]
    assert [(m.what, m.position, m.donor) for m in made.incidents or ()] == [
        ("replaced", 1, 3),
        ("replaced", 2, 3),
    ]


def test_a_callable_decides() -> None:
    asked: list[Failure] = []

    def on_error(failure: Failure) -> Any:
        asked.append(failure)
        return SKIP if failure.index == 10 else -1

    made = repair(on_error)
    for answer in (ValueError("first"), ValueError("second"), "c"):
        made.fetch(gives(answer))
    assert made.batch() == [-1, "c"]
    assert [(f.index, f.exception_type, f.message) for f in asked] == [
        (10, "ValueError", "first"),
        (11, "ValueError", "second"),
    ]
    assert made.incidents == (
        SampleIncident("skipped", 0, "ValueError: first"),
        SampleIncident("replaced", 1, "ValueError: second"),
    )


def test_a_callable_that_raises_ends_the_batch() -> None:
    def on_error(failure: Failure) -> Any:
        raise ZeroDivisionError

    with pytest.raises(Unrepairable) as info:
        repair(on_error).fetch(gives(ValueError("bad")))
    assert type(info.value.cause) is ZeroDivisionError
    assert (info.value.position, info.value.text) == (0, "raised by on_error=, not by the dataset")


def test_raise_with_retries_ends_the_batch() -> None:
    made = repair("raise", retries=2)
    made.have([1])
    with pytest.raises(Unrepairable) as info:
        made.fetch(gives(OSError("a"), OSError("b"), OSError("c")))
    assert (info.value.position, str(info.value.cause)) == (1, "c")


def wrapped(exc: BaseException) -> Exception:
    error = ValueError("bad sample")
    error.__cause__ = exc
    return error


NEVER = [
    MemoryError(),
    ImportError("no module"),
    ModuleNotFoundError("no module"),
    NameError("name"),
    SyntaxError("invalid", ("data.py", 1, 1, "")),
    OSError(24, "Too many open files"),
    OSError(28, "No space left on device"),
    OSError(23, "Too many open files in system"),
]


@pytest.mark.parametrize("how", ["skip", "replace", lambda failure: SKIP])
@pytest.mark.parametrize("exc", [*NEVER, wrapped(MemoryError())], ids=repr)
def test_what_means_a_broken_program_is_never_skipped(
    exc: Exception, how: Any, pauses: list[float]
) -> None:
    made = repair(how, retries=3)
    with pytest.raises(Unrepairable) as info:
        made.fetch(gives(exc))
    assert info.value.cause is exc
    assert pauses == []  # nor asked for again


def test_what_is_no_exception_passes() -> None:
    for interrupt in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(interrupt)):
            repair().fetch(gives(interrupt))


def test_the_end_of_a_stream_is_no_failure() -> None:
    made = repair(retries=3)
    with pytest.raises(StopIteration):
        made.fetch(gives(StopIteration()), may_end=True)
    assert made.asked == 0


def test_a_stop_iteration_that_leaked_is_one() -> None:
    made = repair(retries=1)
    made.fetch(gives(StopIteration(), "came"))
    made.fetch(gives(StopIteration(), StopIteration()))
    assert made.batch() == ["came"]
    assert [incident.what for incident in made.incidents or ()] == ["late", "skipped"]


def test_left_out_without_being_asked_for() -> None:
    made = repair("replace")
    made.leave_out("deadly")
    made.fetch(gives("b"))
    assert made.batch() == ["b", "b"]
    made = repair("raise")
    made.leave_out("deadly")
    made.fetch(gives("b"))
    assert made.batch() == ["b"]
    assert made.incidents == (SampleIncident("skipped", 0, "deadly"),)


@pytest.mark.parametrize("how", ["cannot be shown", "huge message", "no message", "holds a lock"])
def test_reasons_are_short_whatever_was_raised(how: str) -> None:
    made = repair()
    with pytest.raises(Exception) as info:  # noqa: PT011
        faults.raisers()[how]()
    made.fetch(gives(info.value))
    (incident,) = made.incidents or ()
    assert 0 < len(incident.reason) <= 400


# collation, with our fetcher around it ──────────────────────────────────────────────────────────


class Stock:
    auto_collation = True

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn


def batch_of(
    samples: list[Any], on_error: Any = "skip", collate_fn: Any = torch.utils.data.default_collate
) -> Any:
    context = FetchContext(None, policy=Policy(on_error, 0), raised=[])
    fetcher = fetcher_for(Stock(samples, collate_fn), context)
    return fetcher.fetch(Task(0, list(range(len(samples)))))


def odd(at: int, what: Any) -> list[Any]:
    return [what if k == at else torch.full((3,), float(k)) for k in range(5)]


@pytest.mark.parametrize("what", [None, torch.zeros(4), {"a": 1}, "text"], ids=repr)
def test_the_odd_sample_of_a_batch_that_does_not_collate(what: Any) -> None:
    made = batch_of(odd(2, what))
    assert type(made) is DeliveredBatch
    assert made.payload[:, 0].tolist() == [0, 1, 3, 4]
    assert [(m.what, m.position) for m in made.manifest.incidents or ()] == [("skipped", 2)]
    made = batch_of(odd(2, what), "replace")
    assert made.payload[:, 0].tolist() == [0, 1, 3, 3, 4]
    assert [(m.what, m.position, m.donor) for m in made.manifest.incidents] == [("replaced", 2, 3)]
    made = batch_of(odd(2, what), lambda failure: torch.full((3,), 9.0))
    assert made.payload[:, 0].tolist() == [0, 1, 9, 3, 4]


def test_nothing_but_none() -> None:
    assert type(batch_of([None] * 3)).__name__ == "EmptyBatch"


def test_a_batch_of_which_no_sample_is_clearly_the_odd_one() -> None:
    for samples in ([torch.zeros(3), torch.zeros(4)], odd(0, 1)[1:] + [torch.zeros(4)] * 4):
        made = batch_of(samples)
        assert type(made).__name__ == "FailedBatch"
        assert made.failure.phase == "collate"


def divides(failure: Failure) -> Any:
    return 1 / 0


def test_what_on_error_was_asked_about_is_told_with_its_own_fault() -> None:
    failure = batch_of(odd(2, None), divides).failure
    assert "raised by on_error" in failure.hint
    assert "NoneType" in failure.traceback + failure.hint


class Unending(BaseException):
    pass


@pytest.mark.parametrize("answer", [None, torch.zeros(4)], ids=repr)
def test_a_callable_that_gives_no_better_sample_does_not_hang(answer: Any) -> None:
    """A function that logs, and forgets to return SKIP, gives None."""
    asked = []

    def on_error(failure: Failure) -> Any:
        asked.append(failure.index)
        if len(asked) > 100:
            raise Unending
        return answer

    made = batch_of(odd(2, ValueError), on_error, raising_collate)
    assert type(made).__name__ == "FailedBatch"
    assert made.failure.phase == "collate"


def raising_collate(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate(samples)


def demanding_collate(samples: list[Any]) -> Any:
    if any(sample is None for sample in samples):
        raise faults.NeedsArguments("data.csv", line=3)
    return torch.stack(samples)


def test_an_odd_sample_that_makes_collation_raise_what_wants_arguments() -> None:
    made = batch_of(odd(2, None), "skip", demanding_collate)
    assert type(made) is DeliveredBatch
    assert made.payload[:, 0].tolist() == [0, 1, 3, 4]
