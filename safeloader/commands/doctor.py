"""``python -m safeloader doctor``: a program's loader, examined. Runs in: main.

The program is imported in the child that is examined, so that one which trains when it is imported,
prints or ends itself does it there.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from typing import Any

from safeloader.commands.target import Place, needed

_EXAMPLES = """\
TARGET is a script or a module, a colon, and what gives the loader: a function without arguments, or
the loader itself:

  python -m safeloader doctor train.py:make_loader
  python -m safeloader doctor package.module:make_loader

The exit status is 0 where nothing was found that breaks training, 1 where something was, and 2
where TARGET gives no loader.
"""

_OFFERED = 8  # names that are told


class Target(Place):
    """What was asked for: called in the child, it gives the subject.

    Args:
        text: ``train.py:make_loader`` or ``package.module:make_loader``.

    Raises:
        ValueError: if it is neither, or there is no such file.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text, "the loader", "make_loader")

    def __call__(self) -> Any:
        """Import the program, make the loader.

        Raises:
            Unusable: if that does not give a loader.
        """
        from safeloader.examining.subject import Subject
        from safeloader.examining.talk import Unusable
        from safeloader.instrumenting import loader_in

        whole = f"{self.where}:{self.name}"
        try:
            module = found = self.imported()
        except BaseException as exc:  # SystemExit too: a program that reads its command line
            raise Unusable(f"{whole} gives no loader", exc) from exc
        for part in self.name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError as exc:
                told = f"{self.where} has no {self.name!r}"
                if getattr(exc, "obj", found) is not found:  # of a property of the user's
                    raise Unusable(f"{whole} gives no loader", exc) from exc
                raise Unusable(f"{told} (AttributeError); {_offered(module)}", None) from exc
        if loader_in(found) is None and callable(found):
            if missing := needed(found):
                raise Unusable(
                    f"{whole} needs arguments ({', '.join(missing)}), and gets none; "
                    f"{_offered(module)}",
                    None,
                )
            try:
                found = found()
            except BaseException as exc:
                raise Unusable(f"{whole} gives no loader", exc) from exc
        loader = loader_in(found)
        if loader is None:
            kind = type(found).__qualname__
            raise Unusable(f"{whole} gives a {kind}, and no DataLoader; {_offered(module)}", None)
        return Subject(loader)


def _offered(module: Any) -> str:
    """What of a program may give a loader: its loaders, and its functions without arguments."""
    from safeloader.instrumenting import loader_in

    loaders, functions = [], []
    for name, value in list(vars(module).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, types.FunctionType):
            if value.__module__ == module.__name__ and not needed(value):
                functions.append(f"{name}()")
        elif not isinstance(value, type | types.ModuleType) and loader_in(value) is not None:
            loaders.append(name)
    offered = [*loaders, *functions]
    if not offered:
        return "it has no loader, and no function without arguments"
    more = f" and {len(offered) - _OFFERED} more" if len(offered) > _OFFERED else ""
    return f"it offers {', '.join(offered[:_OFFERED])}{more}"


def main(words: list[str]) -> int:
    """Examine what the words of the command line name; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m safeloader doctor",
        description="Examine a loader before training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", help="train.py:make_loader, say")
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="time it may take (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="print what to_dict() gives")
    try:
        told = parser.parse_args(words)
    except SystemExit as exc:
        return int(exc.code or 0)
    try:
        target = Target(told.target)
        from safeloader.examining.doctor import examined  # torch: not for what is wrong before

        report = examined(target, told.target, told.seconds)
    except ValueError as exc:
        print(f"python -m safeloader doctor: {exc}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=1) if told.json else report)
    return 0 if report.ok else 1
