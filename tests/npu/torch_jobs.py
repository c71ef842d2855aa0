"""What torch_npu makes of failures of its own calls, without tiermem: jobs for processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.npu.apart import Tell
from tests.npu.device_jobs import simulated
from tests.sim_acl.control import Fault

MIB = 1 << 20


def outcome(action: Callable[[], Any]) -> Any:
    """What came of it: the types of the exception, most special first, and its text; None where there was none."""
    try:
        action()
    except Exception as error:
        return [[kind.__name__ for kind in type(error).__mro__], str(error)]
    return None


def lost(tell: Tell) -> None:
    """What a lost device is to each kind of call, one after the other, with a copy on its way when it is lost."""
    acl = simulated()
    import torch

    source = torch.arange(4096, dtype=torch.float32).pin_memory()
    target = torch.empty(4096, device="npu:0")
    side, event = torch.npu.Stream(), torch.npu.Event()
    torch.npu.synchronize()
    acl.set_delays(copy_us_per_mib=10_000_000)
    with torch.npu.stream(side):
        target.copy_(source, non_blocking=True)
    event.record(side)
    torch.npu.current_stream().synchronize()
    acl.lose_device()
    actions: dict[str, Callable[[], Any]] = {
        "query": lambda: event.query(),
        "wait": lambda: event.synchronize(),
        "stream": lambda: side.synchronize(),
        "device": lambda: torch.npu.synchronize(),
        "memory": lambda: torch.npu.mem_get_info(),
        "empty": lambda: torch.empty(64 * MIB, dtype=torch.uint8, device="npu:0"),
        "copy": lambda: target.copy_(source),
        "to_host": lambda: target.cpu(),
    }
    tell({name: outcome(action) for name, action in actions.items()})


def failed_copy(tell: Tell) -> None:
    """Where a copy that fails on a side stream while it runs is told."""
    acl = simulated()
    import torch

    source = torch.ones(4096).pin_memory()
    target = torch.empty(4096, device="npu:0")
    side, other, event = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Event()
    torch.npu.synchronize()
    acl.set_delays(copy_us_per_mib=20_000_000)
    acl.fail(Fault.COPY)

    def copy(stream: torch.npu.Stream) -> None:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)

    told = {"copy": outcome(lambda: copy(side)), "record": outcome(lambda: event.record(side))}
    told["wait"] = outcome(lambda: event.synchronize())
    told["query"] = outcome(lambda: event.query())
    told["stream"] = outcome(lambda: side.synchronize())
    told["again"] = outcome(lambda: (copy(side), side.synchronize()))
    told["other"] = outcome(lambda: (copy(other), other.synchronize()))
    tell(told)


def refused_copy(tell: Tell) -> None:
    """What torch_npu does after the driver refused one asynchronous copy: all that follows is asked for in vain."""
    acl = simulated()
    import torch

    source = torch.ones(4096).pin_memory()
    target = torch.zeros(4096).to("npu:0")
    side, other, event = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Event()
    torch.npu.synchronize()
    acl.fail(Fault.COPY_ISSUE)

    def copy(stream: torch.npu.Stream) -> None:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)

    def until_told() -> None:
        for _ in range(1000):
            copy(side)
            side.synchronize()

    told: dict[str, Any] = {"first": outcome(until_told)}
    position = acl.position()
    told["copies"] = outcome(lambda: (copy(side), side.synchronize(), copy(other), other.synchronize()))
    told["record"] = outcome(lambda: (event.record(other), other.synchronize()))
    told["passed"] = event.query()
    told["calls"] = [call.name for call in acl.calls(position, "aclrtMemcpyAsync", "aclrtRecordEvent")]
    told["arrived"] = bool((target.cpu() == source).all())
    tell(told)


def refused_pinned(tell: Tell) -> None:
    """What torch_npu gives when there is no pinned memory: once, and after there is some again."""
    acl = simulated()
    import torch

    torch.npu.synchronize()
    acl.fail(Fault.MALLOC_HOST)
    sizes = (8 * MIB, 8 * MIB, 16 * MIB)
    tell([torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).data_ptr() != 0 for nbytes in sizes])


def hold(tell: Tell) -> None:
    """Takes 512 MiB of npu:0, says so, and keeps them until it is killed."""
    simulated()
    import torch

    kept = torch.empty(512 * MIB, dtype=torch.uint8, device="npu:0")
    tell({"held": kept.numel(), "free": torch.npu.mem_get_info()[0]})
    threading.Event().wait()
