"""Small durable files: whole or refused, whatever happened to them or to their writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tiermem import durable
from tiermem.errors import ReadError


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("body", [b"", b"x", bytes(range(256)) * 300])
def test_a_body_comes_back_and_a_later_one_replaces_it(tmp_path: Path, body: bytes) -> None:
    durable.write(tmp_path / "file", b"an older and much longer body" * 1000)
    durable.write(tmp_path / "file", body)
    assert durable.read(tmp_path / "file") == body
    assert names(tmp_path) == ["file"]


def test_every_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"the body")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ReadError, match="do not match their own digest"):
            durable.read(path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"the body")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ReadError):
            durable.read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 32, b"{}\n", b"\x89PNG" * 40])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ReadError):
        durable.read(tmp_path / "file")


def test_a_missing_file_is_told_from_a_bad_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.read(tmp_path / "file")


def test_a_failed_write_leaves_the_old_body_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    durable.write(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write(tmp_path / "file", b"new")
    assert durable.read(tmp_path / "file") == b"old"
    assert names(tmp_path) == ["file"]


def test_a_directory_that_cannot_be_written_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write(tmp_path / "absent" / "file", b"body")
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        durable.write(tmp_path / "plain" / "file", b"body")


def test_a_crash_before_the_rename_leaves_the_old_body(tmp_path: Path) -> None:
    durable.write(tmp_path / "file", b"old")
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os._exit(9)
        durable.write(tmp_path / "file", b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert durable.read(tmp_path / "file") == b"old"
    left, file = names(tmp_path)
    assert (left[0], file) == (".", "file")
    assert durable.read(tmp_path / left) == b"new", "it was synced before it would have been renamed"
    durable.write(tmp_path / "file", b"newer")
    assert durable.read(tmp_path / "file") == b"newer"
