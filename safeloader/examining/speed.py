"""How speed grows with workers: the settings tried, in turns, on this machine. Runs in: main.

Batches per second are of whole epochs of workers that run already. Each has as many batches for one
worker as for the other, so all work from its begin to its end. A setting's pool stays; between its
turns it has nothing to do, so it takes nothing from the others. Start-up is told apart, as the time
to the first batch.

Each setting begins with a copy of the dataset that has fetched nothing, as in training: workers are
forked before anything is fetched here, and what spawn and forkserver send was pickled before.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import pickle
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from safeloader import _torch
from safeloader.examining.choosing import TURNS, Row, gains
from safeloader.examining.finding import search
from safeloader.examining.samples import raised
from safeloader.examining.sending import weighed
from safeloader.examining.subject import TO_WORKERS, Subject, pickled_alone
from safeloader.examining.talk import Suspects, Talk
from safeloader.introspect.resources import cores

_TURN_S = 0.4
_TURN_BATCHES = 300
_FEWEST = 3  # batches for each worker in a turn
_ROUNDS = 7
_CONTENDS = 0.8  # of the best: is measured again
_HOPELESS = 0.6  # of the best, in one turn: is not, where there are many workers already
_PREFETCH = (1, 4, 8)
_MARK_S = 0.5
_SPAWN_S = 2.5  # in which a fresh Python has imported torch
_WEIGHING_S = 0.5  # what takes longer to weigh takes long to be copied
_START_SHARE = 0.25  # of the time, for the start methods
_COPIED_BYTES = 1 << 28  # of a dataset: a larger one is sent as it is when its turn comes
_MOST = 8  # workers for each core, where speed grows so far


class Setting(NamedTuple):
    """What is tried; without workers, ``prefetch`` and ``method`` are None."""

    workers: int
    prefetch: int | None
    method: str | None


def look(subject: Subject, talk: Talk) -> None:
    """Try numbers of workers, then prefetch factors, then start methods."""
    with warnings.catch_warnings():
        # More workers than cores are tried on purpose; torch says to each that it is too many.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        _Sweep(subject, talk).run()


def counts(cores: int, own: int) -> list[int]:
    """Numbers of workers to try, fewest first.

    >>> counts(2, 0), counts(16, 6)
    ([0, 1, 2, 3, 4], [0, 1, 2, 4, 6, 8, 12, 16, 17, 32])
    """
    tried = {0, 1, cores, cores + 1, 2 * cores}
    tried |= {2**k for k in range(10) if 2**k < cores} | {cores // 2, 3 * cores // 4}
    if cores <= 4:
        tried |= set(range(cores + 2))
    if own <= 8 * cores:
        tried.add(own)
    return sorted(tried)


class _Draws:
    """Stands for the batch sampler: gives out the batches of the next turn."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Pool:
    """A setting, its loader, and what was measured of it."""

    def __init__(
        self, setting: Setting, subject: Subject, talk: Talk, source: Iterator[Any]
    ) -> None:
        self.setting = setting
        self.rates: list[float] = []
        self.first_s = 0.0
        self.is_stopped = False
        self._subject, self._talk, self._source = subject, talk, source
        self._draws = _Draws()
        self._loader: Any = subject.loader(self._draws, *setting)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def best_rate(self) -> float:
        return max(self.rates, default=0.0)

    def start(self) -> None:
        """Start the workers, and see how long the first batch takes."""
        workers = self.setting.workers
        self._draw(max(1, workers))
        self._say("starting")
        start = time.perf_counter()
        for number, _ in enumerate(self._loader):
            if not number:
                self.first_s = time.perf_counter() - start
            self._mark("first batches")
            if number + 1 >= max(1, workers):  # of a stream
                break

    def turn(self, seconds: float) -> None:
        """Measure one epoch of about so many seconds."""
        each = max(1, self.setting.workers)
        guess = self.rate or each / max(self.first_s, 1e-4)
        count = math.ceil(min(_TURN_BATCHES, seconds * guess) / each) * each
        count = max(count, _FEWEST * each)
        self._draw(count)
        self._say("measuring")
        begin = last = time.perf_counter()
        came = 0
        for _ in self._loader:
            last = time.perf_counter()
            came += 1
            self._mark("measuring")
            if came >= count:
                break
        if not came and self._subject.drop_last:
            self._talk.tell("no_batch_of_stream", workers=self.setting.workers)
        if came and last > begin:
            self.rates.append(came / (last - begin))
        self.tell(None)

    def take_over(self, other: _Pool) -> None:
        """Go on with the workers of another pool of this setting."""
        self._loader, self._draws, self.is_stopped = other._loader, other._draws, False
        self.rates += other.rates
        self.tell(None)

    def stop(self) -> None:
        """End the workers."""
        if self.is_stopped:
            return
        self.is_stopped = True
        self._say("ending")
        _torch.abandon(self._loader)
        self._loader = None

    def _draw(self, count: int) -> None:
        """What comes next; it is told, should it not come back."""
        if self._subject.is_stream:
            size = self._subject.batch_size or 1
            self._talk.suspect(Suspects([], samples=count * size))
        else:
            batches = self._draws.batches = list(itertools.islice(self._source, count))
            size = len(batches[0]) if self._subject.batched else 1
            self._talk.suspect(Suspects(batches))
        self._talk.fetched(count * size)

    def _say(self, what: str) -> None:
        workers, _, method = self.setting
        told = f"{workers} workers by {method}" if workers else "no workers"
        self._talk.at(f"{what}: {told}")
        self._marked = time.monotonic()

    def _mark(self, what: str) -> None:
        if time.monotonic() - self._marked > _MARK_S:  # a batch came, so it does not hang
            self._say(what)

    def tell(self, error: dict[str, str] | None) -> None:
        """What was measured so far, or why nothing can be."""
        workers, prefetch, method = self.setting
        self._talk.tell(
            "setting",
            workers=workers,
            prefetch=prefetch,
            method=method,
            rates=self.rates,
            first_s=self.first_s,
            error=error,
        )


class _Sweep:
    def __init__(self, subject: Subject, talk: Talk) -> None:
        self._subject, self._talk = subject, talk
        self._source = subject.batches() if not subject.is_stream else iter(())
        self._own = subject.num_workers
        self._measured: set[Setting] = set()
        methods = multiprocessing.get_all_start_methods()
        self._sent = not subject.unpicklable()
        usable = methods if self._sent else [each for each in methods if each == "fork"]
        self._methods = [each for each in usable if each not in talk.avoided]
        self._cheap = "fork" if "fork" in self._methods else next(iter(self._methods), None)
        self._own_setting = self._tried_with(self._own)
        self._fails_alone = False
        self._samples = talk.samples  # that may be fetched
        self._cold: bytes | None = None

    def run(self) -> None:
        self._talk.tell("machine", cores=cores(), methods=self._methods)
        if not self._subject.is_stream:
            self._talk.at("drawing batches")
            first = next(self._source, None)
            if first is None:
                self._talk.tell("nothing_to_measure")
                return
            self._source = itertools.chain([first], self._source)
        # What workers are made of has fetched nothing before: so without workers is tried last.
        total = self._talk.left()
        tried = self._numbers_of_workers(self._talk.end - 0.55 * total) if self._methods else []
        best = self._best(tried)
        if best is not None:
            held = self._prefetch_factors(tried, best.setting, self._talk.end - 0.42 * total)
            best = self._with_prefetch(best, held)
            for pool in held:
                if pool.setting not in (best.setting, self._own_setting):
                    pool.stop()
            tried = [pool for pool in held if not pool.is_stopped]
        # Before the start methods: a fresh Python takes how long it likes, and this must be known.
        self._keep_cold()
        alone = self._opened(Setting(0, None, None))
        if alone is not None:
            tried = [alone, *tried]
            end = self._talk.end - _START_SHARE * total if best is not None else self._talk.end
            self._in_turns(tried, end, 0.1)
        for pool in tried:
            pool.stop()
        if best is not None:
            self._start_methods(best.setting, self._talk.end)
        elif self._methods and not self._fails_alone:
            self._start_methods(Setting(1, 2, self._cheap), self._talk.end)

    def _tried_with(self, workers: int) -> Setting:
        """The setting that is tried of so many workers, before others are of the best of them."""
        if not workers:
            return Setting(0, None, None)
        return Setting(workers, self._subject.prefetch_factor or 2, self._cheap)

    @staticmethod
    def _best(pools: list[_Pool]) -> _Pool | None:
        return max((pool for pool in pools if pool.rates), key=lambda pool: pool.rate, default=None)

    def _numbers_of_workers(self, end: float) -> list[_Pool]:
        pools: list[_Pool] = []
        worse = 0
        tried = [each for each in counts(cores(), self._own) if each]
        for workers in tried:
            setting = self._tried_with(workers)
            cost = (pools[-1].first_s * 2 + _TURN_S) if pools else 0.0
            needed = workers <= 1 or workers == self._own
            if (time.monotonic() + cost > end and not needed) or self._talk.samples <= 0:
                break
            if worse >= 2 and workers > 4 and workers != self._own:
                continue
            pool = self._opened(setting)
            if pool is None:
                if not pools:
                    return pools
                continue
            best = self._best(pools)
            worse = worse + 1 if best is not None and pool.rate < 1.05 * best.rate else 0
            pools.append(pool)
            if workers == tried[-1] and not worse and 0 < workers < _MOST * cores():
                tried.append(2 * workers)  # it waits for something else than the cores
            pools = self._without_slow(pools)
        self._in_turns(pools, end, 0.5)
        return pools

    def _without_slow(self, pools: list[_Pool]) -> list[_Pool]:
        """End those that are far behind, where there are many workers already.

        One turn is little to judge by, so few are; and what the best is compared with, the loader's
        own setting, stays.
        """
        best = self._best(pools)
        if best is None or sum(pool.setting.workers for pool in pools) <= 4 * cores() + 8:
            return pools
        left = [
            pool
            for pool in pools
            if pool.setting == self._own_setting or pool.best_rate >= _HOPELESS * best.rate
        ]
        for pool in pools:
            if pool not in left:
                pool.stop()
        return left

    def _prefetch_factors(self, pools: list[_Pool], best: Setting, end: float) -> list[_Pool]:
        held = [pool for pool in pools if pool.setting in (best, self._own_setting)]
        for pool in pools:
            if pool not in held:
                pool.stop()
        first_s = max(pool.first_s for pool in held)
        for prefetch in _PREFETCH:
            if time.monotonic() + 2 * first_s + _TURN_S > end:
                break
            setting = best._replace(prefetch=prefetch)
            if any(pool.setting == setting for pool in held):
                continue
            opened = self._opened(setting)
            if opened is not None:
                held.append(opened)
        self._in_turns(held, end, 0.35)
        return held

    @staticmethod
    def _with_prefetch(base: _Pool, held: list[_Pool]) -> _Pool:
        """The fastest, if its prefetch_factor surely gains: the start methods are tried with it."""
        rows = {pool: Row(*pool.setting, tuple(pool.rates), None) for pool in held}
        sure = [
            pool
            for pool in held
            if pool is base
            or (len(pool.rates) >= TURNS <= len(base.rates) and gains(rows[pool], rows[base]))
        ]
        return max(sure, key=lambda pool: pool.rate)

    def _keep_cold(self) -> None:
        """Pickle what is to be sent to workers, as long as nothing of it was fetched here."""
        if not set(self._methods) - {"fork"}:
            return
        self._talk.at("pickling")
        parts = {name: getattr(self._subject, name) for name in TO_WORKERS}
        begin = time.monotonic()
        size = weighed(parts, copied=True)
        if size > _COPIED_BYTES or time.monotonic() - begin > _WEIGHING_S:
            return
        try:
            self._cold = pickled_alone(parts)
        except Exception:  # which is told of what cannot be sent
            return

    def _as_it_was(self) -> Subject:
        """What had fetched nothing, once more; else what there is, and that is told."""
        if self._cold is None:
            self._talk.tell("warm_methods")
            return self._subject
        subject = copy.copy(self._subject)
        vars(subject).update(pickle.loads(self._cold))
        return subject

    def _start_methods(self, best: Setting, end: float) -> None:
        subject: Subject | None = None
        for method in self._methods:
            setting = best._replace(method=method)
            if setting in self._measured:
                continue
            fresh_s = _SPAWN_S * max(1.0, setting.workers / cores())
            needed = _TURN_S + (0.0 if method == "fork" else fresh_s)
            if end - time.monotonic() < needed or self._talk.samples <= 0:
                return
            subject = subject or self._as_it_was()
            pool = self._opened(setting, subject)
            if pool is not None:
                pool.stop()

    def _opened(self, setting: Setting, subject: Subject | None = None) -> _Pool | None:
        """A pool that was started and measured once; None if it could not be."""
        for last in (False, False, True):
            pool = _Pool(setting, subject or self._subject, self._talk, self._source)
            try:
                pool.start()
                pool.turn(_TURN_S)
            except Exception as exc:
                self._measured.add(setting)
                if last or (setting.method != self._cheap and setting.workers):
                    pool.tell(raised(exc))
                else:
                    self._tell_failed(setting, exc)
                pool.stop()  # with other samples it may do
                if setting.method != self._cheap and setting.workers:
                    break
            else:
                self._measured.add(setting)
                return pool
        return None

    def _tell_failed(self, setting: Setting, exc: Exception) -> None:
        """Tell what a batch failed with, and of which sample; that is left out from now on."""
        if search(self._subject, self._talk, self._talk.suspects):
            self._fails_alone = True
        else:
            self._talk.tell("batch_raises", workers=setting.workers, **raised(exc))

    def _once_more(self, pool: _Pool) -> None:
        """Measure a pool once more; where it fails now, anew, or it is left as it was."""
        try:
            pool.turn(_TURN_S)
            return
        except Exception as exc:  # a sample that was not among the batches before
            self._tell_failed(pool.setting, exc)
        pool.stop()
        other = self._opened(pool.setting)
        if other is not None:
            pool.take_over(other)

    def _in_turns(self, pools: list[_Pool], end: float, left: float) -> None:
        """Measure those again that may be the best, forwards and backwards in turn.

        ``left`` is the share of the samples that is for what is tried later.
        """
        for number in range(_ROUNDS):
            best = self._best(pools)
            if best is None:
                return
            rest = [
                pool
                for pool in pools
                if not pool.is_stopped
                and (
                    not number
                    or pool.setting == self._own_setting
                    or pool.best_rate >= _CONTENDS * best.rate
                )
            ]
            if number > 1 and all(
                pool.setting in (best.setting, self._own_setting) for pool in rest
            ):
                return
            for pool in rest if number % 2 else rest[::-1]:
                cost = _TURN_S + _FEWEST * max(1, pool.setting.workers) / max(pool.rate, 1e-6)
                if time.monotonic() + cost > end or self._talk.samples <= left * self._samples:
                    return
                self._once_more(pool)
