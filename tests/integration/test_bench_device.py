"""`tiermem bench device` as a user runs it, and on the simulated ACL, which it refuses to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.sim_acl import library

ASKED = """
from types import SimpleNamespace
from tests.sim_acl import library
from tiermem.bench.device import _refuse_simulated
from tiermem.errors import Refused

npu = SimpleNamespace(name="npu:0", type="npu")
_refuse_simulated(npu)  # no ACL in this process yet
library.load(library.BUILD)
_refuse_simulated(SimpleNamespace(name="cpu", type="cpu"))
try:
    _refuse_simulated(npu)
except Refused as refused:
    print(refused)
"""


def test_the_simulated_acl_is_known_by_its_library() -> None:
    library.build()
    ran = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("npu:0 is simulated")


def test_its_json_is_all_that_is_on_stdout(tmp_path: Path) -> None:
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tiermem", "bench", "device", "cpu", "--size", "2MiB", "--runs", "1", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert (ran.returncode, ran.stderr) == (0, "")
    told = json.loads(ran.stdout)
    assert told["schema"] == "tiermem.bench.device/1"
    assert told["results"]["verified"]
    assert list(tmp_path.iterdir()) == []


def test_an_error_ends_the_command_with_its_code_alone() -> None:
    environ = os.environ | {"PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "tiermem", "bench", "device", "npu:0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert ran.returncode in (1, 5), ran.stderr  # 5: on the simulated ACL
    assert ran.stdout == ""
    assert ran.stderr.startswith("tiermem: error: ")
    assert "Traceback" not in ran.stderr
