"""Samples, fetched one by one and twice: are they the same, is nothing changed. Runs in: main."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from safeloader.checks.leaves import leaves_of
from safeloader.checks.schema import structure_of
from safeloader.examining.probe import print_of, states_of
from safeloader.examining.stored import changes, stored
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Talk
from safeloader.introspect.byte_code import overwrites
from safeloader.introspect.fingerprint import difference, fingerprint
from safeloader.introspect.frames import frames_of, user_frames
from safeloader.introspect.generator_kinds import put_back, state_of
from safeloader.introspect.generators import generators_of
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import array_facts, cut, exception_text, own_length, type_name

_MOST = 48  # indices
_TOGETHER = 6  # indices that `__getitems__` is asked for
_STREAM_TWICE = 8
_FAILED_MAX = 5
_FAILED = object()  # in the place of a sample that did not come
_GOES_ON = -1  # as a seed: the generators go on where they stand
_ATTRIBUTE = re.compile(r"dataset\.(\w+)(?:\[|$)")
_IN_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")
_PLACE = re.compile(r'^  File "(.+)", line (\d+)', re.MULTILINE)


class Numbers:
    """The random generators, global and held by the dataset, as they stand: to be put back."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._held = [(each, state_of(each)) for each in generators_of(dataset).values()]
        self._seed = seed

    def set(self, seed: int | None = None) -> None:
        """Seed the global ones anew, and put the held ones where they stood, but ``_GOES_ON``."""
        if seed == _GOES_ON:
            return
        number = self._seed if seed is None else seed
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        for generator, state in self._held:
            put_back(generator, state)


def look(subject: Subject, talk: Talk) -> None:
    """Fetch each of some indices twice."""
    if subject.is_stream:
        _look_at_stream(subject, talk)
        return
    talk.at("drawing indices")
    indices = subject.indices(min(_MOST, max(2, talk.samples // 8)))
    if not indices:
        if not subject.excluded:  # else all that it gives is known not to come
            talk.tell("nothing_drawn")
        return
    before = stored(subject.dataset, indices)
    fetches = _Fetches(subject, talk)
    measured: list[tuple[Any, float, int]] = []
    different: list[tuple[Any, str]] = []
    good: list[Any] = []
    first_again_s = 0.0
    for index in indices:
        if talk.left() < 0 or fetches.failed >= _FAILED_MAX:
            break
        sample = fetches.one(index)
        if sample is _FAILED:
            continue
        taken_s = fetches.taken_s
        talk.at("looking at the sample of", index)
        prints = fingerprint(sample, None)
        measured.append((index, taken_s, size_of(sample)))
        again = fetches.one(index, "fetching again")
        if again is _FAILED:
            continue
        if len(measured) == 1:
            first_again_s = fetches.taken_s
        found = difference(prints, again, None)
        if found is None and len(prints) != len(fingerprint(again, None)):
            different.append((index, "sample"))
        elif found is not None:
            different.append((index, found.path.replace("batch", "sample", 1)))
        good.append(index)
    _tell_sizes(talk, measured, first_again_s)
    if different:
        changed = [
            each
            for each in changes(before, stored(subject.dataset, indices))
            if not _is_scratch(subject.dataset, each.path)
        ]
        index, path = different[0]
        talk.tell(
            "differs",
            index=index_text(index),
            path=path,
            count=len(different),
            of=len(good),
            changed=[each.path for each in changed[:3]],
            elements=[each.path for each in changed if each.element][:3],
        )
    if good and not different and talk.left() > 0:
        _look_at_seeding(subject, talk, fetches, good)
    if len(good) and talk.left() > 0 and not different:
        _look_at_getitems(subject, talk, fetches, good)


def _is_scratch(dataset: Any, path: str) -> bool:
    """Whether what is held there goes into no sample: it is written first, each time."""
    found = _ATTRIBUTE.match(path)
    return found is not None and overwrites(dataset, found[1])


class _Fetches:
    """The one way in which samples are fetched here: what one raises is told, and no look ends.

    Attributes:
        failed: how many indices raised.
        taken_s: how long the last one took.
        numbers: the generators, put back before each.
    """

    def __init__(self, subject: Subject, talk: Talk) -> None:
        self._subject, self._talk = subject, talk
        self._came: set[str] = set()
        self._told: set[str] = set()
        self.numbers = Numbers(subject.dataset, 7)
        self.failed = 0
        self.taken_s = 0.0

    def one(self, index: Any, what: str = "fetching", seed: int | None = None) -> Any:
        """The sample of an index; ``_FAILED`` where it raises, which is told."""
        sample, exc = self._asked(index, what, seed)
        if exc is None:
            self._came.add(index_text(index))
            return sample
        came = index_text(index) in self._came
        if not came:  # it may come at another time, and then no data are bad
            came = self._asked(index, "fetching again", seed)[1] is None
        name = index_text(index)
        if not came:
            self._subject.excluded.add(name)
        if name not in self._told:
            self._told.add(name)
            self.failed += 1
            self._talk.tell("raises", index=name, came=came, **raised(exc))
        return _FAILED

    def _asked(self, index: Any, what: str, seed: int | None) -> tuple[Any, Exception | None]:
        self._talk.at(what, index)
        self.numbers.set(seed)
        self._talk.fetched()
        start = time.perf_counter()
        try:
            return self._subject.sample(index), None
        except Exception as exc:
            return None, exc
        finally:
            self.taken_s = time.perf_counter() - start


def _look_at_seeding(subject: Subject, talk: Talk, fetches: _Fetches, good: list[Any]) -> None:
    """Whether fetching puts a global generator to a fixed place: the same draws for each index."""
    after: list[dict[str, int]] = []
    if good[0] is good[-1]:
        return
    # One seed for a group of indices (the frames of a clip) is no fixed number.
    among = [good[0], *good[1 : -1 : max(1, len(good) // 6)], good[-1]]
    for seed, index in enumerate(among, 11):
        if fetches.one(index, seed=seed) is _FAILED:
            return
        after.append(states_of(subject.dataset))
    names = ("random", "numpy", "torch")
    fixed = [name for name in names if len({each[name] for each in after}) == 1]
    if fixed:
        talk.tell("seeds", generators=fixed, indices=[index_text(good[0]), index_text(good[-1])])


def _look_at_getitems(subject: Subject, talk: Talk, fetches: _Fetches, good: list[Any]) -> None:
    """Whether a batch that is asked for at once is the samples that it is made of."""
    dataset = subject.dataset
    together = getattr(dataset, "__getitems__", None)
    if not callable(together) or not subject.batched:
        return
    asked = good[:_TOGETHER]
    fetches.numbers.set()
    single = []
    for index in asked:  # all under one run of random numbers, as __getitems__ is
        single.append(fetches.one(index, seed=_GOES_ON))
        if single[-1] is _FAILED:
            return
    prints = [fingerprint(sample, None) for sample in single]
    talk.at("asking __getitems__", asked)
    fetches.numbers.set()
    try:
        came = list(together(list(asked)))
    except Exception as exc:
        talk.tell("getitems_raises", indices=index_text(asked), **raised(exc))
        return
    talk.fetched(len(asked))
    if len(came) != len(asked):
        talk.tell("getitems_count", asked=len(asked), came=len(came))
        return
    kinds = [structure_of(sample) for sample in single]
    for index, sample, one, kind in zip(asked, came, prints, kinds, strict=True):
        other = structure_of(sample)
        if other != kind:
            path = next((each for each in kind if other.get(each) != kind[each]), "sample")
            was, now = kind.get(path, "nothing"), other.get(path, "nothing")
            talk.tell("getitems", index=index_text(index), path=path, single=was, together=now)
            return
        found = difference(one, sample, None)
        if found is not None and not _is_random(subject, fetches, index):
            path = found.path.replace("batch", "sample", 1)
            talk.tell("getitems", index=index_text(index), path=path, single="", together="")
            return


def _is_random(subject: Subject, fetches: _Fetches, index: Any) -> bool:
    """Whether a sample depends on random numbers: then the two may draw them in another order."""
    seen = set()
    for seed in (7, 21, 22, 23):
        fetches.numbers.set(seed)
        before = states_of(subject.dataset)
        sample = fetches.one(index, seed=seed)
        if sample is _FAILED:
            return True  # nothing can be said of it
        seen.add(print_of(sample))
        if states_of(subject.dataset) != before:
            return True
    return len(seen) > 1


def _look_at_stream(subject: Subject, talk: Talk) -> None:
    """The first samples of a stream, twice, and as many more as time allows."""
    numbers = Numbers(subject.dataset, 7)
    measured: list[tuple[Any, float, int]] = []
    passes: list[list[int | None]] = []
    talk.at("asking for its length")
    length = subject.length()
    most = min(_MOST if length is None else max(_MOST, length + 1), talk.samples // 4, 5000)
    ended, number, again = False, -1, False
    try:
        for again in (False, True):
            numbers.set()
            prints, number = [], -1
            talk.at("iterating the dataset")
            for number, (sample, taken_s) in enumerate(_timed(subject)):
                if not again:
                    measured.append((number, taken_s, size_of(sample)))
                talk.fetched()
                talk.at("iterating the dataset", number + 1)
                prints.append(print_of(sample) if number < _STREAM_TWICE else None)
                enough = _STREAM_TWICE if again else most
                if number + 1 >= enough or (talk.left() < 0 and number >= _STREAM_TWICE):
                    break
            else:
                ended = ended or not again
            passes.append(prints)
            if talk.left() < 0:
                break
    except Exception as exc:
        before = number + 1 < len(measured)
        talk.tell("raises", index=f"{number + 1} of the stream", came=before, **raised(exc))
    _tell_sizes(talk, measured, 0.0)
    if len(passes) == 2:
        first, second = (each[:_STREAM_TWICE] for each in passes)
        if first and not second:
            talk.tell("stream_spent", samples=len(measured))
        elif first != second:
            place = next(
                (
                    k
                    for k, pair in enumerate(zip(first, second, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(first), len(second)),
            )
            talk.tell("stream_differs", place=place)
    if length is not None and passes:
        came = len(measured)
        if (ended and came != length) or came > length:
            talk.tell("stream_length", length=length, came=came, ended=ended)


def _timed(subject: Subject) -> Iterator[tuple[Any, float]]:
    iterator = subject.stream()
    while True:
        start = time.perf_counter()
        try:
            sample = next(iterator)
        except StopIteration:
            return
        yield sample, time.perf_counter() - start


def size_of(sample: Any) -> int:
    """Bytes of the arrays, tensors and texts in a sample."""
    total = 0
    for _, leaf in leaves_of(sample):
        facts = array_facts(leaf)
        if facts is not None:
            total += facts.get("size_bytes", 0)
        elif isinstance(leaf, str | bytes):
            total += own_length(leaf) or 0
        else:
            total += 8
    return total


def _tell_sizes(talk: Talk, measured: list[tuple[Any, float, int]], first_again_s: float) -> None:
    if not measured:
        return
    later = measured[1:] or measured
    slowest = max(later, key=lambda each: each[1])
    largest = max(measured, key=lambda each: each[2])
    talk.tell(
        "samples",
        count=len(measured),
        first_s=measured[0][1],
        first_again_s=first_again_s,
        median_s=statistics.median(each[1] for each in later),
        worst_s=slowest[1],
        worst_index=index_text(slowest[0]),
        median_bytes=int(statistics.median(each[2] for each in measured)),
        largest_bytes=largest[2],
        largest_index=index_text(largest[0]),
    )


def raised(exc: BaseException) -> dict[str, str]:
    """An exception as facts: type, text, and the line that raised it, the user's if possible."""
    frames = user_frames(exc) or frames_of(exc)[-1:]
    at = f"{frames[0].frame.f_code.co_filename}:{frames[0].line}" if frames else ""
    text = exception_text(exc).partition("\n\nsafeloader: ")[0]  # the rest is for that loader
    if (found := _IN_WORKER.match(text)) is not None:  # torch has its traceback in the text
        places = _PLACE.findall(text)
        at = ":".join(places[-1]) if places else at
        text = text.rstrip().rpartition("\n")[2].removeprefix(f"{found[1]}: ")
    return {
        "type": type_name(type(exc)),
        "text": cut(text, 300),
        "at": at,
    }
