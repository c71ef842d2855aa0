"""Replay of devices: where requests go, what is copied and dropped, and policies of memory tiers that decide it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import Asked, trace
from tiermem import cli
from tiermem.copying import Copying
from tiermem.errors import ConfigError
from tiermem.policy import Move, Plan, View, as_copies, as_memory, moves
from tiermem.replay.devices import DRAM, HBM, Served, Serving, Setting, baselines, parse_devices
from tiermem.replay.generate import generate, workload
from tiermem.replay.trace import Trace
from tiermem.runner import open_runner
from tiermem.types import PAGE_BYTES

PAGES = 2
"""Of each model that `requests` makes."""


def requests(*models: int, apart_s: float = 3.0, pages: int = PAGES) -> Trace:
    """Passes over these models, one after another."""
    visits = [(i * apart_s, [model * pages + page for page in range(pages)]) for i, model in enumerate(models)]
    return trace(visits, pages=pages, models=max(models) + 1, end_s=len(models) * apart_s + 1)


def keep_what_passed(view: View) -> Plan:
    """Drop everything else where there is no room for it."""
    wanted = np.flatnonzero(view.pages.leased & (view.pages.replicas == 0))
    if view.tiers[HBM].free_bytes >= len(wanted) * PAGE_BYTES:
        return moves(view, wanted, HBM, "keep", "copy")
    old = np.flatnonzero(~view.pages.leased & (view.pages.replicas > 0))
    return [Move(row, 1, HBM, DRAM, "out", "drop") for row in old.tolist()] + moves(view, wanted, HBM, "keep", "copy")


def serve(of: Trace, policies: list[Asked], places: int) -> tuple[Served, Serving]:
    serving = Serving(of, Setting(len(policies), places), policies)
    served = serving.run()
    serving.check()
    assert served.failure == ""
    return served, serving


def shipped(of: Trace, name: str, setting: Setting) -> Served:
    policies = [Copying(open_runner(name, 10.0)) for _ in range(setting.devices)]
    serving = Serving(of, setting, policies)
    served = serving.run()
    serving.check()
    assert served.failure == ""
    return served


def test_a_request_goes_where_most_of_its_model_is_and_else_to_the_oldest_request() -> None:
    policies = [Asked(keep_what_passed) for _ in range(3)]
    served, serving = serve(requests(0, 1, 0, 0, 2, 3, 1), policies, 2 * PAGES)
    leased = [[int(view.pages.model[view.pages.leased][0]) for view in policy.views] for policy in policies]
    # 3 goes where 1 is, idle for longest, and both fit.
    assert leased == [[0, 0, 0], [1, 3, 1], [2]]
    assert served.hit_ratio == pytest.approx(3 / 7)
    assert served.copied_bytes == 4 * PAGES * PAGE_BYTES
    assert served.busiest == pytest.approx(3 / 7)
    assert serving.held.sum(axis=1).tolist() == [2, 4, 2]


def test_a_part_of_a_model_is_worth_going_to() -> None:
    policies = [Asked(lambda view: moves(view, np.array([1]), HBM, "half of it", "copy")
                      if view.pages.leased[0] and not view.pages.replicas[1] else []) for _ in range(2)]  # fmt: skip
    served, _ = serve(requests(0, 1, 1, 0, 0), policies, 1)
    assert [len(policy.views) for policy in policies] == [4, 1]
    assert served.hit_ratio == pytest.approx(2 / 10)


def test_what_passed_is_copied_once_what_is_wanted_besides_too_and_drops_are_free() -> None:
    plans: dict[float, Plan] = {
        0.0: [Move(0, 2, DRAM, HBM, "passed", "copy"), Move(4, 1, DRAM, HBM, "ahead", "copy")],
        3.0: [Move(0, 2, HBM, DRAM, "out", "drop"), Move(5, 1, DRAM, HBM, "ahead", "copy")],
    }
    served, serving = serve(requests(0, 1, 2), [Asked(lambda view: plans.get(view.now_s, []))], 3)
    assert served.copied_bytes == (2 + 1 + 2 + 1) * PAGE_BYTES
    assert served.hit_ratio == pytest.approx(2 / 6)
    assert np.flatnonzero(serving.held[0]).tolist() == [4, 5]


def test_a_policy_sees_its_own_device_after_each_pass() -> None:
    policies = [Asked(keep_what_passed) for _ in range(2)]
    serve(requests(0, 1, 0), policies, PAGES)
    first, then = policies[0].views
    assert then.pages.replicas.tolist() == [1, 1, 0, 0]
    assert first.pages.replicas.tolist() == [0] * 4
    assert (then.pages.tier == DRAM).all()
    assert then.tiers[HBM].free_bytes == 0
    assert then.pages.leased.tolist() == [True, True, False, False]
    assert then.pages.age_s[:2].tolist() == [0, 0]
    assert np.isnan(then.pages.age_s[2:]).all(), "what another device read is none of its business"
    assert then.models.opens.tolist() == [2, 0]
    with pytest.raises(ValueError, match="read-only"):
        then.pages.replicas[0] = 0


def test_a_policy_that_fails_is_named_and_the_devices_keep_what_they_had() -> None:
    def fails(view: View) -> Plan:
        return keep_what_passed(view) if view.now_s < 3 else [1 // 0]  # type: ignore[list-item]

    serving = Serving(requests(0, 1, 0, 1), Setting(1, PAGES), [Asked(fails)])
    served = serving.run()
    serving.check()
    assert "division" in served.failure
    assert served.plans == 2
    assert served.hit_ratio == pytest.approx(1 / 4)


def test_more_than_a_device_holds_is_refused_as_a_pool_does() -> None:
    asked = Asked(lambda view: moves(view, np.arange(2), HBM, "too much", "copy"))
    serving = Serving(requests(0, 1), Setting(1, 1), [asked])
    assert "room for 1 pages" in serving.run().failure
    assert not serving.held.any()


def test_a_memory_policy_sees_copies_as_pages_that_lie_on_the_device() -> None:
    asked = Asked(keep_what_passed)
    serve(requests(0, 1, 0), [asked], 2 * PAGES)
    shown = as_memory(asked.views[1], HBM)
    assert shown.pages.tier.tolist() == [HBM, HBM, DRAM, DRAM]
    assert shown.pages.replicas.tolist() == [0] * 4
    assert [tier.id for tier in shown.memory_tiers] == [HBM, DRAM]
    assert shown.tiers[DRAM].free_bytes == 2 * PAGE_BYTES
    assert shown.tiers[HBM].free_bytes == 2 * PAGE_BYTES
    assert asked.views[1].tiers[DRAM].free_bytes == 0


def test_moves_become_copies_and_drops_and_drops_that_make_no_room_wait() -> None:
    out, into = Move(0, 2, HBM, DRAM, "out"), Move(4, 2, DRAM, HBM, "in")
    dropped, copied = replace(out, kind="drop"), replace(into, kind="copy")
    assert as_copies([out, into], HBM) == [dropped, copied]
    assert as_copies([out, into, Move(2, 2, HBM, DRAM, "idle"), Move(6, 1, HBM, DRAM, "idle")], HBM) == [
        dropped,
        copied,
    ]
    assert as_copies([out], HBM) == []


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_lru_is_the_textbooks_where_requests_are_seldom(models: list[int], holds: int) -> None:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for model in models:
        hits += model in held
        held[model] = None
        held.move_to_end(model)
        if len(held) > holds:
            held.popitem(last=False)
    made = requests(*models)
    served = shipped(made, "lru", Setting(1, holds * PAGES))
    assert served.hit_ratio == pytest.approx(hits / len(models))
    assert served.copied_bytes == (len(models) - hits) * PAGES * PAGE_BYTES


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_bounds_whoever_keeps_only_what_passed(seed: int) -> None:
    random = np.random.default_rng(seed)
    made = requests(*random.integers(0, 12, 80).tolist(), pages=4)
    bound = baselines(made, Setting(3, 6))[1]

    def any_plan(view: View) -> Plan:
        held = random.permutation(np.flatnonzero(view.pages.replicas))
        passed = random.permutation(np.flatnonzero(view.pages.leased & (view.pages.replicas == 0)))
        old, new = held[: int(random.integers(0, 5))], passed[: int(random.integers(0, 5))]
        room = view.tiers[HBM].free_bytes // PAGE_BYTES + len(old)
        out = [Move(row, 1, HBM, DRAM, "why not", "drop") for row in old.tolist()]
        return out + moves(view, new[:room], HBM, "why not", "copy")

    served, _ = serve(made, [Asked(any_plan) for _ in range(3)], 6)
    assert 0 < served.hit_ratio < bound.hit_ratio
    assert served.copied_bytes == pytest.approx((1 - served.hit_ratio) * made.nbytes * 80 / 12)
    assert served.copied_bytes > bound.copied_bytes


def small(seed: int = 0) -> Trace:
    return generate(workload("passes", seed=seed, models=30, nbytes=30 * 8 * PAGE_BYTES, duration_s=60.0))


def test_passes_are_whole_models_by_zipfs_law_and_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        small(seed).write(tmp_path / name)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again
    assert first != other
    made = generate(workload("passes"))
    assert (np.diff(made.first) == 64).all()
    assert (made.page.reshape(-1, 64) == made.model[made.page[::64], None] * 64 + np.arange(64)).all()
    assert 7_000 < len(made.visit_s) < 13_000
    asked = np.sort(np.bincount(made.model[made.page[::64]], minlength=300))[::-1] / len(made.visit_s)
    harmonic = (1 / np.arange(1, 301)).sum()
    assert asked[0] == pytest.approx(1 / harmonic, rel=0.1)
    assert asked[:40].sum() == pytest.approx((1 / np.arange(1, 41)).sum() / harmonic, rel=0.05)
    assert made.use_change.sum() == 0
    assert (np.diff(made.use_s) >= 0).all()


@pytest.mark.parametrize("policy", ["lru", "layer_prefetch"])
def test_shipped_policies_keep_what_is_asked_for_most_and_equal_traces_give_equal_results(policy: str) -> None:
    made, setting = small(), Setting(3, 4 * 8)
    one, two = (replace(shipped(made, policy, setting), policy_s=0.0) for _ in range(2))
    static, best = baselines(made, setting)
    assert str(one) == str(two)
    assert 12 / 30 < one.hit_ratio < best.hit_ratio
    assert static.hit_ratio < best.hit_ratio
    assert one.copied_bytes > best.copied_bytes


@pytest.mark.parametrize(("text", "devices", "places"), [("10:1GiB", 10, 512), ("1:4/300", 1, 4), ("2:5MiB", 2, 2)])
def test_devices_are_how_many_and_how_much(text: str, devices: int, places: int) -> None:
    assert parse_devices(text, 300 * PAGE_BYTES) == Setting(devices, places)


@pytest.mark.parametrize("text", ["", "10", "x:1GiB", "0:1GiB", "-1:1GiB", "2000:1GiB", "1:1/0", "1:0/3", "1:1MiB",
                                  "1:much", "1:-1/2", "1:2:3"])  # fmt: skip
def test_what_are_no_devices_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--devices|is not a size"):
        parse_devices(text, 300 * PAGE_BYTES)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `tiermem replay` with these arguments on a small trace: exit code, stdout, stderr."""
    path = tmp_path / "passes.trace"
    arguments = ("--models", "30", "--size", "480MiB", "--duration", "30s")
    assert cli.main(["trace", "passes", "-o", str(path), *arguments]) == 0
    capsys.readouterr()

    def replay(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["replay", str(path), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return replay


def test_a_table_of_policies_against_the_oracle(run: Run) -> None:
    code, out, err = run("--policy", "lru,layer_prefetch", "--devices", "3:4/30")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "3 devices that hold 64.0 MiB each" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["lru", "layer_prefetch", "best-static", "oracle"]
    assert "1.00x" in lines[-1]


def test_json_has_every_figure_in_base_units(run: Run) -> None:
    code, out, _ = run("--policy", "lru", "--devices", "3:4/30", "--json")
    told = json.loads(out)
    assert (code, told["schema"]) == (0, "tiermem.replay.devices/1")
    results = told["results"]
    lru, oracle = results["rows"][0], results["rows"][-1]
    assert (results["devices"], results["device_bytes"]) == (3, 64 << 20)
    assert lru["plans"] == results["requests"]
    misses = round((1 - lru["hit_ratio"]) * results["touches"])
    assert misses * PAGE_BYTES <= lru["copied_bytes"] < 2 * misses * PAGE_BYTES
    assert oracle["copied_bytes"] == round((1 - oracle["hit_ratio"]) * results["touches"]) * PAGE_BYTES
    assert lru["oracle_share"] == pytest.approx(lru["hit_ratio"] / oracle["hit_ratio"])
    assert oracle["busiest"] is None


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(("--devices", "3"), "how many"), (("--devices", "3:4/30", "--quota", "1GiB"), "--quota"),
     (("--devices", "3:4/30", "--tier", "dram=rest", "--seed", "0"), "--tier, --seed")],
)  # fmt: skip
def test_usage_errors(run: Run, arguments: tuple[str, ...], what: str) -> None:
    code, out, err = run("--policy", "lru", *arguments)
    assert (code, out) == (2, "")
    assert what in err


def test_a_policy_that_fails_is_told(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("class Bad:\n    def plan(self, view):\n        raise ValueError('boom')\n")
    code, out, err = run("--policy", str(bad), "--devices", "1:4/30")
    assert code == 0
    assert "boom" in err
    assert "(failed)" in out
