"""Residency: what is held stays and is right, what is not goes in order, and hold gives all or nothing. Here are also
the weights and the residencies that other tests of devices take."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_device_arena import Counting
from tests.unit.test_device_backend import SlowDevice, slow_device
from tiermem.device import ALIGN, Device, Holding, Replica, Residency, Weight, open_device
from tiermem.errors import Closed, DeviceFull, Refused

KIB = 1024


def bytes_of(key: int, nbytes: int) -> bytes:
    return random.Random(key).randbytes(nbytes)


def weight(key: int, nbytes: int = KIB) -> Weight:
    """Weight number `key`, whose bytes are noise of its own."""
    return Weight(key, f"w{key}", nbytes, lambda: memoryview(bytes_of(key, nbytes)))


@contextmanager
def residency_on(device: Device, budget_bytes: int, **options: Any) -> Iterator[Residency]:
    """A small one, which in the end is whole and leaves nothing behind."""
    settings = {"reserve_bytes": 0, "staging_bytes": 8 * KIB, "chunk_bytes": 8 * KIB} | options
    residency = Residency(device, budget_bytes, **settings)
    try:
        yield residency
        residency.check()
    finally:
        if isinstance(device, SlowDevice):
            for line in device.module.lines:
                line.gate.set()
        residency.close()
    residency.check()
    assert residency.used_bytes == residency.reserved_bytes == residency.pinned_bytes == 0


@contextmanager
def slow_residency(budget_bytes: int, **options: Any) -> Iterator[tuple[SlowDevice, Residency]]:
    with slow_device() as device, residency_on(device, budget_bytes, **options) as residency:
        yield device, residency


def right(holding: Holding) -> bool:
    """Whether each replica has the bytes of its weight."""
    holding.result()
    return all(bytes(r.view.numpy()) == bytes_of(r.weight.key, r.nbytes) for r in holding.replicas)  # type: ignore[arg-type]


def present(residency: Residency, keys: range) -> list[int]:
    return [key for key in keys if residency.has(key)]


def use(residency: Residency, *weights: Weight) -> None:
    holding = residency.hold(weights)
    assert right(holding)
    holding.release()


def test_replicas_come_in_order_and_equal_keys_are_one() -> None:
    with residency_on(open_device("cpu"), 64 * KIB) as residency:
        first = residency.hold([weight(3, 700), weight(1, 5000), weight(3, 700), weight(2, 0)])
        assert [replica.weight.name for replica in first.replicas] == ["w3", "w1", "w3", "w2"]
        assert first.replicas[0] is first.replicas[2]
        assert (first.bytes_copied, first.bytes_shared) == (5700, 700)
        second = residency.hold([weight(1, 5000), weight(4, 10)])
        assert (second.bytes_copied, second.bytes_shared) == (10, 5000)
        assert second.replicas[0] is first.replicas[1]
        assert right(first)
        assert right(second)
        assert first.done()
        assert residency.copied_bytes == 5710
        assert residency.used_bytes == residency.peak_bytes == 1024 + 5120 + 512


def test_what_nobody_held_for_longest_goes_first() -> None:
    with residency_on(open_device("cpu"), 4 * KIB) as residency:
        for key in range(4):
            use(residency, weight(key))
        use(residency, weight(0))
        use(residency, weight(4))
        assert present(residency, range(5)) == [0, 2, 3, 4]
        use(residency, weight(5), weight(6))
        assert present(residency, range(7)) == [0, 4, 5, 6]
        assert residency.copied_bytes == 7 * KIB


def test_what_is_worth_least_goes_first() -> None:
    worth = {0: 5.0, 1: 1.0, 2: 3.0, 3: 9.0, 4: 0.0, 5: 0.0}

    def asked(replica: Replica) -> float:
        return worth[replica.weight.key]  # type: ignore[index]

    with residency_on(open_device("cpu"), 4 * KIB, worth=asked) as residency:
        use(residency, *map(weight, range(4)))
        use(residency, weight(4), weight(5))
        assert present(residency, range(6)) == [0, 3, 4, 5]


def test_one_of_several_holders_goes() -> None:
    with residency_on(open_device("cpu"), 2 * KIB) as residency:
        first, second = residency.hold([weight(0)]), residency.hold([weight(0)])
        first.release()
        first.release()
        use(residency, weight(1))
        assert right(second), "the other one still holds it"
        with pytest.raises(DeviceFull):
            residency.hold([weight(1), weight(2)])
        second.release()
        use(residency, weight(1), weight(2))
        with pytest.raises(Closed, match="hold its weights again"):
            second.wait()


def test_what_does_not_fit_changes_nothing_and_names_the_least_budget() -> None:
    with residency_on(open_device("cpu"), 4 * KIB) as residency:
        use(residency, weight(0), weight(1))
        held = residency.hold([weight(2)])
        with pytest.raises(
            DeviceFull,
            match=r"2 weights of 3\.5 KiB do not fit on cpu beside 1\.0 KiB that are held: the budget is 4\.0 KiB; .* "
            r"at least 4608 bytes",
        ) as caught:
            residency.hold([weight(3, 3000), weight(4, 100), weight(2)])
        assert caught.value.lacking_bytes == ALIGN
        assert present(residency, range(5)) == [0, 1, 2]
        with pytest.raises(DeviceFull, match=r"w5 of 4\.5 KiB .* at least 5632 bytes"):
            residency.hold([weight(5, 4097)])
        residency.check()
        held.release()
        use(residency, weight(6, 4096))


def test_a_drop_gives_up_what_nobody_holds() -> None:
    with residency_on(open_device("cpu"), 8 * KIB) as residency:
        use(residency, weight(0, 1000), weight(1, 10))
        held = residency.hold([weight(2)])
        assert residency.drop([0, 2, 1, 7, 0]) == 1010
        assert present(residency, range(3)) == [2]
        assert residency.used_bytes == KIB
        assert right(held)


def test_what_is_fetched_ahead_takes_no_held_room_and_not_its_own() -> None:
    with residency_on(open_device("cpu"), 4 * KIB) as residency:
        use(residency, weight(0), weight(1))
        held = residency.hold([weight(2)])
        residency.prefetch(map(weight, (3, 2, 4, 5, 6)))
        assert present(residency, range(7)) == [2, 3, 4, 5]
        residency.prefetch([weight(9, 5000)])
        assert present(residency, range(10)) == [2, 3, 4, 5], "nothing is dropped for what cannot fit"
        again = residency.hold([weight(3), weight(4)])
        assert (again.bytes_copied, again.bytes_shared) == (0, 2 * KIB)
        assert right(again)
        assert right(held)


def test_changes_are_told_without_a_lock() -> None:
    with residency_on(open_device("cpu"), 2 * KIB) as residency:
        told: list[list[int]] = []
        residency.on_change = lambda: told.append(present(residency, range(4)))
        use(residency, weight(0))
        use(residency, weight(0))
        residency.prefetch([weight(1)])
        use(residency, weight(2))
        residency.drop([1])
        residency.drop([1])
        assert told == [[0], [0, 1], [1, 2], [2]]
        residency.on_change = None


def test_tensors_over_replicas() -> None:
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    source = values.view(torch.uint8).numpy().data
    with residency_on(open_device("cpu"), 8 * KIB) as residency:
        held = residency.hold([Weight("a", "bias", 12, lambda: source), weight(0, 0), weight(1, 8)])
        held.result()
        tensor = held.replicas[0].tensor("BF16", (2, 3))
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() == held.replicas[0].view.data_ptr()
        assert held.replicas[1].tensor("F32", (4, 0)).shape == (4, 0)
        assert held.replicas[2].tensor("I64", ()).shape == ()
        with pytest.raises(Refused, match=r"bias, 12 bytes on cpu, cannot be F32 \[4\]: .*; take its bytes"):
            held.replicas[0].tensor("F32", (4,))
        with pytest.raises(Refused, match="bias, 12 bytes on cpu, cannot be F64"):
            held.replicas[0].tensor("F64", (2,))
        for name in ("F6_E2M3", "Q4"):
            with pytest.raises(Refused, match=f"has no dtype for {name}"):
                held.replicas[0].tensor(name, (2,))


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no F4")
def test_pairs_of_f4_are_one_element() -> None:
    with residency_on(open_device("cpu"), 8 * KIB) as residency:
        held = residency.hold([weight(0, 6)])
        assert held.replicas[0].tensor("F4", (3, 4)).shape == (3, 2)
        with pytest.raises(Refused, match="half of one"):
            held.replicas[0].tensor("F4", (4, 3))


SIZES = st.lists(st.one_of(st.integers(0, 2000), st.integers(0, 30 * KIB)), max_size=12)


@given(
    history=st.lists(st.tuples(SIZES, st.booleans()), max_size=12),
    last=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    chunk=st.sampled_from([ALIGN, 8 * KIB, 20 * KIB]),
    budget=st.integers(20 * KIB, 70 * KIB),
)
def test_what_fits_the_budget_fits_where_nothing_is_held(
    history: list[tuple[list[int], bool]], last: list[int], chunk: int, budget: int
) -> None:
    """After any history; and the budget holds, as the device counts it."""
    device = Counting()
    with residency_on(device, budget, chunk_bytes=chunk) as residency:
        held: list[Holding] = []
        for number, (sizes, stays) in enumerate(history):
            weights = [weight(100 * number + i, nbytes) for i, nbytes in enumerate(sizes)]
            if number % 3 == 2:
                residency.prefetch(weights)
                continue
            try:
                holding = residency.hold(weights)
            except DeviceFull:
                continue
            finally:
                residency.check()
            holding.result()
            held += [holding] if stays else []
            if not stays:
                holding.release()
        for holding in held:
            assert right(holding)
            holding.release()
        # As large as can be, in any pieces.
        total = residency.budget_bytes // ALIGN
        parts = [part * total // max(1, sum(last)) for part in last]
        whole_budget = residency.hold([weight(10_000 + i, part * ALIGN) for i, part in enumerate(parts)])
        assert right(whole_budget)
        residency.check()
        assert residency.peak_bytes <= budget


@pytest.mark.parametrize("slow", [False, True])
def test_from_many_threads(slow: bool) -> None:
    with slow_device() as device, residency_on(device if slow else open_device("cpu"), 24 * KIB) as residency:
        faults: list[BaseException] = []
        threads = [threading.Thread(target=churn, args=(residency, seed, faults)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        assert residency.used_bytes <= 24 * KIB


def churn(residency: Residency, seed: int, faults: list[BaseException]) -> None:
    order = random.Random(seed)
    try:
        for _ in range(60):
            weights = [weight(key, 100 + key * 100) for key in order.choices(range(40), k=4)]
            match order.randrange(3):
                case 0:
                    residency.prefetch(weights)
                case 1:
                    residency.drop([0, 1, 2])
                case 2:
                    residency.check()
            try:
                holding = residency.hold(weights)
            except DeviceFull:
                continue
            assert right(holding)
            holding.release()
    except BaseException as fault:
        faults.append(fault)
