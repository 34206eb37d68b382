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
_LIKE_TORCHS = ("__module__", "__qualname__", "__doc__", "__annotations__", "__defaults__")


def _begin() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != here]
    off = os.environ.get("SAFELOADER", "").strip().lower() == "off"
    if os.environ.get("SAFELOADER_LAUNCHED") and not off:
        sys.meta_path.insert(0, _Notice())
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
    """Finds no module of its own, but notices when torch's loader is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As :class:`importlib.abc.MetaPathFinder` has it."""
        if name != _LOADING:
            return None
        sys.meta_path.remove(self)
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loads(spec.loader)  # type: ignore[assignment]  # as good as one
        return spec


class _Loads:
    """A loader of modules, that puts our methods into what it loaded."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def exec_module(self, module: Any) -> None:
        """As :class:`importlib.abc.Loader` has it."""
        module.__loader__ = module.__spec__.loader = self._theirs
        self._theirs.exec_module(module)
        _put_in(module)

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

    # Not around `__init__`: torch's warnings would name a line of this file in place of torch's.
    def __new__(cls: Any, loader: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = super(iterator, cls).__new__(cls)
        engine = _engine()
        if engine is not None and loader is not None:
            engine.made(made, loader)
        return made

    pairs: Any = ((__iter__, iterate), (_get_iterator, get))
    for ours, theirs in pairs:
        for name in _LIKE_TORCHS:
            setattr(ours, name, getattr(theirs, name))
        ours.__wrapped__ = theirs
        setattr(loader, ours.__name__, ours)
    iterator.__new__ = staticmethod(__new__)
    return None


_found: list[Any] = []  # the engine, once it was looked for; None if it cannot be had


def _engine() -> Any:
    if not _found:
        _found.append(None)  # while it is imported, torch's own serves
        try:
            from safeloader import beside

            _found[0] = beside
        except ModuleNotFoundError as exc:
            if exc.name != "safeloader":  # another Python than the launcher's may have none
                _tell(f"{type(exc).__name__}: {exc}")
        except Exception as exc:  # the program goes on
            _tell(f"{type(exc).__name__}: {exc}")
        except BaseException:  # an interrupt: the next one who asks looks again
            _found.clear()
            raise
    return _found[0]


def _tell(why: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"safeloader: nothing is recorded in process {os.getpid()}: {why}\n")


_begin()
