"""The text of a failure, for a person. Runs in: both.

Torch's words come first, for logs and tests that look for them; what to know and what to do comes
last, where a terminal shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safeloader.introspect.texts import index_text, indices_text
from safeloader.introspect.values import bounded, short_type_name

if TYPE_CHECKING:
    from safeloader.failures.failure import Failure


def report(failure: Failure) -> Iterator[str]:
    """The lines of ``str(failure)``."""
    if failure._where:
        yield f"Caught {short_type_name(failure.exception_type)} {failure._where}."
        if failure.traceback:
            yield f"Original {failure.traceback.rstrip()}"
    else:
        yield failure.message
        if failure.phase == "sampler":  # raised while torch drew ahead: the live one is gone
            yield f"Original {failure.traceback.rstrip()}"
    yield ""
    yield _headline(failure)
    *found, next_step = failure.hint.split("\n")
    yield from (f"  {line}" for line in found)
    if failure.phase in ("crash", "timeout") and failure.traceback:
        yield "  Python stack, most recent call last:" if failure.phase == "crash" else "  stacks:"
        yield from (f"  {line}" for line in failure.traceback.splitlines())
    if failure.dataset_state:
        yield from _state_lines(failure.dataset_state)
    if next_step:
        yield f"  next: {next_step}"


_DOING = {
    "init": "in worker_init_fn",
    "sampler": "while drawing from the sampler",
    "sample": "while fetching the sample",
    "collate": "while collating the batch",
    "transport": "while handing over the batch",
    "delivery": "while checking what came against what was drawn",
    "crash": "died",
    "timeout": "gave no batch",
}


def _headline(failure: Failure) -> str:
    parts = []
    if failure.index is not None:
        parts.append(f"dataset index {index_text(failure.index)}")
    elif failure.phase not in ("init", "sampler") and failure.indices:
        parts.append(f"dataset indices {indices_text(failure.indices, most=16, counted=True)}")
    place = [f"position {failure.position}"] if failure.position is not None else []
    if failure.batch is not None:
        place.append(f"batch {failure.batch}")
    if failure.epoch is not None and failure.phase != "init":  # which failed before any epoch's
        place.append(f"epoch {failure.epoch}")
    if place:
        where = ", ".join(place)
        parts.append(f"({where})" if parts else where)
    if parts:
        parts[-1] += ","
    if failure.phase in ("crash", "timeout"):
        return " ".join(["safeloader:", _worker_line(failure), *parts]).rstrip(",")
    doing = _DOING[failure.phase]
    if failure.phase == "transport" and failure.batch is None:
        doing = "while starting the workers"
    who = "the main process" if failure.worker_id is None else f"worker {failure.worker_id}"
    rank = "" if failure.rank is None else f", rank {failure.rank}"
    parts.append(f"{doing}, in {who} (pid {failure.pid}{rank}):")
    head, _, rest = failure.message.partition("\n")
    head = bounded(head, 300)
    parts.append(short_type_name(failure.exception_type) + (f": {head}" if head else ""))
    return "safeloader: " + " ".join(parts) + (" ..." if rest else "")


def _worker_line(failure: Failure) -> str:
    rank = "" if failure.rank is None else f", rank {failure.rank}"
    if failure.worker_id is None:
        return f"no batch came, and no worker is at work{rank}"
    known = failure.index is not None or failure.indices
    at = " at" if known else " in" if failure.epoch is not None else ""
    return f"worker {failure.worker_id} (pid {failure.pid}{rank}) {_DOING[failure.phase]}{at}"


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    length = "" if state.get("length") is None else f", length {state['length']}"
    yield f"  dataset: {state.get('class')}{length}"
    told = state.get("told_by_dataset")
    if told:
        yield f"    says of itself: {bounded(str(told), 400)}"
    attributes = state.get("attributes") or {}
    for name, about in list(attributes.items())[:8]:
        facts = [str(about.get("type", "?"))]
        facts += [f"{key} {about[key]}" for key in ("shape", "dtype", "length") if key in about]
        shown = about.get("repr", "")
        # An array's text repeats its type and shape unless it is small enough to be shown.
        text = "" if not shown or shown.startswith(facts[0]) else f" = {shown}"
        yield f"    .{name}: {', '.join(facts)}{bounded(text, 100)}"
    unshown = len(attributes) - 8 + int(state.get("omitted_attributes", 0))
    if unshown > 0 and len(attributes) >= 8:
        yield f"    and {unshown} more attributes (exc.failure.dataset_state)"
    for key, words in (
        ("changed_since_worker_start", "changed since the worker started"),
        ("differs_from_main", "differs from the main process's copy"),
    ):
        for name, what in list((state.get(key) or {}).items())[:6]:
            yield f"    {words}: {name} {bounded(str(what), 160)}"
    for note in (state.get("notes") or [])[:3]:
        yield f"    note: {bounded(str(note), 160)}"
