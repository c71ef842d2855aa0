"""A module of twelve layers on a simulated device with room for four: in which order copies and compute take place, by
the simulated ACL's log, with which bytes, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ConfigMaker
from tests.npu.apart import Apart
from tests.npu.streaming_jobs import BUDGET_BYTES, LAYER_BYTES, LAYERS, WIDTH, streamed, trouble, twelve_layers, weights
from tests.sim_acl.control import Call, SimulatedAcl

pytestmark = pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format")

PASSES = 4
COPIES = ("aclrtMemcpy", "aclrtMemcpyAsync", "aclrtMemcpyAsyncWithCondition")
KERNEL = "aclopCompileAndExecute"
WAITS = (
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtSynchronizeEvent",
)


Begin = Callable[..., Apart]


@dataclass(frozen=True, slots=True)
class Pass:
    """What the log has of one pass: `reading[n]` is the end of layer n's compute, `copies` those of weights."""

    kernels: list[Call]
    reading: list[Call]
    copies: list[Call]


@dataclass(frozen=True, slots=True)
class Steady:
    """Passes from the second on; `calls`: all that was called while the host enqueued them."""

    passes: list[Pass]
    calls: list[Call]
    layers: Any


@pytest.fixture
def steady(torch: ModuleType, acl: SimulatedAcl, config: ConfigMaker, tmp_path: Path) -> Iterator[Steady]:
    net, x = twelve_layers(), torch.zeros(1, WIDTH).to("npu:0")
    with streamed(config(), tmp_path) as on, on.attach(net), torch.no_grad():
        net(x)
        torch.npu.current_stream().synchronize()
        acl.set_delays(copy_us_per_mib=8_000, kernel_us=12_000)
        begun = acl.position()
        for _ in range(PASSES - 1):
            net(x)
        enqueued = acl.position()
        torch.npu.current_stream().synchronize()
        calls = acl.calls(begun)
        during = [call for call in calls if call.number <= enqueued]
        assert on.peak_bytes <= BUDGET_BYTES
        on.residency.check()
    acl.set_delays()
    yield Steady(_passes(calls), during, net.layers)
    for layer in net.layers:
        layer.seen.clear()


def _passes(calls: list[Call]) -> list[Pass]:
    kernels = [call for call in calls if call.name == KERNEL and call.detail == "MatMul"]
    reading = [call for call in calls if call.name in COPIES and call.detail.startswith("d2h")]
    copies = [call for call in calls if call.name in COPIES and call.detail.startswith("h2d")]
    assert len(kernels) == len(reading) == (PASSES - 1) * LAYERS
    ends = [0, *(reading[n * LAYERS - 1].ended for n in range(1, PASSES - 1)), reading[-1].ended]
    return [
        Pass(
            kernels[n * LAYERS :][:LAYERS],
            reading[n * LAYERS :][:LAYERS],
            [call for call in copies if ends[n] < call.ended <= ends[n + 1]],
        )
        for n in range(PASSES - 1)
    ]


def test_layers_compute_with_their_weights(steady: Steady) -> None:
    for layer, weight in zip(steady.layers, weights(), strict=True):
        assert [bool((seen == weight).all()) for seen in layer.seen] == [True] * PASSES


def test_most_of_it_is_copied_in_each_pass_and_no_more(steady: Steady) -> None:
    for one in steady.passes:
        copied = sum(call.bytes for call in one.copies)
        assert (LAYERS - BUDGET_BYTES // LAYER_BYTES) * LAYER_BYTES <= copied <= LAYERS * LAYER_BYTES


def test_the_next_layer_is_copied_while_a_layer_computes(steady: Steady) -> None:
    kernels = [call for one in steady.passes for call in one.kernels]
    reading = [call for one in steady.passes for call in one.reading]
    copies = [call for one in steady.passes for call in one.copies]
    asked_for, begun = [], []
    for n in range(1, len(reading)):
        place = reading[n].source
        last_use = max((call.ended for call in reading[:n] if call.source == place), default=0)
        for copy in copies:
            if copy.to == place and last_use < copy.begun and copy.ended < kernels[n].begun:
                asked_for.append(copy.issued < reading[n - 1].ended)
                begun.append(copy.begun < reading[n - 1].ended)
    assert len(begun) > len(steady.passes) * LAYERS // 2
    assert all(asked_for), "the device has nothing to do meanwhile"
    assert sum(begun) > len(begun) * 3 // 4


def test_a_layer_computes_after_its_copy_and_stays_until_it_has_computed(steady: Steady) -> None:
    for one in steady.passes:
        for kernel, reading in zip(one.kernels, one.reading, strict=True):
            for copy in (copy for other in steady.passes for copy in other.copies if copy.to == reading.source):
                assert copy.ended < kernel.begun or reading.ended < copy.begun, "overwritten while it computes"


def test_nothing_waits_for_the_device(steady: Steady) -> None:
    kernels = [call for one in steady.passes for call in one.kernels]
    reading = [call for one in steady.passes for call in one.reading]
    early = [kernel.issued < before.ended for before, kernel in zip(reading, kernels[1:], strict=False)]
    assert sum(early) > len(early) * 3 // 4, "the host enqueues a layer while the one before it computes"
    assert [call.name for call in steady.calls if call.name in WAITS] == []
    assert not [call.name for call in steady.calls if call.name.startswith(("aclrtMalloc", "aclrtFree"))]
    assert {call.detail for call in steady.calls if call.name in COPIES} <= {"h2d pinned", "d2h pinned"}


ERRORS = {
    "memory": {"DeviceFull"},
    "copy": {"CopyFailed", "RuntimeError"},  # a stream that waited for it takes no kernel of the module either
    "refusal": {"CopyFailed", ""},  # it may have been one ahead, which is then tried again
    "loss": {"DeviceLost"},
}


@pytest.mark.parametrize("phase", ["attach", "first", "third"])
@pytest.mark.parametrize("fault", ERRORS)
def test_a_failure_in_each_phase(apart: Begin, config: ConfigMaker, tmp_path: Path, fault: str, phase: str) -> None:
    told = apart(trouble, config(), tmp_path, fault, phase, TASK_QUEUE_ENABLE="0").hear()
    expected = ERRORS[fault] if (fault, phase) != ("memory", "third") else {""}  # it has all that it needs by then
    assert told["raised"] in expected
    assert told["closed"] == ""
    assert told["left"] == 0


@pytest.mark.parametrize("phase", ["first", "third"])
@pytest.mark.parametrize("fault", ["copy", "refusal", "loss"])
def test_a_failure_where_torch_npu_has_a_queue(
    apart: Begin, config: ConfigMaker, tmp_path: Path, fault: str, phase: str
) -> None:
    """It ends all that is asynchronous, and torch tells it once, to whom it may: to us, or to the module's own work."""
    told = apart(trouble, config(), tmp_path, fault, phase, TASK_QUEUE_ENABLE="1").hear()
    assert told["raised"] in {"DeviceLost", "CopyFailed", "RuntimeError"}
    assert told["closed"] == ""
