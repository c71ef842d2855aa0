"""Certificates for tests of TLS, made by the `openssl` program; tests that need one are skipped without it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = "DNS:localhost,IP:127.0.0.1,IP:::1"


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files of one certificate, and of the CA that issued it."""

    cert: Path
    key: Path
    ca: Path

    @property
    def options(self) -> dict[str, str]:
        """As load_config takes them."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key), "tls_ca": str(self.ca)}

    @property
    def flags(self) -> list[str]:
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key), "--tls-ca", str(self.ca)]


class Authority:
    """A CA of its own, with its files in `directory`."""

    def __init__(self, directory: Path, name: str = "ca", days: int = 1) -> None:
        self.directory = directory
        self.cert, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        _openssl("req", "-x509", *_new_key(self._key), "-out", self.cert, "-subj", f"/CN={name}", "-days", days)

    def issue(self, name: str, *, subject: str | None = None, alternatives: str = HOSTS, days: int = 1) -> Certificate:
        """A certificate in files of that name, by default with it as CN; -1 days: one that has expired."""
        cert, key, request = (self.directory / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
        extension = ("-addext", f"subjectAltName={alternatives}") if alternatives else ()
        subject = f"/CN={name}" if subject is None else subject
        _openssl("req", *_new_key(key), "-out", request, "-subj", subject, *extension)
        _openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial",
                 "-days", days, "-copy_extensions", "copyall", "-out", cert)  # fmt: skip
        return Certificate(cert, key, self.cert)

    def issue_early(self, name: str) -> Certificate:
        """A certificate that is not valid before tomorrow."""
        issued = self.issue(name)
        places = self.directory / f"{name}.ca"
        places.mkdir(exist_ok=True)
        (places / "index.txt").write_text("")
        settings = places / "settings"
        settings.write_text(_SETTINGS.format(places))
        begin, end = (time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400)) for days in (1, 2))
        _openssl("ca", "-batch", "-notext", "-config", settings, "-cert", self.cert, "-keyfile", self._key,
                 "-startdate", begin, "-enddate", end,
                 "-in", issued.cert.with_suffix(".csr"), "-out", issued.cert)  # fmt: skip
        return issued


_SETTINGS = """
[ca]
default_ca = own
[own]
database = {0}/index.txt
new_certs_dir = {0}
rand_serial = yes
default_md = sha256
copy_extensions = copyall
policy = names
[names]
commonName = supplied
"""


def self_signed(directory: Path, name: str) -> Certificate:
    """A certificate that is its own CA."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    _openssl("req", "-x509", *_new_key(key), "-out", cert, "-subj", f"/CN={name}", "-days", 1,
             "-addext", f"subjectAltName={HOSTS}")  # fmt: skip
    return Certificate(cert, key, cert)


def _new_key(path: Path) -> tuple[object, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", path)


def _openssl(*arguments: object) -> None:
    try:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("the openssl program is not installed")


def lock(key: Path, locked: Path) -> Path:
    """A copy of a private key that has a password."""
    _openssl("pkey", "-in", key, "-aes128", "-passout", "pass:secret", "-out", locked)
    return locked
