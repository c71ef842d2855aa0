"""Evidence: what a view tells of each page, the unknown filled in by what is most likely. Never decides anything.

Unknown is not cold. But who holds no lease reads nothing: pages of a model that is not leased rest, whether or not
anybody sampled them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.policy.state import PageState
from tiermem.policy.view import Pages, View

NEVER_S = 1e9
"""Seconds: longer than any pool runs."""


def idle_s(view: View) -> npt.NDArray[np.float32]:
    """Seconds without use of each page, as far as anybody knows: finite, never negative.

    Since it was seen; else, of a model that is not leased, since the model was used; 0 where a reader holds the model
    and no sampler looked.
    """
    pages = view.pages
    idle = pages.age_s.copy()
    unseen = np.flatnonzero(np.isnan(idle))
    idle[unseen] = np.nan_to_num(view.now_s - pages.last_used_s[unseen], nan=NEVER_S)
    idle[unseen[pages.known[unseen]]] = NEVER_S
    idle[pages.leased & ~pages.known] = 0
    return np.clip(idle, 0, NEVER_S, out=idle)


def likely_rate(view: View) -> npt.NDArray[np.float32]:
    """Touches per second of each page: finite, never negative.

    As observed; where nobody sampled, 0 without a lease and with one the mean of the model's other pages, or of all
    leased pages if none of them is known.
    """
    pages = view.pages
    rate = pages.rate.copy()
    unknown = ~(rate >= 0)
    if not unknown.any():
        return rate
    rate[unknown] = 0
    reading = np.flatnonzero(unknown & pages.leased)
    if len(reading):
        models = len(view.models)
        total = np.bincount(pages.model, rate, models)
        count = np.bincount(pages.model[~unknown], minlength=models)
        mean = np.divide(total, count, where=count > 0, out=np.full(models, total.sum() / max(1, count.sum())))
        rate[reading] = mean[pages.model[reading]]
    return rate


class Touches:
    """What was observed of each page since the view before: windows in which it was touched, and samples of it."""

    def __init__(self) -> None:
        self._before = PageState(np.int64, -1)

    def since(self, pages: Pages) -> npt.NDArray[np.int64]:
        """0 for a page that is new: when its touches were, nobody knows."""
        before = self._before.of(pages)
        touches = np.zeros(len(pages), np.int64)
        np.subtract(pages.observed, before, where=before >= 0, out=touches)
        before[:] = pages.observed
        return np.maximum(touches, 0, out=touches)
