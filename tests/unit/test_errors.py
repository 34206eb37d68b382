"""Each error is one of ours and of the type that was raised, and goes wherever pickles go."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from safeloader import (
    CollateError,
    DeliveryError,
    Failure,
    SafeDataLoader,
    SafeLoaderError,
    SampleError,
    SamplerError,
    TransportError,
    WorkerInitError,
)
from safeloader.errors import dual_type, error_from
from safeloader.failures.failure import failure_of

OURS = {
    "init": WorkerInitError,
    "sampler": SamplerError,
    "sample": SampleError,
    "collate": CollateError,
    "transport": TransportError,
    "delivery": DeliveryError,
}


class Nested(LookupError):
    class Inner(ValueError):
        pass


class Slotted(Exception):
    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class DemandingMeta(type):
    def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
        if name.endswith(")"):
            raise TypeError("not to be derived from")
        return super().__new__(cls, name, bases, namespace)


class Demanding(Exception, metaclass=DemandingMeta):
    pass


class NotingMeta(type):
    made: int = 0

    def __call__(cls, *args: Any) -> Any:
        raise RuntimeError("only by the factory")


class ByFactoryOnly(Exception, metaclass=NotingMeta):
    pass


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


class OwnNew(Exception):
    def __new__(cls, path: str, line: int) -> OwnNew:
        return super().__new__(cls, path, line)

    def __init__(self, path: str, line: int) -> None:
        super().__init__(path, line)
        self.path = path


class ReadOnlyFields(Exception):
    @property
    def code(self) -> int:
        return 17


class OwnReduce(Exception):
    def __init__(self, text: str, *, level: int) -> None:
        super().__init__(text)
        self.level = level

    def __reduce__(self) -> Any:
        raise TypeError("not to be sent")

    def __str__(self) -> str:
        return "the user's own text"


def raised(exc: BaseException) -> BaseException:
    """The exception with a traceback."""
    try:
        raise exc
    except BaseException as caught:
        return caught


def failure_from(exc: BaseException, phase: str = "sample", **known: Any) -> Failure:
    return failure_of(raised(exc), phase=phase, where="in DataLoader worker process 1", **known)


def crossed(failure: Failure) -> Failure:
    return pickle.loads(pickle.dumps(failure))  # type: ignore[no-any-return]


# ── the hierarchy ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ours", OURS.values())
def test_every_error_is_a_safe_loader_error(ours: type[SafeLoaderError]) -> None:
    assert ours.__bases__ == (SafeLoaderError,)
    assert SafeLoaderError.__bases__ == (Exception,)
    error = ours("what", 3)
    assert (error.failure, error.index, error.args, str(error)) == (
        None,
        None,
        ("what", 3),
        "('what', 3)",
    )


@pytest.mark.parametrize("phase", OURS)
def test_the_phase_says_which_error(phase: str) -> None:
    error = error_from(crossed(failure_from(KeyError("feature"), phase, index=5)))
    assert isinstance(error, OURS[phase])
    assert isinstance(error, KeyError)
    assert error.index == 5
    assert error.failure is not None
    assert error.failure.phase == phase


@pytest.mark.parametrize("ours", OURS.values())
def test_errors_without_a_failure_can_be_pickled(ours: type[SafeLoaderError]) -> None:
    error = ours("what", 3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ours
    assert again.args == ("what", 3)
    assert str(again) == str(error)


@pytest.mark.parametrize("phase", OURS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_errors_with_a_failure_can_be_pickled(phase: str, protocol: int) -> None:
    failure = failure_from(ValueError("bad", 7), phase, index=("a", 1), batch=4, position=2)
    error = error_from(crossed(failure))
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert again.failure == failure
    assert (str(again), again.args, again.index) == (str(error), ("bad", 7), ("a", 1))
    twice = pickle.loads(pickle.dumps(again))
    assert (type(twice), str(twice), twice.failure) == (type(error), str(error), failure)


def test_errors_can_be_copied() -> None:
    error = error_from(failure_from(KeyError("feature"), index=5))
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert again.index == 5


def test_an_error_made_by_the_package_itself_has_no_second_type() -> None:
    failure = Failure(phase="delivery", exception_type="DeliveryError", message="lost", index=3)
    error = error_from(failure)
    assert type(error) is DeliveryError
    assert error.args == ("lost",)
    assert error.index == 3


# ── two types in one ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ours", OURS.values())
@pytest.mark.parametrize(
    "theirs", [KeyError, OSError, UnicodeDecodeError, Nested, Nested.Inner, Slotted, SyntaxError]
)
def test_a_dual_type_is_both_and_its_mro_begins_with_ours(
    ours: type[SafeLoaderError], theirs: type[Exception]
) -> None:
    both = dual_type(ours, theirs)
    assert issubclass(both, ours)
    assert issubclass(both, theirs)
    mro = both.__mro__
    assert mro[:2] == (both, ours)
    assert mro.index(SafeLoaderError) < mro.index(theirs)
    assert both.__name__ == f"{ours.__name__}({theirs.__qualname__})"
    assert both.__module__ == ours.__module__
    assert both.__doc__ == ours.__doc__


def test_a_dual_type_is_made_once() -> None:
    assert dual_type(SampleError, KeyError) is dual_type(SampleError, KeyError)
    assert dual_type(SampleError, KeyError) is not dual_type(CollateError, KeyError)


@pytest.mark.parametrize("theirs", [StopIteration, StopAsyncIteration, GeneratorExit])
def test_what_would_end_a_loop_in_silence_is_not_combined(theirs: type[BaseException]) -> None:
    derived = type("Derived", (theirs,), {})
    assert dual_type(SampleError, theirs) is SampleError
    assert dual_type(SampleError, derived) is SampleError
    error = error_from(crossed(failure_from(theirs("at index 3"))))
    assert type(error) is SampleError
    assert error.failure is not None
    assert error.failure.exception_type == theirs.__name__


@pytest.mark.parametrize("theirs", [Demanding, Final])
def test_classes_that_object_to_be_derived_from_are_not_combined(
    theirs: type[Exception],
) -> None:
    assert dual_type(SampleError, theirs) is SampleError
    error = error_from(crossed(failure_from(theirs("what"))))
    assert type(error) is SampleError
    assert "what" in str(error)
    assert error.args == ("what",)


def test_a_metaclass_that_only_minds_its_constructor_is_no_obstacle() -> None:
    both = dual_type(SampleError, ByFactoryOnly)
    assert issubclass(both, ByFactoryOnly)
    assert type(both) is NotingMeta
    exc = ByFactoryOnly.__new__(ByFactoryOnly)
    exc.args = ("made",)
    error = error_from(crossed(failure_from(exc)))
    assert type(error) is both
    assert error.args == ("made",)


@pytest.mark.parametrize("theirs", [Exception, BaseException])
def test_a_base_of_ours_adds_nothing(theirs: type[BaseException]) -> None:
    assert dual_type(SampleError, theirs) is SampleError


def test_an_error_of_ours_keeps_its_type() -> None:
    assert dual_type(SampleError, SampleError) is SampleError
    nested = dual_type(SampleError, dual_type(SampleError, KeyError))
    assert issubclass(nested, SampleError)
    assert issubclass(nested, KeyError)
    crossing = dual_type(CollateError, dual_type(SampleError, KeyError))
    assert issubclass(crossing, CollateError)
    assert issubclass(crossing, SampleError)
    assert issubclass(crossing, KeyError)


@pytest.mark.parametrize("theirs", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_named_but_remain_catchable_as_ours(theirs: type[BaseException]) -> None:
    assert issubclass(dual_type(SampleError, theirs), SampleError)


# ── what the original exception carried ──────────────────────────────────────────────────────────


def test_fields_of_an_os_error_survive() -> None:
    original = FileNotFoundError(2, "No such file", "from.txt", None, "to.txt")
    error: Any = error_from(crossed(failure_from(original)))
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.strerror) == (2, "No such file")
    assert (error.filename, error.filename2) == ("from.txt", "to.txt")
    again: Any = pickle.loads(pickle.dumps(error))
    assert (again.errno, again.filename) == (2, "from.txt")


def test_fields_of_a_unicode_error_survive() -> None:
    try:
        b"caf\xe9".decode("utf-8")
    except UnicodeDecodeError as exc:
        error: Any = error_from(crossed(failure_from(exc)))
    assert isinstance(error, UnicodeDecodeError)
    assert (error.encoding, error.object, error.start, error.end) == ("utf-8", b"caf\xe9", 3, 4)
    assert error.reason == "unexpected end of data"
    assert "codec can't decode byte 0xe9" in str(error)


def test_fields_of_syntax_name_attribute_import_and_system_errors_survive() -> None:
    syntax: Any = error_from(crossed(failure_from(SyntaxError("odd", ("f.py", 3, 7, "x = ")))))
    assert (syntax.msg, syntax.filename, syntax.lineno, syntax.offset) == ("odd", "f.py", 3, 7)
    missing: Any = error_from(crossed(failure_from(ImportError("no", name="x", path="y"))))
    assert (missing.name, missing.path) == ("x", "y")
    unknown: Any = error_from(crossed(failure_from(AttributeError("no", name="x", obj=4))))
    assert (unknown.name, unknown.obj) == ("x", 4)


def test_slots_survive() -> None:
    error: Any = error_from(crossed(failure_from(Slotted("deep"))))
    assert isinstance(error, Slotted)
    assert error.args == ("deep",)
    assert error.detail == "deep"


def test_constructors_that_want_arguments_are_not_run() -> None:
    error: Any = error_from(crossed(failure_from(OwnNew("data.csv", 3))))
    assert isinstance(error, OwnNew)
    assert (error.args, error.path) == (("data.csv", 3), "data.csv")
    again: Any = pickle.loads(pickle.dumps(error))
    assert (again.args, again.path) == (("data.csv", 3), "data.csv")


def test_read_only_fields_do_no_harm() -> None:
    error: Any = error_from(crossed(failure_from(ReadOnlyFields("x"))))
    assert error.code == 17


def test_the_users_own_reduce_and_str_do_not_get_in_the_way() -> None:
    error: Any = error_from(crossed(failure_from(OwnReduce("x", level=3), index=8)))
    assert isinstance(error, OwnReduce)
    assert error.level == 3
    assert "the user's own text" in str(error)
    assert "dataset index 8" in str(error)
    again: Any = pickle.loads(pickle.dumps(error))
    assert (again.level, str(again)) == (3, str(error))


def test_exception_groups_stay_groups() -> None:
    group = ExceptionGroup("several", [ValueError(1), KeyError(2)])
    error: Any = error_from(crossed(failure_from(group)))
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, SampleError)
    assert [type(member) for member in error.exceptions] == [ValueError, KeyError]
    assert error.message == "several"
    caught = []
    try:
        raise error
    except* KeyError as part:
        caught.append(part)
    except* ValueError as part:
        caught.append(part)
    assert len(caught) == 2


def test_notes_survive() -> None:
    original = ValueError("x")
    original.add_note("seen in shard 7")
    error = error_from(crossed(failure_from(original)))
    assert "seen in shard 7" in str(error)


@given(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.binary()), max_size=3))
def test_arguments_survive(args: list[Any]) -> None:
    error = error_from(crossed(failure_from(KeyError(*args))))
    assert error.args == tuple(args)
    assert isinstance(error, KeyError)


# ── an error of ours that passes through a second loader ─────────────────────────────────────────


class HoldsALoader:
    def __init__(self, length: int = 4) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        inner = SafeDataLoader(Inner(), batch_size=2, sampler=[3 * index, 3 * index + 1])
        return sum(int(number) for batch in inner for number in batch)


class Inner:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise KeyError("no such row")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_nested_loaders_error_names_the_outer_index_and_tells_of_the_inner(workers: int) -> None:
    loader = SafeDataLoader(HoldsALoader(), batch_size=4, num_workers=workers)
    try:
        list(loader)
    except SampleError as caught:
        error = caught
    assert isinstance(error, KeyError)
    assert error.index == 2
    assert error.failure is not None
    assert error.failure.indices == (0, 1, 2, 3)
    assert error.failure.worker_id == (0 if workers else None)
    assert "dataset index 7" in error.failure.message
    assert "dataset index 7" in str(error)
    assert "dataset index 2" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.index, str(again)) == (type(error), 2, str(error))
    del error


# ── an error that was dealt with ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loader_class", [DataLoader, SafeDataLoader])
def test_an_error_that_was_handled_holds_the_dataset_no_longer(loader_class: Any) -> None:
    def fails() -> weakref.ref[Inner]:
        dataset = Inner()
        with contextlib.suppress(KeyError):
            list(loader_class(dataset))
        return weakref.ref(dataset)

    gc.collect()
    gc.disable()
    try:
        assert fails()() is None
    finally:
        gc.enable()


def test_a_traceback_begins_in_the_users_code() -> None:
    """With ``on_error`` there are frames of ours above it, and it is raised twice."""

    def collate(samples: Any) -> Any:
        raise KeyError("image")

    loader = SafeDataLoader(list(range(4)), 2, collate_fn=collate, on_error="skip", retries=1)
    with pytest.raises(SafeLoaderError) as info:
        next(iter(loader))
    assert info.value.failure is not None
    told = info.value.failure.traceback.splitlines()
    assert [line.split(", in ")[1] for line in told if line.startswith("  File ")] == ["collate"]
    assert len([line for line in told if line.startswith("Traceback ")]) == 1


def test_what_the_user_raised_before_stays_in_the_traceback() -> None:
    def collate(samples: Any) -> Any:
        try:
            raise KeyError("image")
        except KeyError:
            raise ValueError("no image")  # noqa: B904  the context is what this is about

    with pytest.raises(SafeLoaderError) as info:
        next(iter(SafeDataLoader([1], collate_fn=collate)))
    assert info.value.failure is not None
    assert "KeyError: 'image'" in info.value.failure.traceback
    assert "ValueError: no image" in info.value.failure.traceback


@pytest.mark.parametrize("type_", ["DeliveryError", "SampleError"])
def test_a_sentence_of_ours_is_told_once(type_: str) -> None:
    said = "too many samples failed: 3 of 12"
    lines = str(Failure(phase="sample", exception_type=type_, message=said, index=5)).splitlines()
    assert lines[0] == said
    assert sum(said in line for line in lines) == 1
    assert lines[2].startswith("safeloader: dataset index 5, while fetching the sample")
