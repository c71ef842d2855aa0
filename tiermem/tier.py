"""Tiers: capacities of performance classes, fastest first, and how much of each is in use. Counts bytes; moves none.

A page on disk is in its checkpoint and nowhere else. The last tier is always the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tiermem.errors import CapacityError, ConfigError
from tiermem.host import NumaNode
from tiermem.policy import TierView
from tiermem.tier_spec import MEMORY_KINDS, TierSpec
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes

_LOW = (0.02, 1000 << 20)
_HIGH = (0.03, 1500 << 20)
"""Watermarks: a part of the capacity that is kept free, and the most it may be, as MEMTIS has them (SOSP'23)."""


@dataclass(slots=True)
class Speed:
    """As measured; NaN: not measured. Latencies of one dependent load: idle, and now."""

    idle_latency_s: float = math.nan
    latency_s: float = math.nan
    bandwidth_bytes_s: float = math.nan


class Tier:
    """`capacity_bytes` None means that the tier never fills (the checkpoint on disk). `nodes`: where its memory is;
    empty: wherever the kernel puts it. `online` is False while none of them has memory. `device`: whose memory takes
    copies of pages; a capacity of 0 then means that nobody has told it yet."""

    def __init__(
        self, tier_id: int, kind: str, capacity_bytes: int | None, nodes: Sequence[int] = (), device: str = ""
    ) -> None:
        self.id = tier_id
        self.kind, self.device = kind, device
        self.name = f"{kind}@{device}" if device else kind
        self.capacity_bytes = capacity_bytes
        self.nodes = tuple(nodes)
        self.used_bytes = 0
        self.online = True
        self.speed = Speed()

    @property
    def is_memory(self) -> bool:
        return self.kind in MEMORY_KINDS

    @property
    def node_mask(self) -> int:
        """Bit n: node n; 0: any."""
        return sum(1 << node for node in self.nodes)

    @property
    def free_bytes(self) -> int | None:
        if self.capacity_bytes is None:
            return None
        return max(0, self.capacity_bytes - self.used_bytes) if self.online else 0

    @property
    def low_bytes(self) -> int:
        """Free bytes below which pages are demoted, and that promotions leave alone."""
        return self._watermark(*_LOW)

    def _watermark(self, part: float, most: int) -> int:
        return int(min((self.capacity_bytes or 0) * part, most)) // PAGE_BYTES * PAGE_BYTES

    def lacks(self, nbytes: int) -> int:
        """Bytes that must be freed before `nbytes` fit; 0 where they fit."""
        return 0 if self.free_bytes is None else max(0, nbytes - self.free_bytes)

    def reserve(self, nbytes: int) -> None:
        """Count `nbytes` as used. Raises CapacityError where they do not fit."""
        if self.lacks(nbytes):
            raise CapacityError(
                f"tier {self.name!r} needs {format_bytes(nbytes)}, has {format_bytes(self.free_bytes or 0)} free of "
                f"{format_bytes(self.capacity_bytes or 0)}; unload a model or raise the tier's capacity (--tier)"
            )
        self.used_bytes += nbytes

    def count(self, nbytes: int) -> None:
        """Count bytes that are there already, or with a negative number are not any more, full or not."""
        self.used_bytes += nbytes
        assert self.used_bytes >= 0, f"tier {self.name} released more than it had"

    def view(self, load: float = math.nan) -> TierView:
        """As a policy sees it: a tier that is offline is full."""
        capacity = self.capacity_bytes if self.online else self.used_bytes
        return TierView(
            self.id, self.name, self.kind, capacity, self.used_bytes, self.low_bytes, self._watermark(*_HIGH),
            self.speed.idle_latency_s, self.speed.latency_s, self.speed.bandwidth_bytes_s, load,
        )  # fmt: skip


class Tiers(Sequence[Tier]):
    """All tiers of a pool; `tiers[i].id == i`."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tuple(tiers)
        self.devices = tuple(tier for tier in tiers if tier.device)
        self.memory = tuple(tier for tier in tiers if tier.is_memory)
        self.disk = tiers[-1].id
        self._of_node = {node: tier.id for tier in self.memory for node in tier.nodes}

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._tiers[index]

    def __len__(self) -> int:
        return len(self._tiers)

    def __iter__(self) -> Iterator[Tier]:
        return iter(self._tiers)

    @property
    def several(self) -> bool:
        """Whether there is anything to place, and anywhere to move it."""
        return len(self.memory) > 1

    @property
    def steered(self) -> bool:
        """Whether a policy is asked what should lie where, or be copied, also while no load waits for room."""
        return self.several or bool(self.devices)

    @property
    def free_bytes(self) -> int:
        return sum(tier.free_bytes or 0 for tier in self.memory)

    @property
    def capacity_bytes(self) -> int:
        """Of all memory tiers."""
        return sum(tier.capacity_bytes or 0 for tier in self.memory)

    def of_node(self, node: int) -> int:
        """The tier that counts the memory of a NUMA node: the slowest one where the node is nobody's."""
        return self._of_node.get(node, self.memory[-1].id)


def open_tiers(specs: Sequence[TierSpec], nodes: Sequence[NumaNode]) -> Tiers:
    """The tiers of this host. Raises ConfigError where it has not what they need."""
    with_cpus = tuple(node.number for node in nodes if node.cpus)
    memory_only = tuple(node.number for node in nodes if not node.cpus and node.total_bytes)
    tiers = []
    for number, spec in enumerate(specs):
        chosen, capacity = spec.nodes, spec.capacity_bytes
        if spec.kind == "hbm":
            capacity = capacity or 0
        elif spec.kind == "dram":
            _check_nodes(spec, nodes)
            # Without memory-only nodes there is nothing that the kernel could put a page on by mistake.
            chosen = chosen or (with_cpus if memory_only else ())
        elif spec.kind == "cxl":
            if not memory_only:
                raise ConfigError(
                    f"tier {spec}: this host has no memory-only NUMA node; bring CXL memory up as one with "
                    "daxctl reconfigure-device --mode=system-ram dax0.0, and see it with numactl --hardware"
                )
            _check_nodes(spec, nodes)
            chosen = chosen or memory_only
            for node in set(chosen) - set(memory_only):
                raise ConfigError(
                    f"tier {spec}: node{node} has CPUs or no memory, so it is no CXL memory; the memory-only nodes are "
                    f"{_names(memory_only)}. daxctl reconfigure-device --mode=system-ram brings CXL memory up as one"
                )
        tiers.append(Tier(number, spec.kind, capacity, chosen, spec.device))
    shared = [node for tier in tiers for node in tier.nodes]
    if len(shared) != len(set(shared)):
        raise ConfigError("two tiers name the same NUMA node; give each its own")
    return Tiers(tiers)


def _check_nodes(spec: TierSpec, nodes: Sequence[NumaNode]) -> None:
    known = {node.number for node in nodes}
    for node in spec.nodes:
        if node not in known:
            raise ConfigError(f"tier {spec}: this host has no node{node}; it has {_names(sorted(known))}. Memory-only "
                              "nodes come with daxctl reconfigure-device --mode=system-ram")  # fmt: skip


def _names(nodes: Sequence[int]) -> str:
    return ", ".join(f"node{node}" for node in nodes) or "none"
