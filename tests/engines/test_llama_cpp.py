"""llama.cpp on a GGUF file of the pool: nothing but a path, and no private byte of a weight."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EngineDaemon
from tests.integration.child import Child

RUN = Path(__file__).parent / "llama_run.py"
START_S = 120
MIB = 1 << 20

if importlib.util.find_spec("llama") is None:
    pytest.skip("llama-cpp-cffi is not installed; make test-engines installs it", allow_module_level=True)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """What makes the package load where libstdc++ is older than GCC 14, from which it wants this one function."""
    directory = tmp_path_factory.mktemp("stand_in")
    source, library = directory / "terminate.c", directory / "terminate.so"
    source.write_text("void abort(void); void __cxa_call_terminate(void *thrown) { (void)thrown; abort(); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return ["env", f"LD_PRELOAD={library}"]


@pytest.fixture
def exported(daemon: EngineDaemon, smollm2_gguf: Path, tmp_path: Path) -> Path:
    """The path of the file in a directory that `tiermem export` made."""
    from tiermem.export import export

    directory = tmp_path / "exported"
    with daemon.client() as client:
        export(client, smollm2_gguf, directory)
    return directory / smollm2_gguf.name


class Running:
    """A process that has loaded the file and stands still after half of its tokens."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.half: dict[str, Any] = json.loads(child.line(START_S))

    def end(self) -> dict[str, Any]:
        """All of the tokens, and their text."""
        self.child.say()
        found: dict[str, Any] = json.loads(self.child.line(START_S))
        assert found["tokens"][: len(self.half["tokens"])] == self.half["tokens"]
        return found

    def mappings(self, path: Path) -> dict[str, int]:
        """Bytes of its mappings of the file that lies at `path`, by smaps' names; all are read-only and shared."""
        inode = path.stat().st_ino
        sums: dict[str, int] = {}
        ours = False
        for words in (line.split() for line in Path(f"/proc/{self.child.pid}/smaps").read_text().splitlines()):
            if "-" in words[0]:
                ours = int(words[4]) == inode
                assert not ours or words[1] == "r--s"
            elif ours and words[-1] == "kB":
                sums[words[0].rstrip(":")] = sums.get(words[0].rstrip(":"), 0) + (int(words[1]) << 10)
        return sums


Start = Callable[..., Running]


@pytest.fixture
def start(prefix: Sequence[str]) -> Iterator[Start]:
    """`start(path, *flags)`: a process at half of its tokens; the test's end ends it."""
    with ExitStack() as stack:
        yield lambda path, *flags: Running(stack.enter_context(Child([str(RUN), str(path), *flags], prefix=prefix)))


def test_tokens_are_those_of_the_file_and_no_weight_is_private(
    start: Start, exported: Path, smollm2_gguf: Path, memory_of: Callable[..., dict[str, int]]
) -> None:
    plain, read, pooled = start(smollm2_gguf), start(smollm2_gguf, "--no-mmap"), start(exported)
    mapped, weights = pooled.mappings(exported), smollm2_gguf.stat().st_size
    assert mapped["Rss"] > weights - 4 * MIB
    assert mapped["Anonymous"] == mapped["Private_Dirty"] == 0
    anonymous = {running: memory_of(running.child.pid)["anon"] for running in (plain, read, pooled)}
    assert anonymous[read] - anonymous[pooled] > weights - 8 * MIB
    assert abs(anonymous[plain] - anonymous[pooled]) < 8 * MIB
    expected = plain.end()
    assert "Paris" in expected["text"]
    assert pooled.end() == read.end() == expected


def test_two_processes_share_one_copy(start: Start, exported: Path) -> None:
    one, two = start(exported), start(exported)
    mapped = [running.mappings(exported) for running in (one, two)]
    assert sum(sizes["Pss"] for sizes in mapped) < 1.01 * max(sizes["Rss"] for sizes in mapped)
    assert one.end() == two.end()


def test_tokens_go_on_when_the_daemon_dies(
    start: Start, daemon: EngineDaemon, exported: Path, smollm2_gguf: Path
) -> None:
    expected = start(smollm2_gguf).end()
    running = start(exported)
    daemon.kill()
    assert running.end() == expected
    daemon.start()
    assert start(exported).end() == expected
