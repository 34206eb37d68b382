"""The page of all texts is that of the programs; what they say is compared in .ci/full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gallery.page import PAGE, entries, normal, page_of, said_by
from tests.gallery.programs import PROGRAMS, Program


def test_the_page_has_the_entries_of_the_script() -> None:
    assert entries(PAGE.read_text()) == [(each.section, each.title) for each in PROGRAMS]


def test_names_and_titles_are_used_once() -> None:
    assert len({each.name for each in PROGRAMS}) == len(PROGRAMS)
    assert len({(each.section, each.title) for each in PROGRAMS}) == len(PROGRAMS)


def test_every_entry_says_something() -> None:
    page = PAGE.read_text()
    assert "Nothing is said." not in page
    assert "it did not come to an end" not in page


def test_a_page_tells_its_entries() -> None:
    texts = {each.name: "- a line\n---\nanother" for each in PROGRAMS}
    assert entries(page_of(texts)) == [(each.section, each.title) for each in PROGRAMS]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("in worker 1 (pid 8123)", "in worker 1 (pid 4711)"),
        ("open /tmp/gallery-x/frames.bin", "open /data/frames.bin"),
        ("no batch came for 3.2 s", "no batch came for N s"),
        ("16.1 of 31.4 GiB available", "N of N GiB available"),
        (
            "about 1,075 batches that were handed over are still held, with 64 KiB of",
            "about N batches that were handed over are still held, with N MiB of",
        ),
        ("index 5 of batch 3", "index 5 of batch 3"),
    ],
)
def test_what_is_another_each_time_is_put_in_one_form(text: str, told: str) -> None:
    assert normal(text, "/tmp/gallery-x") == told


def test_what_a_program_says_is_told_with_the_error_that_ends_it() -> None:
    def run() -> None:
        print(Path.cwd())
        raise ValueError("and this")

    assert said_by(Program("", "", "", run)) == "/data\nValueError: and this"
