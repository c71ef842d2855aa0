"""Access: which peers may read which models. Pure rules; never knows how a peer proved its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tiermem.errors import AccessDenied
from tiermem.peer.identity import Identity

RULE_EXAMPLE = "pool-b=llama-*"


@dataclass(frozen=True, slots=True)
class AccessRule:
    """The peer of exactly this certificate name may read the models whose names match the shell pattern."""

    name: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.name}={self.pattern}"


class Access:
    """Without rules every peer may read every model; with rules, what one of them allows."""

    def __init__(self, rules: Iterable[AccessRule] = ()) -> None:
        self._patterns: dict[str, list[str]] = {}
        for rule in rules:
            self._patterns.setdefault(rule.name, []).append(rule.pattern)

    def allows(self, peer: Identity, model: str) -> bool:
        if not self._patterns:
            return True
        return any(fnmatchcase(model, pattern) for pattern in self._patterns.get(peer.name, ()))

    def check(self, peer: Identity, model: str) -> None:
        """Raises AccessDenied, in the same words whether or not there is such a model."""
        if not self.allows(peer, model):
            advice = f"allow it where that pool is served: --allow {peer.name or 'CN'}={model}"
            raise AccessDenied(f"{peer} may not read {model!r}; {advice}")


def parse_rules(value: object) -> tuple[AccessRule, ...]:
    """The rules of a list of `CN=PATTERN`, or of one. Raises ValueError saying what is wrong."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise ValueError(f"it must be text such as {RULE_EXAMPLE}, or a list of such")
    return tuple(part if isinstance(part, AccessRule) else _parse(part) for part in parts)


def _parse(text: object) -> AccessRule:
    name, equals, pattern = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not (name.strip() and equals and pattern):
        raise ValueError(f"{text!r} must be the name of a certificate, `=` and a pattern of model names")
    return AccessRule(name.strip(), pattern)
