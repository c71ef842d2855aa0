"""A model on a device: its tensors are the checkpoint's, those that are held stay, and what fails is told by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ConfigMaker, until
from tests.unit.nets import opened, write_raw
from tests.unit.test_device_backend import Runtime, SlowDevice, slow_device
from tiermem.device import ALIGN, Staging, open_device, placed
from tiermem.errors import (
    Closed,
    ConfigError,
    CopyFailed,
    DeviceFull,
    DeviceLost,
    DeviceUnavailable,
    Refused,
    TensorNotFound,
)
from tiermem.model import Model

KIB = 1024


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "layers.0.weight": torch.rand(33, 65),
        "layers.0.scale": torch.rand(()).to(torch.bfloat16),
        "layers.1.weight": torch.rand(7, 3).to(torch.float16),
        "layers.1.mask": torch.rand(11) > 0.5,
        "layers.1.empty": torch.empty(0, 5),
        "layers.2.weight": torch.rand(3, 2, 5).to(torch.float8_e4m3fn),
        "layers.2.ids": torch.arange(9),
        "layers.2.phase": torch.rand(4, dtype=torch.complex64),
        "layers.3.same": torch.arange(9),
    }


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    return (got.dtype, got.shape, raw(got)) == (wanted.dtype, wanted.shape, raw(wanted))


@pytest.fixture
def model(config: ConfigMaker, tmp_path: Path) -> Iterator[Model]:
    with opened(config, tmp_path / "model.safetensors", tensors()) as model:
        yield model


@pytest.fixture
def blocks(config: ConfigMaker, tmp_path: Path) -> Iterator[Model]:
    """Eight tensors of 4 KiB."""
    weights = {f"layers.{i}.weight": torch.full((4 * KIB,), i, dtype=torch.uint8) for i in range(8)}
    with opened(config, tmp_path / "model.safetensors", weights) as model:
        yield model


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDevice]:
    """What opening a device gives."""
    with slow_device() as device:
        monkeypatch.setattr(placed, "open_device", lambda name: device)
        yield device


def copiers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "copier" in thread.name]


def names(*numbers: int) -> list[str]:
    return [f"layers.{number}.weight" for number in numbers]


def test_all_tensors_are_there_once_as_the_checkpoint_has_them(model: Model) -> None:
    wanted = tensors()
    with model.to("cpu") as on:
        assert on.residency.copied_bytes == sum(t.nbytes for t in wanted.values()) - wanted["layers.3.same"].nbytes
        assert list(on) == list(model)
        assert len(on) == len(wanted)
        for name, tensor in wanted.items():
            assert same(on[name], tensor), name
            assert on[name].data_ptr() % ALIGN == 0 or not tensor.nbytes
            assert on.raw(name).dtype == torch.uint8
            assert on.raw(name).nbytes == tensor.nbytes
        assert on["layers.2.ids"].data_ptr() == on["layers.3.same"].data_ptr(), "equal bytes are there once"
        assert (
            on["layers.0.weight"].data_ptr() == on.raw("layers.0.weight").data_ptr() == on["layers.0.weight"].data_ptr()
        )
        assert 0 < on.peak_bytes == on.budget_bytes == on.residency.used_bytes
        on.residency.check()
        kept = on["layers.0.weight"]
    assert same(kept, wanted["layers.0.weight"]), "what somebody has stays when the model is closed"


def test_dtypes_that_torch_lacks_have_bytes(config: ConfigMaker, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_raw(
        path,
        {
            "a.f6": ("F6_E2M3", [4, 2], bytes(range(6))),
            "a.f4": ("F4", [2, 6], bytes(range(6))),
            "a.odd": ("F4", [2, 3], bytes(range(3))),
        },
    )
    with opened(config, path) as model, model.stream("cpu", 64 * KIB) as on:
        with pytest.raises(Refused, match=r"a\.f6 is F6_E2M3: .*raw\('a\.f6'\)"):
            on["a.f6"]
        with pytest.raises(Refused, match=r"a\.odd is F4: .*raw\('a\.odd'\)"):
            on["a.odd"]
        assert on.residency.copied_bytes == 0
        assert (on["a.f4"].shape, on["a.f4"].dtype) == ((2, 3), torch.float4_e2m1fn_x2)
        assert on.raw("a.f6").tolist() == list(range(6))


def test_what_is_held_stays_and_the_rest_makes_room(blocks: Model) -> None:
    with blocks.stream("cpu", 16 * KIB) as on:
        first, second = on[names(0)[0]], on[names(1)[0]]
        on.pin(names(1, 2))
        on[names(3)[0]]
        with pytest.raises(DeviceFull, match=r"layers\.4\.weight.* do not fit on cpu beside 16\.0 KiB that are held"):
            on[names(4)[0]]
        assert first.eq(0).all()
        assert second.eq(1).all()
        on.release(names(0, 2))
        on.release(names(7))
        assert on[names(4)[0]].eq(4).all()
        assert second.eq(1).all()
        assert on[names(1)[0]].data_ptr() == second.data_ptr()
        assert on.residency.used_bytes == on.peak_bytes == on.budget_bytes == 16 * KIB
        on.residency.check()


def test_pinning_is_all_or_nothing(blocks: Model) -> None:
    with blocks.stream("cpu", 16 * KIB) as on:
        on.pin(names(0))
        with pytest.raises(DeviceFull):
            on.pin(names(0, 1, 2, 3, 4))
        with pytest.raises(TensorNotFound, match="it has 8 others"):
            on.pin([*names(1, 2), "layers.9.weight"])
        on.pin(names(5, 6, 7))
        with pytest.raises(DeviceFull):
            on.pin(names(1))


def test_what_is_prefetched_is_there_and_never_too_much(blocks: Model) -> None:
    with blocks.stream("cpu", 16 * KIB) as on:
        on.pin(names(0))
        on.prefetch(names(1, 2, 3, 4, 5))
        until(lambda: on.residency.copied_bytes == 16 * KIB)
        on.pin(names(1, 2, 3), wait=True)
        assert on.residency.copied_bytes == 16 * KIB
        with pytest.raises(TensorNotFound):
            on.prefetch(["layers.9.weight"])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"device": "toaster:0", "budget": 4096}, DeviceUnavailable),
        ({"budget": "a lot"}, ConfigError),
        ({"budget": 0}, ConfigError),
        ({"budget": "1MiB", "ahead": -1}, ConfigError),
        ({"budget": "1MiB", "policy": "none_such"}, ConfigError),
    ],
)
def test_bad_arguments_leave_nothing_behind(blocks: Model, arguments: dict[str, Any], fault: type[Exception]) -> None:
    with pytest.raises(fault):
        blocks.stream(**{"device": "cpu", **arguments})
    assert not copiers()


def test_a_policy_ends_with_what_it_was_for(blocks: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[str]()
    monkeypatch.setattr(placed.Steering, "close", lambda steering: ended.append(steering.name))
    with pytest.raises(DeviceUnavailable):
        blocks.stream("toaster:0", 4096, policy="lru")
    assert ended == ["lru"]
    blocks.stream("cpu", 4096, policy="hold").close()
    assert ended == ["lru", "hold"]


def test_a_budget_is_bytes_or_text_or_what_is_free(blocks: Model) -> None:
    for budget, wanted in ((10_000, 10_000 // ALIGN * ALIGN), ("1MiB", 1 << 20)):
        with blocks.stream("cpu", budget) as on:
            assert on.budget_bytes == wanted
    with blocks.stream("cpu") as on:
        assert 1 << 20 < on.budget_bytes < open_device("cpu").capacity_bytes()


def test_closing_gives_all_back(blocks: Model) -> None:
    on = blocks.to("cpu")
    tensor = on[names(3)[0]]
    on.close()
    on.close()
    residency = on.residency
    assert residency.used_bytes == residency.reserved_bytes == residency.pinned_bytes == 0
    assert tensor.eq(3).all()
    for ask in (lambda: on[names(0)[0]], lambda: on.pin(names(1)), lambda: on.prefetch(names(1))):
        with pytest.raises(Closed):
            ask()
    with pytest.raises(Closed, match="place it again"):
        on.attach(torch.nn.Linear(1, 1))


def test_a_model_that_was_closed_gives_no_more_bytes(blocks: Model) -> None:
    with blocks.stream("cpu", "1MiB") as on:
        assert on[names(0)[0]].eq(0).all()
        blocks.close()
        assert on[names(0)[0]].eq(0).all()
        for _ in range(2):
            with pytest.raises(Closed, match="open it again"):
                on[names(1)[0]]
        assert on.residency.used_bytes == 4 * KIB
        on.residency.check()


def test_bytes_that_lie_askew_are_copied_whole(blocks: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Model.raw
    monkeypatch.setattr(Model, "raw", lambda self, name: memoryview(b"x" + bytes(genuine(self, name)))[1:])
    with blocks.to("cpu") as on:
        assert all(on[name].eq(number).all() for number, name in enumerate(names(*range(8))))


def test_a_failed_copy_is_told_and_made_again(blocks: Model, slow: SlowDevice) -> None:
    with blocks.stream("slow:0", "1MiB") as on:
        slow.faults[0] = RuntimeError("bus error")
        with pytest.raises(CopyFailed, match="bus error"):
            on[names(5)[0]]
        on.pin(names(5), wait=True)
        assert on[names(5)[0]].eq(5).all()
        on.residency.check()
    slow.faults[slow.copies + 2] = RuntimeError("bus error")
    with pytest.raises(CopyFailed):
        blocks.to("slow:0")
    assert not copiers(), "what was begun is ended"
    slow.module.lost = True
    with pytest.raises(DeviceLost):
        blocks.to("slow:0")


def test_the_host_waits_for_no_copy_and_the_compute_stream_does(blocks: Model, slow: SlowDevice) -> None:
    with blocks.stream("slow:0", "1MiB") as on:
        side = slow.module.lines[-1]
        side.gate.clear()
        tensor, seen = on[names(6)[0]], list[int]()
        slow.module.compute.enqueue("compute", lambda: seen.append(int(tensor[-1])))
        assert not seen
        side.gate.set()
        until(lambda: seen == [6])


def test_the_device_may_read_the_hosts_memory_by_itself(
    blocks: Model, slow: SlowDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, pinned = Runtime(), list[int]()
    vars(slow.module)["cudart"] = lambda: runtime
    monkeypatch.setattr(blocks._holder, "pinned", pinned.extend)
    monkeypatch.setattr(Staging, "take", lambda self: pytest.fail("it goes through staging"))
    for place in (partial(blocks.to, register=True), partial(blocks.stream, budget="1MiB", register=True)):
        on = place("slow:0")
        assert [nbytes for nbytes, _ in runtime.held.values()] == [blocks.manifest.page_bytes]
        assert pinned == list(range(8)), "each layer has a page"
        assert on._link.carrier.registered  # type: ignore[attr-defined]
        on.pin(on, wait=True)
        assert all(on[name].eq(number).all() for number, name in enumerate(names(*range(8))))
        on.close()
        assert not runtime.held
        pinned.clear()


def test_where_the_device_cannot_copies_go_through_staging(blocks: Model) -> None:
    with blocks.to("cpu", register=True) as on:
        assert on[names(3)[0]].eq(3).all()
        assert not on._link.carrier.registered  # type: ignore[attr-defined]


def test_a_file_of_several(config: ConfigMaker, tmp_path: Path, checkpoint: Any) -> None:
    written = checkpoint(layers=2, files=2)
    with opened(config, written.files[1]) as model, model.to("cpu") as on:
        assert set(on) == {"model.layers.1.weight", "model.layers.1.bias"}
        for name, tensor in on.items():
            assert np.array_equal(tensor.numpy(), written.tensors[name])


def test_digests_are_known_once_it_is_loaded(model: Model) -> None:
    model.wait()
    digests = model.digests()
    assert list(digests) == list(model)
    assert all(digest is not None and len(digest) == 32 for digest in digests.values())
    assert digests["layers.2.ids"] == digests["layers.3.same"] != digests["layers.2.weight"]
    assert model.digests(["layers.2.ids"]) == {"layers.2.ids": digests["layers.2.ids"]}
    with pytest.raises(TensorNotFound):
        model.digests(["none"])
    model.close()
    with pytest.raises(Closed):
        model.digests()
