"""Data sources: words for every value, and the same words as perf's."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.perf_script import needs_perf, perf, record_faults
from tiermem.data_source import describe, level

NOT_AVAILABLE = 0x1E05080021
"""What software events carry."""

LOAD, HIT, MISS = 2, 2 << 5, 4 << 5


def number(value: int) -> int:
    return value << 33


@pytest.mark.parametrize(
    ("value", "text", "word"),
    [
        (NOT_AVAILABLE, "|OP N/A|LVL N/A|SNP N/A|TLB N/A|LCK N/A|BLK  N/A", ""),
        (0, "|OP No|LVL N/A|SNP N/A|TLB N/A|LCK No|BLK  N/A", ""),
        (LOAD | HIT | 8 << 5 | number(1) | 2 << 19 | 0x1A << 26,
         "|OP LOAD|LVL L1 hit|SNP None|TLB L1 or L2 hit|LCK No|BLK  N/A", "L1"),
        (LOAD | HIT | number(13) | 4 << 19, "|OP LOAD|LVL RAM hit|SNP Hit|TLB N/A|LCK No|BLK  N/A", "RAM"),
        (LOAD | HIT | number(13) | 1 << 37 | 1 << 38,
         "|OP LOAD|LVL Remote RAM hit|SNP Fwd|TLB N/A|LCK No|BLK  N/A", "remote RAM"),
        (LOAD | HIT | number(9) | 6 << 40, "|OP LOAD|LVL CXL hit|SNP N/A|TLB N/A|LCK No|BLK  Data Addr", "CXL"),
        (LOAD | MISS | 0x40 << 5 | 2 << 24, "|OP LOAD|LVL L3 miss|SNP N/A|TLB N/A|LCK Yes|BLK  N/A", "L3 miss"),
        (LOAD | HIT | 0x80 << 5, "|OP LOAD|LVL Local RAM hit|SNP N/A|TLB N/A|LCK No|BLK  N/A", "RAM"),
        (LOAD | HIT | number(3) | 1 << 37 | 2 << 43,
         "|OP LOAD|LVL Remote node, same socket L3 hit|SNP N/A|TLB N/A|LCK No|BLK  N/A", "remote cache"),
        (LOAD | HIT | number(12), "|OP LOAD|LVL LFB/MAB hit|SNP N/A|TLB N/A|LCK No|BLK  N/A", "LFB"),
        (LOAD | HIT | number(14), "|OP LOAD|LVL PMEM hit|SNP N/A|TLB N/A|LCK No|BLK  N/A", "PMEM"),
    ],
)  # fmt: skip
def test_words(value: int, text: str, word: str) -> None:
    assert describe(value) == text
    assert level(value) == word


def test_every_number_has_words() -> None:
    source = random.Random(7)
    for _ in range(3000):
        value = source.getrandbits(64)
        assert describe(value).count("|") == 6
        level(value)


def values_on_which_versions_agree(count: int) -> list[int]:
    """Levels in one of the two ways: of both, perf printed both until 6.2."""
    source, values = random.Random(1), []
    for i in range(count):
        value = 1 << source.randrange(5) | source.getrandbits(14) << 19 | source.getrandbits(2) << 38
        value |= source.getrandbits(3) << 40
        if i % 2:
            value |= (source.choice([0, 2, 4]) | 1 << source.randrange(3, 14)) << 5
        else:
            value |= source.choice([0, 2, 4]) << 5 | number(source.choice([1, 2, 3, 4, 9, 10, 11, 13, 14]))
            value |= source.randrange(2) << 37 | source.randrange(5) << 43
        values.append(value)
    return values


@needs_perf
def test_perf_prints_the_same(tmp_path: Path) -> None:
    path = record_faults(tmp_path / "perf.data")
    data, marker = bytearray(path.read_bytes()), NOT_AVAILABLE.to_bytes(8, "little")
    places = [match.start() for match in re.finditer(re.escape(marker), bytes(data))]
    assert len(places) > 50
    values = values_on_which_versions_agree(len(places))
    for place, value in zip(places, values, strict=True):
        data[place : place + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    printed = perf("script", "-i", str(path), "-F", "data_src")
    texts = {int(value, 16): text.rstrip() for value, text in re.findall(r"^\s*([0-9a-f]+) (\|.*)$", printed, re.M)}
    assert texts.keys() == set(values)
    for value, text in texts.items():
        # perf cuts what does not fit into its 100 bytes.
        assert describe(value).startswith(text)
        assert len(text) > 70 or describe(value).rstrip() == text
