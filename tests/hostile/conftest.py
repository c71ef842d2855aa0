"""Fixtures of what is done to one daemon, which must serve on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def weights(daemon: Daemon, tmp_path: Path) -> Iterator[Weights]:
    """Afterwards nobody has a lease, and the daemon serves them."""
    written = write_weights(tmp_path / tmp_path.name)
    yield written
    assert daemon.serves(written)
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    with daemon.client() as client:
        for model in client.status()["models"]:
            client.remove(model["name"])
