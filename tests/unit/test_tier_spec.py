"""Tier specifications: what is written comes back, and each thing that cannot be is refused with what it should be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.tier_spec import DISK, TierSpec, parse_tiers
from tiermem.types import PAGE_BYTES

NODES = st.lists(st.integers(0, 63), max_size=4, unique=True).map(tuple)
PAGES = st.integers(1, (1 << 39) - 1)


@given(PAGES, NODES, st.none() | st.tuples(PAGES, NODES), st.lists(st.none() | PAGES, max_size=8))
def test_tiers_are_read_as_they_are_written(pages: int, nodes: tuple[int, ...], cxl: Any, hbm: list[Any]) -> None:
    specs = [TierSpec("hbm", size and size * PAGE_BYTES, (), f"npu:{i}") for i, size in enumerate(hbm)]
    specs.append(TierSpec("dram", pages * PAGE_BYTES, nodes))
    if cxl is not None:
        specs.append(TierSpec("cxl", cxl[0] * PAGE_BYTES, cxl[1]))
    wanted = (*specs, DISK)
    text = ",".join(map(str, wanted))
    assert parse_tiers(text) == wanted
    assert parse_tiers(text.split(",")) == wanted
    assert parse_tiers(specs) == wanted, "disk is there also if it is not named"
    assert parse_tiers(",".join(map(str, parse_tiers(text)))) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("dram=8GiB", (TierSpec("dram", 8 << 30), DISK)),
        (" dram=8388609 , disk ", (TierSpec("dram", 8 << 20), DISK)),
        ("dram=8MiB@node0,cxl=3.1GB@node1+2+node1", (
            TierSpec("dram", 8 << 20, (0,)), TierSpec("cxl", 3_100_000_000 // PAGE_BYTES * PAGE_BYTES, (1, 2)), DISK)),
        (["dram=2MiB,cxl=2MiB", "disk"], (TierSpec("dram", 2 << 20), TierSpec("cxl", 2 << 20), DISK)),
        ("hbm=24GiB@npu,hbm@cuda:12,hbm@cpu,dram=2MiB", (
            TierSpec("hbm", 24 << 30, (), "npu:0"), TierSpec("hbm", None, (), "cuda:12"),
            TierSpec("hbm", None, (), "cpu"), TierSpec("dram", 2 << 20), DISK)),
        ((TierSpec("dram", 2 << 20), "disk"), (TierSpec("dram", 2 << 20), DISK)),
    ],
)  # fmt: skip
def test_ways_to_write_tiers(value: object, wanted: tuple[TierSpec, ...]) -> None:
    assert parse_tiers(value) == wanted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "it must be text such as dram="), (None, "it must be text"), (b"dram=8GiB", "it must be text"),
        ([], "it must be text"), ([7], "its parts must be text"), ("", "'' is no tier"), 
        ("dram=8GiB,", "'' is no tier"),
        ("xbm=8GiB", "'xbm=8GiB' is no tier; write hbm=SIZE@DEVICE, dram=SIZE, cxl=SIZE@nodeN or disk"),
        ("DRAM=8GiB", "is no tier"),
        ("hbm=8GiB,dram=8GiB", "hbm needs a device: hbm=24GiB@npu:0"), ("hbm,dram=8GiB", "hbm needs a device"),
        ("hbm=@npu:0,dram=8GiB", "is no tier"), ("hbm=lots@npu:0", "'lots' is no size"),
        ("hbm=1MiB@npu:0", r"hbm must have from 2\.0 MiB to"), ("hbm=8GiB@npu:0", "the first tier must be dram"),
        ("hbm@cpu:0,dram=8GiB", "'cpu:0' is no device; write npu:0, cuda:0 or cpu"),
        ("hbm@npu:-1", "is no device"), ("hbm@npu:01", "is no device"), ("hbm@NPU:0", "is no device"),
        ("hbm@npu:0+npu:1", "is no device"), ("hbm@" + "n" * 33, "is no device"),
        ("hbm@npu:0,hbm@npu,dram=8GiB", "two hbm tiers are of npu:0; a device is one tier"),
        ("dram=8GiB,hbm@npu:0", "hbm tiers come before dram"),
        (",".join(f"hbm@npu:{i}" for i in range(9)) + ",dram=8GiB", "9 hbm tiers; there may be 8: .* bits of one byte"),
        ("dram", "dram needs a size: dram=8GiB"), ("dram@node0", "dram needs a size"), ("dram=", "is no tier"),
        ("dram=lots", "'lots' is no size"), ("dram=-8GiB", "'-8GiB' is no size"),
        ("dram=1MiB", r"dram must have from 2\.0 MiB to"), ("dram=2000000T", "dram must have from"),
        ("disk=8GiB", "neither a size nor a node"), ("dram=8GiB,disk@node1", "neither a size nor a node"),
        ("dram=8GiB@", "is no tier"), ("dram=8GiB@1-2", "'1-2' is no NUMA node; write node0 to node63"),
        ("dram=8GiB@node64", "is no NUMA node"), ("dram=8GiB@node0+", "'' is no NUMA node"),
        ("dram=8GiB@node²", "is no NUMA node"), ("dram=8GiB@nodenode1", "is no NUMA node"),
        ("disk", "the first tier must be dram"), ("cxl=8GiB", "the first tier must be dram"),
        ("cxl=8GiB,dram=8GiB", "the first tier must be dram"), ("dram=8GiB,dram=8GiB", "there is one of it"),
        ("dram=8GiB,disk,cxl=8GiB", "disk must be the last tier"), ("dram=8GiB,disk,disk", "disk must be the last"),
        ("dram=8GiB,cxl=8GiB@node1,cxl=8GiB@node2", r"there is one cxl tier; join its nodes: cxl=64GiB@node1\+node2"),
    ],
)  # fmt: skip
def test_what_is_refused(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_tiers(value)
