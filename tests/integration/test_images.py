"""Images across processes: whoever dies, an image is there as a whole or not at all, and one process fills it."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.integration.child import PRELUDE, REPOSITORY, Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.gate import Running
from tests.unit.paint import PAGES, TENSORS, drawn, fill, painted, prints, sealed
from tiermem.draft import Draft
from tiermem.errors import CapacityError, DaemonUnreachable, FingerprintMismatch, ImageNotFound, Refused
from tiermem.model import Model
from tiermem.types import PAGE_BYTES

ENGINE = """
import ctypes
from tests.unit.paint import TENSORS, fill, painted, prints
client = tiermem.connect(sys.argv[1])
say("connected")
while (order := pause()) not in ("", "end"):
    if order == "create":
        image = client.create_image(prints(), TENSORS, name="image")
        say(type(image).__name__)
    elif order == "fill":
        fill(image)
        say("filled")
    elif order == "seal":
        image = image.seal()
        say("sealed")
    elif order == "close":
        image.close()
        say("closed")
    elif order == "make":
        image = client.create_image(prints(), TENSORS, name="image")
        made = not hasattr(image, "residency")
        if made:
            fill(image)
            image = image.seal()
        say(("made" if made else "found") if painted(image) else "damaged")
    elif order == "write":
        address = image["model.layers.0.qkv"].ctypes.data
        pid = os.fork()
        if not pid:
            ctypes.memset(address, 1, 1)
            os._exit(0)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        say(painted(image))
"""


class Engine(Child):
    """A process that does with one image as it is told."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(["-c", PRELUDE + ENGINE, daemon.address])
        assert self.line() == "connected"

    def do(self, order: str) -> str:
        self.say(order)
        return self.line()


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with Daemon(tier="dram=32MiB") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """Of the whole module. Afterwards it holds nothing that the test's processes left."""
    yield shared
    eventually(lambda: shared.leases() == 0, "all leases ended")
    with shared.client() as client:
        for model in client.status()["models"]:
            assert model["state"] == "resident"
            client.remove(model["name"])
    assert_empty(shared)


@pytest.fixture
def own() -> Iterator[Daemon]:
    """One that the test may kill."""
    with Daemon("--grace=0s", tier="dram=32MiB") as daemon:
        yield daemon


def assert_empty(daemon: Daemon) -> None:
    status = daemon.status()
    assert status["models"] == ()
    assert status["tiers"][0]["used_bytes"] == 0
    assert (status["pool"]["leases"], status["pool"]["quarantined_loads"]) == (0, 0)
    assert list(daemon.segments.glob("*")) == []
    assert list((daemon.state / "catalog").glob("[!.]*")) == []


def mapped_bytes(path: str, offset: int, length: int) -> bytes:
    """What another program finds that maps the file read-only."""
    with open(path, "rb") as file, contextlib.closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as memory:
        return memory[offset : offset + length]


BACKINGS = [
    pytest.param("tmpfs", marks=pytest.mark.root), "shm", "memfd", pytest.param("hugetlb", marks=pytest.mark.root)
]  # fmt: skip


@pytest.mark.parametrize("backing", BACKINGS)
def test_what_one_process_seals_every_process_maps(backing: str, request: pytest.FixtureRequest) -> None:
    if backing == "hugetlb":
        request.getfixturevalue("reserved")
    with Daemon(tier="dram=16MiB", backing=backing) as daemon, Engine(daemon) as engine, daemon.client() as client:
        assert engine.do("create") == "Draft"
        status = daemon.model("image")
        assert (status["state"], status["readers"], status["fingerprint"]) == ("draft", (engine.pid,), prints())
        with pytest.raises(Refused, match="wait until the model is loaded"):
            client.share_paths("image")
        assert engine.do("fill") == "filled"
        assert engine.do("seal") == "sealed"
        with client.open_image(prints(), name="image") as model:
            assert painted(model)
            assert not model["model.layers.0.qkv"].flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                model["model.layers.0.qkv"][0] = 1
            for name in model:
                extent = model.info(name).extent
                found = mapped_bytes(client.share_paths("image")[extent.segment], extent.offset, extent.length)
                assert found == bytes(model.raw(name))
            assert engine.do("write") == str(-signal.SIGSEGV)
            assert engine.line() == "True"
            status = daemon.model("image")
            assert (status["state"], status["resident_bytes"]) == ("resident", PAGES * PAGE_BYTES)
            assert status["readers"] == tuple(sorted((os.getpid(), engine.pid)))
        assert isinstance(client.create_image(prints(), TENSORS), Model)


def test_a_copy_on_write_opener_changes_nobody_else_s_bytes(daemon: Daemon) -> None:
    with daemon.client() as client, sealed(client) as model, client.open_image(prints(), writable=True) as own:
        own["model.layers.1.qkv"][...] = 0
        assert painted(model)


@pytest.mark.parametrize("end", ["kill", "close", "end"])
def test_a_creator_that_leaves_before_the_seal_leaves_nothing(daemon: Daemon, end: str) -> None:
    with Engine(daemon) as engine:
        assert engine.do("create") == "Draft"
        assert engine.do("fill") == "filled"
        assert len(list(daemon.segments.iterdir())) == 3
        if end == "close":
            assert engine.do("close") == "closed"
            eventually(lambda: daemon.leases() == 0, "the draft is given up")
            assert_empty(daemon)
            assert engine.do("make") == "made"
        else:
            engine.kill9() if end == "kill" else engine.say("end")
            eventually(lambda: daemon.leases() == 0, "the creator's lease ended")
            assert_empty(daemon)


def test_who_waits_for_a_creator_that_is_killed_fills_the_image(daemon: Daemon) -> None:
    with Engine(daemon) as first, Engine(daemon) as second, daemon.client() as client:
        assert first.do("create") == "Draft"
        assert first.do("fill") == "filled"
        second.say("create")
        by_name = Running(lambda: painted(client.open("image")))
        eventually(lambda: daemon.leases() == 3, "others wait for it")
        first.kill9()
        assert second.line() == "Draft"
        with pytest.raises(Refused, match=f"process {first.pid} left before it had filled image"):
            by_name.answer()
        assert second.do("fill") == "filled"
        assert second.do("seal") == "sealed"
        with client.open_image(prints()) as model:
            assert painted(model)


def test_a_creator_that_is_killed_after_the_seal_leaves_the_image(daemon: Daemon) -> None:
    with Engine(daemon) as engine:
        assert engine.do("make") == "made"
        engine.kill9()
    eventually(lambda: daemon.leases() == 0, "its lease ended")
    with daemon.client() as client, client.open_image(prints()) as model:
        assert painted(model)


@pytest.mark.parametrize("count", [2, 8])
def test_of_many_that_create_at_once_one_fills(daemon: Daemon, count: int) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(daemon)) for _ in range(count)]
        for engine in engines:
            engine.say("make")
        said = sorted(engine.line() for engine in engines)
        assert said == ["found"] * (count - 1) + ["made"]
        (status,) = daemon.status()["models"]
        assert (status["leases"], status["opens"]) == (count, count)
        assert daemon.status()["tiers"][0]["used_bytes"] == PAGES * PAGE_BYTES


def test_a_draft_that_is_opened_by_name_is_shown_when_it_is_sealed(daemon: Daemon) -> None:
    with daemon.client() as client, drawn(client, name="image") as draft:
        ways = [lambda: painted(client.open("image")), lambda: client.open_image(prints(), name="image")]
        waiting = [Running(way) for way in ways]
        eventually(lambda: daemon.leases() == 3, "both wait")
        fill(draft)
        assert all(each.running for each in waiting)
        assert painted(draft.seal())
        assert all(each.answer() for each in waiting)


def test_a_pool_that_is_full_refuses_an_image_and_keeps_nothing_of_it(own: Daemon) -> None:
    with own.client() as client, ExitStack() as stack:
        for seed in range(4):
            stack.enter_context(drawn(client, seed))
        with pytest.raises(CapacityError, match=r"needs 8\.0 MiB of tier 'dram', which has 0 B free of 32\.0 MiB"):
            client.create_image(prints(4), TENSORS)
        assert len(own.status()["models"]) == own.leases() == 4


def test_a_draft_outlives_its_daemon_for_its_process_alone(own: Daemon) -> None:
    with own.client() as client:
        draft = drawn(client, name="image")
        client.pin("image")
        fill(draft)
        own.kill9()
        assert painted(draft)
        np.frombuffer(draft.raw("model.layers.1.qkv"), np.uint8)[:] = 7
        with pytest.raises((DaemonUnreachable, Refused)):
            draft.seal()
        own.start()
        assert own.ready.endswith(" 0 models adopted")
        assert_empty(own)
        eventually(lambda: client._leases == {}, "the new daemon has no such image")
        with pytest.raises((DaemonUnreachable, Refused)):
            draft.seal()
        assert (np.frombuffer(draft.raw("model.layers.1.qkv"), np.uint8) == 7).all()
        draft.close()
        assert painted(sealed(client, name="image"))


def test_a_sealed_image_outlives_its_daemon(own: Daemon) -> None:
    with Engine(own) as engine:
        assert engine.do("make") == "made"
        own.restart()
        assert own.ready.endswith(" 1 models adopted")
        eventually(lambda: own.model("image")["readers"] == (engine.pid,), "the engine announced its lease")
        (status,) = own.settle()
        assert (status["state"], status["fingerprint"]) == ("resident", prints())
        assert status["last_load"]["check_only"]
        with own.client() as client, client.open_image(prints()) as model:
            assert painted(model)
        engine.say("end")
        eventually(lambda: own.leases() == 0, "the announced lease ended with its process")
        with own.client() as client:
            assert client.evict("image") == PAGES * PAGE_BYTES
        assert_empty(own)
        own.restart()
        assert_empty(own)


@pytest.mark.parametrize("harm", ["flipped", "missing", "short"])
def test_what_is_damaged_of_an_image_costs_the_whole_of_it(own: Daemon, harm: str) -> None:
    with own.client() as client:
        sealed(client, name="image").close()
    own.settle()
    own.kill9()
    path = sorted(own.segments.iterdir())[2]
    path.chmod(0o600)
    if harm == "flipped":
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.seek(PAGE_BYTES + 4)
            file.write(bytes([data[PAGE_BYTES + 4] ^ 1]))
    else:
        path.unlink() if harm == "missing" else os.truncate(path, PAGE_BYTES)
    own.start()
    own.settle()
    status = own.status()
    assert (status["models"], status["tiers"][0]["used_bytes"]) == ((), 0)
    assert status["pool"]["quarantined_loads"] == (harm == "flipped")
    assert list(own.segments.iterdir()) == []
    with own.client() as client:
        with pytest.raises(ImageNotFound, match="no image yet; create this one"):
            client.open_image(prints())
        assert painted(sealed(client, name="image"))


def test_the_example_of_the_page_creates_and_finds_its_image(daemon: Daemon) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/images.md").read_text(), re.DOTALL)
    setting = f"import os\nos.environ['TIERMEM_ADDRESS'] = {daemon.address!r}\n"
    for opens in (1, 2):
        with Child(["-c", setting + example]) as child:
            assert child.line() == "24.0 {'config': '{}'}"
            assert child.exit_code() == 0
        assert (daemon.model("mine-tp0")["opens"], daemon.model("mine-tp0")["state"]) == (opens, "resident")
    with daemon.client() as client:
        fields = daemon.model("mine-tp0")["fingerprint"] | {"tp_rank": "1"}
        with pytest.raises(FingerprintMismatch) as caught:
            client.open_image(fields, name="mine-tp0")
    assert str(caught.value) in (REPOSITORY / "docs/images.md").read_text()


def test_a_daemon_that_is_stopped_gives_drafts_up(own: Daemon, tmp_path: Path) -> None:
    with own.client() as client:
        draft = drawn(client)
        assert own.terminate() == 0
        assert own.leftovers == []
        fill(draft)
        assert painted(draft)
        with pytest.raises((DaemonUnreachable, Refused)):
            draft.seal()
        assert isinstance(draft, Draft)
        draft.close()
