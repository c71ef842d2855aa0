"""The files of TLS, looked at before anybody connects, and again when they change: what cannot work is refused with
the file's name."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.certificates import Authority, Certificate, lock, self_signed
from tests.conftest import ConfigMaker
from tiermem.errors import ConfigError
from tiermem.peer import tls as tls_module
from tiermem.peer.tls import Tls, open_tls


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture(scope="module")
def good(authority: Authority) -> Certificate:
    return authority.issue("pool-a")


def opened(config: ConfigMaker, certificate: Certificate) -> Tls:
    tls = open_tls(config(listen="0.0.0.0:7070", **certificate.options))
    assert tls is not None
    return tls


def test_good_files_give_contexts_and_our_name(config: ConfigMaker, good: Certificate) -> None:
    tls = opened(config, good)
    assert tls.name == "pool-a"
    assert tls.pem == (good.key.read_bytes(), good.cert.read_bytes(), good.ca.read_bytes())
    assert (tls.client.check_hostname, tls.client.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert tls.server.verify_mode is ssl.CERT_REQUIRED


def test_a_ca_may_be_one_of_several_and_have_text_beside_it(
    config: ConfigMaker, good: Certificate, stranger: Authority, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(f"# Főtanúsítvány\n{stranger.cert.read_text()}\n{good.ca.read_text()}")
    assert opened(config, replace(good, ca=bundle)).name == "pool-a"


def test_without_a_common_name_the_dns_name_is_ours(config: ConfigMaker, authority: Authority) -> None:
    assert opened(config, authority.issue("plain", subject="/O=o", alternatives="DNS:pool-d")).name == "pool-d"
    with pytest.raises(ConfigError, match=r"bare\.pem: the certificate has no usable name"):
        opened(config, authority.issue("bare", subject="/O=o", alternatives=""))


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_ca"])
def test_two_files_of_three_are_too_few(config: ConfigMaker, good: Certificate, missing: str) -> None:
    options = {key: value for key, value in good.options.items() if key != missing}
    with pytest.raises(ConfigError, match=f"give --{missing.replace('_', '-')} too"):
        open_tls(config(**options))


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
def test_a_file_that_cannot_be_read_is_named(
    config: ConfigMaker, good: Certificate, which: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"--tls-{which} .*absent: No such file"):
        opened(config, replace(good, **{which: tmp_path / "absent"}))
    with pytest.raises(ConfigError, match=rf"--tls-{which} {tmp_path}: Is a directory"):
        opened(config, replace(good, **{which: tmp_path}))


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
@pytest.mark.parametrize(
    "content", [b"", b"text", os.urandom(500), b"-----BEGIN CERTIFICATE-----\nAAAA\n"], ids=range(4)
)
def test_a_file_of_something_else_is_named(
    config: ConfigMaker, good: Certificate, which: str, content: bytes, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--tls-{which} {wrong}"):
        opened(config, replace(good, **{which: wrong}))


def test_a_key_of_another_certificate(config: ConfigMaker, good: Certificate, authority: Authority) -> None:
    other = authority.issue("pool-x")
    with pytest.raises(ConfigError, match=f"{other.key}: it is not the key of {good.cert}"):
        opened(config, replace(good, key=other.key))


def test_a_key_with_a_password_does_not_ask_the_terminal(
    config: ConfigMaker, good: Certificate, tmp_path: Path
) -> None:
    locked_key = lock(good.key, tmp_path / "locked.key")
    with pytest.raises(ConfigError, match=f"{locked_key}: it is no usable private key .* it has a password"):
        opened(config, replace(good, key=locked_key))


def test_what_peers_would_refuse_is_refused_here(
    config: ConfigMaker, authority: Authority, good: Certificate, stranger: Authority
) -> None:
    with pytest.raises(ConfigError, match=r"--tls-cert \S+old\.pem .*certificate has expired"):
        opened(config, authority.issue("old", days=-1))
    with pytest.raises(ConfigError, match=r"--tls-cert \S+early\.pem .*certificate is not yet valid"):
        opened(config, authority.issue_early("early"))
    with pytest.raises(ConfigError, match=r"pool-a\.pem .*other\.pem: unable to get local issuer"):
        opened(config, replace(good, ca=stranger.cert))


def test_a_certificate_may_be_its_own_ca(config: ConfigMaker, tmp_path: Path) -> None:
    assert opened(config, self_signed(tmp_path, "alone")).name == "alone"


# --- files that change under a running pool -------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Authority:
    return Authority(tmp_path, days=30)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_new_files_are_taken_and_the_same_are_not_read_again(
    config: ConfigMaker, own: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls = opened(config, own.issue("pool-a"))
    before = tls.pem, tls.server, tls.client
    assert (tls.pem is before[0], tls.server is before[1], tls.client is before[2]) == (True, True, True)
    renewed = own.issue("pool-a")
    assert tls.pem == (renewed.key.read_bytes(), renewed.cert.read_bytes(), renewed.ca.read_bytes())
    assert tls.pem != before[0]
    assert tls.server is not before[1]
    assert tls.client is not before[2]
    assert logged(caplog) == []


def test_new_files_that_cannot_be_used_are_told_of_once_and_not_taken(
    config: ConfigMaker, own: Authority, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    good, other = own.issue("pool-a"), own.issue("pool-x")
    tls = opened(config, good)
    used = tls.pem
    shutil.copy(other.key, good.key)
    for _ in range(3):
        assert tls.pem is used
    (line,) = logged(caplog)
    assert line.endswith(f"--tls-key {good.key}: it is not the key of {good.cert}; name the key that the certificate "
                         "was made with")  # fmt: skip
    assert "stays in use" in line
    shutil.copy(other.cert, good.cert)
    assert tls.pem is used
    assert "is of 'pool-x' now, and peers know this pool as 'pool-a'" in logged(caplog)[0]
    good.cert.unlink()
    assert (tls.pem, tls.name) == (used, "pool-a")
    assert "No such file" in logged(caplog)[0]
    own.issue("pool-a")
    assert tls.pem != used
    assert logged(caplog) == []


# --- what works and should not stay so ------------------------------------------------------------------------------


def test_the_end_of_a_certificate_is_told_two_weeks_before(config: ConfigMaker, own: Authority, tmp_path: Path) -> None:
    assert opened(config, own.issue("late", days=15)).faults() == []
    soon = own.issue("soon", days=13)
    day = time.strftime("%Y-%m-%d", time.gmtime(soon.cert.stat().st_mtime + 13 * 86400))
    (fault,) = opened(config, soon).faults()
    assert fault.startswith(f"--tls-cert {soon.cert} ends on {day}; put its successor there")
    brief = Authority(tmp_path, "brief", days=2)
    assert [fault.split()[:2] for fault in opened(config, brief.issue("pool-a")).faults()] == [
        ["--tls-cert", f"{tmp_path}/pool-a.pem"], ["--tls-ca", f"{brief.cert}"]]  # fmt: skip


def test_the_end_of_a_ca_is_that_of_the_one_which_issued_ours(
    config: ConfigMaker, own: Authority, tmp_path: Path
) -> None:
    brief, bundle = Authority(tmp_path, "brief", days=2), tmp_path / "bundle.pem"
    bundle.write_text(brief.cert.read_text() + own.cert.read_text())
    assert opened(config, replace(own.issue("pool-a", days=20), ca=bundle)).faults() == []
    ours = replace(brief.issue("pool-b", days=20), ca=bundle)
    assert [fault.split()[1] for fault in opened(config, ours).faults()] == [str(bundle)]


def test_a_key_that_anybody_may_read_is_complained_of(config: ConfigMaker, own: Authority) -> None:
    good = own.issue("pool-a", days=20)
    tls = opened(config, good)
    good.key.chmod(0o640)
    assert tls.faults() == []
    good.key.chmod(0o644)
    assert tls.faults() == [f"--tls-key {good.key} may be read by every user of this host; chmod o= {good.key}"]


def test_faults_are_logged_when_told_to_and_then_once_a_day(
    config: ConfigMaker, own: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = opened(config, own.issue("soon", days=13))
    assert tls.server
    assert logged(caplog) == []
    tls.warn()
    assert tls.server
    assert len(logged(caplog)) == 1
    now_s = time.time()
    monkeypatch.setattr(tls_module.time, "time", lambda: now_s + 14 * 86400)
    for _ in range(3):
        assert tls.server
    (line,) = logged(caplog)
    assert "ended on" in line
