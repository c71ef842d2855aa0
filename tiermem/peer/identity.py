"""Identity: who a peer is, by the certificate that it proved to own. Never decides what it may do (access does)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiermem.errors import AccessDenied

_MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer: `name` of its certificate, empty without TLS, and the `host` that it calls from."""

    name: str
    host: str

    def __str__(self) -> str:
        return f"{self.name} ({self.host})" if self.name else self.host

    @property
    def party(self) -> str:
        """What limits are counted by: certificates say who, addresses only where from."""
        return f"name {self.name}" if self.name else f"host {self.host}"


def certified_name(common_names: Sequence[str], dns_names: Sequence[str]) -> str:
    """The name of a certificate: its first common name or, without one, its first DNS name.

    Raises AccessDenied where it has neither, or one that cannot be written in a rule or a log.
    """
    name = next(filter(None, (*common_names, *dns_names)), "")
    if not name or len(name) > _MAX_CHARS or not name.isprintable():
        raise AccessDenied(
            f"the certificate has no usable name (common name {name[:80]!r}); issue one with a CN or a DNS name "
            "as its subjectAltName"
        )
    return name


def name_in(certificate: Mapping[str, Any]) -> str:
    """The name of a certificate as `ssl.SSLSocket.getpeercert` gives it. Raises AccessDenied."""
    subject = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return certified_name(subject, [value for key, value in certificate.get("subjectAltName", ()) if key == "DNS"])
