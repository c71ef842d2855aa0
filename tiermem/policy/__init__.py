"""Policy interface: a pure function from a frozen view of the pool to a plan of moves. Never acts, never does I/O.

A policy is a file with one class:

    class Mine:
        period_s = 1.0                                  # how often it is asked; optional
        guard_s = 10.0                                  # a page does not go back within this time; optional
        sources = ("peer", "disk")                      # where missing weights are looked for, in this order; optional
        def plan(self, view: View) -> Plan: ...
        def place(self, request: Request) -> NDArray[np.int8]: ...   # tier of each new page; optional

It may keep what it learned in `self`; equal sequences of views must give equal plans. docs/policy.md is its manual.
"""

from tiermem.policy.copying import as_copies as as_copies
from tiermem.policy.copying import as_memory as as_memory
from tiermem.policy.plan import Move as Move
from tiermem.policy.plan import Plan as Plan
from tiermem.policy.plan import check_plan as check_plan
from tiermem.policy.plan import evictions as evictions
from tiermem.policy.plan import moves as moves
from tiermem.policy.source import DISK as DISK
from tiermem.policy.source import PEER as PEER
from tiermem.policy.source import Policy as Policy
from tiermem.policy.source import load_policy as load_policy
from tiermem.policy.state import PageState as PageState
from tiermem.policy.view import PAGE_DTYPES as PAGE_DTYPES
from tiermem.policy.view import Models as Models
from tiermem.policy.view import Pages as Pages
from tiermem.policy.view import Request as Request
from tiermem.policy.view import Run as Run
from tiermem.policy.view import TierView as TierView
from tiermem.policy.view import View as View
from tiermem.policy.view import fill_fastest as fill_fastest
