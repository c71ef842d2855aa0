"""Grants: the one-use tokens that a pool gave to peers, and the connections that live by them. Opens no socket.

A token says: this lease's peer may read these segments, if it connects before the token expires. Only who was given it
over the authenticated control channel knows it, and it is worth nothing to a peer of another name. The connection that
it opens lives until the lease is withdrawn.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from blake3 import blake3

from tiermem.errors import AccessDenied, Refused
from tiermem.peer.wire import TOKEN_BYTES

MAX_TOKENS = 4096
MAX_TOKENS_PER_LEASE = 64

_DENIED = "the token opens nothing: it is unknown, used, expired or another peer's; ask the pool for a new one"


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """What a token allows: the first `lengths[segment]` bytes of each segment. `expires_s` is of the monotonic clock,
    and only for the token."""

    lease_id: str
    lengths: Mapping[int, int]
    peer: str
    expires_s: float

    def allows(self, segment: int, offset: int, length: int) -> bool:
        return offset + length <= self.lengths.get(segment, -1)


class Grants:
    """Grants of one pool. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(32)
        self._tokens: dict[bytes, Grant] = {}  # by the token's keyed digest: how long a search takes tells nothing
        self._of_lease: dict[str, set[bytes]] = {}
        self._live: dict[Grant, Callable[[], None]] = {}

    def issue(self, lease_id: str, lengths: Mapping[int, int], peer: str, ttl_s: float) -> bytes:
        """A token of 32 bytes for one connection by the peer of that certificate name ("" without TLS), within `ttl_s`.

        Raises Refused where too many are unused: 64 of a lease, 4096 in all.
        """
        token = secrets.token_bytes(TOKEN_BYTES)
        now = time.monotonic()
        grant = Grant(lease_id, MappingProxyType(dict(lengths)), peer, now + ttl_s)
        with self._lock:
            if self._full(lease_id):
                self._sweep(now)
            if self._full(lease_id):
                unused = len(self._of_lease.get(lease_id, ()))
                raise Refused(
                    f"{unused} tokens of lease {lease_id} are unused, and {len(self._tokens)} of all leases; at most "
                    f"{MAX_TOKENS_PER_LEASE} and {MAX_TOKENS} may be: use them, or wait until they expire"
                )
            key = self._key(token)
            self._tokens[key] = grant
            self._of_lease.setdefault(lease_id, set()).add(key)
        return token

    def redeem(self, token: bytes, peer: str, end: Callable[[], None]) -> Grant:
        """Use a token up. `end` is called when the grant is withdrawn, from any thread, until `leave`.

        Raises AccessDenied, in the same words and after the same steps whatever is wrong.
        """
        key = self._key(token)
        with self._lock:
            grant = self._take(key)
            known = grant is not None
            grant = grant or Grant("", {}, "", 0.0)
            mine = hmac.compare_digest(grant.peer.encode(), peer.encode())
            if not (known & mine & (time.monotonic() < grant.expires_s)):
                raise AccessDenied(_DENIED)
            self._live[grant] = end
        return grant

    def leave(self, grant: Grant) -> None:
        """The connection that lived by the grant has ended."""
        with self._lock:
            self._live.pop(grant, None)

    def withdraw(self, lease_id: str) -> None:
        """End a lease's grants: unused tokens are worth nothing, connections end now. Idempotent."""
        with self._lock:
            for key in self._of_lease.pop(lease_id, ()):
                del self._tokens[key]
            ends = [self._live.pop(grant) for grant in list(self._live) if grant.lease_id == lease_id]
        for end in ends:
            end()

    def check(self) -> None:
        """Each token is counted with its lease, once, and the limits hold."""
        with self._lock:
            of_lease: dict[str, set[bytes]] = {}
            for key, grant in self._tokens.items():
                of_lease.setdefault(grant.lease_id, set()).add(key)
            assert of_lease == self._of_lease, "tokens and leases differ"
            assert len(self._tokens) <= MAX_TOKENS, f"{len(self._tokens)} tokens"
            most = max(map(len, of_lease.values()), default=0)
            assert most <= MAX_TOKENS_PER_LEASE, f"a lease has {most} tokens"

    def _key(self, token: bytes) -> bytes:
        return blake3(token, key=self._secret).digest()

    def _full(self, lease_id: str) -> bool:
        of_lease = len(self._of_lease.get(lease_id, ()))
        return of_lease >= MAX_TOKENS_PER_LEASE or len(self._tokens) >= MAX_TOKENS

    def _sweep(self, now: float) -> None:
        for key in [key for key, grant in self._tokens.items() if grant.expires_s <= now]:
            self._take(key)

    def _take(self, key: bytes) -> Grant | None:
        grant = self._tokens.pop(key, None)
        if grant is not None:
            keys = self._of_lease[grant.lease_id]
            keys.discard(key)
            if not keys:
                del self._of_lease[grant.lease_id]
        return grant
