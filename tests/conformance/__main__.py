"""Runs safetensors' own tests against tiermem's readers: `python -m tests.conformance CHECKOUT`.

Once over a pool of the process, once over a daemon that it starts for the purpose. Never changes the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = (
    "test_simple", "test_handle", "test_multithreaded", "test_pread_backend", "test_pt_comparison", "test_pt_model",
    "test_threadable",
)  # fmt: skip
"""What needs torch and numpy alone."""


@contextmanager
def daemon(home: Path) -> Iterator[str]:
    """The address of a daemon that lives as long as the context."""
    address = f"unix:{home}/tm.sock"
    arguments = ["--address", address, "--state", f"{home}/state", "--digests", f"{home}/digests",
                 "--tier", "dram=2GiB"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "tiermem", "serve", *arguments], cwd=REPOSITORY)
    try:
        while not (home / "tm.sock").exists():
            if process.poll() is not None:
                raise SystemExit(f"the daemon ended with status {process.returncode}")
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def conform(tests: Path, home: Path, address: str) -> int:
    """Run the tests in `home`, where they write their files; returns pytest's exit status."""
    environ: Mapping[str, str] = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "TIERMEM_ADDRESS": address,
        "TIERMEM_DIGESTS": f"{home}/digests",
        "TIERMEM_TIER": "dram=2GiB",
    }
    options = [
        "-q",
        "-p",
        "tests.conformance.plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tests),
    ]
    files = [str(tests / f"{name}.py") for name in FILES]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=home, env=environ).returncode


def opens_of(address: str) -> int:
    """Opens that the daemon served: 0 would mean that its clients fell back to pools of their own."""
    import tiermem

    with tiermem.connect(address) as client:
        opens = sum(model["opens"] for model in client.status()["models"])
    print(f"{opens} of them by the daemon, of models that it still knows")
    return int(opens)


def main(checkout: str) -> int:
    tests = Path(checkout).resolve() / "bindings/python/tests"
    if not (tests / "test_simple.py").is_file():
        raise SystemExit(f"{tests}: no tests of safetensors there; clone its repository and pass the checkout's path")
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        for kind in ("embedded", "daemon"):
            print(f"safetensors' tests over tiermem's readers, {kind} pool", flush=True)
            home = Path(directory, kind)
            (home / "tests/data").mkdir(parents=True)
            if kind == "embedded":
                failed |= conform(tests, home, f"unix:{home}/none.sock")
            else:
                with daemon(home) as address:
                    failed |= conform(tests, home, address)
                    failed |= not opens_of(address)
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.conformance CHECKOUT")
    sys.exit(main(sys.argv[1]))
