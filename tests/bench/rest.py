"""`python -m tests.bench.rest`: CPU time of a pool in which nothing has to move.

A daemon with two memory tiers (the second is only claimed, and nothing is placed there) holds 2 GiB of weights that a
client has mapped. Under each policy, for SECONDS: CPU time of the daemon (sampler, views, policy, migrator, RPC) and of
the client, which does nothing but let its agent sample, as a part of one core.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import tiermem
from tests.bench.launch import daemon
from tests.bench.sampling import PAGES, write_checkpoint
from tiermem.types import PAGE_BYTES

POLICIES = ("hold", "lru", "hemem", "memtis", "tpp", "colloid", "layer_prefetch", "static_interleave")
SETTLE_S = 3.0
TARGET = 0.01


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    tiers = ("--tier", f"cxl={2 * PAGES * PAGE_BYTES}@node1")
    with (
        tempfile.TemporaryDirectory(prefix="tiermem-bench-") as place,
        daemon(2 * PAGES * PAGE_BYTES, 0, *tiers, module="tests.bench.two_tiers") as pool,
    ):
        path = Path(place, "model.safetensors")
        write_checkpoint(path)
        with tiermem.Client(pool.address) as client, client.open(str(path)) as model:
            model.wait()
            for name in model:  # each page once, so that all are mapped
                model[name][::4096].sum()
            print(f"{PAGES} pages, one client, {seconds:g} s each; target {TARGET:.0%} of one core for both together")
            for policy in POLICIES:
                client.set_policy(policy)
                time.sleep(SETTLE_S)
                begin = (time.monotonic(), cpu_s(pool.pid), cpu_s(os.getpid()))
                time.sleep(seconds)
                took = time.monotonic() - begin[0]
                ours = (cpu_s(pool.pid) - begin[1]) / took
                clients = (cpu_s(os.getpid()) - begin[2]) / took
                status = client.status()["migration"]
                assert not status["policy_failure"], status["policy_failure"]
                verdict = "met" if ours + clients <= TARGET else "MISSED"
                moved = sum(status["moved_pages"].values())
                print(f"  {policy:18} daemon {ours:6.2%}  client {clients:6.2%}  pages moved so far {moved}  {verdict}")


if __name__ == "__main__":
    main()
