"""What the tests with real torch_npu share: the simulated ACL in this process, torch on it, and processes of their own.

`make test-npu` runs them, in an environment that has torch_npu. Nothing is skipped there, and elsewhere they fail.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.npu.apart import Apart, prepare
from tests.npu.child_run import TOLD
from tests.sim_acl import library
from tests.sim_acl.control import SimulatedAcl

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CAPACITY = 1 << 30
"""Of each simulated device."""
CHILD_S = 100
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    if report.skipped and HERE in item.path.parents:
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def libraries() -> Path:
    """The directory of the simulated ACL."""
    return library.build()


@pytest.fixture(scope="session")
def _loaded(libraries: Path) -> SimulatedAcl:
    os.environ["SIM_ACL_CAPACITY"] = str(CAPACITY)
    return SimulatedAcl(library.load(libraries))


@pytest.fixture(scope="session")
def _torch(_loaded: SimulatedAcl) -> ModuleType:
    if importlib.util.find_spec("torch_npu") is None:
        pytest.fail("torch_npu is not installed here; make test-npu runs these tests where it is", pytrace=False)
    import torch

    torch.npu.set_device(0)
    return torch


@pytest.fixture
def acl(_loaded: SimulatedAcl) -> Iterator[SimulatedAcl]:
    """The simulated ACL in this process: no fault and no delay, before and after."""
    yield _loaded
    _loaded.heal()
    _loaded.set_delays()


@pytest.fixture
def torch(request: pytest.FixtureRequest, _torch: ModuleType, acl: SimulatedAcl) -> Iterator[ModuleType]:
    """torch with torch_npu on two simulated devices, of which npu:0 is current. Nothing of a test stays on them."""
    yield _torch
    acl.heal()
    gc.collect()
    _torch.npu.synchronize()
    _torch.npu.empty_cache()
    if not request.node.stash[FAILED]:  # the report of a failure keeps what the test had
        assert acl.device_bytes(0) == acl.device_bytes(1) == 0


@dataclass(frozen=True, slots=True)
class Ran:
    """How a process ended, and the JSON value that it told last."""

    status: int
    told: Any
    errors: str


Run = Callable[..., Ran]


@pytest.fixture
def environ(libraries: Path) -> dict[str, str]:
    """The environment of a process that uses the simulated ACL. It is none of a Python that autoloads nothing."""
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return ours | library.environment(libraries) | {"PYTHONPATH": str(REPOSITORY), "SIM_ACL_CAPACITY": str(CAPACITY)}


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    """`run(job, **environ)`: a job of child_run.py in a process of its own, to its end."""

    def to_its_end(job: str, **changes: str) -> Ran:
        ran = subprocess.run(command(job), env=environ | changes, capture_output=True, text=True, timeout=CHILD_S)
        lines = [line for line in ran.stdout.splitlines() if line.startswith(TOLD)]
        return Ran(ran.returncode, json.loads(lines[-1].removeprefix(TOLD)) if lines else None, ran.stderr)

    return to_its_end


@pytest.fixture(scope="session")
def _prepared(libraries: Path) -> None:
    prepare(library.environment(libraries))


@pytest.fixture
def apart(_prepared: None) -> Iterator[Callable[..., Apart]]:
    """`apart(job, *arguments, **environ)`: a job of a module of jobs, in a process of its own."""
    started: list[Apart] = []

    def begin(job: Callable[..., None], *arguments: Any, **environ: str) -> Apart:
        started.append(Apart(job, arguments, {"SIM_ACL_CAPACITY": str(CAPACITY)} | environ))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def command(job: str) -> list[str]:
    return [sys.executable, "-m", "tests.npu.child_run", job]
