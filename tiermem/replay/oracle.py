"""Oracle: what could be read from the fastest tier by one who knows the future. Never moves a page of a replay.

It is Belady's MIN with bypass (L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM
Systems Journal 5(2), 1966) by bytes, all pages being alike. It may choose what the fast tier holds at the start, and
take in any page when it is touched, at no cost of time or bandwidth; the touch itself still counts as it was served. It
may not fetch a page before it is touched: a policy that does, by knowing the order, can surpass it. Pages of one visit
are touched at once.

A page that is kept from one touch to the next makes that a hit and takes a place for this while. So the most hits are
the most such intervals of which at no time more overlap than there are places; dropping those that end last whenever
there are too many is optimal (U. Faigle and W. M. Nawijn, "Note on scheduling intervals on-line", 1995). Which page an
interval is of does not matter, so that intervals with one beginning and one end are counted together.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tiermem.replay.trace import Trace


def oracle_hits(trace: Trace, places: int) -> npt.NDArray[np.int64]:
    """Hits of each visit with so many pages' room in the fastest tier."""
    visits = len(trace.visit_s)
    begin, end, count = _intervals(trace)
    hits = np.zeros(visits, np.int64)
    waiting = [0] * visits  # intervals that are kept, by the visit they end with
    latest: list[int] = []  # a heap of these visits, negative; those that are over stay at its bottom
    kept = 0
    bounds = np.searchsorted(begin, np.arange(-1, visits + 1)).tolist()
    intervals = list(zip(end.tolist(), count.tolist(), strict=True))
    for visit, (first, last) in enumerate(pairwise(bounds), -1):
        if visit >= 0:
            hits[visit] = waiting[visit]
            kept -= waiting[visit]
            waiting[visit] = 0
        for until, number in intervals[first:last]:
            if not waiting[until]:
                heapq.heappush(latest, -until)
            waiting[until] += number
            kept += number
        while kept > places:
            until = -latest[0]
            dropped = min(waiting[until], kept - places)
            waiting[until] -= dropped
            kept -= dropped
            if not waiting[until]:
                heapq.heappop(latest)
    return hits


def _intervals(trace: Trace) -> tuple[npt.NDArray[np.int64], ...]:
    """(visit it begins with, or -1 at the start; visit it ends with; how many), by beginning and end."""
    visits = len(trace.visit_s)
    following = np.empty(len(trace.page), np.int64)
    upcoming = np.full(trace.pages, visits, np.int64)
    first = trace.first.tolist()
    for visit in range(visits - 1, -1, -1):
        pages = trace.page[first[visit] : first[visit + 1]]
        following[first[visit] : first[visit + 1]] = upcoming[pages]
        upcoming[pages] = visit
    beginning = np.repeat(np.arange(visits), np.diff(trace.first))
    begins = np.concatenate((np.zeros(trace.pages, np.int64), beginning + 1))
    ends = np.concatenate((upcoming, following))
    keys, count = np.unique((begins * visits + ends)[ends < visits], return_counts=True)
    return keys // visits - 1, keys % visits, count
