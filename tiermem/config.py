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
from tiermem import option_kind as kind
from tiermem.errors import ConfigError
from tiermem.option_kind import Kind
from tiermem.peer.access import RULE_EXAMPLE, AccessRule, parse_rules
from tiermem.peer.address import Address
from tiermem.tier_spec import DISK, EXAMPLE, TierSpec, parse_tiers
from tiermem.types import PAGE_BYTES, TENSOR_ALIGN

Environ = Mapping[str, str]
Backing = Literal["auto", "tmpfs", "hugetlb", "shm", "memfd"]
Sampling = Literal["auto", "perf", "present", "accessed", "declared", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]

SUN_PATH_BYTES = 107
"""Longest path of a Unix socket: `sun_path` is 108 bytes with its terminator, unix(7)."""

DESCRIPTOR_ENDING = ".fd"
"""What the path of the descriptor socket has beyond that of the control socket."""


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
    listen: Address | None
    data_port: int
    peer: tuple[Address, ...]
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    insecure: bool
    allow: tuple[AccessRule, ...]
    peer_connections: int
    peer_fetches: int
    transport: str
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


OPTIONS: tuple[Option, ...] = (
    Option("address", Kind("ADDRESS", "unix:/run/tiermem/tiermem.sock", kind.as_address),
           lambda environ: f"unix:{runtime_dir(environ)}/tiermem.sock", "--address", "TIERMEM_ADDRESS",
           "Where the daemon listens: unix:PATH or HOST:PORT."),
    Option("state", kind.DIRECTORY, lambda environ: runtime_dir(environ) / "pool", "--state", "TIERMEM_STATE",
           "Directory of the pool's segments and catalog."),
    Option("digests", kind.DIRECTORY, _default_digests, "--digests", "TIERMEM_DIGESTS",
           "Directory where digests of checkpoints are kept."),
    Option("tier", Kind("TIER", EXAMPLE, parse_tiers, many=True), _default_tiers, "--tier", "TIERMEM_TIER",
           "A tier, fastest first: hbm=SIZE@npu:0, dram=SIZE, cxl=SIZE@nodeN, disk; half of the memory as DRAM by "
           "default."),
    Option("spare", kind.size("4GiB", 0), lambda environ: 0, "--spare", "TIERMEM_SPARE",
           "Memory kept prefaulted ahead of need."),
    Option("backing", kind.choice(*get_args(Backing)), lambda environ: "auto", "--backing", "TIERMEM_BACKING",
           "What segments are made of; auto takes the fastest this host allows."),
    Option("staging", kind.size("64MiB", 1 << 20, 1 << 30, TENSOR_ALIGN), lambda environ: 64 << 20,
           "--staging", "TIERMEM_STAGING", "Memory through which files are read, of all threads."),
    Option("read_threads", kind.count(1, 64), lambda environ: 12, "--read-threads", "TIERMEM_READ_THREADS",
           "Threads that read files; they mostly wait."),
    Option("policy", Kind("POLICY", "lru", kind.as_text), lambda environ: "lru", "--policy", "TIERMEM_POLICY",
           "Name of a policy, or path of a policy file."),
    Option("policy_budget", Kind("DURATION", "200ms", kind.as_seconds, "seconds"), lambda environ: 0.2,
           "--policy-budget", None, "Time that a policy may take for a plan."),
    Option("quota", kind.size("1GiB", PAGE_BYTES), lambda environ: 1 << 30, "--quota", None,
           "Bytes that may move between memory tiers in a second."),
    Option("sampler", kind.choice(*get_args(Sampling)), lambda environ: "auto", "--sampler", None,
           "How the use of pages is observed; auto takes what tells most on this host."),
    Option("sample_epoch", Kind("DURATION", "100ms", kind.as_epoch, "seconds"), lambda environ: 0.1,
           "--sample-epoch", None, "How often pages are looked at."),
    Option("sample_budget", Kind("SHARE", "1%", kind.as_share), lambda environ: 0.01, "--sample-budget", None,
           "Part of a client's CPU time that observing may cost it."),
    Option("metrics_port", Kind("[HOST:]PORT", "9464", kind.as_listener), lambda environ: "", "--metrics-port", None,
           "Where Prometheus finds metrics; on the loopback unless a host is named."),
    Option("listen", Kind("HOST:PORT", "0.0.0.0:7070", kind.as_pool), lambda environ: None, "--listen", None,
           "Where other hosts' pools find this one; without TLS on the loopback only."),
    Option("data_port", kind.count(0, 65535), lambda environ: 0, "--data-port", None,
           "Port, beside that of --listen, through which peers get weights; 0 is any that is free."),
    Option("peer", kind.pools("--peer"), lambda environ: (), "--peer", None,
           "A pool that has models which this one lacks; may be repeated."),
    Option("tls_cert", kind.FILE, lambda environ: None, "--tls-cert", None,
           "Certificate of this pool with its chain (PEM), shown to peers that call and that are called."),
    Option("tls_key", kind.FILE, lambda environ: None, "--tls-key", None, "Private key of the certificate (PEM)."),
    Option("tls_ca", kind.FILE, lambda environ: None, "--tls-ca", None, "The CA whose certificates peers have (PEM)."),
    Option("insecure", kind.SWITCH, lambda environ: False, "--insecure", None,
           "Talk to other hosts' pools without TLS: whoever reaches the network reads and alters weights."),
    Option("allow", Kind("CN=PATTERN", RULE_EXAMPLE, parse_rules, many=True), lambda environ: (), "--allow", None,
           "A peer, by its certificate's name, and models that it may read; may be repeated. By default all."),
    Option("peer_connections", kind.count(1, 65536), lambda environ: 256, "--peer-connections", None,
           "Connections that peers may have to this pool, of each kind."),
    Option("peer_fetches", kind.count(1, 4096), lambda environ: 16, "--peer-fetches", None,
           "Models that one peer may fetch from this pool at once."),
    Option("transport", kind.choice("auto", "tcp"), lambda environ: "auto", "--transport", None,
           "How weights come from peers: auto takes RDMA where both ends can."),
    Option("grace", Kind("DURATION", "30s", kind.as_seconds, "seconds"), lambda environ: 30.0,
           "--grace", "TIERMEM_GRACE", "Time without eviction after segments were adopted."),
    Option("keep", kind.SWITCH, lambda environ: False, "--keep", "TIERMEM_KEEP",
           "Leave the segments for the next daemon at exit."),
    Option("log_level", kind.choice(*get_args(LogLevel)), lambda environ: "info", "--log-level", "TIERMEM_LOG_LEVEL",
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
