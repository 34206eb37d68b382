"""What a look may say, and what it has to keep to, in the child. Runs in: main."""

from __future__ import annotations

import base64
import json
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from safeloader.examining.subject import Subject
from safeloader.introspect.texts import index_text

Source = Callable[[], Subject]  # called in the child


class Unusable(Exception):
    """There is no loader to examine: what was asked for, and what was raised instead."""

    def __init__(self, what: str, cause: BaseException | None) -> None:
        super().__init__(what)
        self.what, self.cause = what, cause


class Suspects(NamedTuple):
    """What is fetched next, by which a hang, a death or an error comes that names no index.

    Attributes:
        batches: as the loader draws them.
        samples: how many of them, of a stream.
        collated: whether the loader's own ``collate_fn`` gets them.
    """

    batches: list[Any]
    samples: int = 0
    collated: bool = True


class Talk:
    """What a look may say and has to keep to, in the child.

    Attributes:
        loading_s: how long it took until there was a subject.
        suspects: what is being fetched where no index is said.
        avoided: start methods by which workers hung; others are to be used.
        end: when all has to be done, by ``time.monotonic``.
        samples: how many more may be fetched.
        what: what is done now.
    """

    def __init__(
        self, fd: int, end: float, samples: int, avoided: frozenset[str] = frozenset()
    ) -> None:
        self.avoided = avoided
        self.suspects = Suspects([])
        self.loading_s = 0.0
        self._begun, self._samples_then = time.monotonic(), samples
        self._fd, self.end, self.samples = fd, end, samples
        self._look_end = end
        self.what = ""

    def begin(self, look: int, seconds: float) -> None:
        """A look begins, and has so many seconds."""
        self._look_end = min(self.end, time.monotonic() + seconds)
        self.what = ""
        self._say(["look", look])

    def at(self, what: str, index: Any = None) -> None:
        """What is done next; if nothing is heard after it, that is what hangs, or kills."""
        self.what = what if index is None else f"{what} {index_text(index)}"
        self._say(["at", what, None if index is None else index_text(index)])

    def tell(self, kind: str, **facts: Any) -> None:
        """A fact, as JSON has it."""
        if kind == "subject":  # what another child would cost; the import of torch with it
            self.loading_s = max(time.monotonic() - self._begun, time.process_time())
        self._say(["fact", kind, facts])

    def suspect(self, suspects: Suspects) -> None:
        """What is fetched next, without a word for each index."""
        self.suspects = suspects
        try:
            kept = base64.b85encode(pickle.dumps(tuple(suspects))).decode()
        except Exception:  # indices of a kind that cannot be sent: then nothing is searched
            kept = ""
        self._say(["suspects", kept])

    def pass_on(self, subject: Subject) -> None:
        """What the next child has to know of the indices that do not come."""
        self._say(["known", sorted(subject.excluded), subject.end])

    @property
    def is_cold(self) -> bool:
        """Whether no sample was fetched in this process."""
        return self.samples == self._samples_then

    def leave_rest(self, subject: Subject) -> None:
        """What is still to be looked at is for another child, which has fetched nothing."""
        self.pass_on(subject)
        self._say(["rest"])

    def done(self) -> None:
        """All looks are made."""
        self._say(["done", self.samples])

    def left(self) -> float:
        """Seconds that this look has left; below zero when it has to end."""
        return self._look_end - time.monotonic()

    def fetched(self, count: int = 1) -> None:
        """So many samples were fetched."""
        self.samples -= count

    def _say(self, message: list[Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data) :]


class Order(NamedTuple):
    """What a child is to do; picklable."""

    first: int  # the look to begin with
    end: float  # by time.monotonic, which all processes of a machine share
    samples: int
    excluded: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()  # start methods by which workers hang
    samples_end: int | None = None  # where they end, if the length is not true
    suspects: str = ""  # as a child told them: to be searched, and nothing else to be done

    def suspected(self) -> Suspects:
        """What is to be searched."""
        return Suspects(*pickle.loads(base64.b85decode(self.suspects)))
