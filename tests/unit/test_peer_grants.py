"""Grants: a token opens one connection, for one peer, for a while, and withdrawing a lease ends what lives by it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import until
from tiermem.errors import AccessDenied, Refused
from tiermem.peer.grants import MAX_TOKENS, MAX_TOKENS_PER_LEASE, Grant, Grants

LENGTHS = {0: 100, 2: 7}


class Connection:
    def __init__(self) -> None:
        self.ended = 0

    def end(self) -> None:
        self.ended += 1


def issue(grants: Grants, lease: str = "a", peer: str = "pool-b", ttl_s: float = 60.0) -> bytes:
    token = grants.issue(lease, LENGTHS, peer, ttl_s)
    grants.check()
    return token


def redeem(grants: Grants, token: bytes, peer: str = "pool-b") -> Grant:
    try:
        return grants.redeem(token, peer, lambda: None)
    finally:
        grants.check()


def denial(grants: Grants, token: bytes, peer: str = "pool-b") -> str:
    with pytest.raises(AccessDenied) as denied:
        redeem(grants, token, peer)
    return str(denied.value)


def test_grant_says_what_was_issued() -> None:
    grants = Grants()
    grant = redeem(grants, issue(grants))
    assert (grant.lease_id, grant.lengths, grant.peer) == ("a", LENGTHS, "pool-b")


@pytest.mark.parametrize(
    ("segment", "offset", "length", "allowed"),
    [(0, 0, 100, True), (0, 99, 1, True), (0, 99, 2, False), (0, 100, 1, False), (1, 0, 1, False), (2, 0, 7, True),
     (2, 0, 8, False), (2, (1 << 64) - 1, 1, False)],
)  # fmt: skip
def test_grant_allows_its_segments_up_to_their_lengths(segment: int, offset: int, length: int, allowed: bool) -> None:
    grants = Grants()
    assert redeem(grants, issue(grants)).allows(segment, offset, length) is allowed


def test_every_wrong_token_is_denied_in_the_same_words() -> None:
    grants = Grants()
    used, expired, stolen = issue(grants), issue(grants, ttl_s=0.0), issue(grants)
    redeem(grants, used)
    forged = bytearray(issue(grants))
    forged[31] ^= 1
    texts = {
        denial(grants, used),
        denial(grants, expired),
        denial(grants, stolen, "pool-c"),
        denial(grants, bytes(forged)),
        denial(grants, bytes(32)),
        denial(Grants(), issue(grants)),
    }
    assert len(texts) == 1


def test_a_token_that_another_peer_showed_is_used_up() -> None:
    grants = Grants()
    token = issue(grants)
    denial(grants, token, "pool-c")
    denial(grants, token)


def test_one_of_many_who_show_a_token_at_once_has_it() -> None:
    grants = Grants()
    token = issue(grants)
    together = threading.Barrier(8)

    def try_it(_: int) -> bool:
        together.wait()
        try:
            grants.redeem(token, "pool-b", lambda: None)
        except AccessDenied:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(try_it, range(8))) == 1


def test_withdrawing_ends_tokens_and_connections_of_that_lease() -> None:
    grants = Grants()
    mine, left, others = Connection(), Connection(), Connection()
    grants.redeem(issue(grants), "pool-b", mine.end)
    grants.leave(grants.redeem(issue(grants), "pool-b", left.end))
    grants.redeem(issue(grants, "b"), "pool-b", others.end)
    unused, kept = issue(grants), issue(grants, "b")
    grants.withdraw("a")
    grants.withdraw("a")
    grants.check()
    assert (mine.ended, left.ended, others.ended) == (1, 0, 0)
    denial(grants, unused)
    redeem(grants, kept)


def test_tokens_of_a_lease_are_bounded_until_they_are_used_or_expire() -> None:
    grants = Grants()
    tokens = [issue(grants) for _ in range(MAX_TOKENS_PER_LEASE)]
    with pytest.raises(Refused, match=f"{MAX_TOKENS_PER_LEASE} tokens of lease a"):
        issue(grants)
    issue(grants, "b")
    redeem(grants, tokens[0])
    issue(grants, ttl_s=0.0)
    issue(grants)  # in the place of the one that expired
    with pytest.raises(Refused):
        issue(grants)


def test_tokens_are_bounded_over_all_leases() -> None:
    grants = Grants()
    for number in range(MAX_TOKENS):
        grants.issue(str(number % 100), LENGTHS, "pool-b", 60.0)
    with pytest.raises(Refused, match=str(MAX_TOKENS)):
        issue(grants, "one more")


def test_withdrawing_waits_for_no_connection() -> None:
    """A connection that ends may ask the grants for something itself."""
    grants = Grants()
    asked = threading.Event()

    def end() -> None:
        grants.check()
        asked.set()

    grants.redeem(issue(grants), "pool-b", end)
    thread = threading.Thread(target=grants.withdraw, args=("a",), daemon=True)
    thread.start()
    until(asked.is_set)
    thread.join()
