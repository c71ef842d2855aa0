"""Pools on a network that is far and loses packets, as the kernel's netem makes it: slower, and nothing else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from tests.integration.weights import digest_of, write_weights

pytestmark = pytest.mark.numa


@pytest.fixture(params=[("delay", "20ms", "loss", "1%"), ("delay", "5ms", "5ms", "reorder", "25%", "duplicate", "1%")])
def far(request: pytest.FixtureRequest) -> Iterator[None]:
    """The loopback."""
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", *request.param], check=True)
    yield
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


@pytest.mark.usefixtures("far")
def test_a_model_comes_and_is_right(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "far", layers=4, layer_bytes=2 << 20)
    with Daemon("--listen", "127.0.0.1:0", "--transport", "tcp") as owner:
        assert owner.serves(weights)
        found = re.search(r"listening for peers at (\S+) ", owner.log)
        assert found
        with Daemon("--peer", found[1], "--transport", "tcp") as here, here.client() as client:
            with client.open("far") as model:
                assert digest_of(model) == weights.digest
            assert "failed, others are asked" not in here.log
