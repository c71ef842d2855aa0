"""The one door to the native core: opens it, checks every status, and wraps handles. Holds no state of its own.

A wrapper owns its native handle together with every buffer and every call in progress over it: `close` gives up the
wrapper's share, and the handle is released with the last of them. So closing twice, closing while another thread is
inside, and closing under a live array are all safe; using a closed wrapper raises Closed.
"""

from tiermem._native.door import E_ALIGN, E_RANGE, E_SEALED, E_SHORT, PAGE_BYTES, check, ffi, lib, version
from tiermem._native.files import Reader, Staging
from tiermem._native.memory import (
    Access,
    Range,
    RangeReference,
    Segment,
    Stock,
    copy,
    tmpfs_detached,
    tmpfs_mount,
    tmpfs_resize,
    tmpfs_unmount,
)
from tiermem._native.numa import MOVED, NODE_ABSENT, NODE_MIXED, WAS_THERE, Numa, Probe
from tiermem._native.pages import HUGE, PRESENT, PRIVATE, Pagemap
from tiermem._native.perf import RECORD, Count, Decoded, Decoder, Event, Layout, Ring, Spe, decode_spe
from tiermem._native.sweep import FOREIGN, HELD, PINNED, Sweep, Swept

__all__ = [
    "E_ALIGN", "E_RANGE", "E_SEALED", "E_SHORT", "HUGE", "PAGE_BYTES", "PRESENT", "PRIVATE",
    "FOREIGN", "HELD", "PINNED",
    "Access", "Pagemap", "Range", "RangeReference", "Reader", "Segment", "Staging", "Stock", "Sweep", "Swept",
    "MOVED", "NODE_ABSENT", "NODE_MIXED", "WAS_THERE", "Numa", "Probe",
    "RECORD", "Count", "Decoded", "Decoder", "Event", "Layout", "Ring", "Spe", "decode_spe",
    "check", "copy", "ffi", "lib", "tmpfs_detached", "tmpfs_mount", "tmpfs_resize", "tmpfs_unmount", "version",
]  # fmt: skip
