"""The switcher: one model is ready, the others stay as there is room, and a failure leaves it usable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import until
from tests.unit.nets import Computing, write_raw
from tiermem.device import Switched, Switcher, switcher
from tiermem.embedded import EmbeddedPool
from tiermem.errors import (
    CheckpointNotFound,
    Closed,
    ConfigError,
    CopyFailed,
    DeviceFull,
    DeviceLost,
    DeviceUnavailable,
    ModelNotFound,
    ReadError,
    Refused,
)

KIB = 1024
SETTINGS = {"reserve_bytes": 0, "staging_bytes": 8 * KIB, "chunk_bytes": 4 * KIB}


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """Of 6 KiB: 2 KiB that all models share, 4 KiB of the model's own, and nothing."""
    torch.manual_seed(ord(name))
    own = torch.randint(0, 256, (2, 2 * KIB), dtype=torch.uint8)
    return {"embed": torch.arange(512, dtype=torch.float32), "own": own, "empty": torch.empty(0, 3)}


@pytest.fixture
def path(tmp_path: Path) -> Callable[[str], Path]:
    """Path of the checkpoint of a model, which is written."""

    def write(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        save_file(tensors_of(name), directory / "model.safetensors")
        return directory

    return write


@contextmanager
def switching(device: str = "cpu", budget: int | str | None = 64 * KIB, **options: Any) -> Iterator[Switcher]:
    made = Switcher(device, budget, **(SETTINGS | options))
    try:
        yield made
        made.residency.check()
    finally:
        made.close()
    assert made.residency.used_bytes == made.residency.reserved_bytes == made.residency.pinned_bytes == 0


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Computing]:
    """The device that switchers open."""
    device = Computing()
    monkeypatch.setattr(switcher, "open_device", lambda name: device)
    try:
        yield device
    finally:
        device.close()


def right(switched: Switched) -> bool:
    expected = tensors_of(switched.name)
    return set(switched.tensors) == set(expected) and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        for name, tensor in switched.tensors.items()
    )


def test_models_by_path_by_name_and_open(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    pool.load(path("b"), "second")
    with pool.open(path("c")) as model, switching() as models:
        models.add("a", path("a"))
        models.add("b", "second")
        models.add("c", model)
        assert (models.names, models.current) == (("a", "b", "c"), None)
        costs = []
        for name in "abcab":
            switched = models.switch(name)
            assert right(switched)
            assert models.current == name
            assert switched.seconds > 0
            costs.append((switched.bytes_copied, switched.bytes_shared))
        assert costs == [(6 * KIB, 0), (4 * KIB, 2 * KIB), (4 * KIB, 2 * KIB), (0, 6 * KIB), (0, 6 * KIB)]
        assert models.residency.used_bytes == 14 * KIB, "what is common is there once"
        models.close()
        assert model["own"].nbytes == 4 * KIB, "who opened it closes it"
    assert pool.remove("a"), "nobody holds what the switcher opened"


def test_what_was_current_longest_ago_goes_first(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching(budget=10 * KIB) as models:
        for name in "abc":
            models.add(name, path(name))
        copied = []
        for name in "ababcba":
            switched = models.switch(name)
            assert right(switched)
            copied.append(switched.bytes_copied // KIB)
        assert copied == [6, 4, 0, 0, 4, 0, 4]
        assert models.residency.peak_bytes == 10 * KIB


def test_a_switch_to_the_current_model_costs_nothing(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching(budget="6KiB") as models:
        models.add("a", path("a"))
        first, again = models.switch("a"), models.switch("a", block=True)
        assert again.bytes_copied == 0
        assert right(again)
        assert first.tensors["own"].data_ptr() == again.tensors["own"].data_ptr()


def test_ahead_of_a_switch(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching(budget=10 * KIB) as models:
        for name in "abc":
            models.add(name, path(name))
        assert right(models.switch("a"))
        models.prefetch("b")
        assert models.current == "a"
        switched = models.switch("b")
        assert (switched.bytes_copied, right(switched)) == (0, True)


def test_names(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching() as models:
        models.add("a", path("a"))
        with pytest.raises(Refused, match="there is a model 'a' already"):
            models.add("a", path("b"))
        for act in (models.switch, models.prefetch, models.remove):
            with pytest.raises(ModelNotFound, match="no model 'b' was added; there are: a"):
                act("b")
        models.add("none", path("a") / "nowhere")
        assert right(models.switch("a"))
        with pytest.raises(CheckpointNotFound):
            models.switch("none")
        assert models.current == "a"


def test_removing_keeps_what_others_share(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching() as models:
        for name in "ab":
            models.add(name, path(name))
            models.switch(name)
        models.remove("b")
        assert (models.names, models.current) == (("a",), None)
        assert models.residency.used_bytes == 6 * KIB
        assert models.switch("a").bytes_copied == 0
        models.remove("a")
        assert models.residency.used_bytes == 0
        models.add("a", path("a"))
        assert right(models.switch("a"))


def test_a_budget_that_is_too_small_is_told_the_least(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching(budget=6 * KIB - 512) as models:
        models.add("a", path("a"))
        with pytest.raises(DeviceFull, match=r"3 weights of 6\.0 KiB do not fit on cpu .* at least 6144 bytes"):
            models.switch("a")
        assert models.current is None


@pytest.mark.parametrize("budget", ["much", "6 apples"])
def test_what_is_no_budget_and_no_device(budget: str) -> None:
    with pytest.raises(ConfigError):
        Switcher("cpu", budget)
    with pytest.raises(DeviceUnavailable):
        Switcher("toaster:0", 1)


def test_dtypes_that_torch_lacks_are_refused_before_a_copy(pool: EmbeddedPool, tmp_path: Path) -> None:
    write_raw(tmp_path / "odd.safetensors", {"x": ("F6_E2M3", [4], bytes(3))})
    with switching() as models:
        models.add("odd", tmp_path / "odd.safetensors")
        for _ in range(2):
            with pytest.raises(Refused, match="has no dtype for F6_E2M3"):
                models.switch("odd")
        assert models.residency.copied_bytes == 0


def test_after_a_failed_copy_the_next_switch_works(
    slow: Computing, pool: EmbeddedPool, path: Callable[[str], Path]
) -> None:
    with switching("slow:0", 12 * KIB) as models:
        models.add("a", path("a"))
        models.add("b", path("b"))
        assert right(models.switch("a", block=True))
        slow.faults[slow.copies] = RuntimeError("bus error")
        with pytest.raises(CopyFailed, match="bus error"):
            models.switch("b")
        assert models.current is None
        assert models.residency._held_bytes == 0
        models.residency.check()
        for name in "bab":
            assert right(models.switch(name, block=True))


def test_what_stops_a_load_stops_the_switch_only(
    pool: EmbeddedPool, path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool.open(path("b")) as model, switching() as models:
        model.wait()
        models.add("a", path("a"))
        models.add("b", model)
        models.switch("a")
        genuine, broken = model.raw, [True]

        def raw(name: str) -> memoryview:
            if broken:
                raise ReadError("the disk is gone")
            return genuine(name)

        monkeypatch.setattr(model, "raw", raw)
        with pytest.raises(ReadError, match="the disk is gone"):
            models.switch("b")
        broken.clear()
        assert models.current is None
        assert right(models.switch("b"))


def test_a_lost_device_is_told_by_everything(slow: Computing, pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching("slow:0") as models:
        models.add("a", path("a"))
        models.add("b", path("b"))
        models.switch("a", block=True)
        slow.module.lost = True
        slow.faults = {slow.copies + number: RuntimeError("gone") for number in range(10)}
        for act in (models.switch, models.switch, models.prefetch):
            with pytest.raises(DeviceLost):
                act("b")


def test_work_of_the_model_before_is_not_overwritten(
    slow: Computing, pool: EmbeddedPool, path: Callable[[str], Path]
) -> None:
    """Nor does the switch wait for it, or the work of the next model overtake its copies."""
    with switching("slow:0", 6 * KIB) as models:
        models.add("a", path("a"))
        models.add("b", path("b"))
        first = models.switch("a")
        slow.module.compute.gate.clear()
        sums = [slow.compute(first.tensors["own"])]
        second = models.switch("b")
        sums.append(slow.compute(second.tensors["own"]))
        threading.Event().wait(0.02)
        assert sums == [[], []]
        slow.module.compute.gate.set()
        until(lambda: all(sums))
        assert sums == [[int(tensors_of(name)["own"].sum())] for name in "ab"]
        assert set(slow.module.calls) <= {"set_device 0", "empty_cache"}


def test_a_model_that_loads_slowly_ahead_holds_up_no_switch(
    pool: EmbeddedPool, path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, go_on = switcher._opened, threading.Event()

    def slowly(which: Path) -> Any:
        assert which.name == "a" or go_on.wait(10)
        return genuine(which)

    monkeypatch.setattr(switcher, "_opened", slowly)
    with switching() as models:
        models.add("a", path("a"))
        models.add("b", path("b"))
        threads = [threading.Thread(target=models.prefetch, args="b") for _ in range(2)]
        for thread in threads:
            thread.start()
        assert right(models.switch("a"))
        assert not models.residency.copied_bytes > 6 * KIB
        go_on.set()
        for thread in threads:
            thread.join(10)
        assert models.switch("b").bytes_copied == 0
    with switching() as models:
        models.add("b", path("b"))
        member = models._members["b"]
    with pytest.raises(Closed, match="make a new one"):
        member.opened()


def test_from_threads(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching(budget=12 * KIB) as models:
        for name in "abcd":
            models.add(name, path(name))
        faults: list[BaseException] = []

        def churn(seed: int) -> None:
            order = np.random.default_rng(seed)
            try:
                for name in order.choice([*"abcd"], 40):
                    if order.random() < 0.5:
                        models.prefetch(name)
                    else:
                        assert set(models.switch(name).tensors) == {"embed", "own", "empty"}
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        assert right(models.switch("c"))


def test_after_the_end(pool: EmbeddedPool, path: Callable[[str], Path]) -> None:
    with switching() as models:
        models.add("a", path("a"))
        switched = models.switch("a")
    models.close()
    assert right(switched), "memory returns with the last tensor"
    for act in (models.switch, models.prefetch, models.remove):
        with pytest.raises(Closed, match="make a new one"):
            act("a")
    with pytest.raises(Closed):
        models.add("b", path("b"))
    assert models.current is None
