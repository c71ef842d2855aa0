"""safe_open and its framework modules beside safetensors' own: what they take, what they refuse, in which words."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

import tiermem.numpy
import tiermem.torch
from tests.hostile.checkpoints import entry, header_text, write_file
from tiermem import errors
from tiermem.embedded import EmbeddedPool
from tiermem.safe_open import FileRefused, ReaderError, safe_open, safe_open_handle

TENSORS = {
    "a": torch.arange(20, dtype=torch.float32).reshape(4, 5),
    "c": torch.arange(24).reshape(2, 3, 4),
    "e": torch.empty(0, 5),
    "s": torch.tensor(3.0),
}
METADATA = {"format": "pt", "note": "v\u00e9"}


class One:
    def __index__(self) -> int:
        return 1


INDEXES: list[Any] = [
    2, -1, 9, -9, True, np.int64(1), One(), np.array(1), 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40,
    slice(None), slice(1, 3), slice(None, None, 1), slice(0, 4, 2), slice(1, None, 2), slice(0, None, 7), slice(1, 1),
    slice(0, 0), slice(4, None), slice(7, None), slice(None, 9), slice(0, 9, 2), slice(5, None, 2), slice(None, 0),
    slice(None, None, -1), slice(0, 4, 0), slice(np.int64(1), np.int64(3)), slice("a", None), slice(1.0, None),
    (), [], [0, 1], ["a"], [slice(0, 1)], ..., None, 1.0, "a", range(2), np.array([True, False]), {},
    (0, 0), (0, 0, 0), (0, slice(None), 1), (slice(None), slice(1, 3)), (slice(2, None), -1), (slice(0, 1), -6),
    (slice(None), slice(None), slice(None)), (slice(None), 20), (slice(0, 9, 2), slice(None)), (0, slice(0, 9, 3)),
    (..., 0), (..., -9), (..., 9), (0, ...), (0, ..., 9), (..., ...), (..., slice(0, 9, 2)), (0, 0, ..., 0),
    (None, 0), (0, None), (9, -9), (9, "x"), ((0, 1),), (0, [1]), ([],),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, pool: EmbeddedPool) -> Path:
    save_file(TENSORS, tmp_path / "few.safetensors", metadata=METADATA)
    return tmp_path / "few.safetensors"


def outcome(action: Callable[[], Any]) -> tuple[Any, ...]:
    """What a caller can tell of an action: its value, or the class that it would catch and the text."""
    try:
        value = action()
    except safetensors.SafetensorError as error:
        return ("SafetensorError", str(error))
    except Exception as error:
        kinds = (FileNotFoundError, OSError, TypeError, AttributeError, IndexError, ValueError, Exception)
        return (next(kind for kind in kinds if isinstance(error, kind)), str(error))
    if isinstance(value, torch.Tensor | np.ndarray):
        return (type(value), str(value.dtype), tuple(value.shape), value.tolist())
    return ("value", value)


@pytest.mark.parametrize("framework", ["np", "pt"])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_slice_takes_and_refuses_what_the_original_does(path: Path, framework: str, name: str) -> None:
    theirs = safetensors.safe_open(path, framework).get_slice(name)  # type: ignore[no-untyped-call]
    ours = safe_open(path, framework).get_slice(name)
    assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
    for index in INDEXES:
        assert outcome(partial(ours.__getitem__, index)) == outcome(partial(theirs.__getitem__, index)), index


@pytest.mark.parametrize("index", [slice(-2, None), slice(None, -1), slice(3, 1), (slice(None), slice(-1, None, 2))])
def test_bounds_that_crash_the_original_are_refused_by_name(path: Path, index: Any) -> None:
    with pytest.raises((OverflowError, SystemError)):
        safetensors.safe_open(path, "np").get_slice("a")[index]  # type: ignore[no-untyped-call]
    with pytest.raises(ReaderError, match=r"negative|ends before it starts"):
        safe_open(path, "np").get_slice("a")[index]


def test_a_part_of_an_array_is_contiguous_because_writers_take_it_by_address(path: Path) -> None:
    part = safe_open(path, "np").get_slice("a")[:, 1:3]
    assert part.flags.c_contiguous
    assert part.tolist() == TENSORS["a"][:, 1:3].tolist()


FRAMEWORKS = ["pt", "torch", "pytorch", "np", "numpy", "xx", "", None, 3]
BACKENDS = ["mmap", "pread", "io", None]
DEVICES = ["cpu", None, "cpu:0", "cuda:1:2", "cuda:x", "mps:1", "meta", "xyz", -1, 1.5, b"cpu"]


def test_arguments_are_judged_as_the_original_does(path: Path) -> None:
    def keys(reader: Any, *arguments: Any) -> list[str]:
        file, framework, device, backend = arguments
        with reader(file, framework, device, backend=backend) as opened:
            return list(opened.keys())

    files = (path, str(path), "missing.safetensors", bytes(path))
    for case in itertools.product(files, FRAMEWORKS, DEVICES, BACKENDS):
        ours, theirs = (outcome(partial(keys, reader, *case)) for reader in (safe_open, safetensors.safe_open))
        if theirs == (ValueError, "invalid digit found in string"):
            theirs = ("SafetensorError", "device cuda:x is invalid")
        assert ours == theirs, case


@pytest.mark.parametrize("device", ["cuda", "npu:3", 0, True])
def test_numpy_has_the_cpu_alone(path: Path, device: Any) -> None:
    ours, theirs = (outcome(partial(reader, path, "np", device)) for reader in (safe_open, safetensors.safe_open))
    assert ours == theirs
    assert ours[0] == "SafetensorError"


def test_frameworks_that_are_not_served_say_so(path: Path) -> None:
    with pytest.raises(ReaderError, match="framework jax is not served"):
        safe_open(path, "jax")


def test_a_device_of_torch_is_taken_and_tensors_move_there(path: Path) -> None:
    assert safe_open(path, "pt", torch.device("cpu")).get_tensor("a").tolist() == TENSORS["a"].tolist()
    with safe_open(path, "pt", torch.device("meta")) as file:
        assert file.get_tensor("a").is_meta
        assert file.get_slice("a")[0].is_meta
    loaded = tiermem.torch.load_file(path, torch.device("meta"))
    assert all(tensor.is_meta for tensor in loaded.values())
    assert tiermem.torch.load_model(path, torch.device("meta"))["c"].shape == (2, 3, 4)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_the_file_tells_what_the_original_tells(path: Path, framework: str) -> None:
    with safe_open(path, framework) as ours, safetensors.safe_open(path, framework) as theirs:
        assert ours.keys() == theirs.keys()
        assert sorted(ours.offset_keys()) == ours.keys()
        assert ours.offset_keys()[:2] == theirs.offset_keys()[:2]
        assert ours.metadata() == theirs.metadata() == METADATA
        assert list(ours.get_tensors()) == ours.offset_keys()
        names: list[Any] = [*TENSORS, "zz", 3]
        for name in names:
            assert outcome(partial(ours.get_tensor, name)) == outcome(partial(theirs.get_tensor, name))
        for name in names[-2:]:
            assert outcome(partial(ours.get_slice, name)) == outcome(partial(theirs.get_slice, name))


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_after_exit_the_file_is_closed_and_its_slices_are_not(path: Path, framework: str) -> None:
    with safe_open(path, framework) as file:
        part = file.get_slice("a")
    assert part[1].tolist() == TENSORS["a"][1].tolist()
    asks = (file.keys, file.offset_keys, file.metadata, file.get_tensors, lambda: file.get_tensor("a"))
    for ask in (*asks, lambda: file.get_slice("a")):
        assert outcome(ask) == ("SafetensorError", "File is closed")
    assert file.__enter__() is file
    file.__exit__(None, None, None)


def test_files_without_metadata_have_none(tmp_path: Path, pool: EmbeddedPool) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert safe_open(tmp_path / "a.safetensors", "pt").metadata() is None


@pytest.mark.parametrize("content", [b"", b"something", b"\x09\0\0\0\0\0\0\0" + b'{"a":[1]}'])
def test_malformed_files_end_in_an_error_of_both_parents(tmp_path: Path, pool: EmbeddedPool, content: bytes) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    for reader in (safe_open, safetensors.safe_open):
        with pytest.raises(safetensors.SafetensorError, match=r"^Error while deserializing header: "):
            reader(file, "pt")
    with pytest.raises(errors.CheckpointError, match=r"bad\.safetensors"):
        safe_open(file, "pt")


def test_a_directory_is_no_file(tmp_path: Path, pool: EmbeddedPool) -> None:
    with pytest.raises(FileRefused, match="load_model"):
        tiermem.torch.load_file(tmp_path)


def test_a_relative_path_is_never_taken_for_a_model_s_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.rename(path.with_name("plain"))
    monkeypatch.chdir(path.parent)
    assert sorted(tiermem.numpy.load_file("plain")) == sorted(TENSORS)
    with pytest.raises(FileNotFoundError, match=r"^No such file or directory: gone$"):
        tiermem.numpy.load_file("gone")


def test_a_handle_is_opened_by_its_name(path: Path) -> None:
    with path.open("rb") as file, safe_open_handle(file, "np") as opened:
        assert opened.get_tensor("s") == 3.0
    with pytest.raises(AttributeError, match="fileno"):
        safe_open_handle(str(path), "np")


def test_f4_counts_pairs_in_torch(tmp_path: Path, pool: EmbeddedPool) -> None:
    tensors = {"a": entry("F4", [2, 4], 0, 4), "odd": entry("F4", [2, 3], 4, 7)}
    file = write_file(tmp_path / "f4.safetensors", header_text(tensors), bytes(range(7)))
    opened = safe_open(file, "pt")
    whole = opened.get_tensor("a")
    assert (whole.dtype, whole.shape) == (torch.float4_e2m1fn_x2, (2, 2))
    assert whole.view(torch.uint8).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(safetensors.SafetensorError, match="last dim be divisible by 2"):
        opened.get_tensor("odd")


def test_dtypes_that_a_framework_lacks_are_refused(tmp_path: Path, pool: EmbeddedPool) -> None:
    file = write_file(tmp_path / "f6.safetensors", header_text({"a": entry("F6_E2M3", [4], 0, 3)}), bytes(3))
    with pytest.raises(ReaderError, match="Dtype not understood: F6_E2M3"):
        tiermem.torch.load_file(file)
    with pytest.raises(errors.Refused, match="F6_E2M3"):
        tiermem.numpy.load_file(file)


def test_bf16_needs_ml_dtypes_in_numpy(tmp_path: Path, pool: EmbeddedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(errors.Refused, match="pip install ml_dtypes"):
        tiermem.numpy.load_file(tmp_path / "a.safetensors")


def test_bf16_and_fp8_are_arrays_where_ml_dtypes_is_installed(tmp_path: Path, pool: EmbeddedPool) -> None:
    pytest.importorskip("ml_dtypes")
    tensors = {"b": torch.arange(4).bfloat16(), "f": torch.arange(4.0).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = tiermem.numpy.load_file(tmp_path / "a.safetensors")
    assert [array.astype("f4").tolist() for array in loaded.values()] == [[0, 1, 2, 3]] * 2


def test_save_file_is_the_original(tmp_path: Path) -> None:
    import safetensors.numpy

    assert tiermem.torch.save_file is save_file
    assert tiermem.numpy.save_file is safetensors.numpy.save_file
    with pytest.raises(AttributeError, match="load_everything"):
        _ = tiermem.torch.load_everything
