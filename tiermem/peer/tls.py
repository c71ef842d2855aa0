"""TLS: whether a pool has it, and its credentials as their files are now. Never opens a connection.

One certificate serves both ways: a pool shows it to the peers that call and to those that it calls. Certificates are
replaced every few weeks, so the files are looked at whenever somebody connects, and connections that are there go on.
"""

from __future__ import annotations

import logging
import ssl
import stat
import threading
import time
from pathlib import Path

from tiermem.config import Config
from tiermem.errors import ConfigError
from tiermem.peer.address import Address
from tiermem.peer.credentials import Pem, read_credentials

DAY_S = 86400.0
SOON_S = 14 * DAY_S
"""How long before its end a certificate is complained of."""

_FLAGS = {"tls_cert": "--tls-cert", "tls_key": "--tls-key", "tls_ca": "--tls-ca"}
_log = logging.getLogger(__name__)


class Tls:
    """Files that cannot be used once they have changed are told of, and what was read before stays in use. Threads may
    share it."""

    def __init__(self, certificate: Path, key: Path, authority: Path) -> None:
        """Raises ConfigError naming the file that cannot be used."""
        self._paths = certificate, key, authority
        self._lock = threading.Lock()
        self._seen = [_facts(path) for path in self._paths]
        self._credentials = read_credentials(*self._paths)
        self._told_s = time.time()

    @property
    def name(self) -> str:
        """Who we are to peers. No file changes that: leases and tokens go by it."""
        return self._credentials.name

    @property
    def pem(self) -> Pem:
        """For a connection that gRPC makes; the same object for as long as the files are the same."""
        self._look()
        return self._credentials.pem

    @property
    def server(self) -> ssl.SSLContext:
        """For a connection that a peer makes."""
        self._look()
        return self._credentials.server

    @property
    def client(self) -> ssl.SSLContext:
        """For a connection to a peer."""
        self._look()
        return self._credentials.client

    def faults(self) -> list[str]:
        """What works and should not stay as it is: files that are soon out of date, or are, and an open key."""
        self._look()
        (cert, key, ca), used, now_s = self._paths, self._credentials, time.time()
        found = []
        for file, end_s in (f"--tls-cert {cert}", used.certificate_end), (f"--tls-ca {ca}", used.authority_end):
            if end_s < now_s + SOON_S:
                day = time.strftime("%Y-%m-%d", time.gmtime(end_s))
                advice = "put its successor there, which is taken without a restart"
                found.append(f"{file} {'ends' if end_s > now_s else 'ended'} on {day}; {advice}")
        facts = _facts(key)
        if facts is not None and facts[0] & stat.S_IROTH:
            found.append(f"--tls-key {key} may be read by every user of this host; chmod o= {key}")
        return found

    def warn(self) -> None:
        """Log the faults. From then on that is done once a day, when somebody connects."""
        with self._lock:
            self._told_s = time.time()
        for fault in self.faults():
            _log.warning("%s", fault)

    def _look(self) -> None:
        """Take what the files hold now."""
        with self._lock:
            seen = [_facts(path) for path in self._paths]
            if seen != self._seen:
                self._seen = seen
                self._replace()
            due = time.time() > self._told_s + DAY_S
        if due:
            self.warn()

    def _replace(self) -> None:
        try:
            fresh = read_credentials(*self._paths)
            if fresh.name != self.name:
                raise ConfigError(
                    f"--tls-cert {self._paths[0]} is of {fresh.name!r} now, and peers know this pool as {self.name!r}; "
                    "start it again under another name"
                )
        except ConfigError as error:
            _log.warning("the TLS files changed, and what they held before stays in use: %s", error)
        else:
            self._credentials = fresh
            _log.info("the TLS files changed, and connections use them from now on: %s", self._paths[0])


def open_tls(config: Config) -> Tls | None:
    """The TLS of this pool; None where none is configured.

    Raises ConfigError naming the file that cannot be used (missing, no PEM, a key of another certificate, expired, of
    another CA), and where peers would be talked to in the clear though nobody said that they may.
    """
    paths = {"tls_cert": config.tls_cert, "tls_key": config.tls_key, "tls_ca": config.tls_ca}
    missing = [_FLAGS[key] for key, path in paths.items() if path is None]
    if config.tls_cert is not None and config.tls_key is not None and config.tls_ca is not None:
        return Tls(config.tls_cert, config.tls_key, config.tls_ca)
    if len(missing) < len(paths):
        raise ConfigError(f"TLS needs all of {', '.join(_FLAGS.values())}; give {' and '.join(missing)} too")
    if config.allow:
        raise ConfigError(
            f"--allow {config.allow[0]} goes by the names of certificates; give --tls-cert, --tls-key and --tls-ca too"
        )
    for address in (*filter(None, (config.listen,)), *config.peer):
        check_clear(address, None, config.insecure)
    return None


def check_clear(address: Address, tls: Tls | None, insecure: bool) -> None:
    """Raises ConfigError where bytes would cross a network in the clear though nobody said that they may."""
    if tls is None and not (address.loopback or insecure):
        raise ConfigError(
            f"{address} is not of the loopback and there is no TLS: anybody could read and alter weights; give "
            "--tls-cert, --tls-key and --tls-ca, or --insecure on a network that you trust"
        )


def _facts(path: Path) -> tuple[int, int, int, int] | None:
    """What tells that a file changed, and who may read it; None where it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns
