"""Alternating: of new pages every second one begins in the slowest memory tier. Moves none."""

import numpy as np
import numpy.typing as npt

from tiermem.policy import Plan, Request, View


class Alternating:
    def plan(self, view: View) -> Plan:
        return []

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        memory = [tier.id for tier in request.tiers if tier.is_memory]
        return np.where(np.arange(len(request)) % 2, memory[-1], memory[0]).astype(np.int8)
