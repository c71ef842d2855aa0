"""torch_npu 2.13 as it is, on the simulated ACL: devices, memory, copies, streams, events."""

from __future__ import annotations

import mmap
from types import ModuleType

import pytest

from tests.npu.conftest import CAPACITY
from tests.sim_acl.control import Fault, SimulatedAcl

MIB = 1 << 20
COPIES = ("aclrtMemcpy", "aclrtMemcpyAsync", "aclrtMemcpyAsyncWithCondition")


def test_is_what_it_should_be(torch: ModuleType) -> None:
    import torch_npu

    assert torch_npu.__version__.split("+")[0] == "2.13.0"
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 2
    assert torch.npu.mem_get_info() == (CAPACITY, CAPACITY)
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.accelerator.device_count() == 2


def test_allocates_and_frees(torch: ModuleType, acl: SimulatedAcl) -> None:
    before = acl.count("aclrtMallocAlign32") + acl.count("aclrtMalloc")
    tensor = torch.empty(256 * MIB, dtype=torch.uint8, device="npu:0")
    assert tensor.device == torch.device("npu:0")
    assert tensor.data_ptr() % 512 == 0
    assert acl.count("aclrtMallocAlign32") + acl.count("aclrtMalloc") == before + 1
    assert 256 * MIB <= acl.device_bytes() <= 258 * MIB
    assert torch.npu.memory_allocated() >= 256 * MIB
    del tensor
    assert acl.device_bytes() >= 256 * MIB  # kept by torch's allocator
    torch.npu.empty_cache()
    assert acl.device_bytes() == 0


@pytest.mark.parametrize("nbytes", [1, 511, 4097, 3 * MIB + 5])
@pytest.mark.parametrize("pinned", [False, True])
def test_bytes_go_there_and_back(torch: ModuleType, nbytes: int, pinned: bool) -> None:
    sent = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    source = sent.pin_memory() if pinned else sent
    assert source.is_pinned() == pinned
    there = source.to("npu:0", non_blocking=pinned)
    assert torch.equal(there.cpu(), sent)
    slot = torch.empty(nbytes + 512, dtype=torch.uint8, device="npu:0")[512:]
    slot.copy_(source)
    assert torch.equal(slot.cpu(), sent)


def test_pinned_memory_is_what_the_copy_uses(torch: ModuleType, acl: SimulatedAcl) -> None:
    staging = torch.empty(MIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(MIB, dtype=torch.uint8, device="npu:0")
    position = acl.position()
    target[: MIB // 2].copy_(staging[MIB // 2 :], non_blocking=True)
    torch.npu.synchronize()
    (copy,) = acl.calls(position, *COPIES)
    assert (copy.name, copy.detail, copy.bytes) == ("aclrtMemcpyAsync", "h2d pinned", MIB // 2)


def test_memory_that_is_registered_is_not_pinned_to_torch_npu(torch: ModuleType, acl: SimulatedAcl) -> None:
    """It knows what its own allocator pinned, and waits for each copy from other memory: staging serves better."""
    runtime, nbytes = torch.npu.npurt(), MIB
    memory = mmap.mmap(-1, nbytes)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    before = acl.pinned_bytes()
    assert runtime.npuHostRegister(host.data_ptr(), nbytes, 0) == 0
    assert acl.pinned_bytes() == before + nbytes
    assert not host.is_pinned()
    target = torch.empty(nbytes, dtype=torch.uint8, device="npu:0")
    position = acl.position()
    target.copy_(host, non_blocking=True)
    copy, wait = acl.calls(position, *COPIES, "aclrtSynchronizeStreamWithTimeout")
    assert (copy.detail, wait.name) == ("h2d pinned", "aclrtSynchronizeStreamWithTimeout")
    assert runtime.npuHostUnregister(host.data_ptr()) == 0
    assert acl.pinned_bytes() == before
    del target


def test_a_side_stream_does_not_block_the_host(torch: ModuleType, acl: SimulatedAcl) -> None:
    staging = torch.full((MIB,), 7, dtype=torch.uint8).pin_memory()
    target = torch.empty(MIB, dtype=torch.uint8, device="npu:0")
    side, event = torch.npu.Stream(), torch.npu.Event()
    acl.set_delays(copy_us_per_mib=300_000)
    position = acl.position()
    with torch.npu.stream(side):
        target.copy_(staging, non_blocking=True)
        event.record(side)
    assert not event.query()
    torch.npu.current_stream().wait_event(event)
    other = target.to("cpu", non_blocking=True)
    torch.npu.current_stream().synchronize()
    assert event.query()
    assert torch.equal(other, staging)
    there, back = acl.calls(position, *COPIES)
    assert there.stream != back.stream
    assert there.ended < back.begun
    assert not acl.calls(position, "aclrtSynchronizeDevice", "aclrtSynchronizeDeviceWithTimeout")


def test_copies_of_two_streams_overlap(torch: ModuleType, acl: SimulatedAcl) -> None:
    staging = torch.empty(MIB, dtype=torch.uint8, pin_memory=True)
    targets = [torch.empty(MIB, dtype=torch.uint8, device="npu:0") for _ in range(2)]
    streams = [torch.npu.Stream() for _ in targets]
    acl.set_delays(copy_us_per_mib=300_000)
    position = acl.position()
    for stream, target in zip(streams, targets, strict=True):
        with torch.npu.stream(stream):
            target.copy_(staging, non_blocking=True)
    for stream in streams:
        stream.synchronize()
    first, second = acl.calls(position, *COPIES)
    assert max(first.begun, second.begun) < min(first.ended, second.ended)


def test_out_of_memory(torch: ModuleType, acl: SimulatedAcl) -> None:
    kept = torch.empty(CAPACITY // 2, dtype=torch.uint8, device="npu:0")
    before = acl.device_bytes()
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(CAPACITY, dtype=torch.uint8, device="npu:0")
    assert acl.device_bytes() == before
    assert kept.numel() == CAPACITY // 2


def test_out_of_memory_of_the_driver_alone(torch: ModuleType, acl: SimulatedAcl) -> None:
    acl.fail(Fault.MALLOC, count=2)  # torch tries again after it has emptied its cache
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(64 * MIB, dtype=torch.uint8, device="npu:0")
    assert torch.empty(64 * MIB, dtype=torch.uint8, device="npu:0").numel() == 64 * MIB


@pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format")
def test_a_module_runs_its_kernels_in_their_place(torch: ModuleType, acl: SimulatedAcl) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)).to("npu:0")
    given = torch.zeros(2, 16).to("npu:0")
    torch.npu.synchronize()
    position = acl.position()
    acl.set_delays(kernel_us=20_000)
    with torch.no_grad():
        given = module(given)
    torch.npu.current_stream().synchronize()
    assert given.shape == (2, 16)
    matmul, norm = acl.calls(position, "aclopCompileAndExecute")
    assert (matmul.detail, norm.detail) == ("MatMul", "LayerNorm")
    assert matmul.begun < matmul.ended < norm.begun < norm.ended
