"""tiermem: a pool that owns model weights across memory tiers and hands them to inference engines without a copy.

    with tiermem.open("path-or-name") as model:    # the host's daemon if it answers, else a pool of this process
        model["name"]                              # numpy array over shared memory

`tiermem.connect(address)` is a client of a daemon, `tiermem.Pool(config)` a pool of this process; `tiermem.torch` and
`tiermem.numpy` load as safetensors does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiermem.client import Client as Client
    from tiermem.client import Client as connect
    from tiermem.config import load_config as load_config
    from tiermem.embedded import EmbeddedPool as Pool
    from tiermem.errors import TiermemError as TiermemError
    from tiermem.model import Model as Model
    from tiermem.opening import open_model as open

__version__ = "0.1.0"

_PUBLIC = {
    "open": ("tiermem.opening", "open_model"),
    "connect": ("tiermem.client", "Client"),
    "Client": ("tiermem.client", "Client"),
    "Pool": ("tiermem.embedded", "EmbeddedPool"),
    "Model": ("tiermem.model", "Model"),
    "TiermemError": ("tiermem.errors", "TiermemError"),
    "load_config": ("tiermem.config", "load_config"),
}

__all__ = ["Client", "Model", "Pool", "TiermemError", "__version__", "connect", "load_config", "open"]


def __getattr__(name: str) -> Any:
    # Resolved at first use, so that `tiermem --help` imports neither numpy, grpc nor the native core.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tiermem' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
