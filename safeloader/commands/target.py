"""What of a program is meant: ``train.py:make_loader``, ``package.module:name``. Runs in: main.

The program is imported as multiprocessing does it in a process that it spawns, so what stands under
``if __name__ == "__main__"`` does not run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import runpy
import sys
import types
from typing import Any


class Place:
    """A name in a program.

    Args:
        text: ``train.py:make_dataset`` or ``package.module:make_dataset``.
        gives: what it should give, for the words: ``"the loader"``.
        example: a name, for the words: ``"make_loader"``.

    Raises:
        ValueError: if it is neither, or there is no such file.
    """

    def __init__(self, text: str, gives: str, example: str) -> None:
        self.where, _, self.name = text.rpartition(":")
        if not self.where or not all(part.isidentifier() for part in self.name.split(".")):
            raise ValueError(
                f"{text!r} does not say what gives {gives}: write train.py:{example} or "
                f"package.module:{example}"
            )
        self.is_script = self.where.endswith(".py") or os.sep in self.where
        if self.is_script and not os.path.isfile(self.where):
            raise ValueError(f"there is no file {self.where!r}")
        if not self.is_script and not all(part.isidentifier() for part in self.where.split(".")):
            raise ValueError(f"{self.where!r} is neither a script (train.py) nor a module's name")

    def imported(self) -> Any:
        """The program, as a module. It may raise whatever the program raises."""
        if not self.is_script:
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(self.where)
        # As multiprocessing does it in a process that it spawns: so the workers find its classes.
        path = os.path.abspath(self.where)
        sys.path.insert(0, os.path.dirname(path))
        sys.argv = [path]
        module: Any = types.ModuleType("__mp_main__")
        module.__file__ = path
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
        vars(module).update(runpy.run_path(path, run_name="__mp_main__"))
        return module


def needed(function: Any) -> list[str]:
    """The arguments that a function has to be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each.name
        for each in parameters
        if each.default is inspect.Parameter.empty and each.kind not in plain
    ]
