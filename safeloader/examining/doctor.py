"""``safeloader.doctor``: examine a loader before training. Runs in: main."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import time
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from safeloader import _python
from safeloader.examining import child, looks, wording
from safeloader.examining.inheriting import hazards
from safeloader.examining.patience import Patience
from safeloader.examining.report import Examination
from safeloader.examining.sending import tell_unpicklable
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Order, Source
from safeloader.instrumenting import loader_in
from safeloader.introspect.random_state import preserved
from safeloader.introspect.texts import bounded_text
from safeloader.provenance.recorder import Recorder, watch_no_more

_SEARCHED_S = 1.0  # an index of a batch that hung is waited for so long at least
_SEARCHED_SHARE = 0.4  # of the time that is left
_SEARCH_S = 4.0  # a search may take so long, past the end too: a hang is known, and no index yet
_FAILED_MOST = 2  # ends in the middle of fetching, after which nothing more is fetched
_SETTING = re.compile(
    r"(?:starting|measuring|ending|first batches):? (\d+|no) workers(?: by (\w+))?"
)


def doctor(loader: Any, seconds: float = 30.0, *, samples: int = 200_000) -> Examination:
    """Examine a loader before training: what is wrong with it, and how many workers to use.

    Runs the dataset, on purpose: in a child process, which may hang, die, print or start processes
    of its own and is ended with all of them; nothing of the loader and of this process's random
    numbers changes. The child is forked; where CUDA is initialised, a fresh Python gets the
    loader's parts by pickle.

    It is looked at whether an index gives the same twice under the same random numbers, whether
    ``__getitems__`` agrees, whether fetching changes the dataset, whether ``__len__`` is true, what
    cannot be pickled and what does not survive a fork, whether workers draw the same random
    numbers or read the same stream, whether ``set_epoch`` reaches them, how long samples take and
    how large they are, how speed grows with workers, and whether training can be resumed.

    Args:
        loader: a ``DataLoader`` of any class, or a wrapper that :func:`instrument` takes.
        seconds: how long it may take.
        samples: how many samples may be fetched, by all looks together.

    Returns:
        The findings, the worst first, and the settings measured. ``print`` it, or ask ``ok``,
        ``findings``, ``recommended``, ``to_dict()``.

    Raises:
        TypeError: if there is no loader in ``loader``, or an argument is of another kind.
        ValueError: if an argument is out of range.
        RuntimeError: in a worker or another daemonic process; in a program that spawn imports once
            more (put the call under ``if __name__ == "__main__":``); on a system without
            ``os.killpg``.

    Example:
        >>> import safeloader
        >>> from torch.utils.data import DataLoader
        >>> class Lying(list):
        ...     def __len__(self):
        ...         return 12
        >>> report = safeloader.doctor(DataLoader(Lying(range(10)), batch_size=2), seconds=4.0)
        >>> [print(each.answer) for each in report.findings if each.level == "error"]
        __len__ is too long: it says 12, and the samples end at 10
        [None]
    """
    _check(seconds, samples)
    if _python.is_being_prepared():
        if child.EXAMINED in os.environ:  # told by the one who started it all, and once
            raise SystemExit(child.CALLED_AGAIN)
        raise RuntimeError(
            "doctor was called in a process that spawn had started and that was in its "
            "bootstrapping phase: the program is imported once more there. Put the call, and the "
            'training, under `if __name__ == "__main__":`'
        )
    if get_worker_info() is not None:
        raise RuntimeError("doctor cannot run in a worker; call it in the training process")
    if multiprocessing.current_process().daemon:
        raise RuntimeError("doctor cannot run in a daemonic process, which may start no other")
    found = loader_in(loader)
    if found is None:
        raise TypeError(
            f"doctor takes a DataLoader, or a wrapper that holds one; got {bounded_text(loader)}"
        )
    recorder = vars(found).get("recorder")
    if isinstance(recorder, Recorder):
        watch_no_more(recorder)
    return _Examining(float(seconds), samples).of(found)


def examined(source: Source, name: str, seconds: float) -> Examination:
    """Examine what ``source`` gives in the child, where it is called; for the command.

    Raises:
        ValueError: if ``seconds`` is out of range, or ``source`` gives no loader.
    """
    _check(seconds, 1)
    examining = _Examining(float(seconds), 200_000)
    examining.follow(source)
    examining.refuse_unusable()
    return examining.report(name)


def _check(seconds: Any, samples: Any) -> None:
    if not hasattr(os, "killpg"):
        raise RuntimeError(
            "doctor ends its child and all that this started as one group, and this system has no "
            "os.killpg"
        )
    for name, value, kinds in (("seconds", seconds, (int, float)), ("samples", samples, (int,))):
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name} must be a number above 0; got {bounded_text(value)}")
        if not value > 0 or math.isinf(value):
            raise ValueError(f"{name} must be a number above 0; got {value}")


class _Examining:
    """One examination: children, one after the other, until all is looked at or the time is up."""

    def __init__(self, seconds: float, samples: int) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        self._seconds = seconds
        self._samples = samples
        self._patience = Patience(seconds)
        self._heard: wording.Heard = []
        self._output = child.Output()
        self._not_looked_at: list[str] = []
        self._own: dict[str, Any] = {}
        self._forked = True

    def of(self, loader: DataLoader[Any]) -> Examination:
        """Examine a loader of this process."""
        subject = Subject(loader)
        self._own = looks.told_of(subject)
        self._heard.append(("subject", self._own))
        # Threads and locks are not in the child what they are here.
        self._heard += [("hazard", each) for each in hazards(subject)]
        if child.can_fork():
            self.follow(lambda: subject, inherits=False)
        else:
            self._forked = False
            with preserved():
                self._follow_spawned(subject)
        return self.report(subject.name)

    def follow(self, source: Source, *, inherits: bool = True) -> None:
        """Have forked children make the looks."""
        self._all_looks(
            lambda order, patience: child.follow(source, order, patience, self._hear, self._output),
            inherits,
        )

    def refuse_unusable(self) -> None:
        """See that there was a loader.

        Raises:
            ValueError: if there was none.
        """
        for kind, facts in self._heard:
            if kind == "unusable":
                why = (
                    f": {facts['type']}: {facts['text']} ({facts['at']})" if "type" in facts else ""
                )
                printed = [f"\n  | {line}" for line in self._output.tail.splitlines()[-5:]]
                raise ValueError(facts["what"] + why + "".join(printed))

    def _follow_spawned(self, subject: Subject) -> None:
        unpicklable = subject.unpicklable()
        if unpicklable:
            tell_unpicklable(unpicklable, self)
            names = [look.name for look in looks.LOOKS[2:]]
            self._not_looked_at.append(
                f"{', '.join(names)}: CUDA is initialised, so the child cannot be forked, and what "
                "cannot be pickled cannot be sent to another"
            )
            return
        self._all_looks(
            lambda order, patience: child.follow_spawned(
                subject, order, patience, self._hear, self._output
            ),
            False,
        )

    def tell(self, kind: str, **facts: Any) -> None:
        """A fact that was found here."""
        self._heard.append((kind, facts))

    def _hear(self, look: int, kind: str, facts: dict[str, Any]) -> None:
        if kind == "subject":
            if self._own:
                return
            self._own = facts
        self._heard.append((kind, facts))

    def _all_looks(self, start: Any, inherits: bool) -> None:
        order = Order(0 if inherits else 1, self._end, self._samples)
        failed, again, unsent = 0, False, False
        while order.first < len(looks.LOOKS):
            order = order._replace(samples=max(1, self._samples))
            outcome = start(order, self._patience)
            self._samples = outcome.samples
            order = _knowing(order, outcome)
            if outcome.how == "done" and outcome.rest_left:
                order = order._replace(first=outcome.at.look)
                continue
            if outcome.how == "done":
                return
            is_late = outcome.how == "slow" and time.monotonic() >= self._end
            if (
                outcome.how != "ended"
                and not is_late
                and outcome.suspects
                and outcome.at.place is None
            ):
                heard = len(self._heard)
                outcome, order = self._searched(start, order, outcome)
                if not unsent and any(kind == "unsendable" for kind, _ in self._heard[heard:]):
                    unsent = True  # for which workers wait; once more without it
                    order = order._replace(first=outcome.at.look)
                    continue
            at = outcome.at
            self._note(outcome)
            if outcome.how == "ended" or is_late:
                rest = [look.name for look in looks.LOOKS[at.look + 1 :]]
                if rest:
                    self._not_looked_at.append(
                        f"{', '.join(rest)}: the {self._seconds:g} s were up"
                    )
                return
            if at.what in ("loading", "starting"):
                return
            method = self._heard[-1][1]["method"]
            if method is not None and method not in order.avoided and at.place is None:
                last = looks.LOOKS[at.look] is looks.SPEED
                order = order._replace(
                    avoided=order.avoided | {method},  # and the others may do
                    first=at.look if last else at.look + 1,
                )
                continue
            failed += looks.LOOKS[at.look].fetches
            # Once more without that index, if it died: to hang again takes too long. What was
            # searched for came after all else.
            once_more = outcome.how == "died" or looks.LOOKS[at.look] is looks.SPEED
            again = once_more and at.what.startswith("fetching") and not again
            order = order._replace(first=at.look if again else at.look + 1)
            if failed >= _FAILED_MOST:
                rest = [look.name for look in looks.LOOKS[order.first :] if look.fetches]
                if rest:
                    self._not_looked_at.append(f"{', '.join(rest)}: fetching does not come back")
                return

    def _searched(
        self, start: Any, order: Order, outcome: child.Outcome
    ) -> tuple[child.Outcome, Order]:
        """What hung or died without an index, and now with one if that was found."""
        now = time.monotonic()
        patience = self._patience.shortened(max(_SEARCHED_S, _SEARCHED_SHARE * (self._end - now)))
        search = order._replace(
            first=outcome.at.look,
            samples=max(1, self._samples),
            suspects=outcome.suspects,
            end=max(self._end, now + _SEARCH_S),
        )
        found = start(search, patience)
        self._samples = found.samples
        order = _knowing(order, found)
        if found.how not in ("hung", "died") or found.at.place is None:
            return outcome._replace(all_came_alone=found.how == "done"), order
        seconds = outcome.seconds + found.seconds if outcome.how == "hung" else found.seconds
        return found._replace(seconds=seconds), order

    def _note(self, outcome: child.Outcome) -> None:
        at = outcome.at
        look = looks.LOOKS[at.look].name
        found = _SETTING.match(at.what)
        setting = None
        if found is not None:
            workers = 0 if found[1] == "no" else int(found[1])
            told = [facts for kind, facts in self._heard if kind == "setting" and facts["workers"]]
            prefetch = told[-1]["prefetch"] if told else 2
            setting = [workers, prefetch if workers else None, found[2]]
        printed = self._output.tail.strip().splitlines()[-3:]
        self.tell(
            "ending",
            how=outcome.how,
            look=look,
            what=at.what,
            index=at.place,
            seconds=outcome.seconds,
            whole_s=self._seconds,
            busy=outcome.busy,
            locked=outcome.how == "hung" and self._patience.nothing_came,
            cold=outcome.cold,
            code=outcome.code,
            stack=outcome.stack,
            printed="\n".join(printed),
            setting=setting,
            all_came_alone=outcome.all_came_alone,
            method=setting and setting[2],
        )

    def report(self, name: str) -> Examination:
        """What was found."""
        heard, own = self._heard, self._own
        guard = self._output.lacks_guard
        best, why = wording.recommended(heard)
        told = next((facts for kind, facts in heard if kind == "samples"), {})
        why_not = wording.why_untried(heard, self._samples)
        late = [f"start method {each}: {why_not}" for each in wording.untried(heard)]
        unmeasured = [wording.why_unmeasured(heard), wording.what_was_warm(heard)]
        return Examination(
            loader=own.get("name", name),
            findings=tuple(wording.findings_of(heard, own, forked=self._forked, lacks_guard=guard)),
            samples=told,
            settings=tuple(wording.rows_of(heard, lacks_guard=guard)),
            recommended=best,
            own={
                "num_workers": own.get("workers"),
                "prefetch_factor": own.get("prefetch"),
                "start_method": own.get("method") if own.get("workers") else None,
            },
            cores=wording.cores_of(heard),
            sent=next((facts for kind, facts in heard if kind == "weight"), {}),
            resume=wording.resume_text(heard),
            not_looked_at=(*self._not_looked_at, *filter(None, unmeasured), *late),
            output=self._output.tail,
            output_bytes=self._output.bytes,
            seconds=time.monotonic() - self._begin,
            chosen_because=why,
        )


def _knowing(order: Order, outcome: child.Outcome) -> Order:
    """The next order, with what a child told of indices that do not come."""
    excluded = order.excluded | outcome.excluded
    if outcome.at.place is not None and outcome.how in ("hung", "died"):
        excluded |= {outcome.at.place}
    end = order.samples_end if outcome.samples_end is None else outcome.samples_end
    return order._replace(excluded=excluded, samples_end=end)
