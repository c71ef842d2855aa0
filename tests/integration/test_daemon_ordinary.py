"""A daemon without any rights: the same service on /dev/shm or on anonymous memory, and the same end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.integration.child import NOBODY, Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, digest_of, write_weights
from tiermem.types import PAGE_BYTES

pytestmark = pytest.mark.root

READER = """
model = tiermem.open(sys.argv[1], address=sys.argv[2])
arrays = dict(model)
say(digest_of(arrays))
pause()
say(digest_of(arrays))
"""


@pytest.fixture(params=["auto", "memfd"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon("--grace=60s", backing=request.param, ordinary=True) as daemon:
        yield daemon


@pytest.fixture
def weights(daemon: Daemon) -> Weights:
    return write_weights(daemon.directory / "model", layers=3)


def test_ordinary_user_has_the_whole_service(daemon: Daemon, weights: Weights) -> None:
    pool = daemon.status()["pool"]
    assert pool["backing"] == ("shm" if "auto" in daemon.flags else "memfd")
    if "auto" in daemon.flags:
        assert "not tmpfs:" in pool["backing_reason"]
        assert "CAP_SYS_ADMIN" in pool["backing_reason"]
    with (
        Child.script(READER, weights.path, daemon.address, uid=NOBODY) as first,
        Child.script(READER, weights.path, daemon.address, uid=NOBODY) as second,
    ):
        assert first.line() == second.line() == weights.digest
        (status,) = daemon.settle()
        assert status["readers"] == tuple(sorted((first.pid, second.pid)))
        assert status["resident_bytes"] == 3 * PAGE_BYTES
        first.kill9()
        eventually(lambda: daemon.leases() == 1, "the dead reader's lease ended")
        second.say()
        assert second.line() == weights.digest
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    with daemon.client() as client:
        assert client.evict("model") == 3 * PAGE_BYTES
        with client.open("model") as model:
            assert digest_of(model) == weights.digest
    assert daemon.terminate() == 0
    assert daemon.leftovers == []


def test_ordinary_daemon_dies_and_is_followed(daemon: Daemon, weights: Weights) -> None:
    adopts = "auto" in daemon.flags
    with Child.script(READER, weights.path, daemon.address, uid=NOBODY) as reader:
        assert reader.line() == weights.digest
        daemon.settle()
        if adopts:
            shutil.rmtree(weights.path)
        daemon.restart()
        assert daemon.ready.endswith(f"{int(adopts)} models adopted")
        if adopts:
            eventually(lambda: daemon.model("model")["readers"] == (reader.pid,), "the reader announced its lease")
            (status,) = daemon.settle()
            assert (status["state"], status["last_load"]["read_bytes"]) == ("resident", 0)
        else:
            assert daemon.serves(weights)
        reader.say()
        assert reader.line() == weights.digest
    if adopts:
        with daemon.client() as client, client.open("model") as model:
            assert digest_of(model) == weights.digest
    assert daemon.terminate() == 0
    assert daemon.leftovers == []
