"""The agent: orders are carried out in turn, whatever they raise and wherever they were given."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tiermem.agent import Agent


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent("tiermem-test-agent")
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
