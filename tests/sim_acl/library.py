"""Builds the simulated ACL and says how a process finds it. Knows neither torch nor what the library does."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent
BUILD = SOURCE.parent.parent / "build" / "sim_acl"
LIBRARIES = ("ascendcl", "acl_op_compiler", "hccl", "ge_runner", "graph", "acl_tdt_channel")
"""In the order in which they need each other."""


def build() -> Path:
    """The directory of the libraries, built if they are older than their sources.

    Raises:
        RuntimeError: the compiler refused; its output.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake")
    configure = [cmake, "-S", SOURCE, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", BUILD]):
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if ran.returncode:
                raise RuntimeError(f"the simulated ACL does not build: {ran.stdout}")
    return BUILD


def tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} is not on PATH; install it with: pip install {name}")
    return found


def load(directory: Path) -> ctypes.CDLL:
    """Loads all libraries into this process, where torch_npu then finds them by name; gives libascendcl."""
    loaded = [ctypes.CDLL(str(directory / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    return loaded[0]


def environment(directory: Path) -> dict[str, str]:
    """What a process needs in its environment, from its start, to find the libraries."""
    paths = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
