"""An existing loader made ours, whatever library's class it has. Runs in: main.

::

    PrefetchLoader ── loader ──► NodeLoader object      its class: (NodeLoader, SafeDataLoader)

Their class stands in front: what it does around torch's iterator goes on being done around ours.
"""

from __future__ import annotations

import copyreg
import inspect
import warnings
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.handles import handle_of
from safeloader.introspect.random_state import preserved
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import definitions, fields
from safeloader.loader import (
    KEYWORDS,
    SafeDataLoader,
    checked,
    recorder_of,
    refuse_unseedable,
    with_our_keywords,
)
from safeloader.records import Records
from safeloader.settings import Settings

_T = TypeVar("_T")
_INNER = ("base_dataloader", "_dataloader", "loader", "_loader", "dataloader")
_TOLD = tuple(name for name in vars(Records) if name[0] != "_" and name not in KEYWORDS)
_LAUNCHER = "python -m safeloader run records every loader of a program, however it was made"


def instrument(obj: _T, **options: Any) -> _T:
    """Have an existing loader recorded: one that a library made, or the one inside a wrapper.

    The loader gets a class of two bases, its own and :class:`~safeloader.SafeDataLoader`, so that
    ``audit``, ``last_batch``, ``provenance`` and our keywords are its attributes from then on. Of
    a wrapper (what Accelerate, Fabric, Ray or timm's prefetcher put around a loader) it is the
    loader within; :func:`loaders_of` finds it again. An epoch that runs is finished unrecorded.

    Args:
        obj: a loader, or what holds one as ``base_dataloader``, ``_dataloader``, ``loader``,
            ``_loader`` or ``dataloader``.
        options: keywords of :class:`~safeloader.SafeDataLoader`. Of a loader that is ours already,
            those that are given change.

    Returns:
        ``obj`` itself.

    Raises:
        TypeError: if there is no loader in it, its class never asks torch's ``DataLoader`` for
            batches, its workers are threads, it has an attribute of its own by the name of one of
            ours (a keyword, ``audit``, ``metrics``), or an option is not one of ours or of another
            kind than is taken.
        ValueError: for an option out of range, a loader that ``seed=`` cannot serve, or one that
            keeps an iterator of its own which is in the middle of an epoch.

    Whatever is raised, nothing is changed then.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> import safeloader
        >>> loader = safeloader.instrument(DataLoader(torch.arange(6), batch_size=4), verify="warn")
        >>> for batch in loader:
        ...     print(batch.tolist(), loader.last_batch.indices)
        [0, 1, 2, 3] (0, 1, 2, 3)
        [4, 5] (4, 5)
    """
    loader = loader_in(obj)
    if loader is None:
        several = isinstance(obj, dict | list | tuple)
        raise TypeError(
            f"{bounded_text(obj)} is no DataLoader, and holds none as {', '.join(_INNER)}. Give "
            f"{'each loader in it by' if several else 'the loader'} itself; {_LAUNCHER}"
        )
    unknown = [name for name in options if name not in KEYWORDS]
    if unknown:
        raise TypeError(
            f"instrument() takes no option {unknown[0]!r}; it takes {', '.join(KEYWORDS)}"
        )
    if isinstance(loader, SafeDataLoader):
        now = {name: getattr(loader, name) for name in KEYWORDS}
        refuse_unseedable(loader, checked(now | options, loader.dataset), made_by_user=False)
        for name, value in options.items():
            setattr(loader, name, value)
        return obj
    why = why_not_recordable(loader) or _why_not_ours(loader)
    if why:
        raise TypeError(why)
    settings = checked(options, loader.dataset)
    refuse_unseedable(loader, settings, made_by_user=False)
    kept = _torch.iterators_in(loader)
    for name, iterator in kept.items():
        _refuse_midway(loader, name, iterator)
        if settings.seed is not None and settings.seed_per == "sample":
            raise ValueError(
                f"this {type(loader).__qualname__} keeps one iterator for all epochs ({name}), so "
                "each would have the random numbers of the one before: give seed_per='batch'"
            )
    theirs, before = type(loader), dict(vars(loader))
    try:
        _make_ours(loader, settings, kept)
    except BaseException:  # their __setattr__, or what an iterator is made of
        object.__setattr__(loader, "__class__", theirs)
        vars(loader).clear()
        vars(loader).update(before)
        raise
    return obj


def _make_ours(loader: Any, settings: Settings, kept: dict[str, Any]) -> None:
    loader.__class__ = recorded_class(type(loader))
    for name in KEYWORDS:
        setattr(loader, name, getattr(settings, name))
    held = _torch.kept_iterator(loader)
    if held is not None and _torch.is_under_way(held):
        warnings.warn(
            "the epoch that this loader is in is finished unrecorded; records begin with the next",
            stacklevel=3,
        )
    for name in kept:
        # Made by the loader's constructor, for all epochs. Whoever made it drew from the generators
        # for it already.
        with preserved():
            setattr(loader, name, SafeDataLoader.__iter__(loader))
    recorder_of(loader)


def loaders_of(obj: Any) -> list[Any]:
    """The recorded loaders in a wrapper, or in a list, tuple or dict of them.

    Args:
        obj: what was given to :func:`instrument`, what a framework made of it, or several.

    Returns:
        Of each loader what answers ``audit``, ``last_batch``, ``provenance`` and ``replay()``: the
        loader itself where its class is ours, what stands beside it in a launched program. Those
        that are not recorded are left out.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> import safeloader
        >>> class Wrapper:
        ...     def __init__(self, loader):
        ...         self.loader = loader
        >>> wrapper = safeloader.instrument(Wrapper(DataLoader(torch.arange(6), batch_size=4)))
        >>> batches = list(wrapper.loader)
        >>> [print(loader.audit) for loader in safeloader.loaders_of(wrapper)]
        epoch 0: complete, ok; 6 drawn, 6 delivered
        [None]
    """
    if isinstance(obj, dict):
        obj = list(obj.values())
    found = map(loader_in, obj if isinstance(obj, list | tuple) else [obj])
    ours = (each if isinstance(each, SafeDataLoader) else handle_of(each) for each in found)
    return [each for each in ours if each is not None]


def loader_in(obj: Any, outer: tuple[Any, ...] = ()) -> DataLoader[Any] | None:
    """The loader that batches come from: what a wrapper holds, or ``obj`` itself."""
    if any(obj is each for each in outer):
        return None
    held = dict(fields(obj))
    for name in _INNER:
        inner = held.get(name)
        found = None if inner is None else loader_in(inner, (*outer, obj))
        if found is not None:
            return found
    return obj if isinstance(obj, DataLoader) else None


def why_not_recordable(loader: DataLoader[Any]) -> str:
    """Why a loader cannot be recorded, in a sentence; empty if it can."""
    kind = type(loader).__qualname__
    if why := _torch.why_not_asked(type(loader)):
        return f"a {kind} cannot be recorded: {why}, without asking torch's DataLoader for them"
    if _torch.has_thread_workers(loader):
        return (
            f"this {kind} cannot be recorded: its workers are threads (its multiprocessing_context "
            f"is {bounded_text(loader.multiprocessing_context)}); use process workers"
        )
    return ""


def _why_not_ours(loader: DataLoader[Any]) -> str:
    """Why a loader cannot become ours, in a sentence; empty if it can."""
    kept, hides = (
        [name for name in names if name in vars(loader) or definitions(type(loader), name)]
        for names in ((*KEYWORDS, "_pool"), _TOLD)
    )
    if kept and not set(kept) >= set(KEYWORDS):  # all: copied with the attributes of one of ours
        of_its_own = f"{', '.join(kept)} of its own, which would be lost"
    elif hides:
        of_its_own = f"{', '.join(hides)} of its own, which would hide ours"
    else:
        return ""
    return f"this {type(loader).__qualname__} cannot become ours: it has {of_its_own}; {_LAUNCHER}"


def _refuse_midway(loader: DataLoader[Any], name: str, iterator: Any) -> None:
    given = _torch.handed_over(iterator)
    if given and given % len(loader):
        raise ValueError(
            f"this {type(loader).__qualname__} keeps one iterator for all epochs ({name}), which "
            f"is {given % len(loader)} batches into one of {len(loader)}: instrument it before its "
            "first batch, or between two epochs"
        )


_classes: dict[Any, Any] = {DataLoader: SafeDataLoader}


def recorded_class(theirs: type[DataLoader[Any]]) -> Any:
    """The class of a loader of class ``theirs`` that is recorded; always the same one."""
    if theirs not in _classes:
        _classes[theirs] = _class_over(theirs)
    return _classes[theirs]


def _class_over(theirs: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        vars(self).update({name: kwargs.pop(name) for name in ours if name in kwargs})
        theirs.__init__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Below 2 it would be told in a way that names the class, which nobody finds by its name.
        make, args, *rest = super(cls, self).__reduce_ex__(max(protocol, 2))
        if make is cls:
            return _made, (theirs, *args), *rest
        if make is getattr(copyreg, "__newobj__") and args[0] is cls:  # noqa: B009  # no mangling
            return _blank, (theirs, *args[1:]), *rest
        return make, args, *rest

    def set_epoch(self: Any, epoch: int) -> Any:
        self._count_from(epoch)
        return theirs.set_epoch(self, epoch)

    signature = inspect.signature(theirs.__init__)
    ours = [name for name in KEYWORDS if name not in signature.parameters]
    __init__.__signature__ = with_our_keywords(signature)  # type: ignore[attr-defined]  # as inspect has it
    body: dict[str, Any] = {
        "__module__": theirs.__module__,
        "__doc__": theirs.__doc__,
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
    }
    if callable(getattr(theirs, "set_epoch", None)):  # it stands in front of ours
        body["set_epoch"] = set_epoch
    cls: Any = type(f"Safe{theirs.__name__}", (theirs, SafeDataLoader), body)
    return cls


def _made(theirs: type[DataLoader[Any]], *args: Any) -> Any:
    return recorded_class(theirs)(*args)


def _blank(theirs: type[DataLoader[Any]], *args: Any) -> Any:
    cls = recorded_class(theirs)
    return cls.__new__(cls, *args)
