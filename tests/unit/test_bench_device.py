"""`tiermem bench device`: what it copies, that it notices bytes that did not arrive, what it prints. Times nothing."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tiermem import cli
from tiermem.bench import device as bench_device
from tiermem.bench import device_models
from tiermem.bench.device import CopyBench, host_memory
from tiermem.bench.device_stack import LAYERS, write_stack
from tiermem.device import Device, open_device
from tiermem.errors import DigestMismatch

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with host_memory("memfd", 3 * MIB + 5) as memory:
        yield memory


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "CHUNK_BYTES", MIB)


class Runtime:
    """Stands for torch.cuda.cudart(). `held`: addresses of host memory that it was given."""

    def __init__(self) -> None:
        self.held = set[int]()
        self.given = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 8, "the pool's memory cannot be written to"
        self.held.add(address)
        self.given += 1
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.held.remove(address)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cpu, "cudart", lambda: made, raising=False)
    return made


def results(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main(["bench", "device", "cpu", "--size", "3MiB", "--runs", "2", "--json", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "tiermem.bench.device/1"
    found: dict[str, Any] = told["results"]
    return found


def test_tells_the_device_the_ways_and_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    told = results(capsys)
    facts = told["device"]
    assert (facts["name"], facts["registers"], facts["versions"]["torch"]) == ("cpu", False, torch.__version__)
    assert 0 < facts["free_bytes"] <= facts["capacity_bytes"]
    assert [(row["way"], row["in_flight"]) for row in told["copies"]] == [
        ("staged", 1), ("staged", 2), ("staged", 4), ("pageable", 1)
    ]  # fmt: skip
    for row in told["copies"]:
        assert row["bytes"] == 3 * MIB
        assert len(row["seconds"]) == told["runs"] == 2
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
    assert told["allocation"]["bytes"] == MIB
    assert told["verified"]


def test_tells_what_switches_copied_and_what_streaming_took(capsys: pytest.CaptureFixture[str]) -> None:
    told = results(capsys)
    switches = {row["case"]: row for row in told["switches"]}
    nbytes = switches["nothing in common"]["model_bytes"]
    assert 0.5 * MIB < nbytes <= 1.5 * MIB
    assert {
        case: (row["bytes_copied"], row["bytes_shared"], row["budget_bytes"]) for case, row in switches.items()
    } == {
        "nothing in common": (4 * nbytes, 0, nbytes),
        "half in common": (2 * nbytes, 2 * nbytes, nbytes),
        "room for both": (0, 4 * nbytes, 2 * nbytes),
    }
    plain, streamed, ahead = told["streaming"]
    assert (plain["ahead"], plain["copied_bytes"], plain["peak_bytes"]) == (None, 0, nbytes)
    assert [row["ahead"] for row in (streamed, ahead)] == [0, 1]
    for row in (streamed, ahead):
        assert row["model_bytes"] == nbytes
        assert 0 < row["peak_bytes"] <= row["budget_bytes"] == nbytes // 3
        assert nbytes - row["budget_bytes"] <= row["copied_bytes"] <= nbytes
        assert len(row["seconds"]) == 2


def test_registered_memory_goes_directly_and_is_given_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = 0
    honest = Device.registered

    def counted(self: Device, source: memoryview) -> torch.Tensor | None:
        nonlocal direct
        found = honest(self, source)
        direct += found is not None
        return found

    monkeypatch.setattr(Device, "registered", counted)
    told = results(capsys)
    assert told["device"]["registers"]
    assert [row["way"] for row in told["copies"]] == ["registered"] * 3 + ["staged"] * 3 + ["pageable"]
    assert runtime.given == 2  # once to see whether it can be done
    assert runtime.held == set()
    assert direct == 3 * 2 * 8  # of three numbers in flight, two runs of eight pieces: none of the staged ones


def test_the_table_says_that_it_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "device", "cpu", "--size", "1MiB", "--runs", "1"]) == 0
    said = capsys.readouterr().out
    assert "cannot read memory of the pool by itself" in said
    assert "every byte was read back and is what was copied" in said
    assert "streamed, a layer ahead" in said
    assert "between places of the host's own memory" in said


@pytest.mark.parametrize("after", [0, 8])
def test_bytes_that_do_not_arrive_end_it(
    after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a later run, where those of an earlier one could be taken for them."""
    copies, honest = 0, Device.copy

    def forgetful(self: Device, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        nonlocal copies
        copies += 1
        if copies <= after:
            honest(self, target, source, stream)

    monkeypatch.setattr(Device, "copy", forgetful)
    assert cli.main(["bench", "device", "cpu", "--size", "1MiB", "--runs", "2"]) == 6
    said = capsys.readouterr()
    assert "(staged)" in said.err
    assert said.out == ""


def test_one_byte_is_enough(memory: memoryview) -> None:
    with closing(CopyBench(open_device("cpu"), memory, 1)) as bench:
        bench._block.view.copy_(torch.frombuffer(bytearray(memory), dtype=torch.uint8))
        bench_device.check_arrived(bench.device, bench._block, bench._digest, "by hand")
        bench._block.view[-1] += 1
        with pytest.raises(DigestMismatch, match=r"by hand"):
            bench_device.check_arrived(bench.device, bench._block, bench._digest, "by hand")


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_so_many_copies_are_in_flight_and_no_more(in_flight: int, memory: memoryview) -> None:
    most = under_way = covered = 0

    def issue(start: int, end: int) -> Callable[[], None]:
        nonlocal most, under_way, covered
        assert start == covered
        covered, under_way = end, under_way + 1
        most = max(most, under_way)
        return wait

    def wait() -> None:
        nonlocal under_way
        under_way -= 1

    with closing(CopyBench(open_device("cpu"), memory, 1)) as bench:
        bench._pass(in_flight, issue)
    assert (most, under_way, covered) == (in_flight, 0, len(memory))


def test_gives_all_memory_back(memory: memoryview) -> None:
    bench = CopyBench(open_device("cpu"), memory, 1)
    list(bench.ways())
    arena, staging = bench._arena, bench._staging
    assert arena.reserved_bytes > 0 < staging.nbytes
    bench.close()
    assert (arena.reserved_bytes, staging.nbytes) == (0, 0)


def test_a_failing_copy_is_an_error_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no bus\nsecond line")

    monkeypatch.setattr(Device, "copy", fail)
    assert cli.main(["bench", "device", "cpu", "--size", "1MiB"]) == 1
    error = capsys.readouterr().err
    assert "copy of 128.0 KiB to cpu failed: no bus" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["npu:0", "cuda:7", "gpu", ""])
def test_without_such_a_device_it_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device")
    assert cli.main(["bench", "device", name]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_without_torch_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ([], ["npu:0"]):
        assert cli.main(["bench", "device", *name]) == 1
        assert "install tiermem[torch]" in capsys.readouterr().err


def test_without_a_name_it_takes_what_torch_computes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert cli.main(["bench", "device"]) == 1
    assert "name a device: npu:0" in capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert cli.main(["bench", "device"]) == 1
    assert "xpu:0" in capsys.readouterr().err


def test_a_size_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "device", "cpu", "--size", "0"]) == 2
    assert "--size" in capsys.readouterr().err


def test_stacks_have_in_common_what_they_should() -> None:
    with device_models.random_stacks(MIB, device_models.PLAIN, device_models.OTHER, device_models.HALF) as stacks:
        raw = {name: {tensor: bytes(model.raw(tensor)) for tensor in model} for name, model in stacks.models.items()}
    plain, other, half = (raw[name] for name in (device_models.PLAIN, device_models.OTHER, device_models.HALF))
    assert len(set(plain.values())) == len(plain) == 2 * LAYERS
    assert not set(plain.values()) & set(other.values())
    shared = {name for name in plain if plain[name] == half[name]}
    assert len(shared) == LAYERS
    assert len({name.split(".")[1] for name in shared}) == LAYERS // 2
    values = torch.frombuffer(bytearray(plain["layers.0.up.weight"]), dtype=torch.bfloat16).float()
    assert 1 / 128 <= values.abs().min() <= values.abs().max() < 1 / 64
    assert abs(values.mean()) < 1e-3


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("copies", [3, 60])
def test_a_switch_that_loses_bytes_ends_it(copies: int, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest = 0, Device.copy

    def forgetful(self: Device, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        nonlocal made
        made += 1
        honest(self, target, torch.zeros_like(source) if made == copies else source, stream)

    monkeypatch.setattr(Device, "copy", forgetful)
    with device_models.random_stacks(MIB, device_models.PLAIN, device_models.OTHER) as stacks:
        models = stacks.models[device_models.PLAIN], stacks.models[device_models.OTHER]
        budget = device_models.room_for(models[0])
        with pytest.raises(DigestMismatch, match=r"layers\.\d+\.(up|down)\.weight of .* on cpu differs from its file"):
            device_models.time_switches(open_device("cpu"), "damaged", models, budget, 1)
    assert list(room.iterdir()) == []


def test_a_streamed_pass_with_other_results_ends_it(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Device.copy

    def damaging(self: Device, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        honest(self, target, source.roll(2), stream)

    monkeypatch.setattr(Device, "copy", damaging)
    with device_models.random_stacks(MIB, device_models.PLAIN) as stacks:
        bench = device_models.PassBench(open_device("cpu"), stacks, 1)
        passes = bench.passes(device_models.room_for(stacks.models[device_models.PLAIN]) // 3)
        assert next(passes).ahead is None
        with pytest.raises(DigestMismatch, match="different results"):
            next(passes)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_budget_below_a_layer_names_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "device", "cpu", "--size", "1MiB", "--runs", "1", "--budget", "4KiB"]
    assert cli.main(command) == 5
    error = capsys.readouterr().err
    assert str(2 * 4 * 32 * 32 * 2) in error  # bytes of a layer of the smallest stack
    assert "budget" in error


def test_switches_between_two_models_of_the_users(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERMEM_ADDRESS", f"unix:{room}/none.sock")
    paths = [str(room / f"{name}.safetensors") for name in ("a", "b")]
    write_stack(Path(paths[0]), 32, [1, 2])
    write_stack(Path(paths[1]), 32, [1, 3, 4])
    told = results(capsys, "--model", paths[0], "--model", paths[1])
    (row,) = told["switches"]
    assert row["case"] == "a, b"
    layer = 2 * 4 * 32 * 32 * 2
    assert (row["model_bytes"], row["budget_bytes"]) == (3 * layer, 3 * layer)
    # There is room for one layer beside the smaller model: each switch copies the layer that had to go.
    assert (row["bytes_copied"], row["bytes_shared"]) == (2 * (1 + 1) * layer, 2 * (1 + 2) * layer)
    assert sorted(path.name for path in room.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_one_model_is_no_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "device", "cpu", "--model", "/models/a"]) == 2
    assert "name the two models" in capsys.readouterr().err
