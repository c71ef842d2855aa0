"""Which stages stay: what a policy sees and says, and that a pass copies what does not stay, and no more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ConfigMaker, until
from tests.unit.nets import BLOCK_BYTES, LOOSE_BYTES, Block, Net, X, opened, seeded
from tiermem.device.module import Attached
from tiermem.device.placed import DeviceModel
from tiermem.device.stage import bytes_of
from tiermem.device.staying import Staying
from tiermem.model import Model
from tiermem.policy import PAGE_DTYPES, Plan, View, check_plan, moves
from tiermem.steering import Steering
from tiermem.types import PAGE_BYTES

BLOCKS = 12


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def model(config: ConfigMaker, tmp_path: Path) -> Iterator[Model]:
    with opened(config, tmp_path / "model.safetensors", seeded(blocks=BLOCKS).state_dict()) as model:
        yield model


@contextmanager
def attached(
    model: Model, net: torch.nn.Module, budget: int, **options: Any
) -> Iterator[tuple[DeviceModel, Attached, Clock]]:
    """With a clock of the test's own from before the first call."""
    with model.stream("cpu", budget, **options) as on, on.attach(net) as made, torch.no_grad():
        clock, staying = Clock(), made._staying
        assert staying is not None
        staying._clock = clock
        staying._began_s = staying._until_s = clock.now_s
        staying._asked_s = clock.now_s - staying._steering.period_s
        yield on, made, clock


def passes(net: Net, clock: Clock, count: int, seconds: float) -> None:
    """So many passes of so many seconds each."""
    hooks = [
        layer.register_forward_hook(lambda *_: setattr(clock, "now_s", clock.now_s + seconds / len(net.layers)))
        for layer in net.layers
    ]
    for _ in range(count):
        net(X)
    for hook in hooks:
        hook.remove()


COPIED = sum(parameter.nbytes for parameter in Block(16).parameters())


def copied_bytes(on: DeviceModel) -> int:
    """So far, with what is on its way."""
    until(lambda: all(replica.ticket.done() for replica in tuple(on.residency._replicas.values())))
    return on.residency.copied_bytes


@pytest.mark.parametrize("seconds", [0.03, 0.4, 20.0])
@pytest.mark.parametrize(("ahead", "fitting"), [(1, 6), (1, 3), (3, 7), (0, 1)])
def test_a_part_stays_and_a_pass_copies_the_rest(model: Model, ahead: int, fitting: int, seconds: float) -> None:
    """In a cycle: of `fitting` stages all stay but for the window's."""
    net = seeded(blocks=BLOCKS)
    with attached(model, net, LOOSE_BYTES + fitting * BLOCK_BYTES, ahead=ahead) as (on, made, clock):
        passes(net, clock, max(3, int(2 / seconds)), seconds)
        assert made._staying is not None
        stays = made._staying.stays
        assert len(stays) == fitting - 1 - ahead
        before = copied_bytes(on)
        passes(net, clock, 4, seconds)
        copied = copied_bytes(on) - before
        assert made._staying.stays == stays
        # Where the window has more than it needs a tensor more or less may stay there.
        assert 4 * (BLOCKS - fitting) * COPIED <= copied <= 4 * (BLOCKS - len(stays)) * COPIED
        assert copied == 4 * (BLOCKS - len(stays)) * COPIED or ahead > 1
        on.residency.check()
        assert on.peak_bytes <= on.budget_bytes
        made.detach()
        kept = [slot.info.name for number in stays for slot in made.stages[number].slots]
        for name in (*kept, *(name for name in on if name not in kept)):
            on.pin([name])
            on.release([name])
        assert not any(on.residency.has(on._weights[name].key) for name in kept), "there is no module to stay for"


@pytest.mark.parametrize("policy", ["colloid", "hemem", "lru", "memtis", "static_interleave", "tpp"])
def test_any_policy_may_be_asked(model: Model, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    net, plain = seeded(blocks=BLOCKS), seeded(blocks=BLOCKS)
    with attached(model, net, LOOSE_BYTES + 6 * BLOCK_BYTES, policy=policy) as (on, made, clock):
        passes(net, clock, 30, 0.3)
        assert made._staying is not None
        before = copied_bytes(on)
        assert torch.equal(net(X), plain(X))
        assert copied_bytes(on) - before <= (BLOCKS - len(made._staying.stays)) * COPIED
        assert on.peak_bytes <= on.budget_bytes
    assert not caplog.records, "none fails"


def test_without_a_policy_in_charge_no_more_is_copied_than_has_to_be(model: Model) -> None:
    """What was used last goes first: in a cycle that keeps as much as anything could."""
    net = seeded(blocks=BLOCKS)
    with attached(model, net, LOOSE_BYTES + 6 * BLOCK_BYTES, policy="hold") as (on, _, clock):
        passes(net, clock, 3, 0.1)
        before = copied_bytes(on)
        passes(net, clock, 4, 0.1)
        assert copied_bytes(on) - before <= 4 * (BLOCKS - 4) * COPIED


class Asked:
    """A steering whose policy wants the pages in `wants`, as far as there is room; keeps the views."""

    period_s = 1.0

    def __init__(self, *wants: int) -> None:
        self.wants = wants
        self.views = list[View]()
        self.failure = ""

    def refresh(self) -> None:
        pass

    def plan(self, view: View) -> Plan:
        self.views.append(view)
        rows = np.array([row for row in self.wants if view.pages.tier[row] != 0], np.int64)
        rows = rows[: max(0, view.tiers[0].free_bytes) // PAGE_BYTES]
        return check_plan(view, moves(view, rows, 0, "wanted"))


def staying_of(model: Model, net: Net, steering: Any, ahead: int = 1) -> tuple[Staying, Clock]:
    with model.stream("cpu", "1MiB") as on, on.attach(net) as made:
        stages = made.stages
    clock = Clock()
    return Staying("m", model.manifest, stages, ahead, steering, clock), clock


def at(staying: Staying, number: int) -> int:
    """The row of a stage, which is one page here; rows are in the checkpoint's order."""
    (row,) = staying._rows[number].tolist()
    return int(row)


def test_the_policy_sees_pages_that_are_used_and_the_room_that_is_left(model: Model) -> None:
    steering = Asked()
    staying, clock = staying_of(model, seeded(blocks=BLOCKS), steering)
    for number in range(BLOCKS):
        clock.now_s += 0.5
        staying.use(number)
    clock.now_s += 0.25
    staying.use(3)
    clock.now_s += 0.25
    assert staying.choose(6 * BLOCK_BYTES) == frozenset()
    (view,) = steering.views
    pages = view.pages
    assert len(pages) == BLOCKS, "the page of what is in no stage is not among them"
    for name, dtype in PAGE_DTYPES.items():
        column = getattr(pages, name)
        assert (column.dtype, len(column), column.flags.writeable) == (dtype, BLOCKS, False), name
    assert view.tiers[0].free_bytes == 4 * PAGE_BYTES, "six stages less a window of two"
    assert [tier.is_memory for tier in view.tiers] == [True, True, False]
    assert (pages.tier == 1).all()
    assert pages.leased.all()
    assert pages.known.all()
    assert pages.age_s.argmax() == at(staying, 0)
    assert (pages.age_s[at(staying, 11)], pages.age_s[at(staying, 3)]) == (0.5, 0.25)
    assert pages.rate[at(staying, 3)] > 1.9 * pages.rate[at(staying, 2)] > 0
    assert pages.order[at(staying, 10)] > pages.order[at(staying, 9)]
    assert view.models.nbytes.tolist() == [BLOCKS * BLOCK_BYTES]


def test_a_policy_is_asked_once_a_period_and_learns_how_long_it_was(model: Model) -> None:
    steering = Asked(2, 5)
    staying, clock = staying_of(model, seeded(blocks=BLOCKS), steering)
    for _ in range(30):
        keys = staying.choose(6 * BLOCK_BYTES)
        clock.now_s += 0.1
    assert len(steering.views) == 3
    assert {at(staying, number) for number in staying.stays} == {2, 5}
    assert keys == {weight.key for number in staying.stays for weight in staying._stages[number].weights}
    clock.now_s += 7
    staying.choose(6 * BLOCK_BYTES)
    assert [round(view.period_s, 1) for view in steering.views] == [1.0, 1.0, 1.0, 8.0]
    assert steering.views[-1].tiers[0].used_bytes == 2 * PAGE_BYTES
    assert np.flatnonzero(steering.views[-1].pages.tier == 0).tolist() == [2, 5]


def test_stages_stay_only_beside_the_window(model: Model) -> None:
    for room, wanted in ((1, 0), (2, 0), (3, 1), (5, 3), (11, 9), (12, 12)):
        staying, _ = staying_of(model, seeded(blocks=BLOCKS), Asked(*range(BLOCKS)))
        staying.choose(room * BLOCK_BYTES)
        assert len(staying.stays) == wanted, room


def test_less_room_than_before_keeps_what_fits(model: Model) -> None:
    steering = Asked(*range(BLOCKS))
    staying, clock = staying_of(model, seeded(blocks=BLOCKS), steering)
    staying.choose(8 * BLOCK_BYTES)
    assert len(staying.stays) == 6
    clock.now_s += 1
    staying.choose(5 * BLOCK_BYTES)
    assert len(staying.stays) == 3
    assert steering.views[-1].tiers[0].free_bytes == 0, "a tier is never shown fuller than it is large"


def test_a_policy_that_fails_changes_nothing_and_is_told_once(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = tmp_path / "brief.py"
    policy.write_text(
        "from tiermem.policy import moves\n"
        "import numpy as np\n"
        "class Brief:\n"
        "    asked = 0\n"
        "    period_s = 1.0\n"
        "    def plan(self, view):\n"
        "        self.asked += 1\n"
        "        if self.asked > 1:\n"
        "            raise ValueError('boom')\n"
        "        return moves(view, np.arange(2, 4), 0, 'these')\n"
    )
    net, plain = seeded(blocks=BLOCKS), seeded(blocks=BLOCKS)
    caplog.set_level(logging.WARNING)
    with attached(model, net, LOOSE_BYTES + 6 * BLOCK_BYTES, policy=str(policy)) as (on, made, clock):
        passes(net, clock, 8, 1.5)
        assert made._staying is not None
        assert {at(made._staying, number) for number in made._staying.stays} == {2, 3}
        before = copied_bytes(on)
        assert torch.equal(net(X), plain(X))
        assert copied_bytes(on) - before <= (BLOCKS - 2) * COPIED
    assert [record.levelname for record in caplog.records if "boom" in record.message] == ["ERROR"]


def test_what_is_used_more_often_stays(config: ConfigMaker, tmp_path: Path) -> None:
    with opened(config, tmp_path / "model.safetensors", seeded(blocks=BLOCKS).state_dict()) as model:
        steering = Steering("layer_prefetch", 1.0)
        staying, clock = staying_of(model, seeded(blocks=BLOCKS), steering)
        for _ in range(20):
            for number in (0, 1, 7, 2, 3, 7, 4, 5, 6, 7, 8, 9, 7, 10, 11):
                clock.now_s += 0.01
                staying.use(number)
            staying.choose(4 * BLOCK_BYTES)
        assert 7 in staying.stays
        assert len(staying.stays) == 2
        steering.close()


@contextmanager
def layers_of(config: ConfigMaker, path: Path, widths: list[int]) -> Iterator[tuple[Model, Attached]]:
    """Blocks of these widths, attached as a list, which computes nothing."""
    layers = torch.nn.ModuleList([Block(width) for width in widths])
    weights = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    with (
        opened(config, path / "model.safetensors", weights) as model,
        model.stream("cpu", "4MiB") as on,
        on.attach(layers, prefix="layers.") as made,
    ):
        yield model, made


def stay(model: Model, made: Attached, room_bytes: int, *wants: int) -> frozenset[int]:
    """What stays where the policy wants these stages, each of which is one page here."""
    rows = [model.manifest.tensors[model.manifest.by_name[made.stages[number].slots[0].info.name]].extent.segment
            for number in wants]  # fmt: skip
    staying = Staying("m", model.manifest, made.stages, 1, Asked(*rows), Clock())  # type: ignore[arg-type]
    staying.choose(room_bytes)
    return staying.stays


def test_a_large_stage_may_stay_if_the_window_of_the_others_fits(config: ConfigMaker, tmp_path: Path) -> None:
    with layers_of(config, tmp_path, [16, 16, 64, 16, 16]) as (model, made):
        large = bytes_of(made.stages[2].weights)
        assert stay(model, made, large + 2 * BLOCK_BYTES, 2) == {2}
        assert stay(model, made, large + 2 * BLOCK_BYTES - 512, 2) == frozenset()


def test_the_first_stage_follows_the_last(config: ConfigMaker, tmp_path: Path) -> None:
    with layers_of(config, tmp_path, [64, 16, 16, 64]) as (model, made):
        large = bytes_of(made.stages[0].weights)
        assert stay(model, made, 2 * large + BLOCK_BYTES, 1) == {1}
        assert stay(model, made, 2 * large + BLOCK_BYTES - 512, 1) == frozenset()


def test_tied_weights_that_stay_take_no_room_twice(config: ConfigMaker, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"embed.{name}": tensor for name, tensor in Block(64).state_dict().items()}
    weights |= {
        f"layers.{number}.{name}": tensor for number in range(4) for name, tensor in Block(16).state_dict().items()
    }
    net = torch.nn.ModuleDict({"embed": Block(64), "layers": torch.nn.ModuleList([Block(16) for _ in range(4)])})
    net["head"] = Block(64)
    for name, tensor in net["embed"].named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(net["head"].get_submodule(owner), leaf, tensor)
    with (
        opened(config, tmp_path / "model.safetensors", weights) as model,
        model.stream("cpu", "4MiB") as on,
        on.attach(net) as made,
    ):
        assert [stage.path for stage in made.stages][::5] == ["embed", "head"]
        large = bytes_of(made.stages[0].weights)
        assert bytes_of(made.stages[5].weights) == large
        assert stay(model, made, large + 2 * BLOCK_BYTES, 0) == {0, 5}
        assert stay(model, made, large + 2 * BLOCK_BYTES - 512, 0) == frozenset()
