"""Jobs that need a process of their own: `python -m tests.npu.child_run JOB`. Each tells JSON lines.

torch and torch_npu come from the environment alone, as in a user's process: only the library path is set.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import warnings
from typing import Any

TOLD = "told: "


def tell(value: Any) -> None:
    print(TOLD + json.dumps(value), flush=True)  # torch_npu writes to the same output


def touch() -> None:
    """Reads through the address of device memory, as no program should."""
    import torch

    tensor = torch.zeros(64, dtype=torch.uint8).to("npu:0")
    tell("about to touch")
    ctypes.string_at(tensor.data_ptr(), 64)
    tell("touched")


def available() -> None:
    """What a plain `import torch` gives."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import torch

        npu = getattr(torch, "npu", None)
        tell(
            {
                "torch": torch.__version__,
                "npu": npu is not None and npu.is_available(),
                "count": npu.device_count() if npu else 0,
                "warnings": [str(one.message) for one in said],
            }
        )


def opened() -> None:
    """What `open_device` gives or raises."""
    from tiermem.device import open_device

    try:
        device = open_device("npu:0")
        tell([type(device).__name__, device.name])
    except Exception as error:
        tell([type(error).__name__, str(error)])


def imported() -> None:
    """What `import torch` raises, and `import torch_npu`."""
    tell({module: _fault_of_import(module) for module in ("torch", "torch_npu")})


def _fault_of_import(module: str) -> list[str] | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    jobs = {job.__name__: job for job in (touch, available, opened, imported)}
    jobs[sys.argv[1]]()
