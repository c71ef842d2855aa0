"""Writes the checkpoint that the benchmark loads: the shapes of Qwen2.5-1.5B, with random finite bf16 weights.

Owns its shapes, its bytes and where it lies by default. Never downloads anything and never loads the result.
The same seed and scale give the same bytes; a checkpoint that is there and complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

LAYERS, HEADS, KV_HEADS = 28, 12, 2
HEAD_DIM, INTERMEDIATE, VOCABULARY = 128, 8960, 151936
SHARDS = 2
INDEX = "model.safetensors.index.json"

_SIGN_AND_MANTISSA, _EXPONENT = 0x87FF_87FF_87FF_87FF, 0x3800_3800_3800_3800
"""Of four bf16 at once: the random bits that are kept, and the exponent's upper ones: 2**-15 to 2, never NaN."""

Shape = tuple[int, ...]


def default_directory() -> Path:
    """$XDG_CACHE_HOME/tiermem/bench/qwen, or the same below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiermem/bench/qwen"


def shapes(scale: float = 1.0) -> dict[str, Shape]:
    """Name -> shape of all 338 tensors. `scale` shrinks every dimension; the counts of layers and heads stay."""
    head, inner, words = (max(2, round(size * scale)) for size in (HEAD_DIM, INTERMEDIATE, VOCABULARY))
    hidden, kv = HEADS * head, KV_HEADS * head
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden), "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden), "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    named: dict[str, Shape] = {"model.embed_tokens.weight": (words, hidden)}
    for number in range(LAYERS):
        named |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return named | {"model.norm.weight": (hidden,)}


def make_checkpoint(directory: Path, scale: float = 1.0, seed: int = 0) -> bool:
    """Write the checkpoint into `directory`; False if it was there already. Needs memory for its largest tensor."""
    shards = _shards(shapes(scale))
    metadata = {"total_size": sum(map(_nbytes, shapes(scale).values())), "scale": scale, "seed": seed}
    if _complete(directory, shards, metadata):
        return False
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    numbers = {name: number for number, name in enumerate(shapes(scale))}
    for file, tensors in shards.items():
        with open(directory / file, "wb") as out:
            out.write(_header(tensors))
            for name, shape in tensors.items():
                out.write(_weights(math.prod(shape), seed, numbers[name]).data)
            out.flush()
            os.fsync(out.fileno())
    # The index is written last: where it is, the shards are whole.
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))
    return True


def _complete(directory: Path, shards: dict[str, dict[str, Shape]], metadata: dict[str, float]) -> bool:
    try:
        kept = json.loads((directory / INDEX).read_text())["metadata"]
        sizes = {file: (directory / file).stat().st_size for file in shards}
    except (OSError, ValueError, KeyError):
        return False
    return bool(kept == metadata) and sizes == {
        file: len(_header(tensors)) + sum(map(_nbytes, tensors.values())) for file, tensors in shards.items()
    }


def _shards(named: dict[str, Shape]) -> dict[str, dict[str, Shape]]:
    """File -> its tensors: cut into SHARDS files of about equal size, in order."""
    share = sum(map(_nbytes, named.values())) / SHARDS
    files: dict[str, dict[str, Shape]] = {}
    done = 0
    for name, shape in named.items():
        number = min(SHARDS, int(done // share) + 1)
        files.setdefault(f"model-{number:05}-of-{SHARDS:05}.safetensors", {})[name] = shape
        done += _nbytes(shape)
    return files


def _header(tensors: dict[str, Shape]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + _nbytes(shape)]}
        at += _nbytes(shape)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _weights(count: int, seed: int, number: int) -> npt.NDArray[np.uint16]:
    """`count` bf16 as their bits; every tensor has a stream of its own."""
    words = np.random.SFC64([seed, number]).random_raw(-(-count // 4))
    words &= np.uint64(_SIGN_AND_MANTISSA)
    words |= np.uint64(_EXPONENT)
    bits: npt.NDArray[np.uint16] = words.view(np.uint16)[:count]
    return bits


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory())
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every dimension")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    made = make_checkpoint(asked.directory, asked.scale, asked.seed)
    size = sum(map(_nbytes, shapes(asked.scale).values()))
    print(f"{asked.directory}: {size / 1e9:.2f} GB, {len(shapes())} tensors, {'written' if made else 'was there'}")


if __name__ == "__main__":
    main()
