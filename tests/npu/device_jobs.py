"""What tiermem.device does on a simulated device that fails: jobs for processes of their own."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.npu.apart import Tell
from tests.sim_acl import library
from tests.sim_acl.control import Fault, SimulatedAcl
from tiermem.device import Arena, Copier, Device, Staging, backend, open_device
from tiermem.errors import DeviceFull

MIB = 1 << 20
HUNG_S = 45
"""A job that takes so long shows where it hangs."""

Bytes = npt.NDArray[np.uint8]


def simulated() -> SimulatedAcl:
    """The control of this process's simulated ACL."""
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    return SimulatedAcl(library.load(library.BUILD))


def random_bytes(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def outcome(action: Callable[[], Any]) -> str:
    """The type of what it raised, and "" where it did not."""
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return ""


class Tier:
    """Arena, staging and copier of npu:0, and 6 MiB that were copied there."""

    def __init__(self) -> None:
        self.device: Device = open_device("npu:0")
        self.device.use()
        self.arena = Arena(self.device, 256 * MIB, 32 * MIB)
        self.staging = Staging(self.device, 8 * MIB)
        self.copier = Copier(self.device, self.staging)
        self.source = random_bytes(6 * MIB)
        self.block = self.arena.allocate(self.source.nbytes)

    def copy(self) -> None:
        self.copier.copy(memoryview(self.source), self.block).result()

    def arrived(self) -> bool:
        return bool((self.block.view.cpu().numpy() == self.source).all())

    def close(self) -> None:
        self.copier.close()
        self.staging.close()
        self.arena.free(self.block)
        self.arena.close()


def failed_copy(tell: Tell, fault: int, first: int) -> None:
    """What comes of the copy that fails, of those behind it, and what is left in the end."""
    acl, tier = simulated(), Tier()
    tier.copy()
    acl.fail(Fault(fault), first)
    failed = [outcome(tier.copy) for _ in range(3)]
    acl.heal()
    told = {"failed": failed, "healed": outcome(tier.copy), "arrived": tier.arrived()}
    tier.close()
    tier.device.release_cached()
    tell(told | {"left": acl.device_bytes()})


def closed(tell: Tell) -> None:
    """Whether all can be closed after a copy failed, and the process goes on."""
    backend._STALL_S, backend._ANSWER_S = 0.2, 0.5
    acl, tier = simulated(), Tier()
    tier.copy()
    acl.fail(Fault.COPY, first=2)
    failed = outcome(tier.copy)
    tier.close()
    tell(failed)


def halted(tell: Tell) -> None:
    """What all calls raise after a copy was refused while torch_npu has a queue of its own."""
    backend._STALL_S, backend._ANSWER_S = 0.2, 0.5
    acl, tier = simulated(), Tier()
    tier.copy()
    acl.fail(Fault.COPY_ISSUE, first=2)
    tell({"copy": outcome(tier.copy)} | _each(tier))


def lost(tell: Tell, queued: bool) -> None:
    """What all calls raise once the device is lost; with `queued` while a copy is on its way."""
    acl, tier = simulated(), Tier()
    tier.copy()
    ticket = None
    if queued:
        acl.set_delays(copy_us_per_mib=50_000)
        ticket = tier.copier.copy(memoryview(tier.source), tier.block)
        _until(lambda: not all(call.ended for call in acl.calls(0, "aclrtMemcpyAsync")))
    acl.lose_device()
    told = {"ticket": outcome(ticket.result)} if ticket else {}
    tell(told | {"copy": outcome(tier.copy)} | _each(tier))


def _each(tier: Tier) -> dict[str, str]:
    device, stream = tier.device, tier.device.current_stream()
    waiting = tier.copier.copy(memoryview(tier.source), tier.block)
    actions: dict[str, Callable[[], Any]] = {
        "wait": lambda: waiting.wait(stream),
        "result": waiting.result,
        "capacity": device.capacity_bytes,
        "free": device.free_bytes,
        "empty": lambda: device.empty(64 * MIB),
        "pinned": lambda: device.pinned(MIB),
        "allocate": lambda: tier.arena.allocate(64 * MIB),
    }
    return {name: outcome(action) for name, action in actions.items()} | {"close": outcome(tier.close)}


def fill(tell: Tell, wanted_bytes: int) -> None:
    """Takes so many bytes in pieces of 64 MiB; tells how many it got and what stopped it, and holds on to them."""
    simulated()
    device = open_device("npu:0")
    arena, blocks, stop = Arena(device, wanted_bytes, 64 * MIB), [], ""
    try:
        while len(blocks) * 64 * MIB < wanted_bytes:
            blocks.append(arena.allocate(64 * MIB))
    except DeviceFull as error:
        stop = f"{type(error).__name__}: {error}"
    tell({"got": arena.used_bytes, "stop": stop})
    _for_ever()


def copy_for_ever(tell: Tell) -> None:
    """Copies, slowly, and tells when the first one is on its way."""
    acl, tier = simulated(), Tier()
    acl.set_delays(copy_us_per_mib=1_000_000)
    tier.copier.copy(memoryview(tier.source), tier.block)
    _until(lambda: bool(acl.calls(0, "aclrtMemcpyAsync")))
    tell(acl.device_bytes())
    _for_ever()


def _until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.001)


def _for_ever() -> None:
    faulthandler.cancel_dump_traceback_later()
    while True:
        time.sleep(60)
