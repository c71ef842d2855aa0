"""tiermem.device by the real torch_npu, on a simulated device: what it takes, copies, and says where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.npu.apart import Apart
from tests.npu.conftest import CAPACITY, Run
from tests.npu.device_jobs import Tier, closed, copy_for_ever, failed_copy, fill, halted, lost, random_bytes
from tests.sim_acl.control import Fault, SimulatedAcl
from tiermem.device import ALIGN, Arena, Device, Staging, open_device
from tiermem.errors import DeviceFull, DeviceUnavailable

MIB = 1 << 20
ALLOCATIONS = ("aclrtMalloc", "aclrtMallocAlign32")
COPIES = ("aclrtMemcpy", "aclrtMemcpyAsync", "aclrtMemcpyAsyncWithCondition", "aclrtMemcpyBatchAsync")
WAITS = (
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
)
Begin = Callable[..., Apart]


@pytest.fixture
def device(torch: ModuleType) -> Device:
    return open_device("npu:0")


@pytest.fixture
def tier(device: Device) -> Iterator[Tier]:
    made = Tier()
    yield made
    made.close()


def test_a_device_says_what_it_is(device: Device) -> None:
    assert (device.name, device.type, device.index) == ("npu:0", "npu", 0)
    assert device.capacity_bytes() == CAPACITY
    assert 0 < device.free_bytes() <= CAPACITY
    assert open_device("npu").name == "npu:0"
    assert open_device("npu:1").index == 1


def test_a_device_that_is_not_there(torch: ModuleType) -> None:
    with pytest.raises(DeviceUnavailable, match="npu:2"):
        open_device("npu:2")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"SIM_ACL_DEVICES": "0"}, "npu:0"),
        ({"LD_LIBRARY_PATH": ""}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        (
            {"LD_LIBRARY_PATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "torch_npu, which would bring it, does not import",
        ),
    ],
)
def test_a_host_without_driver_or_without_cann(run: Run, environ: dict[str, str], says: str) -> None:
    ran = run("opened", **environ)
    assert ran.status == 0, ran.errors
    kind, text = ran.told
    assert kind == "DeviceUnavailable"
    assert says in text


def test_the_backend_is_imported_where_torch_does_not_do_so(run: Run) -> None:
    ran = run("opened", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (ran.status, ran.told) == (0, ["Device", "npu:0"]), ran.errors


def test_a_chunk_is_one_allocation_and_blocks_are_aligned(device: Device, acl: SimulatedAcl) -> None:
    arena = Arena(device, 256 * MIB, 128 * MIB)
    before = sum(map(acl.count, ALLOCATIONS))
    blocks = [arena.allocate(nbytes) for nbytes in (1, 513, 30 * MIB, 70 * MIB, 64 * MIB)]
    assert sum(map(acl.count, ALLOCATIONS)) == before + 2
    assert all(block.view.data_ptr() % ALIGN == 0 for block in blocks)
    assert arena.reserved_bytes <= acl.device_bytes() <= arena.reserved_bytes + 4 * MIB
    arena.check()
    arena.close()


def test_memory_goes_back_to_the_device(device: Device, acl: SimulatedAcl) -> None:
    arena = Arena(device, 512 * MIB, 128 * MIB)
    blocks = [arena.allocate(128 * MIB) for _ in range(4)]
    taken = acl.device_bytes()
    for block in blocks[1:]:
        arena.free(block)
    assert acl.device_bytes() == taken, "an arena keeps what it has"
    arena.settle()
    assert arena.shrink(128 * MIB) == 128 * MIB
    assert acl.device_bytes() <= taken - 128 * MIB
    assert arena.trim() == 256 * MIB
    assert acl.device_bytes() <= taken - 384 * MIB
    del block, blocks
    arena.close()
    device.release_cached()
    assert acl.device_bytes() == 0


def test_a_full_device(device: Device, acl: SimulatedAcl) -> None:
    arena = Arena(device, 4 * CAPACITY, 256 * MIB)
    got = [arena.allocate(96 * MIB) for _ in range(8)]
    with pytest.raises(DeviceFull, match=r"npu:0 has .* free: NPU out of memory") as caught:
        arena.allocate(512 * MIB)
    assert caught.value.lacking_bytes > 0
    arena.check()
    arena.free(got.pop())
    got.append(arena.allocate(96 * MIB))
    arena.close()


def test_an_allocation_that_the_driver_refuses(device: Device, acl: SimulatedAcl) -> None:
    arena = Arena(device, 256 * MIB, 64 * MIB)
    acl.fail(Fault.MALLOC, count=4)
    with pytest.raises(DeviceFull):
        arena.allocate(32 * MIB)
    arena.check()
    acl.heal()
    arena.grow(256 * MIB - arena.budget_bytes)
    assert arena.allocate(32 * MIB).nbytes == 32 * MIB
    arena.close()


def test_pinned_memory_that_the_host_refuses(device: Device, acl: SimulatedAcl) -> None:
    acl.fail(Fault.MALLOC_HOST)
    with pytest.raises(DeviceFull, match="host memory pinned for npu:0 cannot be had"):
        Staging(device, 16 * MIB)
    staging = Staging(device, 16 * MIB)
    assert staging.take().memory.is_pinned()
    staging.close()


@pytest.mark.parametrize("nbytes", [1, 511, MIB, 5 * MIB + 3, 24 * MIB])
def test_bytes_arrive_by_staging_on_a_stream_of_their_own(tier: Tier, acl: SimulatedAcl, nbytes: int) -> None:
    source, block, position = random_bytes(nbytes, nbytes), tier.arena.allocate(nbytes), acl.position()
    ticket = tier.copier.copy(memoryview(source), block)
    ticket.result()
    copies = acl.calls(position, *COPIES)
    assert {call.detail for call in copies} == {"h2d pinned"}
    assert sum(call.bytes for call in copies) == nbytes
    assert max(call.bytes for call in copies) <= tier.staging.slot_bytes
    (stream,) = {call.stream for call in copies}
    assert stream not in {0, tier.device.current_stream().npu_stream}  # type: ignore[attr-defined]
    assert not acl.calls(position, *WAITS), "nothing waits for a stream or for the device"
    assert (block.view.cpu().numpy() == source).all()
    tier.arena.free(block)


def test_no_more_is_pinned_than_staging_and_all_of_it_is_given_back(tier: Tier, acl: SimulatedAcl) -> None:
    assert acl.pinned_bytes() == tier.staging.nbytes == 8 * MIB
    for _ in range(8):
        tier.copy()
    assert acl.pinned_bytes() == 8 * MIB
    tier.copier.close()
    tier.staging.close()
    assert acl.pinned_bytes() == 0


def test_several_copies_are_in_flight(tier: Tier, acl: SimulatedAcl) -> None:
    acl.set_delays(copy_us_per_mib=50_000)
    position = acl.position()
    tickets = [tier.copier.copy(memoryview(tier.source[: MIB // 2]), tier.block, at * MIB) for at in range(4)]
    for ticket in tickets:
        ticket.result()
    copies = acl.calls(position, *COPIES)
    assert len(copies) == 4
    assert copies[3].issued < copies[0].ended


def test_compute_waits_for_its_copy_and_the_host_does_not(torch: ModuleType, tier: Tier, acl: SimulatedAcl) -> None:
    acl.set_delays(copy_us_per_mib=50_000)
    position = acl.position()
    ticket = tier.copier.copy(memoryview(tier.source), tier.block)
    ticket.wait(tier.device.current_stream())
    got = torch.empty(tier.source.nbytes, dtype=torch.uint8, pin_memory=True)
    got.copy_(tier.block.view, non_blocking=True)
    assert not ticket.done()
    tier.device.current_stream().synchronize()  # type: ignore[attr-defined]
    assert (got.numpy() == tier.source).all()
    *there, back = acl.calls(position, *COPIES)
    assert max(call.ended for call in there) < back.begun
    del got


def test_a_block_is_not_overwritten_before_its_last_use_has_ended(
    torch: ModuleType, tier: Tier, acl: SimulatedAcl
) -> None:
    tier.copy()
    first = torch.empty(tier.source.nbytes, dtype=torch.uint8, pin_memory=True)
    acl.set_delays(copy_us_per_mib=50_000)
    position = acl.position()
    first.copy_(tier.block.view, non_blocking=True)
    used = tier.device.event()
    used.record(tier.device.current_stream())
    address = tier.block.view.data_ptr()
    tier.arena.free(tier.block, used)
    tier.block = tier.arena.allocate(tier.source.nbytes)
    assert tier.block.view.data_ptr() == address
    other = random_bytes(tier.source.nbytes, 7)
    tier.copier.copy(memoryview(other), tier.block).result()
    assert (first.numpy() == tier.source).all()
    assert (tier.block.view.cpu().numpy() == other).all()
    reading, *writing = acl.calls(position, *COPIES)[: 1 + tier.source.nbytes // tier.staging.slot_bytes]
    assert (reading.source, writing[0].to) == (address, address)
    assert reading.ended < writing[0].begun
    del first


@pytest.mark.parametrize("fault", [Fault.COPY, Fault.COPY_ISSUE])
@pytest.mark.parametrize("first", [1, 4, 6])
def test_a_failed_copy(apart: Begin, fault: Fault, first: int) -> None:
    told = apart(failed_copy, int(fault), first, TASK_QUEUE_ENABLE="0").hear()
    assert "CopyFailed" in told.pop("failed")
    assert told == {"healed": "", "arrived": True, "left": 0}


@pytest.mark.parametrize("queue", ["0", "1"])
def test_closing_after_a_failed_copy_does_not_end_the_process(apart: Begin, queue: str) -> None:
    """As torch_npu does where memory is freed that a stream that has stopped has copied from."""
    job = apart(closed, TASK_QUEUE_ENABLE=queue)
    assert job.hear() in {"CopyFailed", "DeviceLost"}
    job.end()


def test_with_a_queue_of_torch_npu_a_refused_copy_is_the_end_of_the_device(apart: Begin) -> None:
    job = apart(halted)
    told = job.hear()
    assert told.pop("close") == ""
    assert set(told.values()) == {"DeviceLost"}, told
    job.end()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_lost_device_says_so_in_every_call(apart: Begin, queued: bool, queue: str) -> None:
    job = apart(lost, queued, TASK_QUEUE_ENABLE=queue)
    told = job.hear()
    assert told.pop("close") == ""
    assert set(told.values()) == {"DeviceLost"}, told
    job.end()


def test_two_processes_get_what_fits_and_a_killed_one_leaves_nothing(apart: Begin, tmp_path: Path) -> None:
    board = {"SIM_ACL_BOARD": str(tmp_path / "board")}
    first = apart(fill, 640 * MIB, **board)
    assert first.hear() == {"got": 640 * MIB, "stop": ""}
    second = apart(fill, 512 * MIB, **board)
    told: dict[str, Any] = second.hear()
    assert 256 * MIB <= told["got"] <= CAPACITY - 640 * MIB
    assert "DeviceFull" in told["stop"]
    first.kill()
    third = apart(fill, 576 * MIB, **board)
    assert third.hear() == {"got": 576 * MIB, "stop": ""}


def test_a_process_that_is_killed_while_it_copies_leaves_nothing(apart: Begin, tmp_path: Path) -> None:
    board = {"SIM_ACL_BOARD": str(tmp_path / "board")}
    copying = apart(copy_for_ever, **board)
    assert copying.hear() > 0
    copying.kill()
    assert apart(fill, 960 * MIB, **board).hear() == {"got": 960 * MIB, "stop": ""}
