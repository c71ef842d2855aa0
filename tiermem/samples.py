"""Samples: what a sampler of addresses saw, one row each, as numpy columns. Vocabulary; never reads a ring or a file.

Rows are those of `tm_sample` in the native core; a column that an event does not deliver is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SAMPLE = np.dtype(
    [
        ("ip", "<u8"), ("time", "<u8"), ("addr", "<u8"), ("phys_addr", "<u8"), ("id", "<u8"), ("stream_id", "<u8"),
        ("period", "<u8"), ("data_src", "<u8"), ("transaction", "<u8"), ("cgroup", "<u8"), ("data_page_size", "<u8"),
        ("code_page_size", "<u8"), ("pid", "<u4"), ("tid", "<u4"), ("cpu", "<u4"), ("weight", "<u4"),
        ("weight2", "<u2"), ("weight3", "<u2"), ("misc", "<u2"), ("event", "<u2"),
    ]
)  # fmt: skip
"""`time` in nanoseconds; `event` is the index of the event in its ring set or file; `data_src` is perf_mem_data_src."""

Samples = npt.NDArray[np.void]
"""An array of dtype SAMPLE."""

IP, TID, TIME, ADDR, READ, CALLCHAIN, ID, CPU, PERIOD, STREAM_ID, RAW, BRANCH_STACK, REGS_USER, STACK_USER, WEIGHT, \
    DATA_SRC, IDENTIFIER, TRANSACTION, REGS_INTR, PHYS_ADDR, AUX, CGROUP, DATA_PAGE_SIZE, CODE_PAGE_SIZE, \
    WEIGHT_STRUCT = (1 << bit for bit in range(25))  # fmt: skip
"""Bits of perf_event_attr.sample_type."""
