"""A loader's metrics in the logger of a framework, and the batches of each step. Runs in: main.

========================  =============================================  ================
``LightningCallback``     for ``Trainer(callbacks=[...])`` of Lightning  ``lightning``
``TransformersCallback``  for ``trainer.add_callback``                   ``transformers``
``log_with_accelerate``   one call in the loop                           ``accelerate``
``mark_with_accelerate``  one call for each batch                        ``accelerate``
========================  =============================================  ================

Each imports its framework when it is first asked for.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from safeloader.integrations.accelerate import log_with_accelerate, mark_with_accelerate
    from safeloader.integrations.lightning import LightningCallback
    from safeloader.integrations.transformers import TransformersCallback

__all__ = [
    "LightningCallback",
    "TransformersCallback",
    "log_with_accelerate",
    "mark_with_accelerate",
]

_HOMES = {
    "LightningCallback": "lightning",
    "TransformersCallback": "transformers",
    "log_with_accelerate": "accelerate",
    "mark_with_accelerate": "accelerate",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeloader.integrations' has no attribute {name!r}")
    framework = _HOMES[name]
    try:
        home = importlib.import_module(f"safeloader.integrations.{framework}")
    except ModuleNotFoundError as exc:
        raise ImportError(
            f"safeloader.integrations.{name} needs {framework}: pip install {framework} "
            f"(there is no module {exc.name!r})"
        ) from exc
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
