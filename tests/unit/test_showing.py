"""What is shown of a loader, as text and in a notebook; and nothing of the user's runs for it."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import safeloader
from safeloader import Recorder, SafeDataLoader, SafeStatefulDataLoader
from safeloader.delivery.audit import EpochAudit
from safeloader.handles import LoaderHandle
from safeloader.introspect.html_text import rows_of, table
from tests import datasets, faults


class Hostile(Dataset[int]):
    """Whatever is asked of it beside a sample fails the test."""

    asked = False

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        assert not type(self).asked, "the user's code was called"
        return self.size

    def __repr__(self) -> str:
        pytest.fail("the user's code was called")

    __str__ = __repr__


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> SafeDataLoader[int]:
    loader = SafeDataLoader(Hostile(), batch_size=4, key=lambda sample: sample)
    list(loader)
    monkeypatch.setattr(Hostile, "asked", True)
    return loader


def test_nothing_of_the_users_runs(
    hostile: SafeDataLoader[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert repr(hostile) == str(hostile)
    assert "Hostile, batch_size=4" in repr(hostile)
    assert "10 delivered" in hostile._repr_html_()
    assert "10 delivered" in hostile.audit._repr_html_()
    assert caplog.messages == []  # no fault of ours either


# ── repr ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, "list (10), batch_size=1, num_workers=0"),
        (
            {"batch_size": 64, "num_workers": 4, "shuffle": True, "drop_last": True},
            "list (10), batch_size=64, shuffled, drop_last, num_workers=4",
        ),
        (
            {"num_workers": 2, "persistent_workers": True, "pin_memory": True},
            "list (10), batch_size=1, num_workers=2, persistent_workers, pin_memory",
        ),
        ({"batch_size": None}, "list (10), batch_size=None, num_workers=0"),
        ({"sampler": WeightedRandomSampler([1.0], 1)}, "sampler=WeightedRandomSampler"),
        ({"batch_sampler": [[0, 1]]}, "list (10), batch_sampler=list, num_workers=0"),
        ({"verify": "raise", "on_error": "raise", "retries": 0}, "num_workers=0)"),
        (
            {"on_error": "skip", "retries": 2, "checksum": True, "seed": 3, "trace": "some/where"},
            "; trace='some/where', on_error='skip', retries=2, checksum=True, seed=3)",
        ),
        ({"verify": "warn", "recorder": Recorder()}, "num_workers=0; verify='warn')"),
    ],
)
def test_dataset_batches_workers_and_what_is_on(arguments: dict[str, Any], wanted: str) -> None:
    shown = repr(SafeDataLoader(list(range(10)), **arguments))
    assert shown.startswith("SafeDataLoader(list (10), ")
    assert wanted in shown


def test_what_the_environment_asks_for_is_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = SafeDataLoader([1], on_error="skip")
    monkeypatch.setenv("SAFELOADER_TRACE", "1")
    assert repr(loader).endswith("; on_error='skip', SAFELOADER_TRACE='1')")
    monkeypatch.setenv("SAFELOADER_TRACE", "0")
    assert repr(loader).endswith("; on_error='skip')")
    monkeypatch.setenv("SAFELOADER", "off")
    assert repr(loader).endswith("; SAFELOADER=off: nothing is recorded)")


def test_a_secret_is_not_shown() -> None:
    class Key:
        def __init__(self) -> None:
            self.api_key = "sesame"

        def __call__(self, sample: object) -> Any:
            return sample

    loader = SafeDataLoader([1], key=Key())
    assert "key=<" in repr(loader)
    assert "sesame" not in repr(loader) + loader._repr_html_()


def test_every_kind_of_loader_has_its_name() -> None:
    class Mine(SafeDataLoader[int]):
        pass

    assert repr(Mine([1])).startswith("Mine(list (1)")  # type: ignore[arg-type]  # no Dataset
    assert repr(SafeStatefulDataLoader([1])).startswith("SafeStatefulDataLoader(list (1)")
    instrumented = safeloader.instrument(DataLoader([1, 2]))  # type: ignore[arg-type]  # no Dataset
    assert repr(instrumented).startswith("SafeDataLoader(list (2)")
    assert repr(SafeDataLoader.__new__(SafeDataLoader)) == (
        "SafeDataLoader(no dataset, batch_size=None, sampler=NoneType, num_workers=None)"
    ).replace(", sampler=NoneType", "")
    stock: Any = DataLoader([1, 2, 3])  # type: ignore[arg-type]  # no Dataset
    handle = LoaderHandle(stock, {"on_error": "skip"}, "train.py:3", Recorder())
    assert repr(handle) == "LoaderHandle(DataLoader, first iterated at train.py:3)"
    assert "list (3)" in handle._repr_html_()
    assert "on_error=&#x27;skip&#x27;" in handle._repr_html_()
    del stock
    assert "no dataset" in handle._repr_html_()


def test_a_fault_of_ours_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> str:
        raise OSError("no such thing")

    loader = SafeDataLoader([1])
    monkeypatch.setattr("safeloader.showing.in_words", fails)
    monkeypatch.setattr("safeloader.showing.in_html", fails)
    with caplog.at_level(logging.ERROR, "safeloader"):
        assert repr(loader).startswith("<safeloader.loader.SafeDataLoader object at ")
        assert loader._repr_html_().startswith("&lt;safeloader.loader.SafeDataLoader object")
    assert "no such thing" in caplog.text


# ── in a notebook ────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """What a browser would see: texts, and whether tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def pages() -> dict[str, str]:
    plain = SafeDataLoader(list(range(10)), batch_size=4, drop_last=True)
    fresh = plain._repr_html_()
    list(plain)
    failing = SafeDataLoader(faults.Raises(at=5, length=12), batch_size=4)
    with pytest.raises(KeyError):
        list(failing)
    stream = SafeDataLoader(datasets.Stream(5), batch_size=2)
    list(stream)
    nasty = EpochAudit(
        3,
        skipped=np.array(["<script>alert(1)</script>", "\ud800"], dtype=object),
        counts={"skipped": 2},
        reasons={"<script>alert(1)</script>": 'a & "b"'},
        notes=("<img src=x onerror=alert(1)>",),
    )
    return {
        "fresh": fresh,
        "loader": plain._repr_html_(),
        "audit": plain.audit._repr_html_(),
        "failed": failing._repr_html_() + failing.audit._repr_html_(),
        "stream": stream._repr_html_() + stream.audit._repr_html_(),
        "nasty": nasty._repr_html_(),
        "unknown": EpochAudit(1).not_checked(4, "the ledger")._repr_html_(),
    }


PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_it_is_plain_html_that_loads_nothing(name: str) -> None:
    page = Page(PAGES[name])
    assert page.tags <= {"div", "table", "tr", "th", "td"}
    assert {key for key, _ in page.attributes} <= {"style", "scope"}
    assert "url(" not in PAGES[name]
    PAGES[name].encode()


@pytest.mark.parametrize("name", PAGES)
def test_texts_have_the_colours_of_the_notebook(name: str) -> None:
    styles = ";".join(value or "" for key, value in Page(PAGES[name]).attributes if key == "style")
    properties = [each.partition(":")[0] for each in styles.split(";")]
    assert "color" not in properties
    grounds = re.findall(r"background[\w-]*:(\w+)", styles)
    assert set(grounds) <= {"none"}


def test_a_loader_shows_its_newest_epoch() -> None:
    assert Page(PAGES["fresh"]).texts[-2:] == ["on", "the defaults"]
    texts = Page(PAGES["loader"]).texts
    shown = dict(zip(texts[1::2], texts[2::2], strict=True))
    assert texts[0] == "SafeDataLoader"
    assert shown["dataset"] == "list (10)"
    assert shown["batches"] == "batch_size=4, drop_last"
    assert shown["audit"] == "epoch 0: complete, ok; 10 drawn, 8 delivered"
    assert re.fullmatch(r"\d+% of the time; [\d,]+ samples/s", shown["waiting"])
    assert re.fullmatch(r"[\d.]+ ms \(median\), [\d.]+ ms \(95th percentile\)", shown["a fetch"])
    assert shown["last batch"].startswith("BatchRecord(epoch=0, batch=1, ")


def test_an_audit_shows_what_its_text_says() -> None:
    assert Page(PAGES["audit"]).texts == [
        "epoch 0: complete, ok; 10 drawn, 8 delivered",
        "dropped",
        "2, left out by drop_last: 8, 9",
    ]


@pytest.mark.parametrize(
    ("name", "colour"),
    [("audit", "#2da44e"), ("failed", "#e5534b"), ("unknown", "#bf8700"), ("fresh", "#8c959f")],
)
def test_a_bar_says_how_good_it_is(name: str, colour: str) -> None:
    assert set(re.findall(r"solid (#\w+)", PAGES[name])) == {colour}


def test_what_was_noticed_is_not_shown_as_good() -> None:
    assert "#bf8700" in EpochAudit(0, noticed=("the same random numbers",))._repr_html_()


def test_every_text_is_escaped() -> None:
    texts = "".join(Page(PAGES["nasty"]).texts)
    assert "<script>alert(1)</script>" in texts
    assert "<img src=x onerror=alert(1)>" in texts
    assert 'a & "b"' in texts
    assert "<script" not in PAGES["nasty"]
    assert "<img" not in PAGES["nasty"]


def test_rows_go_on_where_a_line_has_no_name() -> None:
    audit = EpochAudit(0, notes=("one: two",), resumed_at=3, delivered_before=12)
    assert rows_of(str(audit).split("\n")[1:]) == [
        ("", "resumed at batch 3; 12 delivered before"),
        ("note", "one: two"),
    ]


def test_a_title_alone_is_shown() -> None:
    assert Page(table("title", [])).texts == ["title"]


def test_a_batch_of_tensors_takes_no_room() -> None:
    loader = SafeDataLoader(torch.zeros(5000, 3), batch_size=5000)  # type: ignore[arg-type]  # no Dataset
    list(loader)
    assert len(loader._repr_html_()) < 5000
