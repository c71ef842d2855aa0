"""`python -m tests.bench.replay_table`: the tables of docs/replay.md, as Markdown: every shipped policy, every trace.

Figures of a simulation: hits and moves follow from the traces, slowdowns from a model of the tiers.
"""

from __future__ import annotations

import pkgutil
import sys
from dataclasses import replace

from tiermem import policies
from tiermem.replay.baselines import oracle, static_baselines
from tiermem.replay.generate import DEFAULTS, generate, workload
from tiermem.replay.observe import SAMPLINGS
from tiermem.replay.result import Result, ratio
from tiermem.replay.simulate import Setting, Simulation
from tiermem.replay.tier_model import parse_tier_models
from tiermem.replay.trace import Trace
from tiermem.runner import open_runner

PARTS = ("1/2", "1/4", "1/8")
QUOTA = 1 << 30
SHIPPED = sorted(module.name for module in pkgutil.iter_modules(policies.__path__))
GIB = 1 << 30


def _rows(trace: Trace, part: str, sampling: str) -> list[Result]:
    setting = Setting(parse_tier_models((f"dram={part},cxl=rest",), trace.nbytes), QUOTA, sampling)
    best = oracle(trace, setting)
    rows = []
    for name in SHIPPED:
        print(f"{trace.facts['kind']} {part} {sampling} {name}", file=sys.stderr)
        rows.append(Simulation(trace, setting, open_runner(name, 10.0)).run())
        assert not rows[-1].failure, rows[-1].failure
    if sampling == "exact":
        rows += [row for row in static_baselines(trace, setting) if row.policy in ("interleave", "best-static")]
        rows.append(best)
    return [replace(row, oracle_share=ratio(row.hit_ratio, best.hit_ratio)) for row in rows]


def _shares(tables: dict[tuple[str, str], list[Result]]) -> None:
    """One row a policy, one column a trace and size of DRAM: the share of the oracle's hits."""
    print("| policy |" + "".join(f" {kind} {part} |" for kind, part in tables))
    print("|---|" + "---:|" * len(tables))
    for number, row in enumerate(next(iter(tables.values()))):
        print(f"| {row.policy} |" + "".join(f" {rows[number].oracle_share:.0%} |" for rows in tables.values()))


def _details(rows: list[Result]) -> None:
    print("| policy | hits | of oracle | slowdown | moved | useful | ping-pongs | settles | CPU a plan |")
    print("|---|" + "---:|" * 8)
    for row in rows:
        cells = [
            row.policy, f"{row.hit_ratio:.1%}", f"{row.oracle_share:.1%}", f"{row.slowdown:.2f}x",
            f"{row.moved_bytes / GIB:.1f} GiB" if row.moved_bytes else "",
            f"{ratio(row.useful_bytes, row.promoted_bytes):.0%}" if row.promoted_bytes else "",
            str(row.ping_pongs or ""), "" if row.convergence_s is None else f"{row.convergence_s:.0f} s",
            f"{row.policy_s * 1e3:.1f} ms" if row.ticks else "",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def main() -> int:
    traces = [generate(workload(kind)) for kind in DEFAULTS]
    for sampling in SAMPLINGS:
        tables = {(str(t.facts["kind"]), part): _rows(t, part, sampling) for t in traces for part in PARTS}
        print(f"\n### Share of the oracle's hits, sampling {sampling}\n")
        _shares(tables)
        if sampling == "exact":
            for (kind, part), rows in tables.items():
                print(f"\n#### {kind}, DRAM {part}\n")
                _details(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
