"""Generated traces: equal seeds, equal traces; and what each kind promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiermem.errors import ConfigError
from tiermem.replay.generate import DEFAULTS, generate, workload
from tiermem.types import TENSOR_CLASSES

SMALL: dict[str, dict[str, Any]] = {
    "dense": {"nbytes": 256 << 20, "duration_s": 3.0, "layers": 8},
    "moe": {"nbytes": 2 << 30, "duration_s": 60.0, "layers": 4, "experts": 32, "top_k": 2},
    "switch": {"nbytes": 2 << 30, "duration_s": 60.0, "models": 20},
    "mixed": {"nbytes": 4 << 30, "duration_s": 20.0, "layers": 4, "models": 20, "experts": 32, "top_k": 2},
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_equal_seeds_give_equal_files_and_others_do_not(kind: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(workload(kind, seed=seed, **SMALL[kind])).write(tmp_path / name)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_visit_touches_a_page_once_and_stays_in_one_model(kind: str) -> None:
    made = generate(workload(kind, **SMALL[kind]))
    visit = np.repeat(np.arange(len(made.visit_s)), np.diff(made.first))
    assert len(np.unique(visit * made.pages + made.page)) == made.touches
    assert (made.model[made.page] == made.model[made.page[made.first[:-1]]][visit]).all()
    assert abs(made.nbytes / SMALL[kind]["nbytes"] - 1) < 0.1


def test_dense_touches_every_page_once_a_step_in_reading_order() -> None:
    made = generate(workload("dense", steps_per_s=5.0, **SMALL["dense"]))
    steps = made.page.reshape(15, made.pages)
    assert (steps == np.arange(made.pages)).all()
    assert made.use_change.tolist() == [1, -1]


def test_moe_reads_its_dense_part_always_and_few_experts_often() -> None:
    made = generate(workload("moe", **SMALL["moe"]))
    touches = np.bincount(made.page, minlength=made.pages)
    expert = made.tensor_class == TENSOR_CLASSES.index("expert")
    assert (touches[~expert] == 300).all()
    by_rank = np.sort(touches[expert])[::-1]
    assert by_rank[: len(by_rank) // 4].sum() > 1.5 * by_rank[-len(by_rank) // 2 :].sum()


def test_the_popular_experts_are_others_after_the_marked_shift() -> None:
    made = generate(workload("moe", drift_s=1000.0, **SMALL["moe"]))
    assert made.shifts_s == (30.0,)
    cut = made.first[np.searchsorted(made.visit_s, 30.0)]
    quarters = [np.bincount(part, minlength=made.pages) for part in
                (made.page[: cut // 2], made.page[cut // 2 : cut], made.page[cut:])]  # fmt: skip
    expert = made.tensor_class == TENSOR_CLASSES.index("expert")
    same, other = (np.corrcoef(quarters[1][expert], quarters[i][expert])[0, 1] for i in (0, 2))
    assert same > 0.8
    assert other < 0.5


def test_drift_changes_the_popular_experts_little_by_little() -> None:
    made = generate(workload("moe", drift_s=0.2, **SMALL["moe"]))
    fifths = [np.bincount(made.page[(made.page >= 0) & _between(made, a, a + 3)], minlength=made.pages)
              for a in (0.0, 3.0, 25.0)]  # fmt: skip
    near, far = (np.corrcoef(fifths[0], fifths[i])[0, 1] for i in (1, 2))
    assert far < near


def _between(made: Any, begin_s: float, end_s: float) -> Any:
    at_s = np.repeat(made.visit_s, np.diff(made.first))
    return (at_s >= begin_s) & (at_s < end_s)


def test_requests_of_switch_read_one_model_many_times_while_it_is_open() -> None:
    made = generate(workload("switch", **SMALL["switch"]))
    opened = np.zeros(len(made.names), np.int64)
    uses = sorted(zip(made.use_s.tolist(), (-made.use_change).tolist(), made.use_model.tolist(), strict=True))
    busiest = 0
    for at_s, model in zip(made.visit_s, made.model[made.page[made.first[:-1]]], strict=True):
        while uses and uses[0][0] <= at_s:
            opened[uses[0][2]] -= uses.pop(0)[1]
        assert opened[model] > 0, "it is read while nobody has it open"
        busiest = max(busiest, int((opened > 0).sum()))
    assert busiest > 1, "several requests at once"
    per_model = np.bincount(made.model[made.page], minlength=20) / np.bincount(made.model)
    assert per_model.max() > 50


@pytest.mark.parametrize(
    ("kind", "given_", "what"),
    [
        ("dense", {"nbytes": 1 << 20}, "too small"),
        ("moe", {"top_k": 200}, "--top-k 200 of 128"),
        ("moe", {"skew": -1.0}, "Zipf"),
        ("dense", {"steps_per_s": 0.0}, "steps_per_s is 0.0"),
        ("switch", {"duration_s": 1e9}, "duration_s"),
    ],
)
def test_what_cannot_be_generated_is_named(kind: str, given_: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        workload(kind, **given_)
