"""docs/remote.md: its commands run as they stand there, two hosts being two addresses of the loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import CheckpointWriter
from tests.integration.child import REPOSITORY, eventually
from tiermem.config import load_config

PAGE = (REPOSITORY / "docs" / "remote.md").read_text()
LIMIT_S = 60


def blocks(language: str) -> list[str]:
    """Every block of the page in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


CERTIFICATES, SERVE_A, LOAD_A, SERVE_B, LOAD_B, OPEN_B, CLEAR_A, CLEAR_B = blocks("sh")


@dataclass
class Host:
    """Runs commands of the page in the directory of both hosts, with a socket and a state of its own."""

    name: str
    directory: Path
    model: Path
    ending: ExitStack = field(default_factory=ExitStack)
    logs: list[Path] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("TIERMEM_")}
        own = self.directory / self.name
        # Addresses of the loopback that nobody else listens at, so that the page's ports are free.
        third = os.getpid() % 250 + 1
        return kept | {
            "A": f"127.7.{third}.1", "B": f"127.7.{third}.2", "MODEL": str(self.model), "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(own), "HOME": str(own),
            "XDG_CONFIG_HOME": str(own), "XDG_CACHE_HOME": str(own), "TIERMEM_TIER": "dram=64MiB",
        }  # fmt: skip

    def serve(self, command: str) -> None:
        """Run a command that goes on, until clients can connect."""
        log = self.directory / f"{self.name}{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-euc", f"exec {command}"], cwd=self.directory, env=self.environment,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.ending.callback(process.wait, LIMIT_S)
        self.ending.callback(process.terminate)

        def serving() -> bool:
            assert process.poll() is None, log.read_text()
            return "serving unix:" in log.read_text()

        eventually(serving, "it serves", LIMIT_S)

    def run(self, command: str) -> str:
        """What a command prints that ends, and succeeds."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.directory, env=self.environment, text=True,
            capture_output=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        self.ending.close()


@pytest.fixture
def hosts(checkpoint: CheckpointWriter) -> Iterator[tuple[Host, Host]]:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is not installed")
    model = checkpoint("qwen", layers=3)
    directory = Path(tempfile.mkdtemp(prefix="tiermem-", dir="/tmp"))
    (directory / "bin").mkdir()
    for name, arguments in (("tiermem", "-m tiermem"), ("python", "")):
        command = directory / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        command.chmod(0o755)
    made = Host("a", directory, model.path), Host("b", directory, model.path)
    try:
        yield made
    finally:
        for host in reversed(made):
            host.stop()
        shutil.rmtree(directory)


def test_two_hosts_with_tls(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.run(CERTIFICATES)
    a.serve(SERVE_A)
    assert "loaded in" in a.run(LOAD_A)
    b.serve(SERVE_B)
    told = b.run(LOAD_B)
    assert re.search(r"^peer 127\.7\.\d+\.1:7070 +yes", told, re.MULTILINE), "doctor"
    assert re.search(r"^qwen +resident .* 127\.7\.\d+\.1:7070 *$", told, re.MULTILINE), "status"
    assert "qwen: 6 tensors" in told
    status = a.run("tiermem status")
    assert re.search(r"at 127\.7\.\d+\.1:7070 by TLS, as pool-a; weights leave by port 7071$", status, re.MULTILINE)
    assert re.search(r"^pool-b +127\.0\.0\.1 +1 +0 +192\.1 KiB *$", status, re.MULTILINE), status


def test_a_name_is_looked_for_at_the_peers(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.run(CERTIFICATES)
    a.serve(SERVE_A)
    a.run(LOAD_A)
    b.serve(SERVE_B)
    assert b.run(OPEN_B) == "6 tensors\n"


def test_two_hosts_in_the_clear(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.serve(CLEAR_A)
    a.run(LOAD_A)
    b.serve(CLEAR_B)
    assert b.run(OPEN_B) == "6 tensors\n"


def test_the_file_is_one(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    (tmp_path / "tiermem.toml").write_text(text)
    config = load_config(environ={"HOME": str(tmp_path)}, files=[tmp_path / "tiermem.toml"])
    assert (str(config.listen), config.data_port, len(config.peer)) == ("10.0.0.1:7070", 7071, 2)
    assert list(map(str, config.allow)) == ["pool-b=qwen*", "pool-c=*"]
