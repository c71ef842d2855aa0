"""Address: where another host's pool listens, and which model of it is meant. Pure text; never resolves a name.

HOST:PORT                 a pool; the host of an IPv6 address is in brackets: [::1]:7070
tiermem://HOST:PORT/NAME  a model of it; what a URL cannot hold of the name is percent-encoded
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import quote, unquote

SCHEME = "tiermem://"
_FOREIGN = "p"


@dataclass(frozen=True, slots=True)
class Address:
    """A pool's control port. Port 0 of a listener is any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this host can be meant. A name other than `localhost` can mean any."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class ModelAddress:
    """A model of another host's pool."""

    pool: Address
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.pool}/{quote(self.name, safe='/@:')}"


def parse_address(text: str) -> Address:
    """The address of `HOST:PORT`. Raises ValueError saying what is wrong."""
    if "://" in text:
        raise ValueError("it must be HOST:PORT alone, without a scheme")
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"{host!r} in brackets is no IPv6 address") from None
    elif ":" in host:
        raise ValueError("the host of an IPv6 address must be in brackets, as in [::1]:7070")
    if not (colon and host) or any(c.isspace() or not c.isprintable() or c in "/@[]," for c in host):
        raise ValueError("it must be HOST:PORT")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"the port {port!r} must be a number below 65536")
    return Address(host, int(port))


def is_remote(path: str) -> bool:
    """Whether a model's path is its address at another host's pool."""
    return path.startswith(SCHEME)


def foreign(identity: str) -> str:
    """What a model of that identity at another host goes by here. No peer can name one of this host's own: those are
    hexadecimal."""
    return identity if identity.startswith(_FOREIGN) else _FOREIGN + identity


def native(identity: str) -> str:
    """What a model of that foreign identity goes by on the host that has its files."""
    return identity.removeprefix(_FOREIGN)


def parse_model(text: str) -> ModelAddress:
    """The model of `tiermem://HOST:PORT/NAME`. Raises ValueError saying what is wrong."""
    place, slash, name = text.removeprefix(SCHEME).partition("/")
    if not text.startswith(SCHEME) or not (slash and name):
        raise ValueError(f"it must be {SCHEME}HOST:PORT/NAME")
    try:
        return ModelAddress(parse_address(place), unquote(name, errors="strict"))
    except ValueError as error:
        raise ValueError(f"{error}; write {SCHEME}HOST:PORT/NAME") from None
