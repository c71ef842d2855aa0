"""Credentials: what a certificate, its key and a CA are worth together, as their files were at one time.

Files that could not work are refused here, before anybody connects. Never opens a connection, and never looks again.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tiermem.errors import AccessDenied, ConfigError
from tiermem.peer.identity import name_in

_Certificate = Mapping[str, Any]
"""A certificate as `ssl.SSLSocket.getpeercert` gives it."""


class Pem(NamedTuple):
    """Contents of the three files."""

    key: bytes
    certificate: bytes
    authority: bytes


@dataclass(frozen=True, slots=True)
class Credentials:
    """The contexts: `server` demands a certificate of the CA, `client` checks one and its host name. `name`: who we
    are to peers. `certificate_end` and `authority_end`: when these are out of date, in seconds of `time.time`."""

    pem: Pem
    server: ssl.SSLContext
    client: ssl.SSLContext
    name: str
    certificate_end: float
    authority_end: float


def read_credentials(cert_path: Path, key_path: Path, ca_path: Path) -> Credentials:
    """Raises ConfigError naming the file that cannot be used: missing, no PEM, a key of another certificate, out of
    date, of another CA."""
    cert, key, ca = _read("--tls-cert", cert_path), _read("--tls-key", key_path), _read("--tls-ca", ca_path)
    chain, authorities = _issuers("--tls-cert", cert_path, cert), _issuers("--tls-ca", ca_path, ca)
    server, client = (_context(is_client, cert_path, key_path, ca) for is_client in (False, True))
    try:
        own = _handshake(server, client)
        name = name_in(own)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        raise ConfigError(
            f"--tls-cert {cert_path} cannot be used with --tls-ca {ca_path}: {reason}; peers would refuse it: issue "
            "one by that CA, in date, for server and client"
        ) from error
    except AccessDenied as error:
        raise ConfigError(f"--tls-cert {cert_path}: {error}") from error
    chain.append(own)
    # A file may hold an old CA beside the new one; that which issued ours counts, and of one that was renewed the last.
    ours = {certificate["issuer"] for certificate in chain}
    issuers = [authority for authority in authorities if authority["subject"] in ours] or authorities
    return Credentials(Pem(key, cert, ca), server, client, name, min(_ends(chain)), max(_ends(issuers)))


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; name a PEM file that this user may read") from error


def _issuers(flag: str, path: Path, pem: bytes) -> list[_Certificate]:
    """Those certificates of a file that may issue others."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{flag} {path} holds no usable certificate in PEM form: {error}") from error
    return list(context.get_ca_certs())


def _ends(certificates: Iterable[_Certificate]) -> list[float]:
    return [float(ssl.cert_time_to_seconds(certificate["notAfter"])) for certificate in certificates]


def _no_password() -> str:
    """Where OpenSSL would ask the terminal for the password of a key."""
    raise OSError("it has a password, which nobody is there to type")


def _context(is_client: bool, cert: Path, key: Path, authority: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    if is_client:
        context.set_alpn_protocols(["h2"])  # gRPC's servers insist
    else:
        context.num_tickets = 0  # each connection proves itself anew
    try:
        context.load_cert_chain(cert, key, _no_password)
    except OSError as error:
        mismatch = getattr(error, "reason", "") == "KEY_VALUES_MISMATCH"
        reason = f"it is not the key of {cert}" if mismatch else f"it is no usable private key in PEM form: {error}"
        raise ConfigError(f"--tls-key {key}: {reason}; name the key that the certificate was made with") from error
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> _Certificate:
    """Have the two ends meet in memory; the certificate that the server's end got. Raises SSLError where peers would.

    The host name is not checked: who will call by which name is not known here.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client.check_hostname = False
    try:
        ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    finally:
        client.check_hostname = True
    left: list[Callable[[], None]] = [end.do_handshake for end in ends]
    while left:
        for step in tuple(left):
            try:
                step()
            except ssl.SSLWantReadError:
                continue
            left.remove(step)
    return ends[1].getpeercert() or {}
