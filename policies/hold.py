"""hold: move nothing. A full tier refuses new loads; also what replaces a policy that fails."""

from __future__ import annotations

from tiermem.policy import Plan, View


class Hold:
    def plan(self, view: View) -> Plan:
        return []
