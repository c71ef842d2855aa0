"""A module that streams, in trouble: what fails is told, nothing stays held or stale, and bytes stay while in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ConfigMaker, until
from tests.unit.nets import Computing, Net, X, away, blank, held, opened, seeded, streamed
from tiermem.device import placed
from tiermem.errors import Closed, CopyFailed, DeviceFull, DeviceLost
from tiermem.model import Model


@pytest.fixture
def plain() -> Net:
    return seeded()


@pytest.fixture
def model(config: ConfigMaker, tmp_path: Path, plain: Net) -> Iterator[Model]:
    with opened(config, tmp_path / "model.safetensors", plain.state_dict()) as model:
        yield model


def twice(net: torch.nn.Module) -> None:
    net()
    net()


class Fault(Exception):
    pass


@pytest.mark.parametrize("fault", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "pre_hook", "hook", "before ours"])
def test_an_exception_leaves_nothing_held(model: Model, plain: Net, fault: type[BaseException], where: str) -> None:
    net = blank()
    armed = [True]

    def fail(*_: Any) -> None:
        if armed[0]:
            raise fault

    if where == "forward":
        net.layers[3].down.register_forward_pre_hook(fail)
    elif where == "hook":
        net.layers[3].register_forward_hook(fail)
    with streamed(model, net, 2) as (on, _), torch.no_grad():
        if where in ("pre_hook", "before ours"):
            net.layers[3].register_forward_pre_hook(fail, prepend=where == "before ours")
        for _ in range(3):
            with pytest.raises(fault):
                net(X)
            if fault is Fault:
                assert held(on) == 2 * 16 * 4
        armed[0] = False
        assert torch.equal(net(X), plain(X))
        assert held(on) == 2 * 16 * 4
        assert away(net.layers)


def test_a_failed_copy_is_told_and_the_next_pass_is_right(
    model: Model, plain: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, genuine, failing = blank(), Model.raw, [0]

    def raw(self: Model, name: str) -> memoryview:
        if name.startswith("layers.3") and failing[0]:
            failing[0] -= 1
            raise CopyFailed("the disk is gone")
        return genuine(self, name)

    monkeypatch.setattr(Model, "raw", raw)
    with streamed(model, net, 2) as (on, _), torch.no_grad():
        for _ in range(4):
            on.residency.drop([weight.key for weight in on._weights.values()])
            failing[0] = 100
            with pytest.raises(CopyFailed, match="the disk is gone"):
                net(X)
            failing[0] = 0
            assert held(on) == 2 * 16 * 4
            assert torch.equal(net(X), plain(X))
            on.residency.check()


def test_names_that_are_held_stand_beside_a_module(model: Model, plain: Net) -> None:
    net = blank()
    with streamed(model, net, 2) as (on, _), torch.no_grad():
        on.pin(["layers.0.up.weight", "layers.5.down.bias"])
        assert torch.equal(net(X), plain(X))
        on.pin(["layers.1.up.weight", "layers.1.down.weight"])
        with pytest.raises(DeviceFull):
            net(X)
        on.release(on)
        assert torch.equal(net(X), plain(X))


def test_threads_may_call_it_at_once(model: Model, plain: Net) -> None:
    net = blank()
    inputs = [X * scale for scale in range(1, 5)]
    with torch.no_grad():
        wanted = [plain(x) for x in inputs]
    wrong = list[int]()

    def call(number: int) -> None:
        with torch.no_grad():
            wrong.extend(number for _ in range(20) if not torch.equal(net(inputs[number]), wanted[number]))

    with streamed(model, net, 6) as (on, _):
        threads = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert held(on) == 2 * 16 * 4
        assert away(net.layers)
        on.residency.check()


def test_closing_detaches(model: Model) -> None:
    net = seeded(5)
    weight = net.layers[0].up.weight
    on = model.stream("cpu", "1MiB")
    attached = on.attach(net)
    on.close()
    assert attached.detached
    assert net.layers[0].up.weight is weight
    net(X)
    with pytest.raises(Closed):
        on.attach(net)


class Step(torch.nn.Module):
    """A layer whose kernel reads its weight later, in the compute stream."""

    def __init__(self, device: Computing, log: list[list[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1024, dtype=torch.uint8), requires_grad=False)
        self.device, self.log = device, log

    def forward(self) -> None:
        self.log.append(self.device.compute(self.weight))


class Steps(torch.nn.Module):
    def __init__(self, device: Computing, count: int) -> None:
        super().__init__()
        self.log = list[list[int]]()
        self.layers = torch.nn.ModuleList([Step(device, self.log) for _ in range(count)])

    def forward(self) -> None:
        for layer in self.layers:
            layer()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Computing]:
    device = Computing()
    monkeypatch.setattr(placed, "open_device", lambda name: device)
    yield device
    device.close()


@pytest.fixture
def steps(config: ConfigMaker, tmp_path: Path) -> Iterator[Model]:
    """Eight layers of 1 KiB; the sum of layer i's bytes is 1024 times i + 1."""
    weights = {f"layers.{i}.weight": torch.full((1024,), i + 1, dtype=torch.uint8) for i in range(8)}
    with opened(config, tmp_path / "model.safetensors", weights) as model:
        yield model


def test_the_next_layer_is_copied_while_one_computes(steps: Model, slow: Computing) -> None:
    net = Steps(slow, 8)
    with steps.stream("slow:0", 3 * 1024) as on, on.attach(net):
        compute = slow.module.compute
        compute.gate.clear()
        thread = threading.Thread(target=net)
        thread.start()
        until(lambda: "compute" in compute.log)
        until(lambda: slow.copies >= 2)
        assert not net.log[0], "layer 0 has not been computed, and layer 1 is copied"
        compute.gate.set()
        thread.join(20)
        until(lambda: [sums for sums in net.log] == [[1024 * (i + 1)] for i in range(8)])


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_bytes_stay_until_their_last_use_and_nobody_waits_for_the_device(
    steps: Model, slow: Computing, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    net, waits = Steps(slow, 8), list[str]()
    genuine = type(slow.event()).synchronize

    def synchronize(event: Any) -> None:
        waits.append(threading.current_thread().name)
        genuine(event)

    with steps.stream("slow:0", stages * 1024) as on, on.attach(net):
        line, enqueue, pause = slow.module.compute, slow.module.compute.enqueue, threading.Event()

        def slowly(what: str, work: Any) -> None:
            enqueue(what, lambda: (what == "compute" and pause.wait(0.002), work()))

        monkeypatch.setattr(line, "enqueue", slowly)
        net()
        monkeypatch.setattr(type(slow.event()), "synchronize", synchronize)
        for _ in range(4):
            net()
        assert set(waits) <= {"tiermem-copier-slow:0"}, "only the copier's thread waits, for its own slots"
        until(lambda: all(net.log))
        assert net.log == [[1024 * (i + 1)] for _ in range(5) for i in range(8)]
        assert set(slow.module.calls) == {"set_device 0"}
        monkeypatch.undo()
        on.residency.check()
        assert on.peak_bytes <= on.budget_bytes == stages * 1024


@pytest.mark.parametrize("when", [0, 1, 20])
def test_a_device_that_is_lost_is_told_and_can_be_left(
    steps: Model, slow: Computing, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    net = Steps(slow, 8)
    before = net.layers[0].weight
    with steps.stream("slow:0", 3 * 1024) as on:
        with on.attach(net):
            for _ in range(when // 8):
                net()
            left, genuine = [when % 8], slow.copy

            def copy(*arguments: Any) -> None:
                if not left[0]:
                    slow.module.lost = True
                    raise RuntimeError("gone")
                left[0] -= 1
                genuine(*arguments)

            monkeypatch.setattr(slow, "copy", copy)
            for _ in range(3):
                with pytest.raises(DeviceLost, match=r"slow:0 (answers no|does nothing) more"):
                    twice(net)
        assert net.layers[0].weight is before
    assert on.residency.used_bytes == on.residency.reserved_bytes == on.residency.pinned_bytes == 0
