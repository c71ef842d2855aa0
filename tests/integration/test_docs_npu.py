"""docs/npu.md: its commands have the options that it names, and its Python runs, with the CPU as the device."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.integration.child import REPOSITORY
from tiermem import cli
from tiermem.bench.device_stack import LAYERS, write_stack
from tiermem.config import load_config

PAGE = (REPOSITORY / "docs" / "npu.md").read_text()
WIDTH = 64
SET_UP = f"""
import torch
from tiermem.bench.device_stack import stack_module
module, tokens = stack_module({WIDTH}), torch.zeros(4, {WIDTH}, dtype=torch.bfloat16)
"""


def commands() -> list[str]:
    """Every command line of ours on the page, those of its manifests too."""
    shell = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
    shell += "".join(re.findall(r"^ {4}(tiermem .*\n)", PAGE, flags=re.MULTILINE))
    lines = re.findall(r"^tiermem ([^\n>#]*)", shell, flags=re.MULTILINE)
    manifests = re.findall(r"args: \[tiermem, (.*?)\]\n", PAGE, flags=re.DOTALL)
    return lines + [" ".join(text.replace('"', "").replace(",", " ").split()) for text in manifests]


def test_the_page_has_commands() -> None:
    found = commands()
    assert {"doctor", "status"} <= {text.strip() for text in found}
    assert sum(text.startswith("bench device") for text in found) == 3
    assert sum(text.startswith("serve") for text in found) == 2


@pytest.mark.parametrize("text", commands())
def test_every_command_parses(text: str) -> None:
    arguments = shlex.split(text)
    command: click.Command = cli.group
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    context = command.make_context(command.name, arguments)
    if "tier" in context.params:
        load_config({"tier": context.params["tier"]})


def test_the_python_runs(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", LAYERS)):
        write_stack(tmp_path / name, WIDTH, range(first, first + LAYERS))
    (sample,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    own = {"npu:0": "cpu", "/models/": f"{tmp_path}/", '"qwen"': f'"{tmp_path}/a"', "8GiB": "512KiB", "24GiB": "4MiB"}
    for theirs, ours in own.items():
        assert theirs in sample
        sample = sample.replace(theirs, ours)
    check = f"assert len(tensors) == {2 * LAYERS}"
    options = {"TIERMEM_ADDRESS": f"unix:{tmp_path}/none.sock", "TIERMEM_STATE": str(tmp_path / "state"),
               "TIERMEM_DIGESTS": str(tmp_path / "digests"), "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", SET_UP + sample + check], capture_output=True, text=True, timeout=100, env=options
    )
    assert ran.returncode == 0, ran.stderr
