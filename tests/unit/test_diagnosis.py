"""What is logged of a silence: all of it once, then a line each time while nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.supervision.diagnosis import Stalls

AT_13 = Failure(
    phase="timeout",
    exception_type="WorkerTimeoutError",
    message="no batch came",
    traceback="worker 1, most recent call last:\n  File data.py, line 7, in read",
    index=13,
    batch=3,
    worker_id=1,
    hint="worker 1 (pid 71) is fetching index 13\n3 more idle\nlook at the disk",
)


class Silent:
    """In the place of a ``Diagnosis``."""

    found: Failure | None = AT_13

    def silence(self, waited_s: float, *, timeout: bool) -> Failure:
        if self.found is None:
            raise OSError("no /proc at postgresql://bob:hunter2@host")
        return self.found


def said_of(caplog: pytest.LogCaptureFixture, *silences: tuple[float, Any]) -> list[str]:
    diagnosis: Any = Silent()
    stalls = Stalls(diagnosis, LoaderLog([]))
    for waited_s, diagnosis.found in silences:
        stalls(waited_s)
    return [message.partition(": ")[2] for message in caplog.messages]


def test_what_has_not_changed_is_not_told_again(caplog: pytest.LogCaptureFixture) -> None:
    first, *further = said_of(caplog, (60.2, AT_13), (120.1, AT_13), (240.0, AT_13))
    assert first == str(AT_13)
    where = "worker 1 (pid 71) is fetching index 13"
    assert further == [
        f"still no batch after 120 seconds: {where}, as before",
        f"still no batch after 240 seconds: {where}, as before",
    ]


@pytest.mark.parametrize(
    "changed", [{"index": 14}, {"worker_id": 0}, {"batch": 4}, {"traceback": "elsewhere"}]
)
def test_what_has_changed_is_told(changed: Any, caplog: pytest.LogCaptureFixture) -> None:
    moved = dataclasses.replace(AT_13, **changed)
    assert said_of(caplog, (60, AT_13), (120, moved), (60, moved)) == [
        str(AT_13),
        str(moved),
        str(moved),  # another silence at the same place
    ]


def test_a_diagnosis_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    [told] = said_of(caplog, (60, None))
    assert told.startswith("no batch came for 60 s, and looking into it failed\nTraceback")
    assert told.endswith("OSError: no /proc at postgresql://bob:[redacted]@host")
