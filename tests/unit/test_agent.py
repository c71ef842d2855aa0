"""The agent: orders are carried out in turn, whatever they raise and wherever they were given; then its task."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tests.conftest import until
from tiermem.agent import Agent


class Rounds:
    """A task that counts its rounds."""

    def __init__(self, pause_s: float | None = None) -> None:
        self.pause_s = pause_s
        self.count = 0
        self.failing = False

    def wake(self) -> None:
        self.woken = True

    def run(self) -> None:
        self.count += 1
        if self.failing:
            raise ValueError("this round failed")


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


@pytest.fixture
def agent(rounds: Rounds) -> Iterator[Agent]:
    made = Agent("tiermem-test-agent", rounds)
    yield made
    made.close()


def test_orders_are_carried_out_in_turn_by_one_other_thread(agent: Agent) -> None:
    done: list[tuple[int, str]] = []
    for number in range(50):
        agent.submit(lambda number=number: done.append((number, threading.current_thread().name)))  # type: ignore[misc]
    agent.close()
    assert done == [(number, "tiermem-test-agent") for number in range(50)]


def test_an_order_that_raises_is_logged_and_the_next_is_carried_out(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    with caplog.at_level(logging.DEBUG, "tiermem.agent"):
        agent.submit(lambda: [][0])
        agent.submit(done.set)
        assert done.wait(5)
    assert "tiermem-test-agent failed: list index out of range" in caplog.text


def test_an_order_may_close_its_agent(agent: Agent) -> None:
    agent.submit(agent.close)
    agent._thread.join(5)
    assert not agent._thread.is_alive()


def test_orders_may_be_given_from_inside_a_garbage_collection(agent: Agent) -> None:
    done = threading.Event()

    class Dying:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            agent.submit(done.set)

    Dying()
    gc.collect()
    assert done.wait(5)


def test_giving_an_order_in_a_forked_child_does_not_hang(agent: Agent) -> None:
    child = os.fork()
    if child == 0:
        agent.submit(lambda: os._exit(1))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_task_without_a_time_waits_for_an_order(agent: Agent, rounds: Rounds) -> None:
    agent.settle()
    assert rounds.count == 0

    def due() -> None:
        rounds.pause_s = 0.0

    agent.submit(due)
    until(lambda: rounds.count > 3)


def test_a_task_comes_round_by_itself_between_orders(agent: Agent, rounds: Rounds) -> None:
    done: list[int] = []

    def due() -> None:
        rounds.pause_s = 0.001

    agent.submit(due)
    for number in range(20):
        agent.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    until(lambda: rounds.count >= 3)
    assert done == list(range(20))


def test_a_task_that_fails_comes_round_again_and_orders_are_carried_out(
    agent: Agent, rounds: Rounds, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    rounds.failing = True
    with caplog.at_level(logging.DEBUG, "tiermem.agent"):
        agent.submit(lambda: setattr(rounds, "pause_s", 0.001))
        until(lambda: rounds.count >= 3)
        agent.submit(done.set)
        assert done.wait(5)
    assert "this round failed" in caplog.text


def test_a_pause_that_is_over_is_no_error(agent: Agent, rounds: Rounds) -> None:
    agent.submit(lambda: setattr(rounds, "pause_s", -1.0))
    until(lambda: rounds.count >= 3)


def test_closing_ends_an_agent_whose_task_is_always_due(rounds: Rounds) -> None:
    rounds.pause_s = 0.0
    agent = Agent("tiermem-busy-agent", rounds)
    until(lambda: rounds.count >= 3)
    agent.close()
    assert not agent._thread.is_alive()
    before = rounds.count
    agent.settle(0.01)
    assert rounds.count == before
