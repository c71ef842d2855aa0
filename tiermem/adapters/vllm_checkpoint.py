"""Checkpoint of a vLLM model in the pool: which of its files are read, their identity, and their tensors.

vLLM chooses the files; the pool reads them. Never reads a tensor's bytes itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tiermem.checkpoint import open_checkpoint
from tiermem.checkpoint.layout import identity_of
from tiermem.errors import Refused, TiermemError

if TYPE_CHECKING:
    import torch

    from tiermem.client import Client

_PAUSE_S, _TRIES = 1.0, 300
"""Ranks of one engine load at once; who reads for longer than this is somebody else."""


class Checkpoint:
    """The files that vLLM reads a model's weights from. Raises CheckpointError for a malformed one."""

    def __init__(self, files: Sequence[str]) -> None:
        wanted = sorted(map(os.path.abspath, files))
        directory = os.path.dirname(wanted[0])
        whole = open_checkpoint(directory)
        if sorted(os.path.abspath(file.path) for file in whole.files) == wanted:
            # One model in the pool, which others that load the directory meet.
            self.paths, self.identity = [directory], whole.identity
        else:
            parts = [open_checkpoint(path) for path in wanted]
            self.paths = wanted
            self.identity = identity_of(file for part in parts for file in part.files)

    @property
    def name(self) -> str:
        """The directory's name."""
        path = self.paths[0]
        return os.path.basename(path if os.path.isdir(path) else os.path.dirname(path))

    def tensors(self, client: Client) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, as they arrive in the pool; copy-on-write, since some loaders change what they are given.

        Raises what stops a load: CheckpointChanged, DigestMismatch, ReadError, CapacityError, DaemonUnreachable.
        """
        from tiermem.torch import tensors_of

        with ExitStack() as stack:
            for path in self.paths:
                model = stack.enter_context(client.open(path, writable=True))
                for name in model:
                    yield name, tensors_of(model, (name,), "cpu")[name]

    def absent(self, client: Client) -> list[str]:
        """Paths whose model is not in memory and not being loaded; none, if the pool cannot say."""
        try:
            known = {model["path"]: model["state"] for model in client.status()["models"]}
        except TiermemError:
            return []
        return [path for path in self.paths if known.get(path, "disk") == "disk"]


def evict(client: Client, paths: Sequence[str]) -> None:
    """Take the models of these paths out of memory, now or once the other ranks of this engine have read them too."""
    if not _evicted(client, paths):
        threading.Thread(target=_evict_later, args=(client, paths), name="tiermem-evict", daemon=True).start()


def _evict_later(client: Client, paths: Sequence[str]) -> None:
    for _ in range(_TRIES):
        time.sleep(_PAUSE_S)
        if _evicted(client, paths):
            return


def _evicted(client: Client, paths: Sequence[str]) -> bool:
    """False while somebody reads one of them. Without a daemon there is nothing to evict."""
    try:
        models = {model["path"]: model["name"] for model in client.status()["models"]}
        for path in paths:
            if path in models:
                client.evict(models[path])
    except Refused:
        return False
    except TiermemError:
        pass
    return True
