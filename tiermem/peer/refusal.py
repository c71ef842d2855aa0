"""Refusal: why no session with another host's pool came about, found out by a second look. Only when one has failed.

gRPC tells of a failed handshake in words of its own, and of a refused certificate as a broken connection; Python's ssl
tells which certificate was refused, by whom and why.
"""

from __future__ import annotations

import socket
import ssl

from tiermem.errors import AccessDenied, DaemonUnreachable, TiermemError
from tiermem.peer.address import Address
from tiermem.peer.tls import Tls

_TIMEOUT_S = 5.0
_ALERT_S = 1.0


def why_unreachable(address: Address, tls: Tls | None) -> TiermemError:
    """The error to raise in place of gRPC's: AccessDenied for certificates, else DaemonUnreachable."""
    try:
        with socket.create_connection((address.host, address.port), _TIMEOUT_S) as connection:
            return (_clear if tls is None else _secured)(address, tls, connection) or DaemonUnreachable(
                f"what listens at {address} begins no session; give the port of --listen there, not that of its "
                "weights, and see there that --peer-connections are not used up"
            )
    except OSError as failure:
        advice = "start it there with: tiermem serve --listen"
        if isinstance(failure, socket.gaierror):
            advice = "check the name, or write its IP address"
        elif not isinstance(failure, ConnectionError):
            advice = "check the address, whether that host is up, and firewalls between"
        return DaemonUnreachable(f"no pool listens at {address} ({failure.strerror or failure}); {advice}")


def _clear(address: Address, _tls: Tls | None, connection: socket.socket) -> TiermemError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        context.wrap_socket(connection, suppress_ragged_eofs=False).close()
    except OSError:
        return None
    return AccessDenied(f"the pool at {address} speaks TLS only; give --tls-cert, --tls-key and --tls-ca")


def _secured(address: Address, tls: Tls | None, connection: socket.socket) -> TiermemError | None:
    assert tls is not None
    try:
        secured = tls.client.wrap_socket(connection, server_hostname=address.host)
    except ssl.SSLCertVerificationError as error:
        return AccessDenied(
            f"the certificate of the pool at {address} is not accepted: {error.verify_message}; compare --tls-ca here "
            f"with the certificate there, which must be in date and name {address.host}"
        )
    except ssl.SSLError as error:
        return DaemonUnreachable(
            f"what listens at {address} does not speak TLS ({_words(error)}); serve that pool with --tls-cert, "
            "--tls-key and --tls-ca, or leave them out here"
        )
    with secured:
        # In TLS 1.3 the other end judges our certificate only now; who accepts it sends its settings.
        secured.settimeout(_ALERT_S)
        try:
            if secured.recv(1):
                return None
            reason = "it ends the connection"
        except TimeoutError:
            return None
        except OSError as error:
            reason = _words(error)
    return AccessDenied(
        f"the pool at {address} does not accept the certificate of this one, {tls.name!r} ({reason}); have one issued, "
        "in date, by the CA that it has as --tls-ca"
    )


def _words(error: OSError) -> str:
    return (getattr(error, "reason", None) or error.strerror or str(error)).lower().replace("_", " ")
