"""Weights: small checkpoints of random bytes for tests, and digests by which their readers are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from tests.hostile.checkpoints import entry, header_text, write_file


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint directory: one tensor a layer, layers dealt to `files` in runs. `tensors` are the true bytes."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def digest(self) -> str:
        return digest_of({name: np.frombuffer(data, np.uint8) for name, data in self.tensors.items()})

    def at(self, path: Path) -> Weights:
        """The same files as they are seen at another path."""
        return Weights(path, tuple(path / file.name for file in self.files), self.tensors)


def layer(number: int) -> str:
    """Name of the tensor that is layer `number`."""
    return f"model.layers.{number}.weight"


def write_weights(path: Path, layers: int = 2, files: int = 1, layer_bytes: int = 200_000, seed: int = 0) -> Weights:
    """Write a checkpoint of `layers` layers (a segment each) into the new directory `path`."""
    path.mkdir(parents=True)
    random = np.random.default_rng((seed, *path.name.encode()))
    tensors = {layer(i): random.bytes(layer_bytes) for i in range(layers)}
    written = []
    for number in range(files):
        names = list(tensors)[number * layers // files : (number + 1) * layers // files]
        ends = [(i * layer_bytes, (i + 1) * layer_bytes) for i in range(len(names))]
        entries = {name: entry("U8", [layer_bytes], *end) for name, end in zip(names, ends, strict=True)}
        data = b"".join(tensors[name] for name in names)
        written.append(write_file(path / f"model-{number:05d}.safetensors", header_text(entries), data))
    return Weights(path, tuple(written), tensors)


def digest_of(arrays: Mapping[str, Any]) -> str:
    """One digest of the names and bytes of all arrays, in order of their names."""
    digest = blake3()
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0")
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
