"""The loaders that are compared: how each is imported, and how each makes torch tensors of a directory's files.

Each is used as its own documentation tells, on the CPU, with its defaults. Nothing here is timed or verified.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

Tensors = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loader:
    """`load(directory, files)` gives the tensors and whatever must live as long as they do.

    `copies`: it fills memory of its own, of the model's size, at each load.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    load: Callable[[str, Sequence[str]], tuple[Tensors, object]]
    copies: bool

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        try:
            for module in self.modules:
                importlib.util.find_spec(module)
            return metadata.version(self.distribution)
        except (ImportError, metadata.PackageNotFoundError):
            return None

    def prepare(self) -> None:
        """Import all that a load would import."""
        for module in self.modules:
            importlib.import_module(module)


def _tiermem(directory: str, files: Sequence[str]) -> tuple[Tensors, object]:
    from tiermem.torch import load_model

    return load_model(directory), None


def _safetensors(directory: str, files: Sequence[str]) -> tuple[Tensors, object]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors, None


def _fastsafetensors(directory: str, files: Sequence[str]) -> tuple[Tensors, object]:
    from fastsafetensors import SafeTensorsFileLoader  # type: ignore[import-untyped]

    loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
    loader.add_filenames({0: list(files)})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name) for name in loader.get_keys()}, (loader, buffers)


def _streamer(directory: str, files: Sequence[str]) -> tuple[Tensors, object]:
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-untyped]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files))
        return dict(streamer.get_tensors()), None


OURS = "tiermem"
"""gRPC imports `_channel` at its first channel, tiermem its client at its first open; no clock should see either."""

LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        Loader(OURS, "tiermem", ("tiermem.torch", "tiermem.client", "grpc._channel"), _tiermem, copies=False),
        Loader("safetensors", "safetensors", ("safetensors.torch",), _safetensors, copies=False),
        Loader("fastsafetensors", "fastsafetensors", ("fastsafetensors",), _fastsafetensors, copies=True),
        Loader("runai streamer", "runai-model-streamer", ("runai_model_streamer",), _streamer, copies=True),
    )
}  # fmt: skip
