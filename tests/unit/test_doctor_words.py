"""What the doctor says of facts: true for this loader, with advice that cures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    dataloader,
)

from safeloader import SafeDataLoader, SafeLoaderError
from safeloader.examining import resuming
from safeloader.examining.report import Examination, Finding
from safeloader.examining.samples import raised
from safeloader.examining.sending import weighed
from safeloader.examining.subject import Subject
from safeloader.examining.wording import findings_of, recommended, resume_text, rows_of

OWN: dict[str, Any] = {"workers": 2, "prefetch": 2, "method": "fork", "persistent": False}
ALONE: dict[str, Any] = {"workers": 0, "prefetch": None, "method": "fork", "persistent": False}
ENDING = {
    "look": "samples",
    "seconds": 5.0,
    "whole_s": 30.0,
    "busy": 0.0,
    "locked": False,
    "stack": "",
    "printed": "",
    "setting": None,
    "all_came_alone": True,
}
RAISED = {"type": "OSError", "text": "network", "at": "a.py:3"}


def words(kind: str, own: dict[str, Any] = OWN, **facts: Any) -> Finding:
    [found] = findings_of([(kind, facts)], own, forked=True, lacks_guard=False)
    return found


def ended(own: dict[str, Any] = OWN, **facts: Any) -> Finding:
    return words("ending", own, **{**ENDING, "method": None, **facts})


@pytest.mark.parametrize(
    ("what", "index", "code", "advice"),
    [
        (
            "fetching",
            "3",
            -11,
            "run dataset[3] in a fresh process under a debugger; a worker would",
        ),
        ("fetching", "3", 4, "look for sys.exit, os._exit or a library that ends the process: run"),
        ("iterating the dataset", "3", -6, "run next() of iter(dataset) up to sample 3 in a fresh"),
        ("fetching", "3", -9, "look at the memory that dataset[3] takes: so the kernel ends"),
        (
            "asking __getitems__",
            "[0, 1]",
            -6,
            "run dataset.__getitems__([0, 1]) in a fresh process",
        ),
        ("drawing indices", None, -6, "run it in a fresh process under a debugger"),
    ],
)
def test_what_died_is_run_again_as_it_was_run(
    what: str, index: str | None, code: int, advice: str
) -> None:
    assert ended(how="died", what=what, index=index, code=code).advice.startswith(advice)


def test_the_loaders_timeout_is_advised_where_it_works() -> None:
    hung = {"how": "hung", "what": "fetching", "index": "3", "code": None}
    assert "timeout= of the loader" in ended(**hung).advice
    assert ended(ALONE, **hung).advice == "give what it waits for a time limit"


def test_what_works_without_a_word_may_be_a_loop_without_an_end() -> None:
    hung = {"how": "hung", "what": "fetching", "index": "3", "code": None}
    assert "an endless loop" in ended(**hung, busy=0.9).evidence
    assert "an endless loop" not in ended(**hung).evidence


def test_what_takes_long_to_begin_is_told_once() -> None:
    slow = {**ENDING, "how": "slow", "index": None, "code": None, "setting": [2, 2, "fork"]}
    heard = [
        ("ending", {**slow, "what": "starting 2 workers by fork", "method": "fork", "busy": 0.5}),
        ("ending", {**slow, "what": "starting: 2 workers by spawn", "method": "spawn"}),
    ]
    [found] = findings_of(heard, OWN, forked=True, lacks_guard=False)
    assert found.kind == "slow_start"
    assert found.answer == ("slow: no batch in 5 s; give it longer: doctor(loader, seconds=120)")
    assert found.evidence.endswith("it worked: 50 % of a processor was used")
    assert all(row.error.startswith("no batch yet") for row in rows_of(heard))
    assert recommended(heard) == (None, "")


def test_one_worker_is_one() -> None:
    hung = {"how": "hung", "what": "starting: 1 workers by spawn", "index": None, "code": None}
    answer = ended(**hung, setting=[1, 2, "spawn"], method="spawn").answer
    assert answer == "no batch came for 5 s while starting 1 worker by spawn"


def test_what_was_not_searched_to_the_end_is_not_said_to_have_come() -> None:
    hung = {"how": "hung", "what": "starting: 1 workers by fork", "index": None, "code": None}
    setting = {"setting": [1, 2, "fork"], "method": "fork"}
    assert ended(**hung, **setting).advice.startswith("samples came without")
    advice = ended(**hung, **setting, all_came_alone=False).advice
    assert advice.endswith("not seen to the end: give it longer, doctor(loader, seconds=120)")


def slow(own: dict[str, Any], **times: float) -> str:
    facts = {"first_s": 0.1, "first_again_s": 0.1, "median_s": 0.01, "worst_s": 0.02, **times}
    return words("samples", own, worst_index="3", count=9, **facts).advice


def test_persistent_workers_are_advised_to_whom_they_help() -> None:
    assert "persistent_workers=True" in slow(OWN, first_s=9.0)
    told = slow({**OWN, "persistent": True}, first_s=9.0)
    assert "persistent_workers" not in told
    assert "each epoch" not in told


def test_another_order_is_advised_to_whom_it_helps() -> None:
    assert "in_order=False" in slow(OWN, worst_s=3.0)
    assert "in_order" not in slow(ALONE, worst_s=3.0)


def test_set_epoch_is_spoken_of_where_it_was_called() -> None:
    facts = {"path": "dataset.epoch", "here": 3, "there": 0, "epoch": 3, "persistent": True}
    called = words("stale", **facts, set_by=["dataset"])
    assert called.answer.startswith("set_epoch does not reach the workers: dataset.epoch is 3 here")
    assert words("stale", **facts, set_by=[]).answer.startswith("dataset.epoch does not reach")


def test_who_has_no_workers_is_told_what_they_would_do() -> None:
    facts = {"same": ["dataset.rng"], "same_global": [], "init": False}
    assert words("generators", **facts).answer.startswith("workers draw the same random numbers")
    assert words("generators", ALONE, **facts).answer.startswith("two workers would draw the same")


def test_workers_are_not_blamed_for_samples_that_fail_without_them() -> None:
    failed = {"method": "fork", **RAISED}
    assert "look at worker_init_fn" in words("workers_raise", **failed).advice
    heard = [("raises", {"index": "3", "came": True, **RAISED}), ("workers_raise", failed)]
    found = findings_of(heard, OWN, forked=True, lacks_guard=False)
    assert [each.advice for each in found if each.kind == "workers_raise"] == [
        "samples fail without workers too: mend that first"
    ]


def test_an_empty_dataset_is_told_once() -> None:
    heard: Any = [("nothing_drawn", {}), ("empty", {})]
    assert [each.answer for each in findings_of(heard, OWN, forked=True, lacks_guard=False)] == [
        "the dataset is empty"
    ]
    assert words("nothing_drawn").answer == "the sampler gives no index"


def test_what_follows_from_a_guard_that_is_lacking_is_not_told_by_itself() -> None:
    facts = {**ENDING, "how": "hung", "what": "starting: 1 workers by spawn", "index": None}
    heard: Any = [
        ("ending", {**facts, "code": None, "setting": [1, 2, "spawn"], "method": "spawn"})
    ]
    kinds = {
        lacks: [each.kind for each in findings_of(heard, OWN, forked=True, lacks_guard=lacks)]
        for lacks in (True, False)
    }
    assert kinds == {True: ["guard"], False: ["hangs"]}
    assert rows_of(heard, lacks_guard=True)[0].error.startswith("it imports the program")
    assert rows_of(heard)[0].error == "no batch came after 5.0 s"


# ── what is sent, and what can be resumed ────────────────────────────────────────────────────────


def test_a_tensor_is_shared_with_a_worker_and_not_sent() -> None:
    assert weighed({"a": np.zeros(100_000)}) > 800_000
    assert weighed({"a": torch.zeros(100_000)}) < 2000


class Shuffled(Sampler[list[int]]):
    """A batch sampler with an order of its own, over a sampler that has none."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        order = [*self.sampler]
        return iter([[order[k]] for k in torch.randperm(len(order)).tolist()])


def resumed(**options: Any) -> str:
    heard: Any = []

    class Talk:
        def tell(self, kind: str, **facts: Any) -> None:
            heard.append((kind, facts))

    resuming.look(Subject(DataLoader(range(8), **options)), Talk())  # type: ignore[arg-type]
    return resume_text(heard)


def test_the_order_of_a_batch_sampler_of_ones_own_is_not_known() -> None:
    said = resumed(batch_sampler=Shuffled(SequentialSampler(range(8))))
    assert said.startswith("not known: Shuffled has no state_dict()")
    plain = BatchSampler(SequentialSampler(range(8)), 2, False)
    assert resumed(batch_sampler=plain).startswith("yes, at the beginning of an epoch")
    assert "torch's global generator" in resumed(sampler=RandomSampler(range(8)))


@pytest.mark.parametrize(
    ("left_out", "head"),
    [
        ((), "L: nothing bad found (1.0 s)"),
        (("start method spawn: no time was left",), "L: nothing bad found (1.0 s)"),
        (
            ("samples, length: the 1 s were up",),
            "L: nothing bad found in what was looked at (1.0 s)",
        ),
    ],
)
def test_nothing_bad_is_said_of_what_was_looked_at(left_out: tuple[str, ...], head: str) -> None:
    report = Examination(
        loader="L",
        findings=(),
        samples={},
        settings=(),
        recommended=None,
        own={},
        cores=2,
        sent={},
        resume="",
        not_looked_at=left_out,
        output="",
        output_bytes=0,
        seconds=1.0,
    )
    assert str(report).splitlines()[0] == head


def test_of_an_error_of_a_recorded_loader_it_says_what_was_raised() -> None:
    class Gone:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            raise OSError(f"no file {index}.png")

    with pytest.raises(SafeLoaderError) as caught:
        list(SafeDataLoader(Gone()))
    told = raised(caught.value)
    assert told["type"].endswith("SampleError(OSError)")
    assert told["text"] == "no file 0.png"
    assert "test_doctor_words.py:" in told["at"]


def test_of_a_program_that_trains_as_it_is_imported_its_own_lines_are_shown() -> None:
    def frame(file: str, name: str) -> str:
        return f'  File "{file}", line 3, in {name}\n    {name}()'

    stack = [
        frame("/home/me/train.py", "<module>"),
        *(frame(dataloader.__file__, "next") for _ in range(9)),
        frame(resuming.__file__, "ours"),
    ]
    facts = {**ENDING, "stack": "\n".join(stack)}
    found = words("ending", **facts, method=None, how="hung", index=None, code=None, what="loading")
    assert "does not come to an end" in found.answer
    assert found.evidence == stack[0]
