"""Images in a pool of this process: sealed as a whole and found by their fingerprints, or nothing of them stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import CheckpointWriter, ConfigMaker, dram, until
from tests.integration.gate import Running, assert_empty, model_status, used
from tests.integration.two_nodes import TIERS, TwoNodes
from tests.unit.paint import PAGES, TENSORS, drawn, fill, painted, prints, sealed
from tiermem import _native
from tiermem.draft import Draft
from tiermem.embedded import EmbeddedPool
from tiermem.errors import (
    CapacityError,
    Closed,
    DeadlineExceeded,
    FingerprintMismatch,
    ImageAbandoned,
    ImageNotFound,
    ModelNotFound,
    NativeError,
    Refused,
    TensorNotFound,
)
from tiermem.model import Model
from tiermem.types import PAGE_BYTES, ImageTensor

ONE = (ImageTensor("w", "U8", (1,)),)


@pytest.fixture
def make(config: ConfigMaker) -> Iterator[Callable[..., EmbeddedPool]]:
    made: list[EmbeddedPool] = []

    def make_(**options: object) -> EmbeddedPool:
        made.append(EmbeddedPool(config(**({"tier": dram(2 * PAGES * PAGE_BYTES)} | options))))
        return made[-1]

    yield make_
    for pool in made:
        pool._pool.check()
        pool.close()


@pytest.fixture
def pool(make: Callable[..., EmbeddedPool]) -> EmbeddedPool:
    """Has room for two images."""
    return make()


def left(pool: EmbeddedPool) -> None:
    """Nothing of any image is there, once the agent ended what was released."""
    until(lambda: pool.status()["pool"]["leases"] == 0 and not pool._pool.loads())
    assert_empty(pool)
    assert pool.status()["pool"]["quarantined_loads"] == 0


@pytest.mark.parametrize("backing", [pytest.param("tmpfs", marks=pytest.mark.root), "memfd"])
def test_an_image_is_filled_sealed_and_found(make: Callable[..., EmbeddedPool], backing: str) -> None:
    pool = make(backing=backing)
    draft = drawn(pool, name="image", metadata={"config": "{}"})
    status = model_status(pool, "image")
    assert (status["state"], status["fingerprint"], status["leases"]) == ("draft", prints(), 1)
    assert (status["ready_bytes"], used(pool)) == (0, PAGES * PAGE_BYTES)
    with pytest.raises(Refused, match="wait until the model is loaded"):
        pool.share_paths("image")
    fill(draft)
    model = draft.seal()
    assert painted(model)
    assert model.metadata == {"config": "{}"}
    assert (model.name, model_status(pool, "image")["state"]) == ("image", "resident")
    again = pool.create_image(prints(), TENSORS, name="other", metadata={"config": "ignored"})
    assert isinstance(again, Model)
    assert (again.name, again.metadata) == ("image", {"config": "{}"})
    opened = pool.open_image(prints(), name="image")
    assert painted(opened)
    assert not opened["model.layers.0.qkv"].flags.writeable
    assert model_status(pool, "image")["readers"] == [os.getpid()]
    assert model_status(pool, "image")["leases"] == 3


def test_a_copy_on_write_opener_changes_nobody_else_s_bytes(pool: EmbeddedPool) -> None:
    model = sealed(pool)
    own = pool.open_image(prints(), writable=True)
    own["model.layers.0.qkv"][...] = 0
    assert not own["model.layers.0.qkv"].any()
    assert painted(model)


def test_what_was_taken_of_a_draft_stays_where_it_is(pool: EmbeddedPool) -> None:
    draft = drawn(pool)
    fill(draft)
    before = np.frombuffer(draft.raw("model.layers.0.qkv"), np.float32)
    model = draft.seal()
    assert model["model.layers.0.qkv"].ctypes.data == before.ctypes.data
    draft.close()
    assert painted(model)
    assert pool.status()["pool"]["leases"] == 1, "closing a draft that is sealed ends nothing"
    for use in (draft.seal, lambda: draft.raw("model.layers.0.qkv")):
        with pytest.raises(Closed, match="sealed or closed"):
            use()


def test_paths_of_segments_hold_the_bytes(pool: EmbeddedPool) -> None:
    model = sealed(pool, name="image")
    paths = pool.share_paths("image")
    assert len(paths) == 3
    for name in model:
        extent = model.info(name).extent
        with open(paths[extent.segment], "rb") as file:
            file.seek(extent.offset)
            assert file.read(extent.length) == bytes(model.raw(name))
    with pytest.raises(ModelNotFound):
        pool.share_paths("nothing")


@pytest.mark.parametrize("end", ["close", "with", "forgotten", "raised"])
def test_a_draft_that_is_not_sealed_leaves_nothing(pool: EmbeddedPool, end: str) -> None:
    draft: Draft | None = drawn(pool)
    assert draft is not None
    fill(draft)
    taken = np.frombuffer(draft.raw("model.layers.1.qkv"), np.uint8)
    expected = taken.copy()
    if end == "close":
        draft.close()
        draft.close()
    elif end == "with":
        with draft:
            pass
    elif end == "raised":
        with pytest.raises(ZeroDivisionError), draft:
            1 / 0  # noqa: B018
    else:
        draft = None
        del taken
        gc.collect()
        taken = expected
    left(pool)
    assert np.array_equal(taken, expected), "what was taken outlives the draft"
    assert painted(sealed(pool))


def test_an_unknown_tensor_of_a_draft(pool: EmbeddedPool) -> None:
    with pytest.raises(TensorNotFound, match="no tensor 'w'; it was created with 5 others"):
        drawn(pool).raw("w")


def test_who_comes_while_it_is_filled_waits(pool: EmbeddedPool) -> None:
    draft = drawn(pool, name="image")
    ways: list[Callable[[], Any]] = [
        lambda: pool.create_image(prints(), TENSORS), lambda: pool.open_image(prints()),
        lambda: pool.open("image")["model.layers.0.scale"].any(), lambda: pool.open("image").wait(),
    ]  # fmt: skip
    waiting = [Running(way) for way in ways]
    until(lambda: model_status(pool, "image")["leases"] == 1 + len(ways))
    fill(draft)
    assert all(each.running for each in waiting)
    draft.seal()
    created, opened, *_ = [each.answer() for each in waiting]
    assert painted(created)
    assert painted(opened)


def test_who_waited_for_a_draft_that_was_given_up_fills_the_next(pool: EmbeddedPool) -> None:
    draft = drawn(pool, name="image")
    creator = Running(lambda: pool.create_image(prints(), TENSORS))
    opener = Running(lambda: pool.open("image").wait())
    until(lambda: model_status(pool, "image")["leases"] == 3)
    draft.close()
    with pytest.raises(ImageAbandoned, match=f"process {os.getpid()} left before it had filled image; create it anew"):
        opener.answer()
    second = creator.answer()
    assert isinstance(second, Draft)
    fill(second)
    assert painted(second.seal())


def test_who_looks_for_a_draft_that_is_given_up_finds_no_image(pool: EmbeddedPool) -> None:
    draft = drawn(pool)
    opener = Running(lambda: pool.open_image(prints()))
    until(lambda: pool.status()["pool"]["leases"] == 2)
    draft.close()
    with pytest.raises(ImageNotFound, match="create this one"):
        opener.answer()
    del opener
    left(pool)


def test_waiting_has_an_end(pool: EmbeddedPool) -> None:
    draft = drawn(pool)
    with pytest.raises(DeadlineExceeded, match="not loaded within") as caught:
        pool.create_image(prints(), TENSORS, timeout_s=0.05)
    until(lambda: pool.status()["pool"]["leases"] == 1)
    assert caught.tb is not None, "the error is kept, and holds no lease"
    fill(draft)
    assert painted(draft.seal())


def test_images_that_do_not_fit_are_named_with_what_differs(pool: EmbeddedPool, checkpoint: CheckpointWriter) -> None:
    with pytest.raises(ImageNotFound, match="holds no image yet"):
        pool.open_image(prints())
    near, far = sealed(pool, name="near"), sealed(pool, "far", name="far", tensors=ONE)
    with pytest.raises(ImageNotFound, match=r"\(in 'near' rank is '0', not '1'\); create this one"):
        pool.open_image(prints(rank="1"))
    with pytest.raises(ImageNotFound, match="checkpoint is '0', not 'z', dtype is absent, not 'x'"):
        pool.open_image(prints("z", dtype="x"))
    with pytest.raises(FingerprintMismatch, match="image 'far' does not fit: checkpoint is 'far', not '0'"):
        pool.open_image(prints(), name="far")
    with pytest.raises(ModelNotFound, match="no model 'x'"):
        pool.open_image(prints(), name="x")
    path = checkpoint(layers=1).path
    pool.load(path)
    with pytest.raises(FingerprintMismatch, match=f"'model' is the model of {path}, no image"):
        pool.open_image(prints(), name="model")
    many = {f"field {i}": "a" for i in range(9)}
    with pytest.raises(FingerprintMismatch, match=r"'field 1' |field 1 is absent.* and 7 more"):
        pool.open_image(many, name="near")
    assert pool.status()["pool"]["leases"] == 2
    del near, far


def test_a_name_that_is_taken_gets_the_identity_behind_it(pool: EmbeddedPool, checkpoint: CheckpointWriter) -> None:
    pool.load(checkpoint("taken", layers=1).path)
    draft = drawn(pool, name="taken", tensors=ONE)
    assert draft.name == f"taken@{draft.manifest.identity[:8]}"
    with pytest.raises(Refused, match="leased by process"):
        pool.remove(draft.name)
    second = drawn(pool, 1, name=draft.name, tensors=ONE)
    assert second.name == f"{draft.name}@{second.manifest.identity[:8]}"
    unnamed = drawn(pool, 2, tensors=ONE)
    assert unnamed.name == f"image:{unnamed.manifest.identity[:16]}"


def test_a_pool_that_is_full_refuses_and_keeps_nothing(pool: EmbeddedPool) -> None:
    held = [drawn(pool, i) for i in range(2)]
    with pytest.raises(CapacityError, match=r"needs 8\.0 MiB of tier 'dram', which has 0 B free"):
        pool.create_image(prints(2), TENSORS)
    with pytest.raises(CapacityError, match=r"needs 18\.0 MiB, all memory is 16\.0 MiB; raise --tier"):
        pool.create_image(prints(3), [ImageTensor("w", "U8", (9 * PAGE_BYTES,))])
    with pytest.raises(CapacityError, match="raise --tier"):
        pool.create_image(prints(3), [ImageTensor("w", "F64", (1 << 50, 100))])
    assert len(pool.status()["models"]) == pool.status()["pool"]["leases"] == 2
    for draft in held:
        draft.close()
    left(pool)


def test_memory_that_the_host_lacks_leaves_nothing(pool: EmbeddedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    prefault = _native.Segment.prefault
    calls: list[int] = []

    def full(segment: _native.Segment, *args: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise NativeError("no space", 28)
        prefault(segment, *args)

    monkeypatch.setattr(_native.Segment, "prefault", full)
    with pytest.raises(CapacityError, match=r"2097152 bytes of memory for model\.layers\.0 could not be had"):
        pool.create_image(prints(), TENSORS)
    left(pool)
    assert painted(sealed(pool))


def test_pressure_takes_an_idle_image_whole_and_no_other(pool: EmbeddedPool, checkpoint: CheckpointWriter) -> None:
    sealed(pool, "idle", name="idle").close()
    written = checkpoint(layers=5)
    draft = drawn(pool, "draft", name="draft", tensors=ONE)
    until(lambda: model_status(pool, "idle")["leases"] == 0)
    pool.load(written.path)
    assert [model["name"] for model in pool.status()["models"]] == ["draft", "model"]
    assert used(pool) == 6 * PAGE_BYTES
    assert pool.status()["pool"]["evicted_bytes"] == PAGES * PAGE_BYTES
    pool._pool.check()
    draft.close()


@pytest.mark.parametrize("held", ["leased", "pinned", "draft"])
def test_pressure_takes_no_image_that_is_held(pool: EmbeddedPool, checkpoint: CheckpointWriter, held: str) -> None:
    image = drawn(pool, name="image") if held == "draft" else sealed(pool, name="image")
    if held == "pinned":
        pool.pin("image")
        image.close()
        until(lambda: model_status(pool, "image")["leases"] == 0)
    with pytest.raises(CapacityError, match="leased, pinned or held by the policy"):
        pool.load(checkpoint(layers=5).path)
    for end in (pool.evict, pool.remove):
        with pytest.raises(Refused, match="pinned 1 times" if held == "pinned" else "leased by process"):
            end("image")
    assert model_status(pool, "image")["page_bytes"] == used(pool) == PAGES * PAGE_BYTES


@pytest.mark.parametrize("end", ["evict", "remove"])
def test_an_image_that_leaves_memory_is_gone_and_made_anew(pool: EmbeddedPool, end: str) -> None:
    image = sealed(pool, name="image")
    array = image["model.layers.1.qkv"]
    expected = array.copy()
    image.close()
    assert getattr(pool, end)("image") == PAGES * PAGE_BYTES
    left(pool)
    assert np.array_equal(array, expected), "a mapping keeps its bytes"
    with pytest.raises(ModelNotFound):
        pool.open("image")
    with pytest.raises(ImageNotFound):
        pool.open_image(prints())
    assert painted(sealed(pool))


def test_a_pin_does_not_keep_a_draft_that_is_given_up(pool: EmbeddedPool) -> None:
    draft = drawn(pool, name="image")
    assert pool.pin("image") == 1
    draft.close()
    left(pool)


def test_pages_of_an_image_go_where_the_policy_places_them(
    make: Callable[..., EmbeddedPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = TwoNodes(monkeypatch)
    policy = tmp_path / "mine.py"
    policy.write_text(
        "import numpy as np\nclass Alternating:\n    def plan(self, view):\n        return []\n"
        "    def place(self, request):\n        return np.arange(len(request), dtype=np.int8) % 2\n"
    )
    pool = make(tier="dram=16MiB,cxl=16MiB", policy=str(policy), policy_budget="5s")
    image = sealed(pool, name="image")
    assert painted(image)
    heat = pool.heat("image")
    assert [heat.tiers[tier] for tier in heat.tier] == [TIERS[i % 2] for i in range(PAGES)]
    with pool._pool.lock:
        record = pool._pool.catalog.named("image")
        segments = zip(record.keys, record.manifest.segments, strict=True)
        really = [tier for key, info in segments for tier in nodes.tiers_of(key or "", info.pages)]
    assert really == [TIERS[i % 2] for i in range(PAGES)]
    image.close()
    assert pool.evict("image") == PAGES * PAGE_BYTES
    assert [tier["used_bytes"] for tier in pool.status()["tiers"][:2]] == [0, 0]


def test_a_pool_that_closes_leaves_a_draft_to_its_process(config: ConfigMaker) -> None:
    with EmbeddedPool(config()) as pool:
        draft = drawn(pool)
    fill(draft)
    assert painted(draft)
    with pytest.raises(Closed, match="the pool closed"):
        draft.seal()
    draft.close()
