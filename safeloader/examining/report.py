"""What an examination came to, for people and for programs. Runs in: main."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from safeloader.examining.choosing import Row
from safeloader.introspect.resources import human_bytes

Level = Literal["error", "warning", "note"]
_LEVELS: tuple[Level, ...] = ("error", "warning", "note")
_OF_SETTINGS = ("slow_setting", "too_many_workers")  # kinds that say which setting to use
_TITLES = {"error": "breaks training", "warning": "warning", "note": "note"}


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        level: ``"error"`` breaks training or gives wrong data; ``"warning"`` costs time, memory or
            reproducibility, or breaks what the loader does not do yet; ``"note"`` is good to know.
        kind: a word for it that stays the same, ``"hangs"`` say.
        answer: what it is, in a sentence.
        evidence: what was seen.
        advice: what to do.
    """

    level: Level
    kind: str
    answer: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Examination:
    """What :func:`~safeloader.doctor` found; ``print`` shows it.

    Attributes:
        loader: the loader in a few words.
        findings: the worst first.
        samples: how many were looked at one by one, times in seconds and sizes in bytes; empty
            where none was.
        settings: each setting that was tried, with its batches per second and the seconds to its
            first batch.
        recommended: the one to use; None where none was measured.
        own: the loader's own setting, ``num_workers``, ``prefetch_factor`` and ``start_method``.
        sent: bytes that spawn and forkserver send to each worker, and the heaviest attributes;
            empty where something cannot be pickled.
        resume: whether training can go on where it was, and what is known of it.
        not_looked_at: what could not be looked at, and why.
        output: the end of what the dataset printed; ``output_bytes`` is how much that was.
        seconds: how long it took.
    """

    loader: str
    findings: tuple[Finding, ...]
    samples: dict[str, Any]
    settings: tuple[Row, ...]
    recommended: Row | None
    own: dict[str, Any]
    cores: int | None
    sent: dict[str, Any]
    resume: str
    not_looked_at: tuple[str, ...]
    output: str
    output_bytes: int
    seconds: float
    chosen_because: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was found that breaks training."""
        return not any(each.level == "error" for each in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        told["ok"] = self.ok
        told["findings"] = [asdict(each) for each in self.findings]
        told["settings"] = [each.to_dict() for each in self.settings]
        told["recommended"] = None if self.recommended is None else self.recommended.to_dict()
        told["not_looked_at"] = list(self.not_looked_at)
        return told

    def __str__(self) -> str:
        errors, *others = map(self._count, _LEVELS)
        counts = [f"{errors} {'breaks' if errors == 1 else 'break'} training"] if errors else []
        for count, word in zip(others, ("warning", "note"), strict=True):
            counts += [f"{count} {word}{'s' * (count > 1)}"] if count else []
        nothing = "nothing bad found"
        if any(not each.startswith("start method") for each in self.not_looked_at):
            nothing += " in what was looked at"
        head = f"{self.loader}: {', '.join(counts) or nothing} ({self.seconds:.1f} s)"
        lines = [head, ""]
        for number, each in enumerate(self.findings, 1):
            lines.append(f"{number}. {each.answer} [{_TITLES[each.level]}]")
            lines += [f"   {line}" for line in each.evidence.splitlines()]
            if each.advice:
                lines.append(f"   what to do: {each.advice}")
            lines.append("")
        lines += [*self._speed(), *self._samples()]
        if self.sent:
            parts = [f"{path} {human_bytes(size)}" for path, size in self.sent["heaviest"]]
            heavy = f" ({', '.join(parts)})" if parts else ""
            lines.append(f"spawn sends {human_bytes(self.sent['bytes'])} to each worker{heavy}")
        if self.resume:
            lines.append(f"resuming: {self.resume}")
        if self.output_bytes:
            last = [line for line in self.output.splitlines() if line.strip()][-3:]
            lines.append(f"printed: {human_bytes(self.output_bytes)}; it ends with")
            lines += [f"  | {line[:200]}" for line in last]
        if self.not_looked_at:
            lines.append("not looked at:")
            lines += [f"  {each}" for each in self.not_looked_at]
        return "\n".join(lines).rstrip()

    def _count(self, level: Level) -> int:
        return sum(each.level == level for each in self.findings)

    def _speed(self) -> list[str]:
        if not self.settings:
            return []
        best = self.recommended
        told = any(each.kind in _OF_SETTINGS for each in self.findings)
        use = "" if best is None else f"use {setting_text(best)}: {self.chosen_because}"
        lines = ["settings measured:" if told else use, ""] if use else []
        heads = ("num_workers", "prefetch_factor", "start method", "batches/s", "turns")
        table = [[*heads, "first batch"]]
        for row in sorted(self.settings, key=_place):
            own = (row.workers, row.prefetch, row.method) == tuple(self.own.values())
            rate = row.rate_text
            first = "" if row.first_s is None else f"{row.first_s:.2f} s"
            marks = [*["yours"] * own, *["use this"] * (row == best)]
            table.append(
                [
                    str(row.workers),
                    "-" if row.prefetch is None else str(row.prefetch),
                    row.method or "-",
                    rate if row.rates else "-",
                    str(len(row.rates)),
                    first or "-",
                    row.error or ", ".join(marks),
                ]
            )
        widths = [max(len(line[k]) for line in table) for k in range(6)]
        for line in table:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=False)]
            lines.append(("  " + "  ".join([*cells, *line[6:]])).rstrip())
        return [*lines, ""]

    def _samples(self) -> list[str]:
        if not self.samples:
            return []
        each = self.samples
        return [
            f"samples: {each['count']} fetched; {time_text(each['median_s'])} each (median), at "
            f"worst {time_text(each['worst_s'])} (index {each['worst_index']}), the first "
            f"{time_text(each['first_s'])}; {human_bytes(each['median_bytes'])} each (median), at "
            f"most {human_bytes(each['largest_bytes'])} (index {each['largest_index']})"
        ]


def _place(row: Row) -> tuple[bool, int, int, str]:
    return row.method not in (None, "fork"), row.workers, row.prefetch or 0, row.method or ""


def setting_text(row: Row) -> str:
    """A setting as one would write it."""
    if not row.workers:
        return "num_workers=0"
    return (
        f"num_workers={row.workers}, prefetch_factor={row.prefetch}, "
        f"multiprocessing_context={row.method!r}"
    )


def time_text(seconds: float) -> str:
    """Seconds with their unit.

    >>> time_text(0.0021), time_text(2.5), time_text(1.2e-5)
    ('2.1 ms', '2.5 s', '12 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
