"""Files that take their place when they are whole, or not at all."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from safeloader.introspect.private_files import written_whole


def test_it_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")
    before = os.umask(0)
    try:
        with written_whole(target) as file:
            file.write(b"after")
            assert target.read_text() == "before"
            assert len(os.listdir(tmp_path)) == 2
    finally:
        os.umask(before)
    assert target.read_text() == "after"
    assert os.listdir(tmp_path) == ["page.html"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_what_is_not_whole_goes(raised: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")

    def begin() -> None:
        with written_whole(target) as file:
            file.write(b"af")
            raise raised

    with pytest.raises(raised):
        begin()
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The limit of the shell on file sizes (``ulimit -f``) is a disk that is full after 1 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with written_whole(tmp_path / "page.html") as file:
            file.write(b"x" * 5000)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_two_that_write_it_at_once_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    with written_whole(target) as one, written_whole(target) as two:
        one.write(b"one")
        two.write(b"two")
    assert target.read_bytes() == b"one"  # which came last
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    target = tmp_path / "page.html"
    target.symlink_to(victim)
    with written_whole(target) as file:
        file.write(b"page")
    assert victim.read_text() == "untouched"
    assert not target.is_symlink()
