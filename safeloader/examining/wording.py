"""What was heard of the child, in words: answer, evidence, what to do. Runs in: main."""

from __future__ import annotations

import re
import signal
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safeloader.examining.choosing import Own, Row, chosen, gains, own_row
from safeloader.examining.report import Finding, Level, setting_text, time_text
from safeloader.introspect.advice import BY_PATH, suited
from safeloader.introspect.resources import human_bytes
from safeloader.supervision import causes

Facts = dict[str, Any]
Heard = list[tuple[str, Facts]]
_HEAVY_BYTES = 100 << 20  # of what spawn sends to each worker
_SLOW_FIRST_S = 1.0
_SLOW_RATIO = 20.0  # over the median
_SLOW_S = 0.5
_FASTER = 1.15  # than the loader's own setting, to be told
_ORDER = {"error": 0, "warning": 1, "note": 2}
_STACK_LINES = 14
_FRAME = re.compile(r'\s*File "([^"]+)", line')
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),  # ours
)
_INDICES = 8  # that are named of one cause
_LATE = "the time was up"
_SLOW = "no batch yet"
_BUSY = 0.05  # of a processor: less may be the looking itself
_LONGER = 4  # times as long as was given
_TORCHS = re.compile(r"[/\\]torch[/\\]utils[/\\]data[/\\]")
_SPAWNING = ("spawn", "forkserver")


def findings_of(heard: Heard, own: Facts, *, forked: bool, lacks_guard: bool) -> list[Finding]:
    """The findings of what was heard, the worst first.

    Args:
        heard: kinds and facts, in the order in which they came.
        own: what the loader is, as :func:`~safeloader.examining.looks.told_of` says.
        forked: whether the child was forked, so that the dataset need not be picklable.
        lacks_guard: whether the program starts processes when it is imported.
    """
    words = _Words(own, forked)
    found: list[Finding] = []
    ends = [facts["end"] for kind, facts in heard if kind == "too_long"]
    empty = any(kind == "empty" for kind, _ in heard)
    words.none_came = not any(kind == "samples" for kind, _ in heard)
    for kind, facts in _together(heard, ends):
        if empty and kind == "nothing_drawn":
            continue  # of nothing
        tell: Callable[[Facts], Finding | None] | None = getattr(words, f"on_{kind}", None)
        finding = None if tell is None else tell(facts)
        if ends and kind == "batch_raises" and facts["type"] == "IndexError":
            continue  # and the same of a batch with such an index
        if finding is not None and finding not in found:
            found.append(finding)
    endings = [facts for kind, facts in heard if kind == "ending"]
    found += words.of_endings(
        [each for each in endings if not (lacks_guard and each.get("method") in _SPAWNING)]
    )
    words.best, words.yours = recommended(heard)[0], None
    if (mine := _own_of(heard)) is not None:
        words.yours = own_row(rows_of(heard), mine)
    found += words.of_rows(rows_of(heard), cores_of(heard), lacks_guard)
    return sorted(found, key=lambda each: _ORDER[each.level])


def _together(heard: Heard, ends: list[int]) -> Heard:
    """What was heard, with the indices that raise the same in the same place as one fact."""
    told: Heard = []
    known: dict[Any, Facts] = {}
    for kind, facts in heard:
        if kind == "raises":
            if ends and facts["index"].isdigit() and int(facts["index"]) >= ends[0]:
                continue  # that the length is not true says it
            cause = facts["type"], facts["at"], bool(facts.get("came"))
            if cause in known:
                known[cause]["indices"] |= {facts["index"]: None}
                continue
            facts = known[cause] = {**facts, "indices": {facts["index"]: None}}
        told.append((kind, facts))
    return told


def rows_of(heard: Heard, *, lacks_guard: bool = False) -> list[Row]:
    """The settings that were tried, each as it was told last.

    With ``lacks_guard`` the program starts processes when it is imported, so that spawn fails.
    """
    rows: dict[Any, Row] = {}
    unguarded = 'it imports the program, which has no `if __name__ == "__main__":`'
    for kind, facts in heard:
        if kind == "setting":
            setting = facts["workers"], facts["prefetch"], facts["method"]
            error = facts["error"] or {}
            text = f"{error['type']}: {error['text']}".split("\n")[0][:200] if error else ""
            rates = tuple(facts["rates"])
            if text and lacks_guard and facts["method"] in _SPAWNING:
                text = unguarded
            rows[setting] = Row(*setting, rates, facts["first_s"] if rates else None, text)
        elif kind == "ending" and facts.get("setting"):
            setting = tuple(facts["setting"])
            if setting not in rows:
                how = _ENDS.get(facts["how"])
                text = f"{how or _LATE} after {facts['seconds']:.1f} s"
                if lacks_guard and setting[2] in _SPAWNING:
                    text = unguarded
                rows[setting] = Row(*setting, (), None, text)
    return list(rows.values())


_ENDS = {"died": "the process died", "hung": "no batch came", "slow": _SLOW}


def _failed(rows: list[Row]) -> list[Row]:
    """Those that could not be measured, and not for want of time alone."""
    return [row for row in rows if row.error and not row.error.startswith((_LATE, _SLOW))]


def cores_of(heard: Heard) -> int | None:
    """The cores that the child had."""
    return next((facts["cores"] for kind, facts in heard if kind == "machine"), None)


def untried(heard: Heard) -> list[str]:
    """Start methods that could be used and that nothing is known of."""
    rows = rows_of(heard)
    known = {row.method for row in rows}
    methods: list[str] = next((facts["methods"] for kind, facts in heard if kind == "machine"), [])
    return [each for each in methods if rows and each not in known]


def why_untried(heard: Heard, samples_left: int) -> str:
    """Why some start methods were not tried."""
    rows = rows_of(heard)
    failed = _failed(rows)
    if failed and not any(row.rates for row in rows):
        alone = any(not row.workers for row in failed) or any(kind == "raises" for kind, _ in heard)
        where = "without workers" if alone else f"in workers started by {failed[0].method}"
        return f"not tried: it failed {where} already"
    if samples_left <= 0:
        return "not tried: no more samples were to be fetched"
    return "not enough time was left"


def why_unmeasured(heard: Heard) -> str | None:
    """Why no setting was tried, or not as in training; None where nothing is to be said."""
    kinds = dict(heard)
    if "warm" in kinds:
        return (
            "speed with cold caches: the program takes long to load, so what was measured had "
            "fetched samples before"
        )
    if "nothing_to_measure" not in kinds:
        return None
    if "no_batch" in kinds:
        return f"speed: {_dropping(kinds['no_batch'])[0]} leaves no batch"
    return "speed: no batch is left without the indices that fail"


def _dropping(facts: Facts) -> tuple[str, str, str]:
    """What leaves no batch, the name of its size, and what to say instead."""
    if facts.get("over_ranks"):
        return "tail='drop'", "global_batch", "tail='pad' or tail='uneven'"
    return "drop_last", "batch_size", "drop_last=False"


def what_was_warm(heard: Heard) -> str | None:
    """Which start methods were measured on what had fetched samples; None where none was."""
    if all(kind != "warm_methods" for kind, _ in heard):
        return None
    return (
        "spawn and forkserver with cold caches: the dataset is too large to be kept as it was, so "
        "their workers were sent what had fetched samples before"
    )


def ruled_out(heard: Heard) -> set[str]:
    """Start methods that cannot be used, by what was found."""
    kinds = {kind for kind, _ in heard}
    broken = any(kind == "hazard" and facts.get("read", True) for kind, facts in heard)
    out = {"fork"} if broken else set()
    if "unpicklable" in kinds:
        out |= {*_SPAWNING}
    out |= {"fork" for kind, facts in heard if kind == "ending" and _fork_hangs(facts)}
    failed = _failed(rows_of(heard))
    return out | {str(row.method) for row in failed if row.method != "fork"}


def _fork_hangs(facts: Facts) -> bool:
    return facts["how"] in ("hung", "died") and facts.get("method") == "fork"


def recommended(heard: Heard) -> tuple[Row | None, str]:
    """The setting to use, and why."""
    rows = rows_of(heard)
    out = ruled_out(heard)
    own = _own_of(heard)
    best = chosen(rows, out, own, cores_of(heard) or 0)
    if best is None:
        return None, ""
    why = f"{best.rate_text} batches/s"
    yours = None if own is None else own_row(rows, own)
    if yours is not None and yours.rate:
        same = (best.workers, best.prefetch) == (yours.workers, yours.prefetch)
        if not same:
            why += f"; {best.rate / yours.rate:.2f} times the loader's own setting"
        elif len(rows) > 1 and best.method == yours.method:
            why += "; it is the loader's own setting, and none is measurably faster"
    if best.method and out & {"fork", "spawn"}:
        why += f"; {', '.join(sorted(out))} ruled out by what was found"
    return best, why


def _own_of(heard: Heard) -> Own | None:
    facts = next((facts for kind, facts in heard if kind == "subject"), None)
    if facts is None:
        return None
    workers = facts["workers"]
    return Own(workers, facts["prefetch"], facts["method"] if workers else None)


def resume_text(heard: Heard) -> str:
    """Whether training can go on where it was."""
    facts = next((facts for kind, facts in heard if kind == "resume"), None)
    if facts is None:
        return ""
    if facts["loader"]:
        return "yes, in the middle of an epoch: the loader has a state_dict()"
    if facts["sampler"]:
        return (
            f"in the middle of an epoch by hand: {facts['sampler_name']} has state_dict() and "
            "load_state_dict(); batches that the workers had fetched ahead are not in it"
        )
    order = {
        "sequential": "yes, at the beginning of an epoch: the order is that of the indices",
        "seed and epoch": "yes, at the beginning of an epoch: the order is made of seed and epoch, "
        "so call set_epoch(epoch) before it",
        "epoch": f"at the beginning of an epoch: {facts['sampler_name']} has set_epoch(); whether "
        "its order depends on that alone is not known",
        "generator": "at the beginning of an epoch: save generator.get_state() there",
        "global": "at the beginning of an epoch: the order is drawn from torch's global generator, "
        "so save torch.get_rng_state() there, or give generator= to the loader",
        "stream": "by its own state_dict(), which is in the workers' copies"
        if facts["dataset"]
        else "no: a stream without state_dict() starts anew",
        "unknown": f"not known: {facts['sampler_name']} has no state_dict() and no set_epoch()",
    }[facts["order"]]
    if facts["order"] == "stream":
        return order
    return f"{order}; not in the middle of one: neither loader nor sampler has a state_dict()"


class _Words:
    """A method for each kind of fact; None is nothing to say."""

    def __init__(self, own: Facts, forked: bool) -> None:
        self._own, self._forked = own, forked
        self._failing = 0
        self._unsendable = False
        self._raised: set[str] = set()  # types that were told
        self.none_came = False
        self.best: Row | None = None
        self.yours: Row | None = None
        self._workers: int = own.get("workers", 0)
        self._spawns = self._workers > 0 and own.get("method") in _SPAWNING
        self._forks = self._workers > 0 and own.get("method") == "fork"

    # ── one sample

    def on_raises(self, facts: Facts) -> Finding:
        self._raised.add(facts["type"])
        error = f"{facts['type']}: {facts['text']}"
        if facts.get("came"):
            return Finding(
                "error",
                "raises",
                f"index {facts['index']} raised {facts['type']}, and came at another time",
                f"{error}\nat {facts['at']}",
                "look for what is not the same each time: a network, a disk, a time limit, a "
                "counter, a random number; retries=2 of SafeDataLoader asks again",
            )
        indices = sorted(facts["indices"], key=lambda each: (len(each), each))
        shown = indices[:_INDICES]
        answer = f"index {shown[0]} raises {facts['type']}"
        if len(indices) > 1:
            more = len(indices) - len(shown)
            last = f"{more} more" if more else shown.pop()
            answer = f"indices {', '.join(shown)} and {last} raise {facts['type']}"
            error = f"index {facts['index']}: {error}"
            if self.none_came:
                error += "\nno index that was tried gives a sample"
        return Finding(
            "error",
            "raises",
            answer,
            f"{error}\nat {facts['at']}",
            "mend the sample or leave it out; on_error='skip' of SafeDataLoader goes on without it"
            if len(indices) == 1
            else "look at what they have in common: a path, a key, a file that is not there",
        )

    def on_differs(self, facts: Facts) -> Finding:
        index, path = facts["index"], facts["path"]
        seen = (
            f"{facts['count']} of {facts['of']} samples, fetched twice with the same random "
            f"numbers, are not the same; of index {index}: {path}"
        )
        if facts["elements"]:
            held = ", ".join(facts["elements"])
            return Finding(
                "error",
                "in_place",
                f"fetching changes the dataset, in place: {held}",
                seen,
                "copy before changing (clone(), copy()): in place, each epoch changes it again",
            )
        if facts["changed"]:
            held = ", ".join(facts["changed"])
            return Finding(
                "warning",
                "differs",
                f"index {index} is another each time: fetching changes the dataset ({held})",
                seen,
                f"have the sample depend on its index and on random numbers only, not on {held}: "
                "each worker has a copy of it that goes its own way",
            )
        return Finding(
            "warning",
            "differs",
            f"index {index} is another each time, also with the same random numbers",
            seen + "; nothing that the dataset holds had changed",
            "look for the time, the process, a set's order, a file's position, or a generator that "
            "is not in the dataset: what it gives cannot be had again, by replay or by a seed",
        )

    def on_seeds(self, facts: Facts) -> Finding:
        names = " and ".join(
            {"random": "random", "numpy": "NumPy", "torch": "torch"}[each]
            for each in facts["generators"]
        )
        first, last = facts["indices"]
        return Finding(
            "error",
            "seeds",
            f"__getitem__ seeds {names} with a fixed number: every index draws the same numbers",
            f"after index {first} and after index {last} the generator stood at the same place, "
            "though it had begun at two others",
            "seed with the index and the epoch, by a generator of its own: "
            "torch.Generator().manual_seed(hash of both)",
        )

    def on_getitems(self, facts: Facts) -> Finding:
        told = f"index {facts['index']}: {facts['path']} is not the same"
        if facts["single"]:
            told += f": {facts['single']} by dataset[index], {facts['together']} by __getitems__"
        return Finding(
            "error",
            "getitems",
            f"__getitems__ and __getitem__ do not give the same sample at index {facts['index']}",
            told,
            "mend __getitems__, which the loader uses; a transform in __getitem__ does not run in "
            "an inherited or wrapped __getitems__",
        )

    def on_getitems_count(self, facts: Facts) -> Finding:
        return Finding(
            "error",
            "getitems",
            f"__getitems__ gives {facts['came']} samples for {facts['asked']} indices",
            "each index has to have its sample, in the order asked for",
            "mend __getitems__: what it leaves out is lost without a word",
        )

    def on_getitems_raises(self, facts: Facts) -> Finding:
        return Finding(
            "error",
            "getitems",
            f"__getitems__({facts['indices']}) raises {facts['type']}, and dataset[index] does not",
            f"{facts['type']}: {facts['text']}\nat {facts['at']}",
            "mend __getitems__, or take it away: the loader then asks for each sample",
        )

    def on_samples(self, facts: Facts) -> Finding | None:
        first, again, median = facts["first_s"], facts["first_again_s"], facts["median_s"]
        others = f"the others {time_text(median)} (median)"
        if facts.get("count") == 1:
            median, others = again, "no other was fetched"
        if first > _SLOW_FIRST_S and first > _SLOW_RATIO * median and 4 * again < first:
            return Finding(
                "warning",
                "slow_first",
                f"the first sample takes {time_text(first)}: something is set up at first use",
                f"the same index again took {time_text(again)}, {others}",
                "each worker pays that once, when it starts: make it lighter, or make it before "
                "the fork, if it survives one"
                if self._own.get("persistent")
                else "each worker pays that, each epoch: persistent_workers=True, or a set-up that "
                "is made before the fork and survives it",
            )
        worst = facts["worst_s"]
        if worst > _SLOW_S and worst > _SLOW_RATIO * median:
            return Finding(
                "warning",
                "slow_sample",
                f"index {facts['worst_index']} takes {time_text(worst)}, the median is "
                f"{time_text(median)}",
                f"of {facts['count']} samples fetched one by one",
                "look at this sample: nothing else is loaded meanwhile"
                if not self._workers
                else "batches come in order, so all wait for the slowest: look at this sample, or "
                "use in_order=False",
            )
        return None

    def on_nothing_drawn(self, facts: Facts) -> Finding:
        return Finding(
            "error",
            "nothing_drawn",
            "the sampler gives no index",
            "iterating it came to its end at once",
            "look at the sampler, and whether the dataset is empty",
        )

    def on_no_batch(self, facts: Facts) -> Finding:
        dropping, size, instead = _dropping(facts)
        return Finding(
            "error",
            "no_batch",
            f"{dropping} leaves no batch: {facts['samples']} samples, {size} {facts['batch_size']}",
            "an epoch ends at once, without a word",
            f"{instead}, or a smaller {size}",
        )

    def on_no_batch_of_stream(self, facts: Facts) -> Finding | None:
        if facts["workers"] != self._workers:
            return None
        each = " of any worker" if self._workers else ""
        return Finding(
            "error",
            "no_batch",
            f"drop_last leaves no batch of the stream{each}",
            "an epoch ends at once, without a word",
            "drop_last=False, or a smaller batch_size",
        )

    def on_batch_raises(self, facts: Facts) -> Finding | None:
        if facts.get("workers") and facts["type"] in self._raised:
            return None
        self._failing += 1
        if self._failing > 1:
            return None
        self._raised.add(facts["type"])
        error = f"{facts['type']}: {facts['text']}"
        if not _TORCHS.search(facts["at"]):  # where its default_collate stood tells nothing
            error += f"\nat {facts['at']}"
        if facts.get("index") is not None:
            index, before = facts["index"], facts["before"]
            seen = facts["explained"] or f"of the batch {facts['indices']} " + (
                f"the samples of {before} can be collated, and no more with that of {index}"
                if before
                else f"the sample of {index} cannot be collated alone"
            )
            return Finding(
                "error",
                "batch_raises",
                f"a batch fails in collate_fn, at index {index}: {facts['type']}",
                f"{error}\n{seen}",
                f"mend dataset[{index}], or have collate_fn take both"
                if facts["explained"]
                else f"compare dataset[{index}] with the others: keys, types, shapes; or have "
                "collate_fn take both",
            )
        where = _settings_text(f"with {facts['workers']} workers ") if facts.get("workers") else ""
        return Finding(
            "error",
            "batch_raises",
            f"{where}a batch fails: {facts['type']}",
            f"{error}\nfetched again sample by sample, without workers, it did not fail",
            "look at what is not the same each time, and at worker_init_fn"
            if where
            else "look at what is not the same each time: random numbers, the network, a file",
        )

    def on_unsendable(self, facts: Facts) -> Finding | None:
        if self._unsendable:
            return None
        self._unsendable = True
        return Finding(
            "error" if self._workers else "warning",
            "unsendable",
            f"what index {facts['index']} gives cannot be sent by a worker: {facts['path']} "
            f"({facts['what']})",
            f"{facts['reason']}\ntorch's loader waits for such a batch for ever",
            "leave it out of the sample, or give what was read from it in its place",
        )

    def on_look_failed(self, facts: Facts) -> Finding:
        error = f"{facts['type']}: {facts['text']}\nat {facts['at']}"
        doing = facts["what"] or f"looking at {facts['look']}"
        if facts["yours"]:
            return Finding(
                "error",
                "look_failed",
                f"{doing} raises {facts['type']}",
                error,
                f"mend it and ask again: nothing more is known of {facts['look']}",
            )
        return Finding(
            "warning",
            "look_failed",
            f"this look failed: {facts['look']}, while {doing}",
            error,
            f"the fault is safeloader's own: report it; nothing more is known of {facts['look']}",
        )

    # ── length

    def on_empty(self, facts: Facts) -> Finding:
        return Finding(
            "error", "length", "the dataset is empty", "len(dataset) is 0", "look at what it reads"
        )

    def on_too_long(self, facts: Facts) -> Finding:
        length, end, error = facts["length"], facts["end"], facts["error"]
        return Finding(
            "error",
            "length",
            f"__len__ is too long: it says {length}, and the samples end at {end}",
            f"dataset[{length - 1}] raises {error['type']}: {error['text']}\nat {error['at']}"
            + (
                f"\ndataset[{end}] does too, and dataset[{end - 1}] gives a sample"
                if 0 < end < length - 1
                else ""
            ),
            f"have __len__ give {end}, the number of samples there are",
        )

    def on_too_short(self, facts: Facts) -> Finding:
        length, end = facts["length"], facts["end"]
        return Finding(
            "warning",
            "length",
            f"__len__ is too short: it says {length}, and there are {end} samples",
            f"dataset[{end - 1}] gives a sample, dataset[{end}] does not",
            f"have __len__ give {end}; the last {end - length} are never drawn. If that is meant, "
            "use torch.utils.data.Subset",
        )

    # ── streams

    def on_stream_spent(self, facts: Facts) -> Finding:
        return Finding(
            "error",
            "stream_spent",
            "a second pass over the stream gives nothing",
            f"the first gave {facts['samples']} samples",
            "make what is iterated anew in __iter__: with a generator made in __init__, the second "
            "epoch is empty",
        )

    def on_stream_differs(self, facts: Facts) -> Finding:
        return Finding(
            "warning",
            "differs",
            f"sample {facts['place']} of the stream is another in a second pass",
            "both passes began with the same random numbers",
            "fine if the stream goes on where it was; else have __iter__ begin anew",
        )

    def on_stream_length(self, facts: Facts) -> Finding:
        more = "" if facts["ended"] else "at least "
        return Finding(
            "error",
            "length",
            f"__len__ says {facts['length']}, and the stream gives {more}{facts['came']} samples",
            "counted in one process, without workers",
            "have __len__ give the number of samples: schedules and len(loader) rest on it",
        )

    def on_one_stream(self, facts: Facts) -> Finding:
        return Finding(
            "error" if self._workers > 1 else "warning",
            "one_stream",
            "every worker reads the whole stream: each sample comes once from each worker"
            if self._workers > 1
            else "with workers, each would read the whole stream",
            f"the first {facts['samples']} samples of two workers are the same, one by one",
            "divide it in __iter__ by get_worker_info().id and num_workers",
        )

    # ── workers' copies

    def on_generators(self, facts: Facts) -> Finding | None:
        level: Level = "error" if self._workers > 1 else "warning"
        draw = "workers draw" if self._workers > 1 else "two workers would draw"
        seen = "two workers were started; it stood at the same places in both after each sample"
        if facts["same"]:
            held = ", ".join(facts["same"])
            return Finding(
                level,
                "generators",
                f"{draw} the same random numbers: {held} is a copy in each",
                seen,
                "seed it in worker_init_fn with get_worker_info().seed, or draw from torch's own "
                "generator, which torch seeds for each worker",
            )
        if facts["same_global"]:
            held = " and ".join(facts["same_global"])
            by = "worker_init_fn seeds it" if facts["init"] else "something seeds it"
            return Finding(
                level,
                "generators",
                f"{draw} the same random numbers: {by} with the same number in each ({held})",
                seen,
                "seed with get_worker_info().seed, or not at all: torch seeds each worker",
            )
        return None

    def on_stale(self, facts: Facts) -> Finding:
        level: Level = "error" if self._workers > 0 else "warning"
        path, here, there = facts["path"], facts["here"], facts["there"]
        if facts["persistent"]:
            advice = (
                "persistent workers keep the copy they began with: hold it in shared memory "
                "(torch.zeros((), dtype=torch.int64).share_memory_()), or "
                "persistent_workers=False"
            )
        else:
            advice = (
                "workers start before the sampler is asked for its first index: set it before "
                "iter(loader), or hold it in shared memory"
            )
        calls = " and ".join(f"{name}.set_epoch({facts['epoch']})" for name in facts["set_by"])
        return Finding(
            level,
            "stale",
            f"{'set_epoch' if calls else path} does not reach the workers: {path} is {here} here, "
            f"{there} there",
            f"in epoch {facts['epoch']}" + (f", after {calls}" if calls else ""),
            advice,
        )

    def on_workers_raise(self, facts: Facts) -> Finding:
        alone = bool(self._raised)
        self._raised.add(facts["type"])
        return Finding(
            "error" if self._workers else "warning",
            "workers_raise",
            f"in workers started by {facts['method']} it fails: {facts['type']}",
            f"{facts['type']}: {facts['text']}\nat {facts['at']}",
            "samples fail without workers too: mend that first"
            if alone
            else "it did not without workers: look at worker_init_fn, and at what does not survive "
            f"{facts['method']}",
        )

    # ── what workers are given

    def on_unpicklable(self, facts: Facts) -> Finding:
        broken = self._spawns or not self._forked
        return Finding(
            "error" if broken else "warning",
            "unpicklable",
            f"{facts['path']} cannot be pickled ({facts['what']})",
            facts["reason"],
            f"{facts['advice']} As it is, workers can be started by fork only: not on Windows and "
            "macOS, not beside CUDA",
        )

    def on_weight(self, facts: Facts) -> Finding | None:
        if facts["bytes"] < _HEAVY_BYTES:
            return None
        parts = ", ".join(f"{path} {human_bytes(size)}" for path, size in facts["heaviest"])
        return Finding(
            "warning" if self._spawns else "note",
            "weight",
            f"{human_bytes(facts['bytes'])} are sent to each worker under spawn and forkserver",
            parts or "estimated from what is pickled",
            suited(BY_PATH, stream=bool(self._own.get("stream"))),
        )

    def on_hazard(self, facts: Facts) -> Finding:
        why, read = facts["why"], facts.get("read", True)
        if not read:
            why += "; by its byte code, what makes samples does not read it"
        return Finding(
            "error" if self._forks and read else "warning",
            "hazard",
            f"{facts['path']} ({facts['what']}) does not survive a fork",
            why,
            facts["advice"],
        )

    # ── the child's ends

    def of_endings(self, endings: list[Facts]) -> list[Finding]:
        """Hangs and deaths: each index once, and what happened there."""
        found = [self._hung(facts) for facts in endings if facts["how"] == "hung"]
        slow = [self._slow(facts) for facts in endings if facts["how"] == "slow"]
        found += slow[:1]  # it is one thing that takes long, whoever begins with it
        died: dict[Any, list[Facts]] = {}
        for facts in endings:
            if facts["how"] == "died":
                died.setdefault(facts["code"], []).append(facts)
        return [*found, *map(self._died, died.values())]

    def _died(self, deaths: list[Facts]) -> Finding:
        facts = deaths[0]
        where = " and ".join(dict.fromkeys(map(_where, deaths)))
        return Finding(
            "error",
            "dies",
            f"the process {_how_it_died(facts['code'])} {where}",
            facts["stack"] or facts["printed"] or "it left no stack behind",
            _after_death(facts),
        )

    def _hung(self, facts: Facts) -> Finding:
        if facts["what"] == "loading":
            return Finding(
                "error",
                "guard",
                "the program does not come to an end when it is imported",
                _cut_stack(_own_frames(facts["stack"])) or f"{facts['seconds']:.0f} s went by",
                'put what it does besides defining under `if __name__ == "__main__":`; workers '
                "that are spawned import it too",
            )
        where = _where(facts)
        workers = facts.get("setting")
        if workers and workers[0]:
            own = self._workers > 0 and workers[2] == self._own.get("method")
            return Finding(
                "error" if own else "warning",
                "hangs",
                f"no batch came for {facts['seconds']:.0f} s {where}",
                _cut_stack(facts["stack"]) or "nothing is known of where the workers were",
                _of_workers_alone(facts),
            )
        if workers:
            where = "without workers, and at none of the indices alone"
        evidence = _cut_stack(facts["stack"]) or "it did not answer where it was"
        if facts.get("cold") and facts["index"] is not None:
            evidence += "\nit was the first that was fetched" + (
                ", and all of its threads wait for locks: nobody is left to open them"
                if facts["locked"]
                else ": it may be that what is set up at first use takes longer; with more seconds "
                "that would show"
            )
        if facts["busy"] > _BUSY:
            evidence += "\nit worked all the while: an endless loop, or a sample that takes longer"
        return Finding(
            "error",
            "hangs",
            f"it hangs {where}: nothing came for {facts['seconds']:.0f} s",
            evidence,
            "give what it waits for a time limit"
            + ("; timeout= of the loader ends such a wait" if self._workers else ""),
        )

    def _slow(self, facts: Facts) -> Finding:
        """What did not come in time, and may come if it is given more."""
        longer = _longer(facts)
        begins = facts["index"] is None
        if facts["busy"] > _BUSY:
            seen = f"it worked: {100 * facts['busy']:.0f} % of a processor was used"
        else:
            seen = "it used no processor meanwhile: it waits, for a disk, a network or a clock"
        where = _where(facts) + ("" if begins else ", the first that was fetched")
        stack = _cut_stack(facts["stack"])
        return Finding(
            "warning",
            "slow_start",
            f"slow: no {'batch' if begins else 'sample'} in {facts['seconds']:.0f} s; give it "
            f"longer: doctor(loader, seconds={longer})",
            f"{where}; {seen}" + (f"\n{stack}" if stack else ""),
            f"with the command, --seconds {longer}. In training each worker pays for what is set "
            "up at first use: make it lighter, or make it once, before the fork, if it survives "
            "one",
        )

    # ── settings

    def of_rows(self, rows: list[Row], cores: int | None, lacks_guard: bool) -> list[Finding]:
        """What the sweep says of the loader's own setting, and of start methods that fail."""
        found = []
        if lacks_guard:
            found.append(
                Finding(
                    "error" if self._spawns else "warning",
                    "guard",
                    "the program does its work when it is imported, and spawn imports it",
                    "a worker that was started by spawn came to the program's own work",
                    'put it under `if __name__ == "__main__":`',
                )
            )
        failed = [row for row in rows if row.error and not (lacks_guard and row.method != "fork")]
        for row in failed[:3]:
            mine = row.workers == self._workers and row.method == self._own.get("method")
            if row.error.startswith((*_ENDS.values(), _LATE)):
                continue  # told as an end of the child
            told = bool(self._failing) and row.method in (None, "fork")
            if told or row.error.partition(":")[0] in self._raised:
                continue  # told with what was raised
            who = (
                f"with {row.workers} workers by {row.method}" if row.workers else "without workers"
            )
            found.append(
                Finding(
                    "error" if mine or not row.workers else "warning",
                    "batch_raises",
                    f"{who} a batch fails",
                    row.error,
                    "iterate the loader by SafeDataLoader: its error names the sample",
                )
            )
        found += self._of_own(cores)
        return found

    def _of_own(self, cores: int | None) -> list[Finding]:
        own, best = self.yours, self.best
        if own is None or best is None or not own.rate or not best.rate:
            return []
        gain = best.rate / own.rate
        measured = (
            f"{own.rate_text} batches/s with {setting_text(own)}, "
            f"{best.rate_text} with {setting_text(best)}"
        )
        if cores is not None and own.workers > cores and gain > 0.9 and best.workers < own.workers:
            return [
                Finding(
                    "warning",
                    "too_many_workers",
                    f"{own.workers} workers for {cores} cores gain nothing",
                    measured,
                    f"use num_workers={best.workers}: each worker costs memory and time to start",
                )
            ]
        if gain > _FASTER and gains(best, own):
            return [
                Finding(
                    "warning",
                    "slow_setting",
                    f"another setting is {gain:.2f} times as fast as the loader's own",
                    measured + ", of batches that nobody works with meanwhile",
                    f"use {setting_text(best)}, unless the training step is what takes the time",
                )
            ]
        return []


def _where(facts: Facts) -> str:
    what = _settings_text(facts["what"])
    if facts["index"] is None:
        return f"while {what}" if what else f"while looking at {facts['look']}"
    if what == "collating":
        return f"in collate_fn, with the samples of {facts['index']}"
    if what.startswith("asking __getitems__"):
        return f"in __getitems__({facts['index']})"
    if "iterating" in what or "stream" in what:
        return f"at sample {facts['index']} of the stream"
    return f"at index {facts['index']}"


def _settings_text(what: str) -> str:
    """``starting: 1 workers by fork`` as one would write it.

    >>> _settings_text("starting: 1 workers by fork"), _settings_text("measuring 11 workers")
    ('starting 1 worker by fork', 'measuring 11 workers')
    """
    return re.sub(r"(?<!\d)1 workers", "1 worker", what.replace(": ", " ", 1))


def _longer(facts: Facts) -> str:
    """How many seconds to give where what was given was too little."""
    return f"{_LONGER * facts['whole_s']:g}"


def _of_workers_alone(facts: Facts) -> str:
    """What to do where no batch came from workers, and no index is known to be the cause."""
    if not facts["all_came_alone"]:
        return (
            "whether its samples come without workers was not seen to the end: give it longer, "
            f"doctor(loader, seconds={_longer(facts)})"
        )
    if facts["setting"][2] == "fork":
        return (
            "samples came without workers: look for a lock or a pool of threads that the fork "
            "inherits, in a library too; spawn and forkserver inherit none"
        )
    return "samples came without workers: look for what takes long to import or to send"


def _after_death(facts: Facts) -> str:
    """How to see it again."""
    what = facts["what"]
    if facts["index"] is None:
        call = "it"
    elif what.startswith("asking __getitems__"):
        call = f"dataset.__getitems__({facts['index']})"
    elif "iterating" in what or "stream" in what:
        call = f"next() of iter(dataset) up to sample {facts['index']}"
    else:
        call = f"dataset[{facts['index']}]"
    too = "" if facts["index"] is None else "; a worker would die of it too"
    if facts["code"] == -signal.SIGKILL:
        return (
            f"look at the memory that {call} takes: so the kernel ends what takes more than there "
            f"is; or run {call} in a fresh process under a debugger{too}"
        )
    if facts["code"] is not None and facts["code"] >= 0:
        return f"look for sys.exit, os._exit or a library that ends the process: run {call}{too}"
    return f"run {call} in a fresh process under a debugger{too}"


def _how_it_died(code: int | None) -> str:
    if code is None:
        return "died"
    return f"ended itself with exit status {code}" if code >= 0 else causes.ended(code)


def _own_frames(stack: str) -> str:
    """The frames of a stack that are no library's: where the program is, in its own lines."""
    own, kept = [], False
    for line in stack.splitlines():
        if (place := _FRAME.match(line)) is not None:
            kept = not place[1].startswith(("<", *_LIBRARIES))
        own += [line] if kept else []
    return "\n".join(own) or stack


def _cut_stack(text: str) -> str:
    return "\n".join(text.splitlines()[-_STACK_LINES:])
