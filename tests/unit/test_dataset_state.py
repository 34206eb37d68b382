"""A dataset is described whatever it holds: bounded, guarded, and without its secrets."""

from __future__ import annotations

import collections
import datetime
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torch.utils.data.datapipes.iter import IterableWrapper

from safeloader.introspect.dataset_state import changes, describe, differences
from safeloader.introspect.texts import bounded_text

HERE = __name__
harm: list[str] = []  # what was asked of hostile objects


class Holding(Dataset[Any]):
    def __init__(self, /, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 10


def attribute(value: Any, name: str = "x") -> dict[str, Any]:
    return described(Holding(**{name: value}))["attributes"][name]  # type: ignore[no-any-return]


def described(dataset: object, harmed: list[str] | None = None, ask: bool = True) -> dict[str, Any]:
    """The description, after checks that hold for every one."""
    harm.clear()
    start = time.monotonic()
    state = describe(dataset, ask=ask)
    assert harm == (harmed or [])
    assert time.monotonic() - start < 2
    assert len(json.dumps(state, allow_nan=False)) < 16_384
    assert json.loads(json.dumps(state)) == state
    assert all(len(entry["repr"]) <= 120 for entry in state["attributes"].values())
    return state


class Hostile:
    """Does harm whatever it is asked."""

    def _harm(self, *args: Any) -> Any:
        harm.append("called")
        raise RuntimeError("not to be called")

    __getattribute__ = __getattr__ = __repr__ = __str__ = __eq__ = __len__ = __iter__ = _harm
    __bool__ = __index__ = __int__ = __float__ = __format__ = __array__ = __reduce_ex__ = _harm
    __hash__ = __dir__ = __sizeof__ = _harm  # type: ignore[assignment]
    __class__ = property(_harm)  # type: ignore[assignment]


class HostileMeta(type):
    __module__ = __name__ = __mro__ = __dict__ = property(Hostile._harm)  # type: ignore[assignment]
    __eq__ = __instancecheck__ = __subclasscheck__ = __repr__ = Hostile._harm  # type: ignore[assignment]
    __hash__ = __getattribute__ = Hostile._harm  # type: ignore[assignment]


# Kept in a dict: pytest looks closely at what stands in a module by itself.
zoo: dict[str, Any] = {"class": HostileMeta("HostileClass", (), {"__module__": HERE})}


class HostileList(list[Any]):
    __len__ = __iter__ = __getitem__ = __repr__ = __eq__ = Hostile._harm  # type: ignore[assignment]


class HostileDict(dict[Any, Any]):
    __len__ = __iter__ = __getitem__ = __repr__ = items = Hostile._harm  # type: ignore[assignment]


class HostileText(str):
    __len__ = __getitem__ = __repr__ = __str__ = encode = Hostile._harm  # type: ignore[assignment]


class HostileTensor(torch.Tensor):
    __torch_function__ = classmethod(Hostile._harm)  # type: ignore[assignment]


class Slotted:
    __slots__ = ("filled", "unset")

    def __init__(self) -> None:
        self.filled = 3


class Credentials(NamedTuple):
    user: str
    password: str


class Config:
    def __init__(self) -> None:
        self.rate, self.api_key = 0.5, "hunter2"


TOLD: dict[str, Any] = {
    "None": None,
    "True": True,
    "nan": float("nan"),
    "7": 7,
    "<332193 bits>": 10**100_000,
    "'a\\nb'": "a\nb",
    "'\\ud800'": "\ud800",
    "[1, [2, list of 1]]": [1, [2, [3]]],
    "(1, 'a')": (1, "a"),
    "{'a', 'b'}": {"b", "a"},
    "{... 100 more}": set(range(100)),
    "collections.deque([1])": collections.deque([1]),
    "collections.OrderedDict({'a': 1})": collections.OrderedDict(a=1),
    "range(0, 3, 1)": range(3),
    "numpy.float32(0.5)": np.float32(0.5),
    "torch.float32": torch.float32,
    "device(type='cpu')": torch.device("cpu"),
    "datetime.date(2024, 1, 2)": datetime.date(2024, 1, 2),
    "PurePosixPath('/a')": pathlib.PurePosixPath("/a"),
    f"<{HERE}.Config rate=0.5 api_key=[redacted]>": Config(),
    f"[<{HERE}.Config>]": [Config()],
    f"<class {HERE}.Config>": Config,
    f"<{HERE}.Slotted filled=3>": Slotted(),
    "<module 'json'>": json,
    "<function len>": len,
    "<torch.Generator>": torch.Generator(),
    f"<{HERE}.Hostile>": Hostile(),
    f"<{HERE}.HostileClass>": zoo["class"](),
    f"<class {HERE}.HostileClass>": zoo["class"],
    f"{HERE}.HostileList([1])": HostileList([1]),
    f"{HERE}.HostileDict({{'a': 1}})": HostileDict(a=1),
    f"{HERE}.HostileText('a')": HostileText("a"),
}


@pytest.mark.parametrize("text", TOLD)
def test_values_are_told_without_running_their_code(text: str) -> None:
    assert attribute(TOLD[text])["repr"] == text


def test_tensors_and_arrays_are_told_by_their_header() -> None:
    objects = np.empty(1, dtype=object)
    objects[0] = Hostile()
    small = attribute(torch.tensor([[0.5, 2.0]]))
    assert small == {
        "type": "torch.Tensor",
        "shape": [1, 2],
        "dtype": "float32",
        "device": "cpu",
        "size_bytes": 8,
        "repr": "torch.Tensor float32 [1, 2] cpu (0.5, 2)",
    }
    assert attribute(torch.ones(9))["repr"] == "torch.Tensor float32 [9] cpu"
    assert attribute(np.arange(3))["repr"] == "numpy.ndarray int64 [3] (0, 1, 2)"
    assert attribute(np.ones((1000, 1000)))["size_bytes"] == 8_000_000
    assert attribute(objects)["repr"] == "numpy.ndarray object [1]"
    assert attribute(np.zeros(2, dtype=[("a", "f4")]))["dtype"] == "record of 1"


@pytest.mark.filterwarnings("ignore")
def test_no_kind_of_tensor_does_harm() -> None:
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    expected = {
        "meta": (torch.ones(2, device="meta"), [2]),
        "sparse": (torch.eye(2).to_sparse(), [2, 2]),
        "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), [2]),
        "nested": (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), None),
        "uninitialized": (torch.nn.UninitializedParameter(), [0]),
        "freed": (freed, [3]),
        "grad": (torch.ones(2, requires_grad=True) * 2, [2]),
        "conjugate": (torch.tensor([1j]).conj(), [1]),
        "bfloat16": (torch.ones(2, dtype=torch.bfloat16), [2]),
        "overridden": (torch.ones(2).as_subclass(HostileTensor), [2]),
        "parameter": (torch.nn.Parameter(torch.ones(2)), [2]),
        "scalar": (torch.tensor(1), []),
    }
    state = described(Holding(**{name: tensor for name, (tensor, _) in expected.items()}))
    assert "notes" not in state
    for name, (_, shape) in expected.items():
        assert state["attributes"][name].get("shape") == shape, name


def test_a_memory_mapped_file_is_not_read(tmp_path: pathlib.Path) -> None:
    mapped = np.memmap(tmp_path / "data", dtype="u1", mode="w+", shape=(8,))
    assert attribute(mapped)["repr"] == "numpy.memmap uint8 [8]"


def test_huge_containers_cost_nothing() -> None:
    state = described(
        Holding(many=[0] * 10_000_000, table=dict.fromkeys(range(1_000_000)), text="x" * 10**8)
    )
    assert state["attributes"]["many"] == {
        "type": "list",
        "length": 10_000_000,
        "repr": "[0, 0, 0, 0, 0, ... 9999995 more]",
    }
    assert state["attributes"]["table"]["length"] == 1_000_000
    assert state["attributes"]["text"]["length"] == 10**8


def test_cycles_and_depth_end() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    holder = Holding(cycle=cycle)
    vars(holder)["self"] = holder
    assert described(holder)["attributes"]["cycle"]["repr"] == "[[list of 1]]"


def test_many_attributes_are_counted_beyond_the_bound() -> None:
    few = described(Holding(**{f"a{n}": n for n in range(80)}))
    assert len(few["attributes"]) == 50
    assert few["omitted_attributes"] == 30
    wide = "\N{GRINNING FACE}" * 500  # twelve bytes of JSON each
    long = described(Holding(**{f"{n}{wide}": wide for n in range(50)}))
    assert len(long["attributes"]) + long["omitted_attributes"] == 50
    described(Holding(**{f"a{n}": n for n in range(200_000)}))


def test_names_need_not_be_texts() -> None:
    holder = Holding()
    vars(holder)[3] = vars(holder)[("a", 1)] = 4  # type: ignore[index]
    vars(holder)[HostileText("name")] = 5
    assert described(holder)["attributes"].keys() == {"[3]", "[tuple of 2]", "name"}


@pytest.mark.parametrize(
    "name",
    ["password", "DB_PASSWD", "token", "hfToken", "HF_TOKENS", "client_secret", "credentials",
     "awsCredential", "api key", "api_key", "apikey", "openaiApiKey", "private_key",
     "ACCESS_KEY_ID"],
)  # fmt: skip
def test_secrets_are_not_shown_at_any_depth(name: str) -> None:
    class Told:
        def __safeloader_state__(self) -> Any:
            return {name: "hunter2", "in": {"a": {name: "hunter2"}}, "list": [{name: "hunter2"}]}

    holder = Holding(**{name: "hunter2", "config": {name: "hunter2"}, "deep": [{name: "hunter2"}]})
    holder.inner = Holding(**{name: "hunter2"})  # type: ignore[attr-defined]
    state = described(holder)
    assert state["attributes"][name] == {"type": "str", "repr": "[redacted]"}
    assert "hunter2" not in json.dumps(state)
    assert "hunter2" not in json.dumps(described(Told()))
    assert "hunter2" not in json.dumps(described(Holding(pair=Credentials("me", "hunter2"))))


def test_what_only_resembles_a_secret_is_shown() -> None:
    for name in ("tokenizer", "tokenized", "key", "keys", "accessible", "passed"):
        assert attribute("shown", name)["repr"] == "'shown'"


def test_the_shape_of_a_secret_may_stay() -> None:
    assert attribute(torch.ones(3), "secret")["shape"] == [3]
    assert attribute(torch.ones(3), "secret")["repr"] == "[redacted]"


NUMERIC: dict[str, Any] = {
    "None": None,
    "True": True,
    "512": 512,
    "0.5": 0.5,
    "numpy.int64(3)": np.int64(3),
    "range(0, 3, 1)": range(3),
    "torch.Tensor int64 [2] cpu (1, 2)": torch.tensor([1, 2]),
    "numpy.ndarray int64 [2] (1, 2)": np.array([1, 2]),
    "[]": [],
    "[1, 2]": [1, 2],
    "(1, 2.5)": (1, 2.5),
    "{1, 2}": {1, 2},
    "{0: 3, 1: None}": {0: 3, 1: None},
    "[[1, 2], [3]]": [[1, 2], [3]],
    "{0: [1]}": {0: [1]},
    "[torch.Tensor int64 [1] cpu (7)]": [torch.tensor([7])],
    "[0, 0, 0, 0, 0, ... 995 more]": [0] * 1000,
}


@pytest.mark.parametrize("text", NUMERIC)
def test_tokens_that_are_numbers_are_shown(text: str) -> None:
    for name in ("token_ids", "max_tokens", "num_tokens", "tokens_per_batch", "pad_token_id"):
        value = NUMERIC[text]
        assert attribute(value, name)["repr"] == text
        assert "[redacted]" not in attribute({name: value})["repr"]
        told = described(Telling(lambda name=name, value=value: {name: value, "in": {name: value}}))
        assert "[redacted]" not in json.dumps(told["told_by_dataset"])


@pytest.mark.parametrize(
    "value",
    [
        *("hunter2", b"hunter2", bytearray(b"hunter2"), HostileText("hunter2")),
        *(["hunter2"], [1, "hunter2"], {"hunter2"}, {"hunter2": 1}, {1: "hunter2"}),
        *([[1, "hunter2"]], {0: {"a": ("hunter2",)}}, [[[["hunter2"]]]]),
        *(HostileList(["hunter2"]), HostileDict(a="hunter2"), collections.deque(["hunter2"])),
        *(np.array(["hunter2"]), np.array([b"hunter2"]), np.array(["hunter2"], dtype=object)),
        *(Config(), Credentials("hunter2", "hunter2"), [Config()]),
    ],
    ids=lambda value: bounded_text(value),
)
def test_tokens_that_are_or_hold_texts_are_not_shown(value: Any) -> None:
    for name in ("token", "bos_token", "tokens", "tokens_per_batch"):
        assert attribute(value, name)["repr"] == "[redacted]"
        told = described(Telling(lambda name=name: {name: value, "in": {name: value}}))
        assert told["told_by_dataset"] == {name: "[redacted]", "in": {name: "[redacted]"}}
        assert "hunter2" not in str(described(Holding(config={name: value}, deep=[{name: value}])))


@pytest.mark.parametrize("name", ["password", "passwd", "secret_tokens", "credential", "api_key",
                                  "private_key", "access_key", "authkey"])  # fmt: skip
def test_other_secrets_are_not_shown_even_as_numbers(name: str) -> None:
    for value in (None, 1234, torch.ones(1), [12, 34]):
        assert attribute(value, name)["repr"] == "[redacted]"


def test_telling_numbers_from_texts_ends() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    wide = [[[0] * 1000] * 1000] * 1000
    state = described(
        Holding(cycle_tokens=cycle, **{f"tokens{letter}": wide for letter in "abcdefgh"})
    )
    assert state["attributes"]["cycle_tokens"]["repr"] == "[redacted]"


class Watchful:
    """Has properties that must not be asked, and a slot."""

    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.slot, self.plain = 1, 2

    @property
    def raising(self) -> int:
        raise SystemExit

    def __getattr__(self, name: str) -> Any:
        raise SystemExit


def test_only_what_the_instance_holds_is_read() -> None:
    state = described(Watchful())
    assert state["attributes"].keys() == {"plain", "slot"}
    assert state["length"] is None
    assert "notes" not in state


def test_any_object_at_all_can_be_described() -> None:
    assert described(Hostile())["class"] == f"{HERE}.Hostile"
    for thing in (zoo["class"](), zoo["class"], None, 3, "abc", [1], len, torch, type, np.ones(2)):
        assert described(thing)["class"]


class Answering:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __len__(self) -> int:
        return self.answer()  # type: ignore[no-any-return]


class Telling(Answering):
    def __len__(self) -> int:
        return 3

    def __safeloader_state__(self) -> Any:
        return self.answer()


def raising(error: BaseException) -> Any:
    def answer() -> Any:
        raise error

    return answer


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize("kind", ["raises", "hangs", "ends the process"])
def test_a_dataset_is_not_asked_for_its_length(kind: str) -> None:
    """Neither here nor in another thread: it may wait for what the failed call left locked."""
    answers = {"raises": raising(ValueError()), "hangs": threading.Event().wait}
    state = described(Answering(answers.get(kind, raising(SystemExit(3)))))
    assert state["length"] is None
    assert "notes" not in state
    assert describe(Answering(threading.Event().wait), length=7)["length"] == 7


def test_lengths_of_containers_and_of_torchs_datasets_are_read() -> None:
    rows = TensorDataset(torch.ones(5, 2))
    for dataset in ([1] * 5, range(5), rows, Subset(Hostile(), [1] * 5), np.ones((5, 2))):  # type: ignore[arg-type]
        assert describe(dataset, length=99)["length"] == 5
    assert describe(ConcatDataset([rows, rows]))["length"] == 10


@pytest.mark.parametrize("error", [SystemExit(3), ValueError("x" * 10**6)])
def test_an_account_that_raises_is_noted(error: BaseException) -> None:
    (note,) = described(Telling(raising(error)))["notes"]
    assert note.startswith(f"__safeloader_state__ raised {type(error).__name__}: ")
    (note,) = described(Telling(raising(Unprintable())))["notes"]
    assert "raised SystemExit" in note


def test_an_account_is_asked_for_in_the_thread_that_asks() -> None:
    asked_in: list[threading.Thread] = []
    described(Telling(lambda: asked_in.append(threading.current_thread())))
    assert asked_in == [threading.current_thread()]


def test_a_dataset_may_tell_of_itself() -> None:
    state = described(Telling(lambda: {"epoch": 3, "rate": 0.5, "open": None, "files": ["a", "b"]}))
    assert state["told_by_dataset"] == {"epoch": 3, "rate": 0.5, "open": None, "files": ["a", "b"]}
    assert state["attributes"] == {}
    assert described(Telling(lambda: 7))["told_by_dataset"] == {"answer": 7}


def test_what_a_dataset_tells_is_made_json_and_bounded() -> None:
    wide = "\N{GRINNING FACE}" * 120
    told = described(
        Telling(
            lambda: {
                3: float("inf"),
                "big": 10**100_000,
                "object": Hostile(),
                "tensor": torch.ones(1),
                "list": list(range(10**6)),
                "deep": {"a": {"b": {"c": 1}}},
                "text": HostileText("x" * 1000),
                "wide": {n: dict.fromkeys(range(99), wide) for n in range(99)},
            }
        )
    )["told_by_dataset"]
    assert told["[3]"] == "inf"
    assert told["big"] == "<332193 bits>"
    assert told["object"] == f"<{HERE}.Hostile>"
    assert told["tensor"] == "torch.Tensor float32 [1] cpu (1)"
    assert told["list"][-1] == "... 999980 more"
    assert told["deep"] == {"a": {"b": "{'c': 1}"}}
    assert len(told["text"]) == 120
    assert isinstance(told["wide"], str)
    many = described(Telling(lambda: dict.fromkeys(range(10**6), "x" * 1000)))
    assert many["omitted_attributes"] == 10**6 - len(many["told_by_dataset"])


def test_an_account_that_raises_gives_way_to_the_attributes() -> None:
    state = described(Telling(raising(KeyError("epoch"))))
    assert state["notes"] == ["__safeloader_state__ raised KeyError: 'epoch'"]
    assert "told_by_dataset" not in state
    assert "answer" in state["attributes"]


def test_a_dataset_need_not_be_asked() -> None:
    def unasked() -> Any:
        harm.append("asked")
        raise RuntimeError("not to be called")

    before = threading.active_count()
    for dataset in (Answering(unasked), Telling(unasked)):
        state = described(dataset, ask=False)
        assert state["length"] is None
        assert state["attributes"].keys() == {"answer"}
        assert "told_by_dataset" not in state
        assert "notes" not in state
    assert threading.active_count() == before
    assert described(Hostile(), [], ask=False)["class"] == f"{HERE}.Hostile"
    assert "asked" not in described(Holding())


def test_names_of_classes_are_bounded() -> None:
    long = type("x" * 10**6, (Exception,), {})
    for state in (described(long()), described(Holding(x=long()))):
        assert len(state["class"]) <= 120
    assert len(attribute(long())["type"]) <= 120
    assert len(described(Telling(raising(long())))["notes"][0]) <= 240


def test_datasets_of_torch_are_described_sensibly() -> None:
    subset = described(Subset(Holding(rate=2), [1, 2]))
    assert subset["class"] == "torch.utils.data.dataset.Subset"
    assert subset["length"] == 2
    assert subset["attributes"]["dataset"]["repr"] == f"<{HERE}.Holding rate=2>"
    assert subset["attributes"]["indices"]["repr"] == "[1, 2]"
    pipe = described(IterableWrapper([1, 2]))
    assert pipe["attributes"]["iterable"]["repr"] == "[1, 2]"


def test_changes_in_one_process() -> None:
    holder = Holding(counter=0, handle=Config(), items=[1, 2], same=1, w=torch.zeros(1))
    start = described(holder)
    vars(holder).update(counter=137, cache={1: 1, 2: 2, 3: 3}, items=[1, 3], w=torch.ones(1))
    del vars(holder)["handle"]
    assert changes(start, described(holder)) == {
        "counter": "was 0, now 137",
        "handle": f"removed (was <{HERE}.Config rate=0.5 api_key=[redacted]>)",
        "items": "was [1, 2], now [1, 3]",
        "w": "was torch.Tensor float32 [1] cpu (0), now torch.Tensor float32 [1] cpu (1)",
        "cache": "added: dict of 3",
    }
    assert changes(start, start) == {}


def test_changes_of_lengths() -> None:
    assert changes(described([1, 2]), described([1, 2, 3])) == {"len()": "was 2, now 3"}
    assert changes(described(Holding(x=[1])), described(Holding(x=[1, 2])))["x"] == (
        "was list of 1, now list of 2"
    )
    assert changes(described(Holding()), describe(Holding(), length=3)) == {}


def test_changes_of_what_the_dataset_tells() -> None:
    def state(epoch: int) -> dict[str, Any]:
        return described(Telling(lambda: {"epoch": epoch, "files": ["a"]}))

    assert changes(state(0), state(3)) == {"epoch": "was 0, now 3"}
    assert changes(state(0), described(Telling(raising(ValueError())))) == {}


def test_changes_since_a_start_that_was_not_asked() -> None:
    items = [1, 2]
    dataset = Answering(items.__len__)
    start = described(dataset, ask=False)
    assert changes(start, described(dataset)) == {}
    items.append(3)
    dataset.extra = 1  # type: ignore[attr-defined]
    assert changes(start, described(dataset)) == {"extra": "added: 1"}
    assert changes(described(dataset), start) == {"extra": "removed (was 1)"}
    failed = Answering(raising(ValueError()))
    assert changes(described(failed, ask=False), described(failed)) == {}


def test_an_account_is_not_compared_with_attributes() -> None:
    dataset = Telling(lambda: {"epoch": 3})
    start = described(dataset, ask=False)
    assert changes(start, described(dataset)) == {}
    dataset.answer = raising(ValueError("no file"))
    dataset.extra = 1  # type: ignore[attr-defined]
    assert changes(start, described(dataset))["extra"] == "added: 1"


def test_changes_of_a_secret_do_not_show_it() -> None:
    told = changes(described(Holding(token=None)), described(Holding(token="hunter2")))
    assert told.keys() == {"token"}
    assert "hunter2" not in told["token"]


def test_differences_from_the_main_process() -> None:
    here = described(Holding(epoch=0, x=1))
    main = described(Holding(epoch=3, handle=[1]))
    assert differences(here, main) == {
        "epoch": "here 0, in the main process 3",
        "handle": "lost on the way from the main process (there: list of 1)",
        "x": "only here: 1",
    }
    assert differences(main, main) == {}


def test_what_was_omitted_is_not_called_lost() -> None:
    many = {f"a{n}": n for n in range(60)}
    assert differences(described(Holding(x=1, **many)), described(Holding(**many))) == {}


def test_classes_of_a_spawned_script_do_not_differ() -> None:
    main = type("Local", (), {"__module__": "__main__"})
    here = type("Local", (), {"__module__": "__mp_main__"})
    assert differences(describe(here()), describe(main())) == {}


def test_describing_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    described(Holding())
    assert threading.active_count() == before


leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text()),
    *(st.binary(), st.dates(), st.datetimes(), st.builds(torch.ones, st.integers(0, 9))),
    *(st.builds(Hostile), st.builds(Config)),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        *(st.lists(inner), st.tuples(inner), st.builds(HostileList, st.lists(inner))),
        st.dictionaries(st.text() | st.integers(), inner),
        st.builds(lambda x: Holding(x=x), inner),
    ),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), values))
def test_every_description_is_small_json_and_repeatable(attributes: dict[str, Any]) -> None:
    state = described(Holding(**attributes))
    assert len(state["attributes"]) + state.get("omitted_attributes", 0) == len(attributes)
    again = described(Holding(**attributes))
    assert changes(state, again) == differences(state, again) == {}
    described(Telling(lambda: attributes))


@pytest.mark.slow
@settings(deadline=None)
@given(values)
def test_every_text_is_bounded(value: Any) -> None:
    assert len(bounded_text(value)) <= 120
    bounded_text(value).encode()


def iterate() -> Iterator[int]:
    yield 1


def test_objects_of_the_interpreter_can_be_described(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "f", "w") as file:
        state = described(
            Holding(file=file, lock=threading.Lock(), generator=iterate(), code=iterate.__code__)
        )
    assert state["attributes"]["file"]["repr"].startswith("<_io.TextIOWrapper mode='w'")
    assert "notes" not in state


def test_of_a_module_the_empty_tables_of_hooks_are_left_out() -> None:
    class Files(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self._root = "data"

    told = described(Files())["attributes"]
    assert {"_root", "_parameters", "in_features"} <= told.keys()
    assert not [name for name in told if "hooks" in name]
