"""The directory of an export: links, small files beside them, and a note of what was made.

Replaces and deletes only what the note names and is still as it was made. Knows no pool and writes no weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from tiermem.errors import AccessDenied, Refused, TiermemError

NOTE_NAME = ".tiermem-export.json"
_SCHEMA = "tiermem.export-note/1"


@dataclass(frozen=True, slots=True)
class Note:
    """What an export made: `links` are name -> target, `files` name -> BLAKE3 hex, names relative to the directory.

    `path` and `checkpoint` are the checkpoint's path and identity; `image` is what is pinned in the pool at `address`,
    of which `instance` is one. `made`: the directory was not there before.
    """

    path: str
    checkpoint: str
    address: str
    image: str
    instance: str
    links: Mapping[str, str]
    files: Mapping[str, str]
    made: bool


def note_of(directory: Path) -> Note | None:
    """What an export noted there; None where none did. Raises Refused for a note that no export wrote."""
    try:
        body = json.loads((directory / NOTE_NAME).read_bytes())
        schema = body.pop("schema")
        note = Note(**body)
        texts = (*note.links.values(), *note.files.values(), note.path, note.address, note.image)
        names = (*note.links, *note.files)
        if schema != _SCHEMA or not all(isinstance(text, str) for text in texts) or not all(map(_is_inside, names)):
            raise ValueError(f"schema {schema!r}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{directory / NOTE_NAME}: is not as an export of this version writes it; remove the directory by hand, "
            "its weights are links"
        ) from error
    return note


def check(directory: Path, checkpoint: str, address: str) -> Note | None:
    """The note of an earlier export of the same, None where there is none. Changes nothing.

    Raises Refused where something else is there, and AccessDenied where nothing may be made.
    """
    with _told(directory):
        if not os.path.lexists(directory):
            _check_writable(directory.parent)
            return None
        if not directory.is_dir():
            raise Refused(f"{directory}: is no directory; name one that is empty or not there yet")
        note = note_of(directory)
        if note is None and any(directory.iterdir()):
            raise Refused(f"{directory}: holds what no export made; name a directory that is empty or not there yet")
        if note is not None and (note.checkpoint, note.address) != (checkpoint, address):
            raise Refused(
                f"{directory}: is an export of {note.path} as it was then, from the pool at {note.address}; "
                f"undo it first: tiermem export --undo {directory}"
            )
        _check_writable(directory)
        return note


def claim(directory: Path, note: Note, old: Note | None) -> None:
    """Write the note, before anything that it names is made, so that an undo finds all of it after a crash too.

    What the `old` note names and this one does not, or elsewhere, is removed. Raises Refused where something that it
    does not name is in the way.
    """
    with _told(directory):
        for name in (*note.links, *note.files):
            if os.path.lexists(directory / name) and not (old and _is_own(directory, name, old)):
                raise Refused(f"{directory / name}: is in the way, and no export made it; move it elsewhere")
        if old is None:
            directory.mkdir(exist_ok=True)
        else:
            _remove(directory, old, keep=note)
        _replace(directory / NOTE_NAME, json.dumps({"schema": _SCHEMA, **asdict(note)}, indent=2).encode())


def fill(directory: Path, note: Note, contents: Mapping[str, bytes]) -> None:
    """Make the links, and the files with their contents; those that are there are replaced."""
    with _told(directory):
        for name, target in note.links.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            beside = _beside(directory / name)
            beside.unlink(missing_ok=True)
            beside.symlink_to(target)
            beside.replace(directory / name)
        for name, content in contents.items():
            _replace(directory / name, content)


def clear(directory: Path, note: Note) -> None:
    """Remove what the export made, all but its note; what was changed since stays."""
    with _told(directory):
        _remove(directory, note, keep=None)


def leave(directory: Path, note: Note) -> bool:
    """Remove the note, and the directory if the export made it; False where something else is in it, which stays."""
    with _told(directory):
        (directory / NOTE_NAME).unlink()
        if any(directory.iterdir()):
            return False
        if note.made:
            directory.rmdir()
        return True


def digest_of(content: bytes) -> str:
    """What a note says of a file's content."""
    return blake3(content).hexdigest()


def _remove(directory: Path, note: Note, keep: Note | None) -> None:
    kept = {*keep.links.items(), *keep.files.items()} if keep else set()
    for name, what in (*note.links.items(), *note.files.items()):
        if (name, what) not in kept and _is_own(directory, name, note):
            (directory / name).unlink()
            for folder in (directory / name).relative_to(directory).parents[:-1]:
                with suppress(OSError):  # not empty: another of our links, or the user's file
                    (directory / folder).rmdir()


def _is_own(directory: Path, name: str, note: Note) -> bool:
    """Whether it is as the export made it."""
    path = directory / name
    if name in note.links:
        return path.is_symlink() and os.readlink(path) == note.links[name]
    return path.is_file() and not path.is_symlink() and digest_of(path.read_bytes()) == note.files.get(name)


def _is_inside(name: object) -> bool:
    return isinstance(name, str) and name != "" and not os.path.isabs(name) and ".." not in name.split("/")


def _replace(path: Path, content: bytes) -> None:
    beside = _beside(path)
    beside.write_bytes(content)
    beside.replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _check_writable(directory: Path) -> None:
    if not directory.is_dir():
        raise Refused(f"{directory}: is no directory; make it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise AccessDenied(f"{directory}: user {os.geteuid()} may not make files there; name another directory")


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Errors of the system as ours."""
    try:
        yield
    except TiermemError:
        raise  # AccessDenied is an OSError too
    except PermissionError as error:
        raise AccessDenied(f"{error.filename or directory}: {error.strerror}; name another directory") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in a name
        raise Refused(f"{directory}: {error}; name another directory") from error
