"""Bad checkpoints of every format end in their own error, soon and small; mutated good ones in no other error."""

from __future__ import annotations

import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import open_files
from tests.hostile.checkpoints import Case
from tests.hostile.formats import CORPUS, GOOD, ckpt, gguf, state, stored, text, torch_file
from tiermem.checkpoint import open_checkpoint
from tiermem.errors import CheckpointError, TiermemError

LIMIT_S = 2.0
MOST_BYTES = 1 << 20

NUMBERS = [0, 1, 2, 127, 128, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
INSTRUCTIONS = [
    b"}", b"]", b")", b"(", b"N", b"u", b"e", b"a", b"s", b"t", b"R", b"b", b"Q", b"\x85", b"\x86", b"\x87", b"q\0",
    b"q\1", b"h\0", b"h\1", b"K\2", text("a"), text("storage"), b"ctorch\nFloatStorage\n", b"0", b"2", b"1",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", stored("0", 6, 0, (6,), (1,)),
]  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
def test_bad_checkpoint_is_refused(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    files = open_files()
    start = time.perf_counter()
    with pytest.raises(TiermemError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < LIMIT_S
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert case.words in message
    assert str(tmp_path) in message
    assert "; " in message
    assert len(message) < 1000 + 2 * len(str(path))
    assert message.isprintable()
    assert open_files() == files


@pytest.mark.parametrize("ending", GOOD)
def test_the_unmutated_files_are_accepted(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"good.{ending}"
    path.write_bytes(GOOD[ending])
    assert len(open_checkpoint(path).tensors) == 2


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(GOOD)), EDITS)
@example("bin", [(60, 1, b"\xff")])
def test_mutated_bytes(ending: str, edits: list[tuple[int, int, bytes]]) -> None:
    raw = GOOD[ending]
    for at, removed, inserted in edits:
        at %= len(raw) + 1
        raw = raw[:at] + inserted + raw[at + removed :]
    opened(ending, raw)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.integers(0, 2000), st.sampled_from([1, 2, 4, 8]), st.sampled_from(NUMBERS))
def test_mutated_numbers(ending: str, at: int, width: int, value: int) -> None:
    raw = bytearray(GOOD[ending])
    at %= len(raw)
    raw[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    opened(ending, bytes(raw))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))
def test_any_pickle(instructions: list[bytes]) -> None:
    opened("bin", torch_file(b"\x80\x02" + b"".join(instructions) + b".", {"data/0": bytes(24)}))


def opened(ending: str, raw: bytes) -> None:
    """Open `raw`: either an error of ours, or tensors that lie within the file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"m.{ending}"
        path.write_bytes(raw)
        try:
            manifest = open_checkpoint(path)
        except TiermemError:
            return
        for tensor in manifest.tensors:
            assert 0 <= tensor.file_offset <= tensor.file_offset + tensor.nbytes <= len(raw)
            assert all(size >= 0 for size in tensor.shape)
        assert [t.file_offset for t in manifest.tensors] == sorted(t.file_offset for t in manifest.tensors)


HUGE = {
    "a gguf of claims": ("gguf", gguf(b"", 1 << 17, 0, b"", 1 << 17)),
    "a pickle of brackets": ("bin", torch_file(b"\x80\x02" + b"]" * 4_000_000 + b".", {})),
    "protobuf fields without end": ("onnx", b"\x08\1" * 5_000_000),
    "an archive of nothing": ("bin", b"PK\3\4" + bytes(1 << 20)),
}  # fmt: skip


@pytest.mark.parametrize(("ending", "raw"), HUGE.values(), ids=HUGE)
def test_what_asks_for_much_gets_little(ending: str, raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"huge.{ending}"
    path.write_bytes(raw)
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize("ending", GOOD)
def test_a_sparse_file_of_a_terabyte_costs_nothing(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"huge.{ending}"
    path.write_bytes(GOOD[ending])
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        if ending == "gguf":
            assert len(open_checkpoint(path).tensors) == 2
        else:
            with pytest.raises(CheckpointError):
                open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_one_huge_member_is_read_no_further(tmp_path: Path) -> None:
    path = tmp_path / "big.ckpt"
    path.write_bytes(ckpt(("a", "Int8", (1 << 24,), bytes(1 << 24)), ("b", "Int8", (1,), b"\0")))
    tracemalloc.start()
    try:
        assert list(open_checkpoint(path).by_name) == ["a", "b"]
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_a_plain_value_is_metadata_and_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(
        torch_file(state(epoch=b"K\7", lr=b"G" + bytes(8), note=text("x" * 5000), odd=b"X\3\0\0\0\xed\xa0\x80"), {})
    )
    metadata = open_checkpoint(path).files[0].metadata
    assert metadata is not None
    assert (metadata["epoch"], metadata["lr"], metadata["odd"], len(metadata["note"])) == ("7", "0.0", "?", 1024)
