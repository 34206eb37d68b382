"""``SafeDataLoader``: what the user holds; runs in main.

The class adds four keywords, each a public attribute of the same name, and one override:
``__iter__``. Everything else is torch's. Frameworks re-create loaders from their attributes and
signatures, copy their ``__dict__`` and look at ``_iterator``; the rules that make ours survive it
are in ``tests/frameworks/``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch.utils.data import DataLoader, Dataset

from safeloader import tracing
from safeloader.main.audit import EpochAudit
from safeloader.main.iterator import iterate
from safeloader.main.provenance import BatchRecord, Provenance, record_of
from safeloader.main.recorder import Recorder, watch_for_use

if TYPE_CHECKING:
    from safeloader.main.iterator import Session

T_co = TypeVar("T_co", covariant=True)

_VERIFY = ("raise", "warn", "off")


class SafeDataLoader(DataLoader[T_co]):
    """A ``torch.utils.data.DataLoader`` that knows which sample, where, when and by whom.

    Takes every argument of ``DataLoader``, positional or by keyword, and gives the same batches in
    the same order with the same use of random numbers.

    Args:
        dataset: as for ``DataLoader``.
        args: further arguments of ``DataLoader``.
        verify: what happens when what was delivered is not what was drawn: ``"raise"`` a
            :class:`~safeloader.DeliveryError`, ``"warn"``, or ``"off"``.
        trace: None asks the environment variable ``SAFELOADER_TRACE``; False; True logs a line per
            event; a folder gets a Chrome trace file that Perfetto opens.
        recorder: the notebook to write in; made on demand. Two loaders may share one.
        key: called with each sample, before collation and in the worker; gives a hashable identity.
            Two indices that yield one sample, or two workers that read one stream, are then seen.
            The first two million keys of an epoch are kept and compared.
        kwargs: further keywords of ``DataLoader``.

    Attributes:
        recorder: the :class:`~safeloader.Recorder` that the three properties below read from.

    Raises:
        ValueError: for an unknown ``verify``, or a trace folder that cannot be written to.
        TypeError: for a ``key`` that cannot be called, a ``trace`` or ``recorder`` of another kind.

    Iterating raises the subclasses of :class:`~safeloader.SafeLoaderError`.

    Example:
        >>> import torch
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader(torch.arange(6), batch_size=4)
        >>> for batch in loader:
        ...     print(batch.tolist(), loader.last_batch.indices)
        [0, 1, 2, 3] (0, 1, 2, 3)
        [4, 5] (4, 5)
        >>> print(loader.audit)
        epoch 0: complete, ok; 6 drawn, 6 delivered
    """

    # Defaults at class level: some frameworks make loaders on which __init__ never runs.
    verify: str = "raise"
    trace: bool | str | os.PathLike[str] | None = None
    recorder: Recorder | None = None
    key: Callable[[Any], Hashable] | None = None
    _session: Session | None = None

    def __init__(
        self,
        dataset: Dataset[T_co],
        *args: Any,
        verify: str = "raise",
        trace: bool | str | os.PathLike[str] | None = None,
        recorder: Recorder | None = None,
        key: Callable[[Any], Hashable] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_bad(verify, trace, recorder, key)
        super().__init__(dataset, *args, **kwargs)
        self.verify = verify
        self.trace = trace
        self.recorder = recorder
        self.key = key
        if recorder is None:
            self._recorder_on_demand()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show our keywords in the signature of a subclass that hands ``**kwargs`` on.

        Lightning reads signatures to re-create a loader and would lose them.
        """
        super().__init_subclass__(**kwargs)
        init = cls.__dict__.get("__init__")
        if init is not None and not hasattr(init, "__signature__"):
            _spell_out_keywords(init)

    def _recorder_on_demand(self) -> Recorder:
        if self.recorder is None:
            self.recorder = Recorder()
            watch_for_use(self.recorder, _calling_line())
            # Lightning re-creates a loader made in one of its hooks from the arguments that it saw
            # the user give. With the recorder among them, the user's own loader still answers.
            typed = self.__dict__.get("__pl_saved_kwargs")
            takes = inspect.signature(type(self).__init__).parameters
            if isinstance(typed, dict) and "recorder" in takes:
                typed.setdefault("recorder", self.recorder)
        return self.recorder

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]
        """The next epoch: an iterator that checks every batch it hands over."""
        if _is_off():
            if self._session is not None:  # its workers speak in parcels
                self._session = self._iterator = None
            return super().__iter__()
        return cast(Iterator[T_co], self._get_iterator())

    def _get_iterator(self) -> Any:
        # Torch's hook for subclasses; some code asks for a fresh iterator this way.
        return super()._get_iterator() if _is_off() else iterate(self)

    def __getstate__(self) -> dict[str, Any]:
        """The state without worker processes: a copy starts its own."""
        state = self.__dict__.copy()
        state.pop("_session", None)
        if "_iterator" in state:
            state["_iterator"] = None
        return state

    @property
    def last_batch(self) -> BatchRecord | None:
        """The record of the batch handed over last; None before the first."""
        delivery = None if self.recorder is None else self.recorder.last_delivery()
        return None if delivery is None else record_of(delivery)

    @property
    def provenance(self) -> Provenance:
        """The table of the samples delivered."""
        return Provenance(self._recorder_on_demand())

    @property
    def audit(self) -> EpochAudit | None:
        """Drawn against delivered, of the running or last epoch; None before the first."""
        return None if self.recorder is None else self.recorder.audit()


def _is_off() -> bool:
    value = os.environ.get("SAFELOADER", "").strip().lower()
    if value not in ("", "on", "off"):
        raise ValueError(
            f"the environment variable SAFELOADER must be 'off' (torch's own behaviour, nothing "
            f"recorded), 'on' or unset; it is {value!r}"
        )
    return value == "off"


_NOT_THE_CALLER = frozenset({"safeloader", "lightning", "lightning_fabric", "pytorch_lightning"})


def _calling_line() -> str:
    """File and line of the user's code that made a loader."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_CALLER:
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _refuse_bad(verify: object, trace: object, recorder: object, key: object) -> None:
    _is_off()
    if verify not in _VERIFY:
        raise ValueError(
            f"verify must be 'raise' (an error when the audit fails), 'warn' or 'off'; "
            f"got {verify!r}"
        )
    wanted = tracing.wish(trace)
    if isinstance(wanted, Path):
        tracing.check_folder(wanted)
    if recorder is not None and not isinstance(recorder, Recorder):
        raise TypeError(
            f"recorder must be a safeloader.Recorder, or None to have one made; got {recorder!r}"
        )
    if key is not None and not callable(key):
        raise TypeError(
            f"key must be a callable that takes a sample and gives a hashable identity, such as "
            f"lambda sample: sample['id']; got {key!r}"
        )


def _spell_out_keywords(init: Any) -> None:
    try:
        signature = inspect.signature(init)
    except (TypeError, ValueError):  # a constructor that is not a Python function
        return
    parameters = list(signature.parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return
    missing = [each for each in _our_keywords() if each.name not in signature.parameters]
    if missing:
        try:
            init.__signature__ = signature.replace(
                parameters=[*parameters[:-1], *missing, parameters[-1]]
            )
        except AttributeError:  # an object that takes no attributes
            return


@functools.cache
def _our_keywords() -> tuple[inspect.Parameter, ...]:
    parameters = inspect.signature(SafeDataLoader.__init__).parameters.values()
    return tuple(each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)
