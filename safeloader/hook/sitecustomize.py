"""What each Python of a launched program runs at its start. Runs in: main.

``python -m safeloader run`` puts this folder first on ``PYTHONPATH``, so that children have it too.
Nothing of torch's or ours is imported here: the program's first line waits for this. When torch's
loader is loaded its classes get three methods, which ask ``safeloader.beside`` at the first
``iter``.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as `typing` has it, which takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

_LOADING = "torch.utils.data.dataloader"
_TELLING = "safeloader.provenance.events"
_LIKE_TORCHS = ("__module__", "__qualname__", "__doc__", "__annotations__", "__defaults__")


def _begin() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != here]
    off = os.environ.get("SAFELOADER", "").strip().lower() == "off"
    if os.environ.get("SAFELOADER_LAUNCHED") and not off:
        sys.meta_path[:0] = [_Notice(_LOADING, _put_in), _Notice(_TELLING, _listen)]
    # The module that this one hides: the system's own, or a coverage tool's.
    mine = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as exc:
        if exc.name != "sitecustomize":
            raise
    finally:
        if mine is not None:
            sys.modules.setdefault("sitecustomize", mine)


class _Notice:
    """Finds no module of its own, but notices when one is looked for, and has it changed."""

    def __init__(self, name: str, change: Any) -> None:
        self._name = name
        self._change = change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As :class:`importlib.abc.MetaPathFinder` has it."""
        if name != self._name:
            return None
        others = [getattr(each, "find_spec", None) for each in sys.meta_path if each is not self]
        found = (find(name, path, target) for find in others if find is not None)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loads(spec.loader, self._loaded)
        return spec

    def _loaded(self, module: Any) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if not _looking:
            import threading  # which torch, by now, has loaded

            _looking.append(threading.RLock())
        self._change(module)


class _Loads:
    """A loader of modules, that tells of what it loaded."""

    def __init__(self, theirs: Any, loaded: Any) -> None:
        self._theirs = theirs
        self._loaded = loaded

    def exec_module(self, module: Any) -> None:
        """As :class:`importlib.abc.Loader` has it."""
        module.__loader__ = module.__spec__.loader = self._theirs
        self._theirs.exec_module(module)
        self._loaded(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def _put_in(module: Any) -> None:
    try:
        loader, iterator = module.DataLoader, module._BaseDataLoaderIter
        iterate, get = loader.__iter__, loader._get_iterator
    except AttributeError as exc:
        return _tell(f"it does not know this torch: {exc}")

    def __iter__(self: Any) -> Any:
        engine = _engine()
        return iterate(self) if engine is None else engine.iterate(self, iterate)

    def _get_iterator(self: Any) -> Any:
        engine = _engine()
        return get(self) if engine is None else engine.get_iterator(self, get)

    # Not `__init__`: that would be a frame more, to which torch's warnings and errors would point.
    def __new__(cls: Any, loader: Any = None, *args: Any, **kwargs: Any) -> Any:
        engine = _engine()
        if engine is not None and loader is not None:
            engine.made(cls, loader)
        return super(iterator, cls).__new__(cls)

    pairs: Any = ((__iter__, iterate), (_get_iterator, get))
    for ours, theirs in pairs:
        for name in _LIKE_TORCHS:
            setattr(ours, name, getattr(theirs, name))
        ours.__wrapped__ = theirs
        setattr(loader, ours.__name__, ours)
    __new__.__wrapped__ = iterator.__init__  # type: ignore[attr-defined]  # for its signature
    iterator.__new__ = staticmethod(__new__)
    _torchs[:] = (module, "DataLoader", loader), (loader, "_get_iterator", _get_iterator)
    return None


def _listen(module: Any) -> None:
    def listens(loader: Any, log: Any) -> Any:
        engine = _engine()
        return None if engine is None else engine.listens(loader, log)

    module.listeners.append(listens)


_torchs: list[Any] = []  # where what stands of torch's that the engine builds on
_found: list[Any] = []  # the engine, once it is looked for; None while it is not had
_settled: list[bool] = []  # whether that is the last word
_looking: list[Any] = []  # the lock of who looks for it


def _engine() -> Any:
    if not _settled:
        with _looking[0]:  # another thread's first loader waits
            if not _found:
                _look_for_engine()
    return _found[0]


def _look_for_engine() -> None:
    _found.append(None)  # while it is imported, torch's own serves this thread
    try:
        _found[0] = _import_engine()
    except ModuleNotFoundError as exc:
        if exc.name != "safeloader":  # another Python than the launcher's may have none
            _tell(f"{type(exc).__name__}: {exc}")
    except Exception as exc:  # the program goes on
        _tell(f"{type(exc).__name__}: {exc}")
    except BaseException:  # an interrupt: the next one who asks looks again
        _found.clear()
        raise
    _settled.append(True)


def _import_engine() -> Any:
    """Load it with torch's own in its places: the program may have put other things there."""
    places = [*_torchs, *((sys.modules["torch.utils.data"], *each[1:]) for each in _torchs[:1])]
    theirs = [vars(owner).get(name, places) for owner, name, _ in places]
    for owner, name, torchs in places:
        setattr(owner, name, torchs)
    try:
        from safeloader import beside
    finally:
        for (owner, name, _), its in zip(places, theirs, strict=True):
            if its is places:  # there was none
                delattr(owner, name)
            else:
                setattr(owner, name, its)
    return beside


def _tell(why: str) -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"safeloader: nothing is recorded in process {os.getpid()}: {why}\n")
    except (OSError, ValueError):  # the program has closed it
        pass


_begin()
