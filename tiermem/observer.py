"""Observer: by which rung a pool observes, the orders to its clients' agents, and the thread that empties perf rings.

Owns the sampler of hardware events where there is one. Never keeps what was seen: the pool's statistics do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiermem.config import BY_KEY, Config
from tiermem.errors import ConfigError, TiermemError
from tiermem.observations import Rung
from tiermem.pool import Pool
from tiermem.rpc.messages import SamplingOrder
from tiermem.sampler import RungState, choose
from tiermem.sampler.perf import PerfSampler

_log = logging.getLogger(__name__)


def own_order(config: Config) -> SamplingOrder:
    """What the agent of an embedded pool does: its one client reads its own page tables, and no ring."""
    wanted = config.sampler if config.sampler in ("present", "accessed") else "present"
    rung = wanted if config.sampler in ("auto", "perf", wanted) else "off"
    return SamplingOrder(rung, config.sample_epoch, config.sample_budget)


class Observer:
    """Of one pool. `on_order` is called, from any thread, when what clients shall do has changed."""

    def __init__(self, pool: Pool, config: Config, on_order: Callable[[], object]) -> None:
        self._pool, self._config, self._on_order = pool, config, on_order
        self.state: RungState = choose(config.sampler)
        pool.statistics.rung, pool.statistics.reason = self.state.name, self.state.reason
        self._lock = threading.Lock()
        self._wishes: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if self.state.rung is Rung.PERF:
            self._thread = threading.Thread(target=self._run, name="tiermem-perf", daemon=True)
            self._thread.start()

    @property
    def order(self) -> SamplingOrder:
        """What clients' agents shall do now: as configured, or more often and at a higher cost where a watcher asks."""
        rung = self.state.rung
        with self._lock:
            epochs = [self._config.sample_epoch, *(epoch for epoch, _ in self._wishes)]
            budgets = [self._config.sample_budget, *(budget for _, budget in self._wishes)]
        name = rung.name.lower() if rung in (Rung.PRESENT, Rung.ACCESSED) else "off"
        return SamplingOrder(name, min(epochs), max(budgets))

    @contextmanager
    def wish(self, epoch_s: float | None, budget: float | None) -> Iterator[None]:
        """While this lasts, a watcher wants to see more than the configuration gives. Raises ConfigError for what the
        configuration would refuse."""
        for key, value in (("sample_epoch", epoch_s), ("sample_budget", budget)):
            if value is None:
                continue
            try:
                BY_KEY[key].kind.read(value)
            except ValueError as error:
                raise ConfigError(f"{key} = {value} of a watcher: {error}") from None
        wish = (epoch_s or self._config.sample_epoch, budget or self._config.sample_budget)
        with self._lock:
            self._wishes.append(wish)
        self._on_order()
        try:
            yield
        finally:
            with self._lock:
                self._wishes.remove(wish)
            self._on_order()

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with PerfSampler(self.state.events, None if self.state.whole_host else ()) as sampler:
                while not self._stopping.is_set():
                    self._tick(sampler)
        except TiermemError as error:
            with self._pool.lock:
                self._pool.statistics.reason = f"failed: {error}"
            _log.error("no more samples are taken: %s", error)

    def _tick(self, sampler: PerfSampler) -> None:
        begin_s = time.monotonic()
        pool = self._pool
        with pool.lock:
            pids = set(pool.statistics.clients)
        for pid in sampler.watched - pids:
            sampler.unwatch(pid)
        for pid in pids - sampler.watched:
            try:
                sampler.watch(pid)
            except TiermemError as error:  # it ended just now, or is not ours to watch
                _log.info("process %d is not sampled: %s", pid, error)
        batch = sampler.poll(self._config.sample_epoch)
        names = [event.name for event in self.state.events]
        with pool.lock:
            cost = pool.statistics.costs[Rung.PERF]
            cost.lost += batch.lost
            cost.lost_samples += batch.lost_samples
            cost.throttled += batch.throttled
            cost.sampler_s += batch.cost_s
            pool.statistics.sampled(names, batch.samples, list(pool.catalog), begin_s, time.monotonic())
        self._stopping.wait(max(0.0, begin_s + self._config.sample_epoch - time.monotonic()))
