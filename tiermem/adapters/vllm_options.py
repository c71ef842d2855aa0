"""Options of `--load-format tiermem`, as `--model-loader-extra-config` gives them. Reads them, and acts on none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiermem.errors import ConfigError

TABLE: Mapping[str, tuple[type, str]] = {
    "address": (str, "the daemon's address: unix:PATH or HOST:PORT; default TIERMEM_ADDRESS, then the host's socket"),
    "image": (str, "name of the image to use; made if it is not there, an error if it was made from other inputs"),
    "fallback": (bool, "what the pool cannot serve is loaded by the engine itself, with one warning; else an error"),
}
"""Key -> its type and what it means."""


@dataclass(frozen=True, slots=True)
class Options:
    """Checked values."""

    address: str | None = None
    image: str | None = None
    fallback: bool = True


def options_of(extra: Any) -> Options:
    """Raises ConfigError for an unknown key, with the nearest known one, and for a value of another type."""
    if not isinstance(extra, Mapping):
        raise ConfigError(f"model_loader_extra_config is a {type(extra).__name__}; give a JSON object, such as {{}}")
    for key, value in extra.items():
        if key not in TABLE:
            near = difflib.get_close_matches(str(key), TABLE, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(TABLE)}"
            raise ConfigError(f"unknown option {key!r} in model_loader_extra_config; {advice}")
        wanted = TABLE[key][0]
        if not isinstance(value, wanted):
            kind = "true or false" if wanted is bool else "text"
            raise ConfigError(f"option {key!r} in model_loader_extra_config is {value!r}; it must be {kind}")
    return Options(**extra)
