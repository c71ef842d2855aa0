"""Data sources: the number that a hardware sample gives for what served an access, as words. Pure; never samples.

The number is `union perf_mem_data_src` of linux/perf_event.h, little-endian. What CPUs report is coarse: an Intel CPU
counts CXL memory as RAM, and an access that hardware prefetched is a hit of the cache where it found the line.
"""

from __future__ import annotations

_OPERATIONS = ("N/A", "LOAD", "STORE", "PFETCH", "EXEC")
_LEVEL_BITS = ("N/A", "HIT", "MISS", "L1", "LFB/MAB", "L2", "L3", "Local RAM", "Remote RAM (1 hop)",
               "Remote RAM (2 hops)", "Remote Cache (1 hop)", "Remote Cache (2 hops)", "I/O", "Uncached")  # fmt: skip
_SHORT = ("", "", "", "L1", "LFB", "L2", "L3", "RAM", "remote RAM", "remote RAM", "remote cache", "remote cache", "I/O",
          "uncached")  # fmt: skip
_LEVEL_NUMBERS = {8: "Uncached", 9: "CXL", 10: "I/O", 11: "Any cache", 12: "LFB/MAB", 13: "RAM", 14: "PMEM"}
_HOPS = ("", "core, same node ", "node, same socket ", "socket, same board ", "board ")
_SNOOPS = ("N/A", "None", "Hit", "Miss", "HitM")
_SNOOPS_MORE = ("Fwd", "Peer")
_TLBS = ("N/A", "HIT", "MISS", "L1", "L2", "Walker", "Fault")
_BLOCKS = ("Data", "Addr")
_HIT, _MISS = 2, 4
_NO_NUMBER = (0, 15)


def _operation(value: int) -> int:
    return value & 0x1F


def _level_bits(value: int) -> int:
    return value >> 5 & 0x3FFF


def _level_number(value: int) -> int:
    return value >> 33 & 0xF


def _remote(value: int) -> bool:
    return bool(value >> 37 & 1)


def _hops(value: int) -> int:
    return value >> 43 & 7


def _set_in(bits: int, names: tuple[str, ...]) -> list[str]:
    return [name for i, name in enumerate(names) if bits >> i & 1]


def _verdict(bits: int) -> str:
    """The suffix that a level's or a TLB's two verdict bits make."""
    return (" hit" if bits & _HIT else "") + (" miss" if bits & _MISS else "")


def _level_text(value: int) -> str:
    bits, number = _level_bits(value), _level_number(value)
    verdict = " hit" if bits & _HIT else " miss" if bits & _MISS else ""
    if number not in _NO_NUMBER:
        remote = "Remote " if _remote(value) else ""
        hops = _HOPS[_hops(value)] if _hops(value) < len(_HOPS) else ""
        return f"{remote}{hops}{_LEVEL_NUMBERS.get(number, f'L{number}')}{verdict}"
    names = _set_in(bits & ~(1 | _HIT | _MISS), _LEVEL_BITS)
    return " or ".join(names) + verdict if names else "N/A"


def describe(value: int) -> str:
    """What `perf script -F data_src` prints behind the number: operation, level, snoop, TLB, lock, blocked.

    As perf since 6.2: of the two ways in which a level is given, only the newer is printed where both are.
    """
    operation = next(iter(_set_in(_operation(value), _OPERATIONS)), "No")
    snoop = " or ".join(_set_in(value >> 19 & 0x1F, _SNOOPS) + _set_in(value >> 38 & 3, _SNOOPS_MORE)) or "N/A"
    tlb_bits, lock, blocked = value >> 26 & 0x7F, value >> 24 & 3, value >> 40 & 7
    tlb = (" or ".join(_set_in(tlb_bits & ~(_HIT | _MISS), _TLBS)) or "N/A") + _verdict(tlb_bits)
    locked = "N/A" if lock & 1 else "Yes" if lock & 2 else "No"
    blocks = " N/A" if blocked & 1 else "".join(f" {name}" for name in _set_in(blocked >> 1, _BLOCKS)) or " N/A"
    return f"|OP {operation}|LVL {_level_text(value)}|SNP {snoop}|TLB {tlb}|LCK {locked}|BLK {blocks}"


def level(value: int) -> str:
    """What served the access, in a word or two: `L1`, `L3`, `LFB`, `RAM`, `remote RAM`, `remote cache`, `CXL`, `PMEM`.

    Empty where the hardware did not tell; `L1 miss` where it only told that.
    """
    bits, number = _level_bits(value), _level_number(value)
    if number not in _NO_NUMBER:
        name = {8: "uncached", 11: "cache", 12: "LFB"}.get(number) or _LEVEL_NUMBERS.get(number, f"L{number}")
        if _remote(value):
            name = "remote cache" if number < 8 or number == 11 else f"remote {name}"
    else:
        names = _set_in(bits & ~(1 | _HIT | _MISS), _SHORT)
        name = names[0] if names else ""
    return f"{name} miss" if name and bits & _MISS and not bits & _HIT else name
