"""Addresses of peers, their names, what they may read, and the options that say so: pure text, no sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ConfigMaker
from tiermem.config import load_config
from tiermem.errors import AccessDenied, ConfigError
from tiermem.peer.access import Access, AccessRule, parse_rules
from tiermem.peer.address import Address, ModelAddress, parse_address, parse_model
from tiermem.peer.identity import Identity, certified_name, name_in
from tiermem.peer.tls import check_clear, open_tls

PEER = Identity("pool-b", "10.0.0.2")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("pool-b:7070", Address("pool-b", 7070)),
        (" 0.0.0.0:0 ", Address("0.0.0.0", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "HOST:PORT"), ("7070", "HOST:PORT"), (":7070", "HOST:PORT"), ("host", "HOST:PORT"), ("host:", "port ''"),
        ("host:65536", "below 65536"), ("host:-1", "below 65536"), ("host:7x", "below 65536"),
        ("host:٣", "below 65536"),
        ("::1:7070", "in brackets"), ("[::1]", "in brackets"), ("[pool]:1", "no IPv6"), ("[]:1", "no IPv6"),
        ("a b:1", "HOST:PORT"), ("a/b:1", "HOST:PORT"), ("a\0b:1", "HOST:PORT"), ("me@host:1", "HOST:PORT"),
        ("http://host:1", "without a scheme"), ("tiermem://host:1/m", "without a scheme"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_address(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("pool-b", False), ("localhost.example", False), ("::ffff:10.0.0.1", False)],
)  # fmt: skip
def test_only_what_can_mean_nothing_else_is_the_loopback(host: str, loopback: bool) -> None:
    assert Address(host, 1).loopback is loopback


@given(st.text(min_size=1, max_size=40))
def test_a_model_s_address_holds_any_name(name: str) -> None:
    model = ModelAddress(Address("::1", 7070), name)
    try:
        text = str(model)
    except UnicodeEncodeError:  # lone surrogates, which no message can hold either
        return
    assert parse_model(text) == model


@pytest.mark.parametrize("text", ["pool:1/m", "tiermem://pool:1", "tiermem://pool:1/", "tiermem:///m", "http://p:1/m"])
def test_what_is_no_address_of_a_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_model(text)


def test_a_peer_is_named_by_its_common_name_and_else_by_its_dns_name() -> None:
    assert certified_name(["pool-b", "x"], ["y"]) == "pool-b"
    assert certified_name([], ["y", "z"]) == "y"
    subject = ((("organizationName", "o"),), (("commonName", "pool-b"),))
    alternatives = (("IP Address", "10.0.0.2"), ("DNS", "b.example"))
    assert name_in({"subject": subject, "subjectAltName": alternatives}) == "pool-b"
    assert name_in({"subject": subject[:1], "subjectAltName": alternatives}) == "b.example"
    assert certified_name([""], ["y"]) == "y"
    for names in ([], [""], ["a\nb"], ["x" * 257]):
        with pytest.raises(AccessDenied, match="issue one with a CN"):
            certified_name(names, [])


def test_without_rules_every_peer_may_read_every_model() -> None:
    Access().check(PEER, "m")
    Access().check(Identity("", "127.0.0.1"), "m")


def test_with_rules_a_peer_may_read_what_one_of_its_own_allows() -> None:
    access = Access(parse_rules(["pool-b=llama-*", "pool-b=qwen", "pool-c=*", "pool-*=never"]))
    assert [access.allows(PEER, model) for model in ("llama-7b", "qwen", "llama", "qwen2", "never")] == [
        True, True, False, False, False]  # fmt: skip
    assert access.allows(Identity("pool-c", "x"), "anything")
    assert not access.allows(Identity("", "10.0.0.2"), "llama-7b")
    with pytest.raises(AccessDenied, match=r"pool-b \(10.0.0.2\) may not read 'gpt'; .*--allow pool-b=gpt"):
        access.check(PEER, "gpt")


def test_options_of_peers(config: ConfigMaker) -> None:
    assert config().listen is None
    assert config().peer == ()
    made = config(listen="[::]:7070", peer=("a:1", "b:2"), allow=["a=m*", "b=x=y"], data_port="7071", insecure="yes")
    assert (made.listen, made.data_port, made.insecure) == (Address("::", 7070), 7071, True)
    assert made.peer == (Address("a", 1), Address("b", 2))
    assert made.allow == (AccessRule("a", "m*"), AccessRule("b", "x=y"))
    assert config(peer="a:1").peer == made.peer[:1]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("listen", "7070", "HOST:PORT"), ("listen", 7070, "text"), ("peer", "b:0", "above 0"), ("peer", 7, "a list"),
        ("peer", "a:1,b:2", "write --peer a:1 --peer b:2, or"), ("peer", ("a:1, [::1]:2",), r"--peer \[::1\]:2, or"),
        ("peer", [7], "text"), ("allow", "pool-b", "pattern"), ("allow", "=x", "pattern"), ("allow", "b=", "pattern"),
        ("allow", [7], "pattern"), ("allow", 7, "a list"), ("peer_fetches", 0, "from 1"), ("tls_key", 7, "text"),
        ("peer_connections", 0, "from 1"), ("data_port", 65536, "to 65535"),
    ],
)  # fmt: skip
def test_a_wrong_option_of_peers_is_refused(key: str, value: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config({key: value}, {}, ())


@pytest.mark.parametrize(
    "options", [{"listen": "0.0.0.0:7070"}, {"listen": "pool-a:7070"}, {"peer": "10.0.0.2:7070"}], ids=str
)
def test_in_the_clear_only_the_loopback_is_talked_to_unless_said(config: ConfigMaker, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--tls-cert, --tls-key and --tls-ca, or --insecure"):
        open_tls(config(**options))
    assert open_tls(config(**options, insecure=True)) is None
    assert open_tls(config(listen="localhost:7070", peer="[::1]:7070")) is None
    with pytest.raises(ConfigError, match="anybody could read and alter"):
        check_clear(Address("10.0.0.2", 7070), None, insecure=False)


def test_rules_without_certificates_are_refused(config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match="--allow pool-b=x goes by the names of certificates"):
        open_tls(config(allow="pool-b=x"))
