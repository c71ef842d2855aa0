"""Mutated headers: only errors of ours leave the parser, and what it accepts the reference reader accepts too."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from tests.hostile.checkpoints import entry, header_text, write_file
from tiermem.checkpoint import open_checkpoint
from tiermem.errors import TiermemError

DATA = bytes(range(20))
GOOD = header_text(
    {
        "__metadata__": {"k": "v"},
        "a\u00e9": entry("F32", [2], 0, 8),
        "e": entry("F16", [0, 3], 8, 8),
        "s": entry("U8", [], 8, 9),
        "f": entry("F4", [2, 11], 9, 20),
    }
)

NUMBERS = ["-0", "-1", "0", "1", "1.0", "1e0", "1e400", "01", "9" * 30, str(2**63), str(2**64 - 1), str(2**64)]
TOKENS = st.sampled_from(
    [*NUMBERS, "NaN", "-Infinity", "null", "true", '"U8"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "[]", "[[]]",
     "{}", "[0]", "[0,0]", "[0,8]", "[8,8]", "[0,1099511627776,1099511627776]", "[1099511627776,16777216,0]"]
)  # fmt: skip
KEYS = st.sampled_from(["a", "b", "__metadata__", "dtype", "shape", "data_offsets", "\\u0061", "\\udfff"])


def agree(raw: bytes) -> None:
    """Open `raw` as a file; where that succeeds, the reference must see the same tensors."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.safetensors"
        path.write_bytes(raw)
        try:
            manifest = open_checkpoint(path)
        except TiermemError:
            return
    reference = dict(deserialize(raw))
    assert {t.name: (t.dtype, list(t.shape)) for t in manifest.tensors} == {
        name: (tensor["dtype"], tensor["shape"]) for name, tensor in reference.items()
    }
    assert all(raw[t.file_offset :][: t.nbytes] == reference[t.name]["data"] for t in manifest.tensors)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) + 7), st.integers(0, 1), st.binary(max_size=3)), max_size=4))
@example([])
def test_mutated_bytes(edits: list[tuple[int, int, bytes]]) -> None:
    raw = len(GOOD).to_bytes(8, "little") + GOOD + DATA
    for at, removed, inserted in edits:
        raw = raw[:at] + inserted + raw[at + removed :]
    agree(raw)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), TOKENS, st.binary(max_size=9), KEYS)
def test_mutated_values(where: str, token: str, data: bytes, extra: str) -> None:
    fields = {"dtype": '"U8"', "shape": f"[{len(data)}]", "data_offsets": f"[0,{len(data)}]"}
    metadata = '{"k":"v"}'
    if where in fields:
        fields[where] = token
    elif where == "__metadata__":
        metadata = token
    tensor = token if where == "a" else "{" + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}"
    for header in (
        f'{{"__metadata__":{metadata},"a":{tensor}}}',
        f'{{"a":{tensor}}}',
        f'{{"{extra}":{tensor}}}',
        f'{{"a":{tensor},"{extra}":{token}}}',
        f'{{"a":{tensor[:-1]},"{extra}":{token}}}}}',
    ):
        raw = header.encode()
        agree(len(raw).to_bytes(8, "little") + raw + data)


@given(st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**32, 2**60, 2**63, 2**64 - 1]), max_size=4),
       st.sampled_from(["U8", "F4", "F6_E2M3", "F64"]), st.integers(0, 27))  # fmt: skip
@example([2**40, 2**40, 0], "U8", 0)
@example([4], "F6_E2M3", 3)
def test_shapes(shape: list[object], dtype: str, size: int) -> None:
    raw = header_text({"a": entry(dtype, shape, 0, size)})
    agree(len(raw).to_bytes(8, "little") + raw + bytes(size))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4), st.integers(0, 8))
def test_offsets(ranges: list[tuple[int, int]], size: int) -> None:
    tensors = {str(i): entry("U8", [max(end - begin, 0)], begin, end) for i, (begin, end) in enumerate(ranges)}
    raw = json.dumps(tensors).encode()
    agree(len(raw).to_bytes(8, "little") + raw + bytes(size))


def test_the_unmutated_header_is_accepted(tmp_path: Path) -> None:
    manifest = open_checkpoint(write_file(tmp_path / "m.safetensors", GOOD, DATA))
    assert [t.name for t in manifest.tensors] == ["a\u00e9", "e", "s", "f"]
