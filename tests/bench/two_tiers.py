"""`python -m tests.bench.two_tiers`: tiermem's command line on a host that claims a memory-only NUMA node, node 1.

For what costs CPU time and moves nothing: the control loop of a pool with two memory tiers, on a host with one node.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tiermem import cli, host

_nodes = host.numa_nodes


def _with_another() -> tuple[host.NumaNode, ...]:
    first, *_ = _nodes()
    return (first, replace(first, number=1, cpus=""))


if __name__ == "__main__":
    host.numa_nodes = _with_another  # type: ignore[assignment]
    sys.exit(cli.main(sys.argv[1:]))
