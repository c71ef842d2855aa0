"""Checkpoints that are bad, change, break or vanish while a daemon reads them, and disks and memory that are full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hostile.checkpoints import CORPUS, Case
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.faulty_disk import FaultyDisk
from tests.integration.weights import Weights, digest_of, layer, write_weights
from tiermem import _native
from tiermem.errors import (
    AccessDenied,
    CapacityError,
    CheckpointChanged,
    DigestMismatch,
    ProtocolError,
    ReadError,
    TiermemError,
)
from tiermem.types import PAGE_BYTES


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon("--read-threads", "1") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def weights(daemon: Daemon, tmp_path: Path) -> Iterator[Weights]:
    """Three layers in three files. Afterwards the daemon holds nothing, and serves another checkpoint."""
    yield write_weights(tmp_path / "source", layers=3, files=3)
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    other = write_weights(tmp_path / "after")
    assert daemon.serves(other)
    empty(daemon)
    assert list(daemon.segments.iterdir()) == []


@pytest.fixture
def disk(weights: Weights, tmp_path: Path) -> Iterator[FaultyDisk]:
    """Shows the weights as another model."""
    with FaultyDisk(weights.path, tmp_path / "disk") as disk:
        yield disk


def empty(daemon: Daemon) -> None:
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    with daemon.client() as client:
        for model in client.status()["models"]:
            client.remove(model["name"])
        assert client.status()["tiers"][0]["used_bytes"] == 0


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
def test_bad_checkpoint_is_refused_across_the_wire(daemon: Daemon, case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    with daemon.client() as client:
        for attempt in (client.open, client.load):
            with pytest.raises(TiermemError) as caught:
                attempt(path)
            assert type(caught.value) is case.error
            assert case.words in str(caught.value)
        status = client.status()
        assert (status["models"], status["pool"]["leases"]) == ((), 0)


def rewrite(path: Path, offset: int = 150_000, *, keep_time: bool = False) -> None:
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"another weight")
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES: dict[str, Callable[[Path], None]] = {
    "shrinks": lambda path: os.truncate(path, 120_000),
    "is emptied": lambda path: os.truncate(path, 0),
    "grows": grow,
    "changes": rewrite,
    "is touched": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.root
@pytest.mark.parametrize("number", [0, 2], ids=["read", "being read"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_file_that_changes_is_not_served(
    daemon: Daemon, weights: Weights, disk: FaultyDisk, change: Callable[[Path], None], number: int
) -> None:
    gate = disk.gate(weights.files[2].name, 100_000)
    with daemon.client() as client, client.open(disk.path) as model:
        first = model[layer(0)]
        gate.await_reached()
        change(weights.files[number])
        gate.open()
        for names in (None, [layer(2)], None):
            with pytest.raises(CheckpointChanged, match=f"{weights.files[number].name}.* load it again"):
                model.wait(names)
        # It was whole and true when it was given out.
        assert first.tobytes() == weights.tensors[layer(0)]
        assert client.status()["models"] == ()
        assert client.status()["tiers"][0]["used_bytes"] == 0


@pytest.mark.root
def test_silent_change_is_found_by_its_digest(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    assert daemon.serves(weights.at(disk.path))
    empty(daemon)
    rewrite(weights.files[2], keep_time=True)
    gate = disk.gate(weights.files[2].name, 100_000)
    with daemon.client() as client, client.open(disk.path) as model:
        assert model[layer(0)].tobytes() == weights.tensors[layer(0)]
        gate.open()
        with pytest.raises(DigestMismatch, match=r"tensor 'model\.layers\.2\.weight' has digest .* restore the file"):
            model.wait()
    assert list(daemon.segments.iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize("replaced", [False, True])
def test_open_file_that_goes_is_read_to_its_end(
    daemon: Daemon, weights: Weights, disk: FaultyDisk, replaced: bool
) -> None:
    gate = disk.gate(weights.files[2].name, 100_000)
    with daemon.client() as client, client.open(disk.path) as model:
        gate.await_reached()
        for file in weights.files:
            if replaced:
                (weights.path / "new").write_bytes(bytes(file.stat().st_size))
                (weights.path / "new").rename(file)
            else:
                file.unlink()
        gate.open()
        model.wait()
        assert digest_of(model) == weights.digest


@pytest.mark.root
def test_file_that_goes_before_it_is_read(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    gate = disk.gate(weights.files[1].name, 100_000)
    with daemon.client() as client, client.open(disk.path) as model:
        gate.await_reached()
        weights.files[2].unlink()
        gate.open()
        with pytest.raises(ReadError, match=f"{weights.files[2].name}.*check that the file exists"):
            model.wait()
    assert daemon.status()["models"] == ()


@pytest.mark.root
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_disk_error_in_the_middle(daemon: Daemon, weights: Weights, disk: FaultyDisk, number: int) -> None:
    disk.fail(weights.files[1].name, 100_000, number)
    with daemon.client() as client:
        with pytest.raises(ReadError, match=f"{weights.files[1].name}.*check the disk"):
            client.open(disk.path).wait()
        with pytest.raises(ReadError, match="check the disk"):
            client.load(disk.path)
        assert client.status()["models"] == ()
        assert client.status()["tiers"][0]["used_bytes"] == 0
    disk.heal()
    assert daemon.serves(weights.at(disk.path))


@pytest.mark.root
@pytest.mark.parametrize("known", [False, True], ids=["new", "evicted"])
def test_model_of_a_failed_load_is_never_taken_for_that_of_a_later_one(
    daemon: Daemon, weights: Weights, disk: FaultyDisk, known: bool
) -> None:
    """The first client has mapped segments that were given up: the second load fills others."""
    if known:
        with daemon.client() as client:
            client.load(disk.path)
            client.evict("disk")
    gate = disk.gate(weights.files[1].name, 100_000)
    disk.fail(weights.files[1].name, 150_000)
    with daemon.client() as early, early.open(disk.path) as lost:
        gate.await_reached()
        gate.open()
        eventually(lambda: all(model["state"] == "disk" for model in daemon.status()["models"]), "the load failed")
        disk.heal()
        with daemon.client() as client, client.open(disk.path) as model:
            assert digest_of(model) == weights.digest
            for names in ([layer(1)], None):
                with pytest.raises(ReadError, match="check the disk"):
                    lost.wait(names)
            with pytest.raises(ReadError):
                lost[layer(2)]
        with early.open(disk.path) as again:
            assert digest_of(again) == weights.digest


@pytest.mark.root
def test_file_that_may_not_be_read() -> None:
    with Daemon(ordinary=True) as daemon:
        weights = write_weights(daemon.directory / "model")
        weights.files[0].chmod(0)
        with daemon.client() as client, pytest.raises(AccessDenied, match="may not be read by user 65534; grant read"):
            client.open(weights.path)
        weights.files[0].chmod(0o644)
        assert daemon.serves(weights)


@pytest.mark.parametrize("name", ["with space", "line\nbreak", "ünï", "a" * 250, "-rf", "%s"])
def test_unusual_directory_names(daemon: Daemon, tmp_path: Path, name: str) -> None:
    weights = write_weights(tmp_path / name)
    assert daemon.serves(weights)
    assert [(model["name"], model["state"]) for model in daemon.settle()] == [(name, "resident")]
    empty(daemon)


def test_file_name_that_is_no_text_is_refused(daemon: Daemon, weights: Weights) -> None:
    """MessagePack's text is UTF-8: such a manifest cannot be sent, and the lease that it was for must not stay."""
    weights.files[1].rename(os.fsdecode(os.fsencode(weights.path) + b"/model-\xff.safetensors"))
    with daemon.client() as client:
        with pytest.raises(ProtocolError):
            client.open(weights.path)
        eventually(lambda: client.status()["pool"]["leases"] == 0, "no lease is left")
        with pytest.raises(ProtocolError):
            client.open(os.fsdecode(b"/no\xfftext"))


def test_checkpoint_on_tmpfs_and_through_links(daemon: Daemon, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        weights = write_weights(Path(memory, "model"), files=2)
        assert daemon.serves(weights)
        link = tmp_path / "link"
        link.symlink_to(weights.path)
        assert daemon.serves(weights.at(link))
        # The way Hugging Face's cache keeps files: a directory of links.
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in weights.files:
            (linked / file.name).symlink_to(file)
        assert daemon.serves(weights.at(linked))
        assert len(daemon.status()["models"]) == 1
    empty(daemon)


@pytest.mark.root
def test_full_catalog_costs_the_next_daemon_only(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model")
    with Daemon(start=False) as daemon:
        catalog = daemon.state / "catalog"
        catalog.mkdir(parents=True)
        daemon.digests.symlink_to(catalog / "digests")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(catalog)], check=True)
        (catalog / "digests").mkdir()
        filling = catalog / "digests" / "filling"
        filling.write_bytes(bytes(65536))
        daemon.start()
        assert daemon.serves(weights)
        eventually(lambda: "No space left" in daemon.status()["pool"]["catalog_error"], "it says so")
        assert "a restart would not find model" in daemon.status()["pool"]["catalog_error"]
        assert [path.name for path in catalog.iterdir()] == ["digests"]
        filling.unlink()
        with daemon.client() as client:
            client.pin("model")
        assert daemon.status()["pool"]["catalog_error"] == ""
        daemon.restart()
        assert daemon.ready.endswith("1 models adopted")
        assert daemon.serves(weights)


@pytest.mark.root
def test_full_memory_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """A host whose memory is taken by others: the pool's file system ends before the tier's capacity does."""
    small, large = (write_weights(tmp_path / f"model{count}", layers=count) for count in (1, 6))
    with Daemon() as daemon:
        assert daemon.serves(small)
        _native.tmpfs_resize(str(daemon.segments), 4 * PAGE_BYTES)
        with daemon.client() as client:
            with pytest.raises(CapacityError, match="free memory on the host"):
                client.open(large.path).wait()
            with pytest.raises(CapacityError):
                client.load(large.path)
        assert daemon.status()["tiers"][0]["used_bytes"] == PAGE_BYTES
        assert daemon.serves(small)
        _native.tmpfs_resize(str(daemon.segments), 16 * PAGE_BYTES)
        assert daemon.serves(large)


def test_eight_loaders_compete_for_a_third_of_their_memory(tmp_path: Path) -> None:
    models = [write_weights(tmp_path / f"model{i}", layers=3) for i in range(8)]
    refusals: list[str] = []
    with Daemon(tier="dram=16MiB") as daemon:

        def read_twice(weights: Weights) -> None:
            served, deadline = 0, time.monotonic() + 30
            with daemon.client() as client:
                while served < 2:
                    assert time.monotonic() < deadline, f"{weights.name} was served {served} times"
                    try:
                        with client.open(weights.path) as model:
                            assert digest_of(model) == weights.digest
                            served += 1
                    except CapacityError as full:
                        refusals.append(str(full))
                        time.sleep(0.01)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(read_twice, models))
        assert all("the rest is leased" in refusal for refusal in refusals)
        daemon.settle()
        status = daemon.status()
        assert status["tiers"][0]["used_bytes"] <= 8 * PAGE_BYTES
        held = sum(model["resident_bytes"] for model in status["models"])
        assert held == status["tiers"][0]["used_bytes"]
        assert len(list(daemon.segments.iterdir())) * PAGE_BYTES == held
        for weights in models:
            assert daemon.serves(weights)


@pytest.mark.root
def test_catalog_that_cannot_be_written_does_not_stop_the_end(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model")
    with Daemon() as daemon:
        assert daemon.serves(weights)
        daemon.settle()
        catalog = daemon.state / "catalog"
        for flags in (["--bind"], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *flags, str(catalog), str(catalog)], check=True)
        with daemon.client() as client:
            assert client.pin("model") == 1
            assert client.unpin("model") == 0
            client.remove("model")
        assert "Read-only file system" in daemon.status()["pool"]["catalog_error"]
        assert daemon.serves(weights)
        assert daemon.terminate() == 0
        assert not daemon.segments.exists()
        shutil.rmtree(weights.path)
