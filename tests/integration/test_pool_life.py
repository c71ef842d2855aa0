"""Names, changes, sharing between threads and processes, and how a pool and its models end."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tiermem
from tests.conftest import CheckpointWriter, ConfigMaker, open_files, until
from tests.integration.conftest import PoolMaker
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CheckpointNotFound, Closed, ConfigError, ModelNotFound, Refused
from tiermem.types import PAGE_BYTES


def names(pool: EmbeddedPool) -> list[str]:
    return [model["name"] for model in pool.status()["models"]]


def leases(pool: EmbeddedPool) -> int:
    return int(pool.status()["pool"]["leases"])


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_model_is_opened_by_path_or_by_name(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint("llama"), embedded()
    with pytest.raises(ModelNotFound, match=r"no model 'llama' in the pool \(it holds: none\)"):
        pool.open("llama")
    assert pool.load(written.path) == "llama"
    for way in (written.path, str(written.path), "llama", written.files[0]):
        with pool.open(way) as model:
            assert model.name == "llama"
            assert written.same(model)
    for call in (pool.open, pool.evict, pool.remove, pool.pin, pool.unpin, pool.status):
        with pytest.raises(ModelNotFound, match=r"no model 'lama' in the pool \(it holds: llama\); load it first"):
            call("lama")
    with pytest.raises(CheckpointNotFound):
        pool.open("./lama")


def test_a_model_keeps_the_name_that_it_got(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, other, pool = checkpoint("llama"), checkpoint("other", seed=1), embedded()
    assert pool.load(written.path, "mine") == "mine"
    assert pool.load(written.path) == "mine"
    with pytest.raises(Refused, match=r"llama is in the pool as 'mine'; open it by that name or its path"):
        pool.load(written.path, "yours")
    with pytest.raises(Refused, match=r"the name 'mine' is taken by .*/llama; unload that model or .*--name"):
        pool.load(other.path, "mine")
    assert names(pool) == ["mine"]
    with pytest.raises(ModelNotFound):
        pool.open("llama")


def test_models_of_the_same_directory_name_are_told_apart(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    first, second = checkpoint("a/llama"), checkpoint("b/llama", seed=1)
    pool = embedded()
    assert pool.load(first.path) == "llama"
    name = pool.load(second.path)
    identity = pool.status(name)["models"][0]["identity"]
    assert name == f"llama@{identity[:8]}"
    with pool.open("llama") as one, pool.open(name) as two:
        assert first.same(one)
        assert second.same(two)


def test_a_copy_of_a_file_is_another_model(embedded: PoolMaker, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    written, pool = checkpoint("llama"), embedded()
    shutil.copytree(written.path, tmp_path / "copy")
    os.link(written.files[0], tmp_path / "linked.safetensors")
    assert pool.load(written.path) == "llama"
    assert pool.load(tmp_path / "copy") == "copy"
    assert pool.load(tmp_path / "linked.safetensors") == "llama", "the same inode is the same model"


# --- a checkpoint that changes ---------------------------------------------------------------------------------------


def test_a_changed_checkpoint_supersedes_an_idle_model(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    old, pool = checkpoint("llama"), embedded()
    pool.load(old.path)
    new = checkpoint("llama", seed=1)
    with pool.open(new.path) as model:
        assert model.name == "llama"
        assert new.same(model)
        assert not old.same(model)
    assert names(pool) == ["llama"]
    assert pool.status()["tiers"][0]["used_bytes"] == 2 * PAGE_BYTES


def test_a_changed_checkpoint_leaves_the_model_that_is_leased(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    old, pool = checkpoint("llama"), embedded()
    with pool.open(old.path) as held:
        held.wait()
        new = checkpoint("llama", seed=1)
        with pool.open(new.path) as model:
            assert model.name == f"llama@{model.manifest.identity[:8]}"
            assert new.same(model)
            assert old.same(held)
    until(lambda: leases(pool) == 0)
    assert len(names(pool)) == 2


def test_a_pinned_model_is_not_superseded(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    old, pool = checkpoint("llama"), embedded()
    pool.load(old.path)
    pool.pin("llama")
    new = checkpoint("llama", seed=1)
    assert pool.load(new.path).startswith("llama@")
    with pool.open("llama") as model:
        assert old.same(model)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_closed_model_gives_nothing_more_and_what_it_gave_stays(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    written, pool = checkpoint(), embedded()
    model = pool.open(written.path)
    name = "model.layers.0.weight"
    array, raw, info = model[name], model.raw("model.layers.1.weight"), model.info(name)
    assert leases(pool) == 1
    model.close()
    model.close()
    until(lambda: leases(pool) == 0)
    for call in (partial(model.get, name), partial(model.raw, name), model.wait, partial(model.place, info)):
        with pytest.raises(Closed, match="model model is closed; open it again"):
            call()
    assert "closed" in repr(model)
    assert len(model) == 4
    pool.remove("model")
    pool.close()
    del model, call
    gc.collect()
    assert np.array_equal(array, written.tensors["model.layers.0.weight"])
    assert bytes(raw) == written.tensors["model.layers.1.weight"].tobytes()


def test_a_lease_ends_with_the_last_array(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(), embedded()
    array = pool.open(written.path)["model.layers.0.weight"][3:5, ::2].T
    gc.collect()
    time.sleep(0.02)
    assert leases(pool) == 1, "a view of a view of it still lives"
    with pytest.raises(Refused):
        pool.remove("model")
    del array
    gc.collect()
    until(lambda: leases(pool) == 0)
    assert pool.remove("model") == 2 * PAGE_BYTES


def mapped_segments() -> int:
    """Bytes of segments that this process maps."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[3] == "00:00":
            continue
        if len(fields) == 6 and ("memfd:" in fields[5] or "-0000" in fields[5]):
            start, end = (int(text, 16) for text in fields[0].split("-"))
            total += end - start
    return total


def test_closing_unmaps_what_nobody_uses(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(layers=3), embedded()
    pool.load(written.path)
    before = mapped_segments()
    model = pool.open(written.path)
    assert mapped_segments() == before + 3 * PAGE_BYTES
    model.close()
    assert mapped_segments() == before


def test_a_transient_pool_gives_the_memory_back_with_the_last_reader(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    written, pool = checkpoint(), embedded(transient=True)
    first, second = pool.open(written.path), pool.open(written.path)
    array = first["model.layers.0.weight"]
    first.close()
    until(lambda: leases(pool) == 1)
    assert names(pool) == ["model"]
    assert written.same(second)
    second.close()
    until(lambda: names(pool) == [])
    assert pool.status()["tiers"][0]["used_bytes"] == 0
    assert np.array_equal(array, written.tensors["model.layers.0.weight"])
    with pool.open(written.path) as again:
        assert written.same(again)
    del again
    until(lambda: names(pool) == [])


@pytest.mark.root
def test_a_transient_pool_gives_memory_back_to_the_host(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(), embedded(transient=True)
    dirfd = pool._pool.memory.backing._dirfd

    def held() -> int:
        facts = os.fstatvfs(dirfd)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize

    empty = held()
    model = pool.open(written.path)
    array = model["model.layers.0.weight"]
    model.wait()
    assert held() == empty + 2 * PAGE_BYTES
    model.close()
    until(lambda: names(pool) == [])
    assert held() == empty + 2 * PAGE_BYTES, "the array still needs it"
    del array
    gc.collect()
    assert held() == empty


def test_a_closed_pool_serves_nothing_more_and_arrays_outlive_it(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    written = checkpoint()
    files = open_files()
    with embedded(spare="4MiB") as pool:
        arrays = dict(pool.open(written.path))
    pool.close()
    gc.collect()
    assert all(np.array_equal(array, written.tensors[name]) for name, array in arrays.items())
    for call in (lambda: pool.open(written.path), lambda: pool.open("model"), lambda: pool.load(written.path),
                 lambda: pool.status(), lambda: pool.evict("model"), lambda: pool.remove("model"),
                 lambda: pool.pin("model"), lambda: pool.unpin("model")):  # fmt: skip
        with pytest.raises(Closed, match="the embedded pool is closed"):
            call()
    del arrays
    gc.collect()
    assert open_files() == files


def test_an_open_by_name_that_comes_while_the_pool_closes_is_told(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    """The last moment at which the pool was still open has passed for the inner pool only."""
    pool = embedded()
    pool.load(checkpoint().path)
    pool.evict("model")
    pool._pool.close()
    with pytest.raises(Closed, match="the pool is closed"):
        pool.open("model")


def test_a_bad_backing_is_a_configuration_error(embedded: PoolMaker) -> None:
    with pytest.raises(ConfigError, match="leaves no files in /dev/shm"):
        embedded(backing="shm")


@pytest.mark.parametrize("backing", ["memfd", pytest.param("tmpfs", marks=pytest.mark.root)])
def test_each_backing_serves(embedded: PoolMaker, checkpoint: CheckpointWriter, backing: str) -> None:
    written, pool = checkpoint(), embedded(backing=backing, spare="2MiB")
    with pool.open(written.path) as model:
        assert written.same(model)
    assert pool.status()["pool"]["backing"] == backing


# --- writable, forked, and without a pool ---------------------------------------------------------------------------


def test_writes_stay_with_who_wrote(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(), embedded()
    with pool.open(written.path, writable=True) as mine, pool.open(written.path) as shared:
        mine["model.layers.0.weight"][:] = 0
        assert not mine["model.layers.0.weight"].any()
        assert written.same(shared)
        with pytest.raises(ValueError, match="read-only"):
            shared["model.layers.0.weight"][:] = 0
    with pool.open(written.path, writable=True) as again:
        assert written.same(again)


def test_a_forked_child_reads_and_ends_no_lease(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(), embedded()
    model = pool.open(written.path)
    model.wait()
    array = model["model.layers.1.weight"]
    child = os.fork()
    if child == 0:
        right = written.same(model) and np.array_equal(array, written.tensors["model.layers.1.weight"])
        del array
        model.close()
        del model
        gc.collect()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    time.sleep(0.02)
    assert leases(pool) == 1
    with pytest.raises(Refused):
        pool.evict("model")
    assert written.same(model)
    model.close()


SCRIPT = """
import gc, os, sys, threading
import numpy as np
import tiermem
model = tiermem.open(sys.argv[1])
total = sum(int(np.asarray(model[name]).astype(np.float64).sum()) for name in model)
child = os.fork()
if child == 0:
    os._exit(0 if sum(int(np.asarray(model[n]).astype(np.float64).sum()) for n in model) == total else 1)
assert os.waitpid(child, 0)[1] == 0
print(len(model), total)
"""


def test_open_needs_no_pool_and_a_program_may_end_with_it(checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    written = checkpoint()
    environ = os.environ | {
        "TIERMEM_DIGESTS": str(tmp_path / "digests"), "TIERMEM_TIER": "dram=64MiB", "XDG_RUNTIME_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(tiermem.__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(written.path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    total = sum(int(array.astype(np.float64).sum()) for array in written.tensors.values())
    assert done.stdout.split() == [str(len(written.tensors)), str(total)]
    assert list((tmp_path / "digests").iterdir()), "what was loaded once is verified the next time"


def test_a_pool_that_is_dropped_without_a_close_does_not_keep_a_program(
    config: ConfigMaker, checkpoint: CheckpointWriter
) -> None:
    """Its threads are daemons; nothing waits for them at exit."""
    import threading

    before = set(threading.enumerate())
    pool = EmbeddedPool(config(spare="2MiB"))
    pool.load(checkpoint().path)
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"tiermem-load-0", "tiermem-load-1", "tiermem-spare", "tiermem-agent"}
    assert all(thread.daemon for thread in started)
    pool.close()
    assert not any(thread.is_alive() for thread in started)
