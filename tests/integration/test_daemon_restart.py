"""A daemon dies and another takes over: readers read on, whole models are adopted, damaged and half ones are not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.faulty_disk import FaultyDisk
from tests.integration.weights import Weights, digest_of, layer, write_weights
from tiermem.errors import CapacityError, CheckpointNotFound, DaemonUnreachable, ModelNotFound, ReadError, Refused
from tiermem.types import PAGE_BYTES

MODEL_BYTES = 3 * PAGE_BYTES
GRACE = "--grace=60s"


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return write_weights(tmp_path / "model", layers=3)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(GRACE, tier="dram=16MiB") as daemon:
        yield daemon


def load(daemon: Daemon, *models: Weights) -> None:
    with daemon.client() as client:
        for weights in models:
            client.load(weights.path)
    daemon.settle()


LOOPING_READER = """
model = tiermem.open(sys.argv[1], address=sys.argv[2])
arrays = dict(model)
say(digest_of(arrays))
import threading
stop = threading.Event()
threading.Thread(target=lambda: (pause(), stop.set()), daemon=True).start()
rounds = 0
while not stop.is_set():
    assert digest_of(arrays) == sys.argv[3]
    rounds += 1
say(rounds)
"""


def test_reader_survives_and_next_daemon_serves_without_reading(daemon: Daemon, weights: Weights) -> None:
    with Child.script(LOOPING_READER, weights.path, daemon.address, weights.digest) as reader:
        assert reader.line() == weights.digest
        daemon.settle()
        before = daemon.status()["pool"]
        # What is not there any more cannot be read again.
        shutil.rmtree(weights.path)
        daemon.restart()
        assert daemon.ready.endswith("1 models adopted")
        eventually(lambda: daemon.model("model")["readers"] == (reader.pid,), "the reader announced its lease")
        (status,) = daemon.settle()
        assert (status["state"], status["resident_bytes"], status["leases"]) == ("resident", MODEL_BYTES, 1)
        assert status["last_load"]["check_only"]
        assert status["last_load"]["read_bytes"] == 0
        after = daemon.status()["pool"]
        assert after["id"] != before["id"]
        assert after["quarantined_loads"] == 0
        with daemon.client() as client:
            with client.open("model") as model:
                assert digest_of(model) == weights.digest
            eventually(lambda: daemon.leases() == 1, "only the reader's lease is left")
            with pytest.raises(Refused, match=f"leased by process {reader.pid}"):
                client.evict("model")
        reader.say()
        assert int(reader.line()) > 0
        assert reader.exit_code() == 0
        eventually(lambda: daemon.leases() == 0, "the reader's lease ended")


def test_client_calls_the_next_daemon(daemon: Daemon, weights: Weights) -> None:
    with daemon.client() as client, client.open(weights.path) as model:
        model.wait()
        daemon.settle()
        daemon.kill9()
        with pytest.raises(DaemonUnreachable, match="tiermem serve"):
            client.status()
        assert digest_of(model) == weights.digest
        daemon.start()
        eventually(lambda: daemon.leases() == 1, "the lease is announced")
        assert client.status()["models"][0]["readers"] == (os.getpid(),)
        assert set(model.residency()) == {"model.layers.0", "model.layers.1", "model.layers.2"}


def test_nothing_is_evicted_in_the_grace_time(daemon: Daemon, weights: Weights, tmp_path: Path) -> None:
    others = write_weights(tmp_path / "others", layers=6)
    load(daemon, weights)
    daemon.restart()
    daemon.settle()
    with daemon.client() as client:
        with pytest.raises(CapacityError, match=r"nothing is evicted for another .* after a restart"):
            client.load(others.path)
        assert daemon.model("model")["resident_bytes"] == MODEL_BYTES
    daemon.restart("--grace=0s")
    with daemon.client() as client:
        daemon.settle()
        client.load(others.path)
        assert daemon.model("model")["resident_bytes"] < MODEL_BYTES
    assert daemon.serves(others)


def flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def segment_files(daemon: Daemon) -> list[Path]:
    return sorted(daemon.segments.iterdir())


def test_damaged_segment_is_not_served_but_read_again(daemon: Daemon, weights: Weights, tmp_path: Path) -> None:
    sound = write_weights(tmp_path / "sound")
    load(daemon, weights, sound)
    (damaged,) = daemon.segments.glob(f"{daemon.model('model')['identity'][:16]}-00002-*")
    daemon.kill9()
    flip(damaged, 150_000)
    daemon.start()
    models = {model["name"]: model for model in daemon.settle()}
    assert (models["model"]["state"], models["model"]["resident_bytes"]) == ("disk", 0)
    assert models["sound"]["state"] == "resident"
    assert daemon.status()["pool"]["quarantined_loads"] == 1
    assert len(segment_files(daemon)) == 2
    assert daemon.serves(weights)
    status = daemon.model("model")
    assert not status["last_load"]["check_only"]
    assert status["last_load"]["read_bytes"] == 3 * 200_000


def test_damaged_segment_is_not_served_without_its_checkpoint(daemon: Daemon, weights: Weights) -> None:
    load(daemon, weights)
    daemon.kill9()
    flip(segment_files(daemon)[1], 0)
    shutil.rmtree(weights.path)
    daemon.start()
    daemon.settle()
    with daemon.client() as client:
        with pytest.raises((ReadError, CheckpointNotFound), match=str(weights.path)):
            client.open("model")["model.layers.1.weight"]
        with pytest.raises(CheckpointNotFound):
            client.open(weights.path)
    assert segment_files(daemon) == []


@pytest.mark.parametrize("harm", ["missing", "short", "long"])
def test_segment_of_another_size_is_read_again(daemon: Daemon, weights: Weights, harm: str) -> None:
    load(daemon, weights)
    daemon.kill9()
    path = segment_files(daemon)[1]
    path.chmod(0o600)
    path.unlink() if harm == "missing" else os.truncate(path, PAGE_BYTES * 2 if harm == "long" else 0)
    daemon.start()
    assert daemon.serves(weights)
    (status,) = daemon.settle()
    assert status["resident_bytes"] == MODEL_BYTES
    assert status["last_load"]["read_bytes"] == 200_000
    assert len(segment_files(daemon)) == 3


def test_model_adopted_in_part_is_opened_while_it_is_checked(tmp_path: Path) -> None:
    """Large enough for the check to be under way when the open comes."""
    weights = write_weights(tmp_path / "large", layers=4, layer_bytes=48 << 20)
    with Daemon("--read-threads", "1", tier="dram=256MiB") as daemon:
        load(daemon, weights)
        daemon.kill9()
        segment_files(daemon)[3].unlink()
        daemon.start()
        assert daemon.serves(weights)
        assert daemon.model("large")["last_load"]["read_bytes"] == 48 << 20


WAITER = """
model = tiermem.open(sys.argv[1], address=sys.argv[2])
say("waits")
try:
    model.wait()
except tiermem.TiermemError as error:
    say(type(error).__name__)
"""


@pytest.mark.root
def test_half_loaded_model_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "source", layers=3, files=3)
    with (
        FaultyDisk(weights.path, tmp_path / "slow") as disk,
        ExitStack() as stack,
        daemon.client() as client,
    ):
        gate = disk.gate(weights.files[2].name, 100_000)
        waiting = stack.enter_context(Child.script(WAITER, disk.path, daemon.address))
        assert waiting.line() == "waits"
        model = client.open(disk.path)
        assert model[layer(0)].tobytes() == weights.tensors[layer(0)]
        gate.await_reached()
        assert len(segment_files(daemon)) == 3
        assert daemon.child is not None
        daemon.child.signal(signal.SIGKILL)
        gate.open()
        assert waiting.line() == "DaemonUnreachable"
        daemon.start()
        assert daemon.ready.endswith(" 0 models adopted")
        assert segment_files(daemon) == []
        assert daemon.status()["tiers"][0]["used_bytes"] == 0
        # The client's lease is of a model that nobody has.
        eventually(lambda: daemon.leases() == 0, "refused")
        assert model[layer(0)].tobytes() == weights.tensors[layer(0)]
        with pytest.raises((Refused, ModelNotFound), match="open the model again"):
            model[layer(2)]
        assert daemon.serves(weights.at(disk.path))


@pytest.mark.parametrize("harm", ["flipped", "truncated", "empty", "copied", "foreign", "directory"])
def test_damaged_catalog_file_costs_its_model_only(daemon: Daemon, weights: Weights, tmp_path: Path, harm: str) -> None:
    sound = write_weights(tmp_path / "sound")
    load(daemon, weights, sound)
    path = daemon.state / "catalog" / daemon.model("model")["identity"]
    daemon.kill9()
    if harm == "flipped":
        flip(path, path.stat().st_size // 2)
    elif harm in ("truncated", "empty"):
        os.truncate(path, path.stat().st_size // 2 if harm == "truncated" else 0)
    elif harm == "copied":
        shutil.copy(path, path.with_name("backup"))
    elif harm == "foreign":
        path.with_name("notes.txt").write_text("not ours")
    else:
        path.with_name("lost+found").mkdir()
    daemon.start()
    lost = harm in ("flipped", "truncated", "empty")
    assert [model["name"] for model in daemon.status()["models"]] == ["sound"] if lost else ["model", "sound"]
    assert len(segment_files(daemon)) == 2 if lost else 5
    assert ("catalog file" in daemon.log) == (harm != "directory")
    assert daemon.serves(weights)
    assert daemon.serves(sound)


def test_smaller_daemon_adopts_what_fits(daemon: Daemon, weights: Weights, tmp_path: Path) -> None:
    others = write_weights(tmp_path / "others", layers=4)
    load(daemon, weights, others)
    daemon.flags[:2] = ["--tier", "dram=8MiB"]
    daemon.restart("--grace=0s")
    status = daemon.status()
    assert status["tiers"][0]["capacity_bytes"] == 4 * PAGE_BYTES
    assert 0 < status["tiers"][0]["used_bytes"] <= 4 * PAGE_BYTES
    assert len(segment_files(daemon)) == status["tiers"][0]["used_bytes"] // PAGE_BYTES
    assert daemon.serves(weights)
    assert daemon.serves(others)
    daemon.flags[:2] = ["--tier", "dram=64MiB"]
    daemon.restart("--grace=0s")
    assert daemon.serves(weights)
    assert daemon.serves(others)
    assert daemon.status()["tiers"][0]["used_bytes"] == 7 * PAGE_BYTES


def test_kept_models_wait_for_the_next_daemon(daemon: Daemon, weights: Weights) -> None:
    daemon.restart("--keep")
    with daemon.client() as client:
        client.load(weights.path)
        client.pin("model")
    daemon.settle()
    assert daemon.terminate() == 0
    assert not daemon.socket.exists()
    assert len(segment_files(daemon)) == 3
    shutil.rmtree(weights.path)
    daemon.start()
    (status,) = daemon.settle()
    assert (status["pins"], status["last_load"]["read_bytes"]) == (1, 0)
    with daemon.client() as client, client.open("model") as model:
        assert digest_of(model) == weights.digest


def test_without_keep_nothing_stays_but_what_readers_hold(daemon: Daemon, weights: Weights) -> None:
    with Child.script(LOOPING_READER, weights.path, daemon.address, weights.digest) as reader:
        assert reader.line() == weights.digest
        daemon.settle()
        assert daemon.leftovers
        assert daemon.terminate() == 0
        assert daemon.leftovers == []
        reader.say()
        assert int(reader.line()) > 0
        assert reader.exit_code() == 0
