"""Paths of checkpoints: the name that a model gets from one, and the manifest that it had when it was last parsed.

Opening a resident model then costs a few `stat` calls, not a parse. Never trusts a path whose directory, index or
files differ in inode, size or modification time.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from tiermem.checkpoint import open_checkpoint
from tiermem.checkpoint.formats import ENDINGS, INDEX_ENDING
from tiermem.peer.address import SCHEME, is_remote, parse_model
from tiermem.types import Manifest

_Facts = tuple[tuple[int, int, int, int], ...]
_KEPT = 4096


class KnownPaths:
    """Thread-safe; keeps the last few thousand paths."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[tuple[str, ...], _Facts, Manifest]] = OrderedDict()

    def manifest(self, path: str, layers: Mapping[str, str] | None = None) -> Manifest:
        """The manifest of the checkpoint at `path`. Raises what `open_checkpoint` raises."""
        with self._lock:
            known = self._known.get(path)
        if known is not None and layers is None and _facts(known[0]) == known[1]:
            return known[2]
        watched = [path]
        if os.path.isdir(path):
            watched += sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".index.json"))
        before = _facts(tuple(watched))
        manifest = open_checkpoint(path, layers)
        files = tuple(file.path for file in manifest.files)
        facts = tuple((f.device, f.inode, f.size, f.mtime_ns) for f in manifest.files)
        if layers is None and before is not None:
            with self._lock:
                self._known[path] = ((*watched, *files), (*before, *facts), manifest)
                self._known.move_to_end(path)
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return manifest


def _facts(paths: tuple[str, ...]) -> _Facts | None:
    try:
        found = [os.stat(path) for path in paths]
    except (OSError, ValueError):  # ValueError: NUL
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


def default_name(manifest: Manifest) -> str:
    """A model's name unless told otherwise: its directory's, or the file's where that is not (pytorch_)model."""
    if is_remote(manifest.path):
        return parse_model(manifest.path).name
    path = Path(os.path.abspath(manifest.path))
    name, ending = os.path.splitext(path.name.removesuffix(INDEX_ENDING))
    if ending not in ENDINGS:
        name = path.name
    if path.is_dir() or name in ("model", "pytorch_model"):
        return (path if path.is_dir() else path.parent).name or "model"
    return name


def path_or_name_of(path_or_name: str | os.PathLike[str]) -> tuple[str | None, str | None]:
    """(absolute path, None) for something that exists or looks like a path, else (None, name)."""
    text = os.fspath(path_or_name)
    looks = os.path.isabs(text) or text.startswith((".", "~", SCHEME)) or text.endswith(ENDINGS)
    return (absolute(os.path.expanduser(text)), None) if looks or os.path.exists(text) else (None, text)


def absolute(path: str | os.PathLike[str]) -> str:
    """What a daemon with another working directory understands: an absolute path, or a model's address as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(text)
