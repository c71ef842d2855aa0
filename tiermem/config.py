"""The option table: every flag, variable and file key that exists is one row of OPTIONS.

Owns names, types, defaults and where a value came from. Never opens a socket, creates a directory or allocates memory.

A value comes from the first of: flag, TIERMEM_* variable, ./tiermem.toml, $XDG_CONFIG_HOME/tiermem/config.toml,
/etc/tiermem/tiermem.toml, default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tiermem import host
from tiermem.errors import ConfigError
from tiermem.tier_spec import DISK, EXAMPLE, TierSpec, parse_tiers
from tiermem.types import PAGE_BYTES, TENSOR_ALIGN
from tiermem.units import format_bytes, parse_bytes, parse_seconds

Environ = Mapping[str, str]
Backing = Literal["auto", "tmpfs", "hugetlb", "shm", "memfd"]
Sampling = Literal["auto", "perf", "present", "accessed", "declared", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]

SUN_PATH_BYTES = 107
"""Longest path of a Unix socket: `sun_path` is 108 bytes with its terminator, unix(7)."""

DESCRIPTOR_ENDING = ".fd"
"""What the path of the descriptor socket has beyond that of the control socket."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an option's value is. `read` turns text, or a typed value of a file or a caller, into it or raises
    ValueError with what is wrong; `unit` is that of the number it returns. `many`: the flag may be repeated."""

    noun: str
    example: str
    read: Callable[[object], object]
    unit: str | None = None
    many: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One row. `default` is computed from the environment; `env` may be None, there are at most 12 variables."""

    key: str
    kind: Kind
    default: Callable[[Environ], object]
    flag: str
    env: str | None
    help: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from: a flag, a variable, a file's path, or `default`."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Config:
    """The values of all options; sizes in bytes, times in seconds."""

    address: str
    state: Path
    digests: Path
    tier: tuple[TierSpec, ...]
    spare: int
    backing: Backing
    staging: int
    read_threads: int
    policy: str
    policy_budget: float
    quota: int
    sampler: Sampling
    sample_epoch: float
    sample_budget: float
    metrics_port: str
    grace: float
    keep: bool
    log_level: LogLevel


def load_config(
    flags: Mapping[str, object] | None = None,
    environ: Environ = os.environ,
    files: Iterable[str | Path] | None = None,
) -> Config:
    """The configuration of this process. `flags` maps keys to text or typed values; None means not given.

    `files`, most important first, replace the three standard ones and must exist.
    Raises ConfigError for an unknown key, an unusable value, or a file that cannot be read.
    """
    return Config(**{key: setting.value for key, setting in origins(flags, environ, files).items()})


def origins(
    flags: Mapping[str, object] | None = None,
    environ: Environ = os.environ,
    files: Iterable[str | Path] | None = None,
) -> dict[str, Setting]:
    """As load_config, but each value with where it came from, in table order."""
    paths = _standard_files(environ) if files is None else [Path(path) for path in files]
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    _check_keys(flags, "flags")
    _check_variables(environ)
    tables = [(str(path), _read_file(path)) for path in paths]
    return {option.key: _resolve(option, flags, environ, tables) for option in OPTIONS}


def value_of(key: str, environ: Environ = os.environ) -> Any:
    """The value of one option, without working out the others. Raises ConfigError."""
    tables = [(str(path), _read_file(path)) for path in _standard_files(environ)]
    return _resolve(BY_KEY[key], {}, environ, tables).value


def socket_path(address: str) -> Path:
    """The path of a `unix:PATH` address. Raises ConfigError for HOST:PORT and for a path no Unix socket can have."""
    scheme, _, path = address.partition(":")
    if scheme != "unix":
        raise ConfigError(f"address {address!r}: this version serves Unix sockets only; write unix:/PATH")
    length = len(os.fsencode(path + DESCRIPTOR_ENDING))
    if length > SUN_PATH_BYTES:
        raise ConfigError(
            f"socket path {path!r} is {length} bytes, a Unix socket's may be {SUN_PATH_BYTES}; "
            "choose a shorter one with --address unix:PATH or TIERMEM_ADDRESS"
        )
    return Path(path)


def descriptor_path(socket: Path) -> Path:
    """Where the daemon whose control socket is `socket` hands out descriptors."""
    return socket.with_name(socket.name + DESCRIPTOR_ENDING)


def runtime_dir(environ: Environ = os.environ) -> Path:
    """Where sockets and segments are by default: gone after a reboot, private to this user."""
    if base := environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "tiermem")
    return Path("/run/tiermem") if os.geteuid() == 0 else Path(f"/tmp/tiermem-{os.geteuid()}")


def _default_digests(environ: Environ) -> Path:
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base, "tiermem", "digests")
    return Path("/var/cache/tiermem/digests") if os.geteuid() == 0 else Path.home() / ".cache/tiermem/digests"


def _default_tiers(environ: Environ) -> tuple[TierSpec, ...]:
    half = max(host.memory().usable_bytes // 2 // PAGE_BYTES, 1) * PAGE_BYTES
    return (TierSpec("dram", half), DISK)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it must be text and not empty")
    return value


def _path(value: object) -> Path:
    text = os.fspath(value) if isinstance(value, os.PathLike) else _text(value)
    return Path(os.path.abspath(os.path.expanduser(text)))


def _address(value: object) -> str:
    text = _text(value)
    place, _, tail = text.rpartition(":")
    if text.startswith("unix:/") or (place and place != "unix" and tail.isdecimal() and 0 < int(tail) < 1 << 16):
        return text
    raise ValueError("it must be unix: with an absolute path, or HOST:PORT")


def _quantity(value: object, parse: Callable[[str], float], noun: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        return parse(_text(value))
    except ValueError:
        raise ValueError(f"it must be {noun}") from None


def _size(example: str, low: int, high: int = 1 << 60, step: int = PAGE_BYTES) -> Kind:
    """Bytes from `low` to `high`, rounded down to whole `step`s: `3.1GB` is no whole number of pages."""

    def read(value: object) -> int:
        size = int(_quantity(value, parse_bytes, "a size"))
        if not low <= size <= high:
            raise ValueError(f"it must be from {format_bytes(low)} to {format_bytes(high)}")
        return size - size % step

    return Kind("SIZE", example, read, "bytes")


def _count(low: int, high: int) -> Kind:
    def read(value: object) -> int:
        count = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if not isinstance(count, int) or isinstance(count, bool) or not low <= count <= high:
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return count

    return Kind("COUNT", str(low), read)


def _seconds(value: object) -> float:
    seconds = _quantity(value, parse_seconds, "a duration")
    if not 0 <= seconds < float("inf"):
        raise ValueError("it must be finite and not negative")
    return float(seconds)


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError("it must be true or false")
    return known[value.lower()]


def _choice(*names: str) -> Kind:
    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"it must be one of {', '.join(names)}")
        return str(value)

    return Kind("|".join(names), names[0], read)


def _epoch(value: object) -> float:
    seconds = _seconds(value)
    if not 0.01 <= seconds <= 60:
        raise ValueError("it must be from 10ms to 60s")
    return seconds


def _share(value: object) -> float:
    text = value.strip() if isinstance(value, str) else value
    scale = 1.0
    if isinstance(text, str) and text.endswith("%"):
        text, scale = text.removesuffix("%"), 0.01
    try:
        share = float(text) * scale if isinstance(text, str | int | float) else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1 or isinstance(value, bool):
        raise ValueError("it must be a share, above 0% and up to 100%")
    return share


def _listener(value: object) -> str:
    """`` (none), PORT on the loopback, or HOST:PORT."""
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else "?"
    host_name, _, port = text.rpartition(":")
    if text and not (port.isdecimal() and int(port) < 1 << 16):
        raise ValueError("it must be a port, or HOST:PORT")
    return f"{host_name or '127.0.0.1'}:{port}" if text else ""


_PATH = Kind("DIRECTORY", "/var/lib/tiermem", _path)

OPTIONS: tuple[Option, ...] = (
    Option("address", Kind("ADDRESS", "unix:/run/tiermem/tiermem.sock", _address),
           lambda environ: f"unix:{runtime_dir(environ)}/tiermem.sock", "--address", "TIERMEM_ADDRESS",
           "Where the daemon listens: unix:PATH or HOST:PORT."),
    Option("state", _PATH, lambda environ: runtime_dir(environ) / "pool", "--state", "TIERMEM_STATE",
           "Directory of the pool's segments and catalog."),
    Option("digests", _PATH, _default_digests, "--digests", "TIERMEM_DIGESTS",
           "Directory where digests of checkpoints are kept."),
    Option("tier", Kind("TIER", EXAMPLE, parse_tiers, many=True), _default_tiers, "--tier", "TIERMEM_TIER",
           "A tier, fastest first: dram=SIZE, cxl=SIZE@nodeN, disk; half of the memory as DRAM by default."),
    Option("spare", _size("4GiB", 0), lambda environ: 0, "--spare", "TIERMEM_SPARE",
           "Memory kept prefaulted ahead of need."),
    Option("backing", _choice(*get_args(Backing)), lambda environ: "auto", "--backing", "TIERMEM_BACKING",
           "What segments are made of; auto takes the fastest this host allows."),
    Option("staging", _size("64MiB", 1 << 20, 1 << 30, TENSOR_ALIGN), lambda environ: 64 << 20,
           "--staging", "TIERMEM_STAGING", "Memory through which files are read, of all threads."),
    Option("read_threads", _count(1, 64), lambda environ: 12, "--read-threads", "TIERMEM_READ_THREADS",
           "Threads that read files; they mostly wait."),
    Option("policy", Kind("POLICY", "lru", _text), lambda environ: "lru", "--policy", "TIERMEM_POLICY",
           "Name of a policy, or path of a policy file."),
    Option("policy_budget", Kind("DURATION", "200ms", _seconds, "seconds"), lambda environ: 0.2,
           "--policy-budget", None, "Time that a policy may take for a plan."),
    Option("quota", _size("1GiB", PAGE_BYTES), lambda environ: 1 << 30, "--quota", None,
           "Bytes that may move between memory tiers in a second."),
    Option("sampler", _choice(*get_args(Sampling)), lambda environ: "auto", "--sampler", None,
           "How the use of pages is observed; auto takes what tells most on this host."),
    Option("sample_epoch", Kind("DURATION", "100ms", _epoch, "seconds"), lambda environ: 0.1, "--sample-epoch", None,
           "How often pages are looked at."),
    Option("sample_budget", Kind("SHARE", "1%", _share), lambda environ: 0.01, "--sample-budget", None,
           "Part of a client's CPU time that observing may cost it."),
    Option("metrics_port", Kind("[HOST:]PORT", "9464", _listener), lambda environ: "", "--metrics-port", None,
           "Where Prometheus finds metrics; on the loopback unless a host is named."),
    Option("grace", Kind("DURATION", "30s", _seconds, "seconds"), lambda environ: 30.0, "--grace", "TIERMEM_GRACE",
           "Time without eviction after segments were adopted."),
    Option("keep", Kind("SWITCH", "true", _switch), lambda environ: False, "--keep", "TIERMEM_KEEP",
           "Leave the segments for the next daemon at exit."),
    Option("log_level", _choice(*get_args(LogLevel)), lambda environ: "info", "--log-level", "TIERMEM_LOG_LEVEL",
           "Least severe messages that are logged."),
)  # fmt: skip
"""The table. `tiermem doctor --config` prints it."""

BY_KEY: Mapping[str, Option] = {option.key: option for option in OPTIONS}


def _resolve(
    option: Option, flags: Mapping[str, object], environ: Environ, tables: Iterable[tuple[str, Mapping[str, object]]]
) -> Setting:
    if option.key in flags:
        return _setting(option, flags[option.key], option.flag)
    # An empty variable is one that a script could not unset.
    if option.env and environ.get(option.env):
        return _setting(option, environ[option.env], option.env)
    for origin, table in tables:
        if option.key in table:
            return _setting(option, table[option.key], origin)
    return Setting(option.default(environ), "default")


def _setting(option: Option, raw: object, origin: str) -> Setting:
    try:
        return Setting(option.kind.read(raw), origin)
    except ValueError as error:
        example = option.kind.example
        raise ConfigError(f"{option.key} = {raw!r} ({origin}): {error}; for example {option.key} = {example}") from None


def _standard_files(environ: Environ) -> list[Path]:
    home = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    candidates = (Path("tiermem.toml"), home / "tiermem/config.toml", Path("/etc/tiermem/tiermem.toml"))
    # Not Path.is_file, which raises where a directory may not be entered: HOME may be that of another user.
    return [path for path in candidates if os.path.isfile(path)]


def _read_file(path: Path) -> dict[str, object]:
    try:
        table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}; name one that can be read") from error
    except ValueError as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from error
    _check_keys(table, str(path))
    return table


def _check_keys(keys: Iterable[str], origin: str) -> None:
    for key in keys:
        if key not in BY_KEY:
            near = difflib.get_close_matches(key, BY_KEY, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(BY_KEY)}"
            raise ConfigError(f"unknown option {key!r} in {origin}; {advice}")


def _check_variables(environ: Environ) -> None:
    """A variable that is nearly one of ours is a typo. Others with our prefix are not ours to judge: Kubernetes sets
    TIERMEM_PORT and TIERMEM_SERVICE_HOST in every pod beside a service called tiermem."""
    known = {option.env.removeprefix("TIERMEM_"): option.env for option in OPTIONS if option.env}
    for name in environ:
        suffix = name.removeprefix("TIERMEM_")
        if suffix != name and suffix not in known:
            near = difflib.get_close_matches(suffix, known, n=1, cutoff=0.75)
            if near:
                raise ConfigError(f"unknown variable {name}; did you mean {known[near[0]]}?")
