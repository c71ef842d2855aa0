"""A pool that keeps its segments, and the next one that adopts them: nothing is read again, everything is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import CheckpointWriter, ConfigMaker, dram
from tiermem.errors import CapacityError, DigestMismatch
from tiermem.lease import Session
from tiermem.pool import Pool
from tiermem.status import status_of
from tiermem.types import PAGE_BYTES

PoolStarter = Callable[..., Pool]


@pytest.fixture(params=["shm", pytest.param("tmpfs", marks=pytest.mark.root)])
def start(request: pytest.FixtureRequest, config: ConfigMaker) -> Iterator[PoolStarter]:
    """Starts a daemon's pool, without its server, over one state directory. At the end its files are removed."""
    made: list[Pool] = []

    def start_(**options: object) -> Pool:
        made.append(Pool(config(**({"backing": request.param, "keep": True, "grace": "0s"} | options))))
        return made[-1]

    yield start_
    made[-1].check()
    made[-1].close()
    start_(keep=False).close()


def loaded(pool: Pool, *paths: object) -> None:
    for path in paths:
        pool.load(str(path))[1].result(20)


def settled(pool: Pool) -> None:
    for load in pool.loads().values():
        load.finished.exception(20)


def test_models_are_there_after_a_restart_and_are_checked(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama", layers=3)
    first = start()
    loaded(first, written.path)
    first.pin("llama")
    first.close()
    second = start()
    settled(second)
    status = status_of(second)
    (entry,) = status["models"]
    assert (entry["name"], entry["state"], entry["pins"]) == ("llama", "resident", 1)
    assert entry["last_load"]["check_only"] is True
    assert entry["last_load"]["read_bytes"] == 0
    assert status["tiers"][0]["used_bytes"] == 3 * PAGE_BYTES
    loaded(second, written.path)
    assert status_of(second)["models"][0]["last_load"]["check_only"] is True, "nothing was read for it"
    second.check()


def test_what_was_not_kept_is_read_again(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama", layers=3)
    first = start()
    loaded(first, written.path)
    with first.lock:
        first.memory.drop(first.catalog.named("llama"), 2)
    first.close()
    second = start()
    loaded(second, written.path)
    (entry,) = status_of(second)["models"]
    assert entry["state"] == "resident"
    assert entry["last_load"]["read_bytes"] == written.nbytes // 3
    second.check()


def test_a_damaged_segment_is_never_served(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama")
    first = start()
    loaded(first, written.path)
    backing = first.memory.backing
    assert backing.directory is not None
    home, keys = backing.directory, backing.keys()
    first.close()
    (home / keys[1]).chmod(0o600)
    with open(home / keys[1], "r+b") as file:
        file.seek(4096)
        file.write(b"damage")
    second = start()
    settled(second)
    status = status_of(second)
    assert status["pool"]["quarantined_loads"] == 1
    assert status["models"][0]["state"] == "disk"
    assert status["tiers"][0]["used_bytes"] == 0
    loaded(second, written.path)
    record = second.catalog.named("llama")
    lease = second.open(Session(1, 0), name="llama").lease
    for tensor in record.manifest.tensors:
        with second.memory._segments[record.keys[tensor.extent.segment] or ""].buffer() as memory:
            held = memory[tensor.extent.offset : tensor.extent.offset + tensor.nbytes]
            assert bytes(held) == written.tensors[tensor.name].tobytes()
    second.release(lease)


def test_a_client_that_held_a_damaged_segment_is_told(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama")
    first = start()
    loaded(first, written.path)
    backing, model_id = first.memory.backing, first.catalog.named("llama").id
    assert backing.directory is not None
    path = backing.directory / backing.keys()[0]
    first.close()
    path.chmod(0o600)
    path.write_bytes(bytes(PAGE_BYTES))
    second = start()
    session = Session(1, 0)
    if second.announce(session, "brought", model_id):
        settled(second)
        with pytest.raises(DigestMismatch, match="earlier daemon left is damaged"):
            second.record(second.lease(session, "brought"))
    second.end_session(session)


def test_segments_that_no_catalog_names_are_removed(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama")
    first = start()
    loaded(first, written.path)
    assert first.files is not None
    first.memory.backing.create("half-a-load", PAGE_BYTES).close()
    kept = first.memory.backing.keys()
    first.close()
    second = start()
    settled(second)
    assert second.memory.backing.keys() == [key for key in kept if key != "half-a-load"]


def test_a_torn_catalog_file_costs_its_model_and_no_other(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    one, two = checkpoint("one"), checkpoint("two", seed=1)
    first = start()
    loaded(first, one.path, two.path)
    assert first.files is not None
    file = first.files.directory / first.catalog.named("one").id
    first.close()
    file.write_bytes(file.read_bytes()[:-5])
    second = start()
    settled(second)
    assert [entry["name"] for entry in status_of(second)["models"]] == ["two"]
    assert status_of(second)["tiers"][0]["used_bytes"] == 2 * PAGE_BYTES
    assert len(second.memory.backing.keys()) == 2
    loaded(second, one.path)


def test_a_smaller_pool_adopts_what_fits(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    written = checkpoint("llama", layers=4)
    first = start()
    loaded(first, written.path)
    first.close()
    second = start(tier=dram(3 * PAGE_BYTES))
    settled(second)
    second.check()
    assert status_of(second)["tiers"][0]["used_bytes"] <= 3 * PAGE_BYTES


def test_nothing_is_evicted_before_the_grace_time_has_passed(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    one, two = checkpoint("one"), checkpoint("two", seed=1)
    first = start(tier=dram(2 * PAGE_BYTES))
    loaded(first, one.path)
    first.close()
    second = start(tier=dram(2 * PAGE_BYTES), grace="1h")
    settled(second)
    with pytest.raises(CapacityError, match=r"nothing is evicted for another .* s after a restart"):
        second.load(str(two.path))
    second.close()
    third = start(tier=dram(2 * PAGE_BYTES))
    settled(third)
    loaded(third, two.path)
    assert [(entry["name"], entry["state"]) for entry in status_of(third)["models"]] == [
        ("one", "disk"), ("two", "resident")
    ]  # fmt: skip


def test_a_pool_that_keeps_nothing_leaves_nothing(start: PoolStarter, checkpoint: CheckpointWriter) -> None:
    pool = start(keep=False)
    loaded(pool, checkpoint("llama").path)
    directory, files = pool.memory.backing.directory, pool.files
    assert directory is not None
    assert files is not None
    pool.close()
    assert not directory.exists()
    assert list(files.directory.iterdir()) == []


def test_a_removal_while_the_catalog_is_written_is_not_undone(
    start: PoolStarter, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = start()
    loaded(pool, checkpoint("llama").path)
    assert pool.files is not None
    put = pool.files._put

    def removed_meanwhile(record: object) -> None:
        pool._forget(record)  # type: ignore[arg-type]
        put(record)  # type: ignore[arg-type]

    monkeypatch.setattr(pool.files, "_put", removed_meanwhile)
    pool._persist(pool.catalog.named("llama"))
    assert list(pool.files.directory.iterdir()) == []
