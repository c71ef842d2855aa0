"""Tier specification: what `--tier` says of one tier. Pure text and numbers; never asks the host.

hbm=24GiB@npu:0     memory of a device, which takes copies; before dram, one a device
hbm@npu:0           as much as the device has, which is known once a client uses it
dram=8GiB           memory of the nodes that have CPUs
dram=8GiB@node0     of this node alone
cxl=32GiB@node1     a memory-only node; several: @node1+node2
disk                the checkpoints; always last, and there also if it is not named
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tiermem.errors import ConfigError
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes, parse_bytes

MEMORY_KINDS = ("dram", "cxl")
EXAMPLE = "dram=8GiB,cxl=32GiB@node1"
MAX_DEVICES = 8
"""A page's copies are the bits of one byte, and hbm tiers come first."""

_MAX_NODE = 63
_SPEC = re.compile(r"(?P<kind>[a-z]+)(?:=(?P<size>[^@]+))?(?:@(?P<place>.+))?")
_DEVICE = re.compile(r"cpu|(?!cpu:)([a-z]{1,32})(:(0|[1-9][0-9]{0,3}))?")


@dataclass(frozen=True, slots=True)
class TierSpec:
    """`capacity_bytes`, in whole pages, is None for disk and where the device says; `nodes` is empty where the host
    decides. `device`: of hbm alone."""

    kind: str
    capacity_bytes: int | None
    nodes: tuple[int, ...] = ()
    device: str = ""

    def __str__(self) -> str:
        size = "" if self.capacity_bytes is None else f"={_exactly(self.capacity_bytes)}"
        place = self.device or "+".join(f"node{node}" for node in self.nodes)
        return self.kind + size + (f"@{place}" if place else "")


def _exactly(nbytes: int) -> str:
    """Whole pages as text that reads as the same number."""
    return f"{nbytes >> 20}MiB" if nbytes % (1 << 30) else f"{nbytes >> 30}GiB"


DISK = TierSpec("disk", None)


def parse_tiers(value: object) -> tuple[TierSpec, ...]:
    """The tiers of `dram=8GiB,cxl=32GiB@node1`, of a list of such parts, or of TierSpecs; disk is added.

    Raises ValueError saying what is wrong.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or isinstance(parts, bytes) or not parts:
        raise ValueError(f"it must be text such as {EXAMPLE}, or a list of its parts")
    specs = [spec for part in parts for spec in (_parse(part) if isinstance(part, str) else [part])]
    if not all(isinstance(spec, TierSpec) for spec in specs):
        raise ValueError(f"its parts must be text such as {EXAMPLE.split(',')[0]}")
    if DISK not in specs:
        specs.append(DISK)
    devices = [spec.device for spec in specs if spec.kind == "hbm"]
    kinds = [spec.kind for spec in specs]
    if len(devices) > MAX_DEVICES:
        raise ValueError(f"{len(devices)} hbm tiers; there may be {MAX_DEVICES}: a page's copies are bits of one byte")
    if twice := [device for i, device in enumerate(devices) if device in devices[:i]]:
        raise ValueError(f"two hbm tiers are of {twice[0]}; a device is one tier")
    if "hbm" in kinds[len(devices) :]:
        raise ValueError("hbm tiers come before dram")
    kinds = kinds[len(devices) :]
    if kinds[0] != "dram" or kinds.count("dram") != 1:
        raise ValueError("the first tier must be dram, and there is one of it; only hbm tiers come before it")
    if kinds[-1] != "disk" or kinds.count("disk") != 1:
        raise ValueError("disk must be the last tier")
    if kinds.count("cxl") > 1:
        raise ValueError("there is one cxl tier; join its nodes: cxl=64GiB@node1+node2")
    return tuple(specs)


def _parse(text: str) -> list[TierSpec]:
    if "," in text:
        return [spec for part in text.split(",") for spec in _parse(part)]
    match = _SPEC.fullmatch(text.strip())
    if match is None or match["kind"] not in (*MEMORY_KINDS, "hbm", "disk"):
        raise ValueError(f"{text!r} is no tier; write hbm=SIZE@DEVICE, dram=SIZE, cxl=SIZE@nodeN or disk")
    kind, size, place = match["kind"], match["size"], match["place"]
    if kind == "disk":
        if size or place:
            raise ValueError("disk is the checkpoints themselves, and takes neither a size nor a node")
        return [DISK]
    if kind == "hbm":
        if place is None:
            raise ValueError("hbm needs a device: hbm=24GiB@npu:0")
        return [TierSpec(kind, None if size is None else _capacity(kind, size), device=device_name(place))]
    if size is None:
        raise ValueError(f"{kind} needs a size: {kind}=8GiB")
    return [TierSpec(kind, _capacity(kind, size), _nodes(place))]


def device_name(text: str) -> str:
    """A device as clients tell of it: npu is npu:0. Raises ValueError."""
    match = _DEVICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is no device; write npu:0, cuda:0 or cpu")
    return match[0] + (":0" if match[1] and not match[2] else "")


def _capacity(kind: str, size: str) -> int:
    try:
        capacity = parse_bytes(size)
    except ConfigError:
        raise ValueError(f"{size!r} is no size; write for example {kind}=8GiB") from None
    if not PAGE_BYTES <= capacity < 1 << 60:
        raise ValueError(f"{kind} must have from {format_bytes(PAGE_BYTES)} to {format_bytes(1 << 60)}")
    return capacity // PAGE_BYTES * PAGE_BYTES


def _nodes(text: str | None) -> tuple[int, ...]:
    nodes = []
    for part in text.split("+") if text else []:
        number = part.removeprefix("node")
        if not (number.isascii() and number.isdecimal() and int(number) <= _MAX_NODE):
            raise ValueError(f"{part!r} is no NUMA node; write node0 to node{_MAX_NODE}")
        nodes.append(int(number))
    return tuple(dict.fromkeys(nodes))
