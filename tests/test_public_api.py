"""The public names, the signature and the refusals: what other people's code relies on."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import safeloader
from safeloader import Recorder, SafeDataLoader
from safeloader.handles import LoaderHandle
from safeloader.introspect.texts import bounded_text
from safeloader.records import Records
from safeloader.settings import Keywords

NAMES = [
    "SKIP",
    "AuditPart",
    "BatchRecord",
    "CollateError",
    "DeliveryError",
    "EpochAudit",
    "Failure",
    "GlobalBatchSampler",
    "Provenance",
    "Recorder",
    "ResumeError",
    "RunAudit",
    "SafeDataLoader",
    "SafeLoaderError",
    "SafeStatefulDataLoader",
    "SampleError",
    "SamplerError",
    "TransportError",
    "ValidationError",
    "WorkerCrashError",
    "WorkerInitError",
    "WorkerTimeoutError",
    "__version__",
    "audit_across_ranks",
    "doctor",
    "instrument",
    "loaders_of",
    "merge_audits",
    "replay",
    "sample_rng",
]
OUR_KEYWORDS = {
    "verify": "raise",
    "trace": None,
    "recorder": None,
    "key": None,
    "validate": None,
    "on_error": "raise",
    "retries": 0,
    "max_skipped": None,
    "on_crash": "raise",
    "stall_after": 60.0,
    "on_failure_dump": None,
    "transport": "auto",
    "checksum": False,
    "seed": None,
    "seed_per": "sample",
    "run_dir": None,
    "run_max_bytes": None,
    "run_sources": False,
}


def test_the_public_names() -> None:
    assert safeloader.__all__ == NAMES
    assert safeloader.__all__ == sorted(NAMES, key=lambda name: (not name.isupper(), name))


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    found = getattr(safeloader, name)
    if inspect.isclass(found):
        assert found.__doc__
        assert found.__module__.startswith("safeloader.")


def test_nothing_public_stands_outside_of_all() -> None:
    public = {
        name
        for name, value in vars(safeloader).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {name for name in NAMES if not name.startswith("_")}


def test_the_import_waits_for_no_torch_and_each_name_loads_what_it_needs() -> None:
    program = """
import sys
before = set(sys.modules)
import safeloader
heavy = {"torch", "numpy", "psutil", "multiprocessing", "logging"} & (set(sys.modules) - before)
assert not heavy, heavy
assert set(safeloader.__all__) <= set(dir(safeloader))
assert not hasattr(safeloader, "no_such_name")
import pickle
assert pickle.loads(pickle.dumps(safeloader.errors.SampleError)) is safeloader.SampleError
assert "torch" not in sys.modules
from safeloader import *
assert {name: globals()[name] for name in safeloader.__all__}
assert safeloader.loader.SafeDataLoader is SafeDataLoader
assert pickle.loads(pickle.dumps(SafeDataLoader)) is SafeDataLoader
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_is_a_version() -> None:
    assert [part.isdigit() for part in safeloader.__version__.split(".")[:2]] == [True, True]


def test_the_signature() -> None:
    parameters = list(inspect.signature(SafeDataLoader.__init__).parameters.values())
    kinds = [(each.name, each.kind.description) for each in parameters]
    assert kinds == [
        ("self", "positional or keyword"),
        ("dataset", "positional or keyword"),
        ("args", "variadic positional"),
        *((name, "keyword-only") for name in OUR_KEYWORDS),
        ("kwargs", "variadic keyword"),
    ]
    defaults = {each.name: each.default for each in parameters if each.name in OUR_KEYWORDS}
    assert defaults == OUR_KEYWORDS


def test_no_keyword_of_ours_is_one_of_torchs() -> None:
    assert not set(OUR_KEYWORDS) & set(inspect.signature(DataLoader.__init__).parameters)


def test_the_public_attributes_of_the_classes() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    added = {"last_batch", "provenance", "audit", "audits", "replay", "transport_stats", "metrics"}
    added |= {"summary", "audit_part", "mark"}
    ours = public(SafeDataLoader) | public(Keywords) | public(Records)
    assert ours == added | set(OUR_KEYWORDS)
    assert public(LoaderHandle) == {"dataset"}
    read = {"to_numpy", "to_pandas", "lookup", "batch", "slowest", "save"}
    assert public(safeloader.Provenance) == read
    assert {"epochs", "forgotten"} <= public(Recorder)
    assert {"index", "failure"} <= public(safeloader.SafeLoaderError)
    assert {"to_dict"} <= public(safeloader.Failure)
    assert {"ok", "to_dict"} <= public(safeloader.EpochAudit)


def test_the_keywords_are_instance_attributes() -> None:
    recorder = Recorder()
    given = {
        "verify": "warn",
        "trace": False,
        "recorder": recorder,
        "key": repr,
        "validate": [lambda sample, index: None],
        "on_error": "skip",
        "retries": 2,
        "max_skipped": 0.5,
        "on_crash": "restart",
        "stall_after": 5,
        "on_failure_dump": None,
        "transport": "torch",
        "checksum": True,
        "seed": 3,
        "seed_per": "batch",
        "run_dir": False,
        "run_max_bytes": 1 << 20,
        "run_sources": True,
    }
    loader = SafeDataLoader([1], **given)
    assert {name: vars(loader)[name] for name in OUR_KEYWORDS} == given
    plain = set(vars(DataLoader([1])))
    extra = set(vars(loader)) - plain - set(OUR_KEYWORDS)
    assert all(name.startswith("_") for name in extra)


def test_a_subclass_that_hands_keywords_on_shows_ours() -> None:
    class Derived(SafeDataLoader[Any]):
        def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra

    names = list(inspect.signature(Derived.__init__).parameters)
    assert names == ["self", "args", "extra", *OUR_KEYWORDS, "kwargs"]


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No thread, file or open descriptor is left behind, and nothing in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    threads = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield tmp_path
    assert set(threading.enumerate()) == threads
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(str(path) for path in tmp_path.rglob("*")) == [str(tmp_path / "a file")]


def refusal(kind: type[Exception], **arguments: Any) -> str:
    dataset = arguments.pop("dataset", [1, 2, 3])
    with pytest.raises(kind) as info:
        SafeDataLoader(dataset, **arguments)
    return str(info.value)


@pytest.mark.parametrize("bad", ["loud", "Raise", "", None, True, 3, ["raise"]])
def test_verify_is_one_of_three(bad: Any, leaves_nothing: Path) -> None:
    said = refusal(ValueError, verify=bad)
    assert said.startswith("verify must be 'raise'")
    assert "'warn' or 'off'" in said
    assert said.endswith(f"got {bad!r}")


@pytest.mark.parametrize("bad", [3, "id", ["id"], True])
def test_key_is_a_callable(bad: Any, leaves_nothing: Path) -> None:
    said = refusal(TypeError, key=bad)
    assert "key must be a callable that takes a sample" in said
    assert "lambda sample: sample['id']" in said
    assert repr(bad) in said


@pytest.mark.parametrize("bad", ["x", 3, True, {}, Recorder])
def test_recorder_is_a_recorder(bad: Any, leaves_nothing: Path) -> None:
    said = refusal(TypeError, recorder=bad)
    assert "recorder must be a safeloader.Recorder, or None" in said
    assert bounded_text(bad) in said


@pytest.mark.parametrize(
    ("name", "bad", "right"),
    [
        *(("on_error", bad, "'raise', 'skip'") for bad in ("ignore", None, True, 3)),
        *(("retries", bad, "an int, 0 or more") for bad in (-1, 1.0, True, None, "3")),
        *(
            ("max_skipped", bad, "a count")
            for bad in (-1, 0.0, 1.5, -0.1, True, "1%", float("nan"))
        ),
        *(("on_crash", bad, "'raise' or 'restart'") for bad in ("skip", None, True)),
        *(("stall_after", bad, "0 for never") for bad in (-1, None, True, "60", float("nan"))),
    ],
)
def test_what_is_out_of_range_is_refused(
    name: str, bad: Any, right: str, leaves_nothing: Path
) -> None:
    said = refusal(ValueError, **{name: bad})
    assert said.startswith(f"{name} must be ")
    assert right in said
    assert said.endswith(f"got {bad!r}")


@pytest.mark.parametrize("name", ["a file", "a file/failures"])
def test_a_folder_for_failures_that_cannot_be_written_to_is_refused(
    name: str, leaves_nothing: Path
) -> None:
    folder = leaves_nothing / name
    said = refusal(ValueError, on_failure_dump=folder)
    assert said.startswith(f"failures cannot be written to {str(folder)!r}: ")
    assert "on_failure_dump must be a folder" in refusal(TypeError, on_failure_dump=3)


def test_a_stream_is_not_restarted(leaves_nothing: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    said = refusal(ValueError, dataset=Stream(), on_crash="restart", num_workers=1)
    assert "on_crash='restart' needs a map-style dataset" in said


@pytest.mark.parametrize("bad", [3.5, 1, 0, b"traces", ["traces"], object()])
def test_trace_is_none_a_bool_or_a_folder(bad: Any, leaves_nothing: Path) -> None:
    said = refusal(TypeError, trace=bad)
    assert "trace must be None (ask SAFELOADER_TRACE), False, True (log lines) or a folder" in said
    assert bounded_text(bad) in said


@pytest.mark.parametrize("name", ["a file", "a file/traces", "a file/deep/er"])
@pytest.mark.parametrize("by", ["keyword", "path", "environment"])
def test_a_trace_folder_at_or_below_a_file_is_refused(
    name: str, by: str, leaves_nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leaves_nothing / name
    if by == "environment":
        monkeypatch.setenv("SAFELOADER_TRACE", str(folder))
        said = refusal(ValueError)
    else:
        said = refusal(ValueError, trace=folder if by == "path" else str(folder))
    assert said.startswith(f"trace files cannot be written to {str(folder)!r}: ")
    assert "a folder that can be written to, 1 for log lines, or 0 for nothing" in said


@pytest.mark.parametrize("value", ["maybe", "0", "1", "true", "of"])
def test_the_switch_is_off_on_or_unset(
    value: str, leaves_nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELOADER", value)
    said = refusal(ValueError)
    assert "SAFELOADER must be 'off'" in said
    assert "'on' or unset" in said
    assert repr(value) in said


@pytest.mark.parametrize("value", ["off", "OFF", " off ", "on", "On", ""])
def test_the_switch_is_read_generously(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER", value)
    loader = SafeDataLoader([1, 2], batch_size=2)
    assert [batch.tolist() for batch in loader] == [[1, 2]]
    assert (loader.last_batch is None) == (value.strip().lower() == "off")


@pytest.mark.parametrize(
    "bad",
    [
        {"no_such_argument": 3},
        {"tracing": True},
        {"Verify": "raise"},
    ],
)
def test_an_unknown_keyword_is_a_type_error_that_names_it(
    bad: dict[str, Any], leaves_nothing: Path
) -> None:
    (name,) = bad
    assert repr(name) in refusal(TypeError, **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_workers": -1},
        {"batch_size": 0},
        {"shuffle": True, "sampler": [0]},
        {"batch_sampler": [[0]], "drop_last": True},
        {"prefetch_factor": 2},
        {"persistent_workers": True},
        {"timeout": -1},
        {"multiprocessing_context": "no such", "num_workers": 1},
    ],
)
def test_torchs_own_refusals_are_unchanged(bad: dict[str, Any], leaves_nothing: Path) -> None:
    with pytest.raises(Exception) as stock:  # noqa: PT011  (whatever torch raises)
        DataLoader([1, 2, 3], **bad)
    assert refusal(type(stock.value), **bad) == str(stock.value)


def test_a_bad_keyword_is_told_before_a_bad_argument_of_torch(leaves_nothing: Path) -> None:
    assert "verify" in refusal(ValueError, verify="loud", num_workers=-1)


def test_a_good_loader_leaves_nothing_either(leaves_nothing: Path) -> None:
    SafeDataLoader([1, 2, 3], num_workers=2, trace=leaves_nothing / "traces")


def test_off_looks_at_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER", "off")
    monkeypatch.setenv("SAFELOADER_TRACE", "/proc/no")
    assert len(list(SafeDataLoader([1, 2], on_failure_dump="/proc/no"))) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_full_disk_refuses_no_loader(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert len(list(SafeDataLoader([1, 2], on_failure_dump=tmp_path))) == 2
