"""What the workers' reports say of data that is wrong behind right indices. Runs in: main.

Pure: reports in, findings out. What a finding says is so was seen; what it means for the samples
follows where they are made as the attribute's name and the byte code let one think. What a sound
program shows as well is not told, and so some that is wrong is not. A finding says first what is
so, then by what that is known, then what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations, takewhile
from typing import NamedTuple

from safeloader.introspect.advice import OPEN_THERE, suited
from safeloader.introspect.copy_state import CopyState, Order
from safeloader.introspect.generator_kinds import PROCESS_WIDE, Standing
from safeloader.introspect.seeds import SeedPer
from safeloader.introspect.texts import plain_text
from safeloader.introspect.values import cut
from safeloader.supervision.self_report import (
    STREAM_SAMPLES,
    FirstDraws,
    Opening,
    SelfReport,
)

LOST_MIN = 16  # entries that a cache must have gained
FILLED_MIN = 4  # elements of a list, looked at, most of which must have been filled
SAME_STREAM = "read the same stream"  # in the text of that finding
STREAM_MIN = 4  # different samples among those of a stream that are equal in two workers


class Finding(NamedTuple):
    """Something that is so.

    Attributes:
        about: names it, so that it is told once.
        text: what is so, by what it is known, what to do.
        short: what is so, where the first sentence of the text says more.
    """

    about: tuple[str, ...]
    text: str
    short: str = ""


class Seen(NamedTuple):
    """What is known of one loader as main looks.

    Attributes:
        reports: of each process that makes samples, by worker; without workers that of main, by 0.
        main: main's copy of the dataset: as it is now where the workers stay, else as it was when
            the first batches of the epoch had been drawn. What is set after that is for the next.
        length: of the dataset, where it has one.
        stream: whether the dataset is iterable-style.
        persistent: whether the workers stay for the next epoch.
        workers: how many there are; 0: main makes the samples.
        epochs: how many the loader has begun.
        began: main's copy as the workers were about to begin.
        drawn: main's copy as the newest epochs of the workers began, the newest last; with new
            workers, as the first batches were drawn.
        their_epoch: which of their epochs the workers are in, from 1.
        seeds_per: what ``seed=`` seeds the process's own generators for; None without.
        ended: whether the newest of them is at its end.
        resumed: whether an epoch of these went on from a state.
        cure: gives what to do about generators of the dataset's, by their path, as it is said at
            the start; "" where that is not known.
    """

    reports: Mapping[int, SelfReport]
    main: CopyState
    length: int | None
    stream: bool
    persistent: bool
    workers: int
    epochs: int
    began: CopyState = CopyState({}, {}, {})
    drawn: tuple[CopyState, ...] = ()
    their_epoch: int = 0
    seeds_per: SeedPer | None = None
    ended: bool = True
    resumed: bool = False
    cure: Callable[[str], str] = lambda _: ""


def findings(seen: Seen, earlier: Mapping[int, tuple[Opening, ...]] | None = None) -> list[Finding]:
    """What is to be told, in the order of weight.

    Args:
        seen: the state of the loader.
        earlier: by worker, the openings of earlier epochs by workers that are gone.
    """

    def numbers(seen: Seen) -> Iterator[Finding]:
        return _random_numbers(seen, earlier or {})

    rules = (
        _diverged,
        _same_stream,
        _shared_files,
        _stale,
        _set_anew,
        numbers,
        _in_place,
        _lost,
    )
    return [each for rule in rules for each in rule(seen)]


# ── copies ──────────────────────────────────────────────────────────────────────────────────────


def _diverged(seen: Seen) -> Iterator[Finding]:
    """Orders that each worker shuffled, cut or drew for itself."""
    if seen.stream or seen.workers < 2:
        return
    for (u, one), (v, other) in combinations(seen.reports.items(), 2):
        if one.epochs != other.epochs:
            continue  # each may be at the order that all have in its epoch
        for path, here in one.now.orders.items():
            there = other.now.orders.get(path)
            if there is None or not _differ(one.start.orders.get(path), here, there):
                continue
            if path in one.unsteady or path in other.unsteady:
                continue  # something to draw from, and no order
            changes = {_change(one, path), _change(other, path)}
            reordered = "reordered" in changes and changes <= {"", "reordered"}
            came_apart = changes == {""} and _same_contents(one, other, path)
            made = changes == {"replaced"} and here.length == seen.length
            if reordered or came_apart or (made and _both_made(one, other, path)):
                yield Finding(
                    ("diverged", path, *changes & {"replaced"}),
                    f"{path} is in another order in worker {u} than in worker {v}: one index is "
                    f"two samples, so some samples come twice and others never. Each worker has a "
                    f"copy of its own and {_changed_by(one, other, path, came_apart)}. Make the "
                    "order in the main process before iter(loader), and with "
                    "persistent_workers=False; or leave it to the loader's sampler",
                )
        for path, length in one.now.lengths.items():
            start, there_length = one.start.orders.get(path), other.now.lengths.get(path)
            if start is None or there_length is None or length == there_length:
                continue
            if start.length != seen.length:
                continue
            yield Finding(
                ("diverged", path),
                f"{path} has {length} entries in worker {u} and {there_length} in worker {v}; both "
                f"began with {start.length}, one for each sample. {_cut_by(one, other, path)}, so "
                "one index is two samples. Change it in the main process, before iter(loader)",
            )


def _changed_by(one: SelfReport, other: SelfReport, path: str, came_apart: bool) -> str:
    """What put a worker's order into its own, as far as that is seen."""
    if came_apart:
        return "made it as it came to it (a shuffle, or list(set(...)), in __setstate__?)"
    if path in one.set_up_orders or path in other.set_up_orders:
        return "worker_init_fn changed it there, in each worker in its own way"
    return "changed it (a shuffle in the dataset?)"


def _cut_by(one: SelfReport, other: SelfReport, path: str) -> str:
    by_function = path in one.set_up_lengths or path in other.set_up_lengths
    return f"{'worker_init_fn' if by_function else 'Each worker'} changed its copy"


def _same_contents(one: SelfReport, other: SelfReport, path: str) -> bool:
    """Whether two copies held the same, as they came."""
    a, b = one.start.orders[path], other.start.orders[path]
    return a.contents is not None and a.contents == b.contents


def _differ(start: Order | None, one: Order, other: Order) -> bool:
    total = None if start is None else start.all_of_them
    if total is not None and total == one.all_of_them == other.all_of_them:
        return one.which != other.which  # the elements that both were forked with
    pairs = zip(one.sampled, other.sampled, strict=False)
    return one.length == other.length and any(a != b for a, b in pairs if a and b)


def _change(report: SelfReport, path: str) -> str:
    """What a worker made of an order that it began with: "", "reordered", "replaced", "other".

    What is counted or noted for each sample in its place (visits, losses) is no order.
    """
    start, now = report.start.orders.get(path), report.now.orders[path]
    if start is None:
        return "other" if now.is_data else "replaced"
    if start.sampled == now.sampled and start.which == now.which:
        return ""
    if start.contents is not None and start.contents == now.contents:
        return "reordered"
    if start.all_of_them is not None and start.all_of_them == now.all_of_them:
        return "reordered" if start.which != now.which else ""
    if now.is_data:
        return "other"
    if start.held_as != now.held_as:
        return "replaced"
    if start.contents is None and start.all_of_them is None and _elsewhere(start, now):
        return "reordered"
    return "other"


def _elsewhere(start: Order, now: Order) -> bool:
    """Of too many to look at all: whether none comes twice, and most are in other places."""
    moved = sum(a != b for a, b in zip(start.sampled, now.sampled, strict=False))
    distinct = len(set(start.sampled)) == len(start.sampled) == len(set(now.sampled))
    return distinct and moved * 2 > len(start.sampled)


def _both_made(one: SelfReport, other: SelfReport, path: str) -> bool:
    """Whether two workers made what is an order; a list that grew to that length is none."""
    for report in (one, other):
        if path not in report.start.orders and path in report.start.lengths:
            contents = one.now.orders[path].contents
            return contents is not None and contents == other.now.orders[path].contents
    return True


_BEFORE = (
    "Set it before iter(loader): the sampler's __iter__ runs when the workers have their copies "
    "already"
)


def _stale(seen: Seen) -> Iterator[Finding]:
    """Numbers and words that main has changed, and the workers' copies have not."""
    if not seen.workers or not seen.reports:
        return
    reports = list(seen.reports.values())
    anew = tuple(f"{each.about[1]}[" for each in _set_anew(seen))
    for path, here in seen.main.scalars.items():
        if path.startswith(anew):
            continue  # of an element that is another now
        held = [_untouched(each, path, seen.main.defaults) for each in reports]
        theirs = {repr(each) for each in held}
        if any(each is _TOUCHED for each in held) or len(theirs) != 1 or theirs == {repr(here)}:
            continue
        if type(held[0]) is not type(here):
            continue  # None: made at first use, wherever that is
        (there,) = theirs
        cure = (
            "Persistent workers never get another copy: hold it in shared memory "
            "(multiprocessing.Value), or have a new copy each epoch by persistent_workers=False"
        )
        cure = cure if seen.persistent else _BEFORE
        yield Finding(
            ("stale", path),
            f"{path} is {cut(plain_text(repr(here)), 60)} here and {cut(plain_text(there), 60)} in "
            f"the workers: it was changed after they had got their copies of the dataset, and what "
            f"they make is by the old value. {cure}",
        )


def _set_anew(seen: Seen) -> Iterator[Finding]:
    """Lists and arrays that main has changed, and the workers' copies have not.

    A dataset that changes them where samples are made does so in the workers too: so some have to
    have made samples of an epoch that began with the change, and in none it may have changed.
    """
    made = {each.epoch + 1 for one in seen.reports.values() for each in one.openings}
    drawn = zip(range(seen.their_epoch, 0, -1), reversed(seen.drawn), strict=False)
    # The reports of an exhausted stream come after main has looked.
    state = next((state for epoch, state in drawn if epoch in made), CopyState({}, {}, {}))
    told: tuple[str, ...] = ()
    for path, here in state.held.items():
        if path.startswith(told):
            continue  # in an element that is another now
        was = seen.began.held.get(path)
        became = was.became(here) if was is not None else ""
        if was is None or not became or not all(_kept(r, path) for r in seen.reports.values()):
            continue
        if was.length != here.length and became != "set anew" and was.length != seen.length:
            continue  # a history, a cache
        sizes = f" ({here.length} entries here, {was.length} there)" * (was.length != here.length)
        cure = (
            "Persistent workers never get another copy: make the loader anew after such a change, "
            "have new copies each epoch by persistent_workers=False, or hold it in shared memory "
            "(a tensor with .share_memory_(), changed in place)"
        )
        told += (f"{path}[",)
        yield Finding(
            ("stale", path, "held"),
            f"{path} was {became} here after the workers began: they still have what it was{sizes} "
            f"and make samples by that. {cure if seen.persistent else _BEFORE}",
        )


def _kept(report: SelfReport, path: str) -> bool:
    """Whether a worker's copy still holds under a name what it held as it came."""
    start, now = report.start.held.get(path), report.now.held.get(path)
    return start is not None and now is not None and start.is_as(now)


_TOUCHED = object()  # or not known


def _untouched(report: SelfReport, path: str, defaults: Mapping[str, object]) -> object:
    """What a worker's copy has had under a name from its start on, itself or by its class."""
    start, now = report.start.scalars, report.now.scalars
    if path in start and path in now:
        same = start[path] == now[path] and type(start[path]) is type(now[path])
        return now[path] if same else _TOUCHED
    owner = path.rpartition(".")[0]
    known = owner == "dataset" or any(each.startswith(f"{owner}.") for each in start)
    if path in start or path in now or not known or report.left_out:
        return _TOUCHED
    return defaults.get(path, _TOUCHED)


def _lost(seen: Seen) -> Iterator[Finding]:
    """Caches that workers filled, and took with them."""
    if not seen.workers or seen.persistent or seen.epochs < 2:
        return
    gained: dict[str, int] = {}
    filled: dict[str, tuple[int, int]] = {}
    made = 0
    for report in seen.reports.values():
        made += report.batches
        for path, length in report.now.lengths.items():
            before = report.lengths_at_work.get(path)
            if path in report.now.counts:
                continue  # nothing was saved by them
            if before is not None and length > before:
                gained[path] = gained.get(path, 0) + length - before
        for path, empty, full in report.filled:
            were, are = filled.get(path, (0, 0))
            filled[path] = were + empty, are + full
    for path, entries in gained.items():
        if entries < LOST_MIN or entries < made:
            continue
        yield Finding(
            ("lost", path),
            f"{path} grew in the workers by {entries} entries and is lost with them at the end of "
            "each epoch: what it was to save is done again. persistent_workers=True keeps it",
        )
    for path, (empty, full) in filled.items():
        if empty >= FILLED_MIN and full * 2 > empty:
            yield Finding(
                ("lost", path),
                f"{path} was filled in the workers ({full} of {empty} elements that were looked "
                "at) and is lost with them at the end of each epoch: what it was to save is done "
                "again. persistent_workers=True keeps it",
            )


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def _same_stream(seen: Seen) -> Iterator[Finding]:
    """Workers whose first samples are the same."""
    if not seen.stream or seen.workers < 2 or seen.length is not None:
        return  # with a length the ledger counts what was read, and says it with numbers
    for (u, one), (v, other) in combinations(seen.reports.items(), 2):
        if one.stream != other.stream or None in one.stream:
            continue
        number = len(one.stream)
        whole = one.stream_ended and other.stream_ended
        if len(set(one.stream)) < STREAM_MIN or not (whole or number >= STREAM_SAMPLES):
            continue  # of bits that each draws for itself, a few are equal by chance
        equal = f"all {number} samples of each" if whole else f"their first {number} samples"
        others = "" if seen.workers == 2 else f" (and so may others of the {seen.workers})"
        yield Finding(
            ("same stream",),
            f"workers {u} and {v} {SAME_STREAM}{others}: {equal} are equal, so the loop gets each "
            f"sample {seen.workers} times. Give each worker its part: "
            "torch.utils.data.get_worker_info().id and .num_workers in __iter__ "
            "(itertools.islice(stream, id, None, num_workers)), or the library's own splitting by "
            "worker",
        )
        return


# ── random numbers ──────────────────────────────────────────────────────────────────────────────


class _Repeat(NamedTuple):
    """A generator that repeats: who draws what again, by what that is known, and what to do."""

    name: str
    who: str
    how_often: str
    known_by: str
    cure: str = ""


# Torch seeds new workers by a number that it draws from the global generator. Of a resumed epoch
# that is put back, so that the next one has the order that the program gives it.
_RESUMED = (
    "Without seed=, the workers of an epoch that is resumed begin where those of the next one do, "
    "if the loop draws nothing from torch in between. Train with seed=, which gives each epoch "
    "numbers of its own. If the audits of later epochs tell it too, something seeds by a fixed "
    "number, in worker_init_fn or in the dataset: leave that out"
)
_LEAVE_OUT = "It is seeded by a fixed number where samples are made. Leave that out"


def _random_numbers(seen: Seen, earlier: Mapping[int, tuple[Opening, ...]]) -> Iterator[Finding]:
    """Random numbers that come again, once for each generator, and for each object with several."""
    first: dict[str, _Repeat] = {}
    for each in chain(_same_numbers(seen), _repeated_numbers(seen, earlier)):
        first.setdefault(each.name, each)
    together: dict[str, list[_Repeat]] = {}
    for each in first.values():
        top = ".".join(each.name.split(".")[:2])
        together.setdefault(top if each.name.startswith("dataset.") else each.name, []).append(each)
    for several in together.values():
        name, who, how_often, known_by, cure = several[0]
        number = ""
        if len(several) > 1:
            name = _common_path([each.name for each in several])
            number = f" ({len(several)} generators)"
        so = f"{who} the same random numbers from {name}{number}{how_often}"
        text = f"{so}: {known_by}. {cure or _cure(seen, name)}"
        yield Finding(("same numbers", name), text, so)


def _common_path(paths: list[str]) -> str:
    """What holds all of them: ``dataset.t`` of ``dataset.t[0].rng`` and ``dataset.t[1].rng``."""
    steps = [re.findall(r"^\w+|\.\w+|\[[^]]*\]", path) for path in paths]
    same = takewhile(lambda step: len(set(step)) == 1, zip(*steps, strict=False))
    return "".join(step[0] for step in same)


def _cure(seen: Seen, name: str) -> str:
    if name in PROCESS_WIDE:
        return (
            "Do not seed it by a fixed number, in worker_init_fn or in the dataset: torch gives "
            "each worker and each epoch a seed of its own (torch.initial_seed())"
        )
    advice = seen.cure(name) if seen.workers else ""
    return advice[:1].upper() + advice[1:] or "Where it is made, seed it by torch.initial_seed()"


def _openings(seen: Seen) -> Iterator[tuple[tuple[int, Opening], tuple[int, Opening]]]:
    """Pairs of openings of one epoch, the newest that both have begun, in two workers."""
    for (u, one), (v, other) in combinations(seen.reports.items(), 2):
        by_epoch = {each.epoch: each for each in other.openings}
        both = [each for each in one.openings if each.epoch in by_epoch]
        for mine in both[-1:]:
            yield (u, mine), (v, by_epoch[mine.epoch])


def _alike(mine: Opening, a: FirstDraws, theirs: Opening, b: FirstDraws) -> str:
    """Whether two first samples drew the same numbers, which both have to have drawn.

    ``"from"``: the generator stood at the same place before them. ``"to"``: it came from different
    places to the same one, for samples of different indices: it was seeded meanwhile. ``"made"``:
    there was none before them.
    """
    if a.before is None or b.before is None:
        return "made" if a.before is b.before and _made_alike(mine, a, theirs, b) else ""
    if a.before == a.after or b.before == b.after:
        return ""
    if a.before == b.before:
        if not _drew_on(a.after, b.after):
            return ""
        if a.before.seed == a.after.seed:
            return "from"
        if a.after_second is b.after_second is None:
            return "from"
        # Seeded by what these samples share, or much was drawn: that tells as a worker begins.
        if not _each_time(a) and not _each_time(b):
            on = a.after_second and b.after_second and _drew_on(a.after_second, b.after_second)
            return "from" if on and mine.epoch == theirs.epoch == 0 else ""
    return "to" if a.after == b.after and mine.indices[:1] != theirs.indices[:1] else ""


def _made_alike(mine: Opening, a: FirstDraws, theirs: Opening, b: FirstDraws) -> bool:
    """Whether first samples made a generator from one seed, and second samples drew from it."""
    moved = a.second != a.after_second is not None and b.second != b.after_second is not None
    others = mine.indices[:1] != theirs.indices[:1]
    if not (moved and others and a.after_second and b.after_second):
        return False
    return _drew_on(a.after, b.after) and _drew_on(a.after_second, b.after_second)


def _alike_second(a: FirstDraws, b: FirstDraws) -> str:
    """As :func:`_alike`, of second samples."""
    if not (a.second and a.after_second and b.second and b.after_second):
        return ""
    moved = a.second != a.after_second and b.second != b.after_second
    same = a.second == b.second and _drew_on(a.after_second, b.after_second)
    return "from" if moved and same else ""


def _drew_on(after: Standing, other: Standing) -> bool:
    """Whether two that stood at one place drew from there, as far as can be told.

    Seeded meanwhile, by the index or by the epoch, they drew what that gave them.
    """
    return after.seed == other.seed


def _same_numbers(seen: Seen) -> Iterator[_Repeat]:
    """Two workers that draw the same numbers."""
    for (u, mine), (v, theirs) in _openings(seen):
        for name, a in mine.draws.items():
            b = theirs.draws.get(name)
            if b is None:
                continue
            # The first sample of a stream is where it is set up: a shuffle by a seed that all
            # workers share is as it should be.
            alike = (
                _alike_second(a, b)
                if seen.stream
                else _but_for_seed(seen, name, mine, a, theirs, b)
            )
            who = f"workers {u} and {v} draw"
            if alike == "from":
                yield _Repeat(
                    name,
                    who,
                    "",
                    f"it stood at the same place in both before {_first(seen)}. What one worker's "
                    "samples get at random, the other's get too",
                )
            elif alike == "made":
                yield _Repeat(
                    name,
                    who,
                    "",
                    f"it was made there, for {_sample(mine)} in worker {u} and {_sample(theirs)} "
                    f"in worker {v}, and began by the same seed. What one worker's samples get at "
                    "random, the other's get too",
                )
            elif alike == "to" and _is_fixed(seen, name, a, b, (u, v)):
                yield _Repeat(
                    name,
                    "each sample draws" if _each_time(a) else who,
                    "",
                    f"after {_sample(mine)} in worker {u} and {_sample(theirs)} in worker {v} it "
                    f"stood at the same place, {_came_from(a, b)}",
                    f"{_LEAVE_OUT}: torch seeds each worker",
                )


def _is_fixed(
    seen: Seen, name: str, a: FirstDraws, b: FirstDraws, workers: tuple[int, int]
) -> bool:
    """Whether what seeds a generator for samples is one number, as far as can be seen.

    A number for each group of indices (the frames of a clip) is sound: then other samples leave it
    at other places, of which an epoch's end shows more than its beginning.
    """
    if not all(
        each is None or _drew_on(a.after, each) for each in (a.after_second, b.after_second)
    ):
        return False
    if not _each_time(a) or not _each_time(b):
        return True  # seeded once
    if seen.seeds_per == "sample" and name in PROCESS_WIDE:
        return True  # collation is seeded too: where it stands at a report tells nothing
    later = {seed for each in workers for seed in seen.reports[each].seeds.get(name, ())}
    return seen.ended and later <= {a.after.seed}


def _but_for_seed(
    seen: Seen, name: str, mine: Opening, a: FirstDraws, theirs: Opening, b: FirstDraws
) -> str:
    """As :func:`_alike`, but for what ``seed=`` has put at one place.

    For batches: before both, where the user gave one number of an epoch twice. For samples it does
    not matter where a generator stood before them, and after two of them it stands at two places.
    """
    alike = _alike(mine, a, theirs, b)
    if seen.seeds_per is None or name not in PROCESS_WIDE or alike != "from":
        return alike
    same = a.after == b.after and mine.indices[:1] != theirs.indices[:1]
    return "to" if seen.seeds_per == "sample" and same else ""


def _each_time(draws: FirstDraws) -> bool:
    """Whether a generator stood after the second sample where it stood after the first."""
    return draws.after_second in (None, draws.after)


def _came_from(a: FirstDraws, b: FirstDraws) -> str:
    if a.before == b.before:
        return "as after all others that were looked at"
    return "though it came from different ones"


def _first(seen: Seen) -> str:
    return "their second samples" if seen.stream else "their first samples"


def _sample(opening: Opening) -> str:
    return f"index {opening.indices[0]}" if opening.indices else "the first sample"


def _repeated_numbers(seen: Seen, earlier: Mapping[int, tuple[Opening, ...]]) -> Iterator[_Repeat]:
    """A worker that draws in one epoch what it drew in another."""
    if seen.stream:
        return
    for worker, report in seen.reports.items():
        gone = earlier.get(worker, ()) if not seen.persistent else ()
        epochs = [*gone, *report.openings]
        for one, other in ((each, epochs[-1]) for each in epochs[:-1]):
            if one.indices[:1] == other.indices[:1]:
                continue  # a validation that is the same each time may be meant so
            for name, a in one.draws.items():
                b = other.draws.get(name)
                alike = b and _but_for_seed(seen, name, one, a, other, b)
                who = f"worker {worker}" if seen.workers else "the dataset"
                if alike == "from":
                    yield _Repeat(
                        name,
                        f"{who} draws",
                        " in two epochs" if seen.resumed else " in each epoch",
                        f"it stood at the same place before {_sample(one)} and, in a later epoch, "
                        f"before {_sample(other)}",
                        _RESUMED if seen.resumed and name in PROCESS_WIDE else "",
                    )
                elif alike == "made":
                    yield _Repeat(
                        name,
                        f"{who} draws",
                        " in each epoch",
                        f"it was made there, for {_sample(one)} and, in a later epoch, for "
                        f"{_sample(other)}, and began by the same seed",
                    )
                elif alike == "to" and b and _is_fixed(seen, name, a, b, (worker, worker)):
                    each_time = _each_time(a)
                    yield _Repeat(
                        name,
                        "each sample draws" if each_time else f"{who} draws",
                        "" if each_time else " in each epoch",
                        f"after {_sample(one)} and, in a later epoch, after {_sample(other)} it "
                        f"stood at the same place, {_came_from(a, b)}",
                        _LEAVE_OUT,
                    )


# ── what is written to, and what is shared ──────────────────────────────────────────────────────


def _in_place(seen: Seen) -> Iterator[Finding]:
    """Elements of the dataset that fetching them changed, and that are fetched again."""
    if seen.epochs < 2 or (seen.workers and not seen.persistent):
        return  # what a worker changed in its copy went with it
    for worker, report in seen.reports.items():
        if not report.in_place or report.epochs < 2:
            continue
        first = report.in_place[0]
        where = f" in worker {worker}" if seen.workers else ""
        more = len(report.in_place) - 1
        others = f"; {more} more of those looked at changed too" if more else ""
        yield Finding(
            ("in place",),
            f"index {first.asked_as} was changed in place{where}: {first.path} was {first.was} "
            f"before it was fetched first and is {first.now} now{others}. Each epoch gets what the "
            "one before made of it. A transform (or __getitem__) writes into the dataset's own "
            "data: let it work on a copy (.clone(), .copy(), copy.deepcopy)",
        )
        return


def _shared_files(seen: Seen) -> Iterator[Finding]:
    """Read positions that several workers move."""
    if seen.workers < 2:
        return
    cure = suited(OPEN_THERE, stream=seen.stream, shared=True)
    by_path: dict[str, list[tuple[int, int, int, str]]] = {}
    for worker, report in seen.reports.items():
        for each in report.files:
            by_path.setdefault(each.path, []).append((worker, each.mine, each.others, each.holder))
    for path, movers in by_path.items():
        if len(movers) < 2:
            continue
        holder = next((each[3] for each in movers if each[3]), "")
        named = f"{path} ({holder})" if holder else path
        numbers = " and ".join(str(each[0]) for each in movers[:2])
        crossed = all(each[2] for each in movers[:2])
        if crossed:
            said = (
                f"workers {numbers} share one read position of {named}, and each moved it between "
                "the other's batches: what one reads, the other skips, so samples are wrong unless "
                "a lock is held from seek to read"
            )
        else:
            said = (
                f"workers {numbers} share one read position of {named}: it was open before they "
                "were forked, and both moved it"
            )
        yield Finding(
            ("shared file", path),
            f"{said}. {cure[0].upper()}{cure[1:]}",
        )
