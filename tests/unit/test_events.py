"""The stream of events: who is told of what, and what happens to a sink that raises."""

from __future__ import annotations

from typing import Any

import pytest

from safeloader.failures.loader_log import LoaderLog
from safeloader.provenance.events import Events


class Sink:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def failed(self, failure: Any) -> None:
        self.heard.append(failure)

    def closed(self, epoch: int, notes: Any) -> None:
        self.heard.append((epoch, notes))


class BadSink(Sink):
    def failed(self, failure: Any) -> None:
        raise ValueError("a bad sink")


def test_an_event_that_nobody_listens_to_has_nobody_to_call() -> None:
    events = Events(LoaderLog([]), [Sink(), None])
    assert events.delivered == events.drawn == ()
    assert len(events.failed) == len(events.closed) == 1


def test_every_sink_is_told_in_its_order() -> None:
    sinks = [Sink(), Sink()]
    events = Events(LoaderLog([]), sinks)
    events.tell("failed", "a")
    events.tell("closed", 3, ["note"])
    assert [sink.heard for sink in sinks] == [["a", (3, ["note"])]] * 2


def test_a_sink_that_raises_is_told_once_and_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    before, bad, after = Sink(), BadSink(), Sink()
    events = Events(LoaderLog([]), [before, bad, after])
    for _ in range(3):
        events.tell("failed", "a")
        events.tell("closed", 0, [])
    assert before.heard == after.heard == ["a", (0, [])] * 3
    assert bad.heard == []  # of nothing more, not even of what it took well
    (told,) = caplog.messages
    assert "BadSink failed and is off for the rest of this epoch; training goes on" in told
    assert "ValueError: a bad sink" in told
    assert all(record.exc_info is None for record in caplog.records)  # no frames, which hold data


def test_an_interrupt_goes_through() -> None:
    class Interrupted(Sink):
        def failed(self, failure: Any) -> None:
            raise KeyboardInterrupt

    sink = Interrupted()
    events = Events(LoaderLog([]), [sink])
    with pytest.raises(KeyboardInterrupt):
        events.tell("failed", "a")
    assert len(events.failed) == 1
