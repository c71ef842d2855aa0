"""`python -m tests.bench`: the main job against its peers, every figure beside its target. What `make bench` runs.

a  open a resident model          d  eight processes at once
b  open it and touch every page   e  staging memory
c  load it from a cold file       f  memory used for the first time, and again
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import cases, figures, report
from tests.bench.figures import Row
from tests.bench.launch import daemon
from tests.bench.loaders import LOADERS, OURS
from tests.bench.make_checkpoint import default_directory, make_checkpoint
from tests.bench.subject import REAL_MODEL, Subject, real_model
from tiermem.errors import DigestMismatch
from tiermem.units import format_bytes

CASES = {
    "a": "a. resident model: load_model returns",
    "b": "b. resident model: load_model, then one byte of each 4 KiB",
    "c": "c. cold file: until every tensor is there",
    "d": "d. several processes at once: memory",
    "e": "e. memory beside the model during a cold load",
    "f": "f. prefaulting memory of the pool's kind",
}
QUICK_RUNS, QUICK_SCALE = 2, 0.2
SPARE_BYTES, DRAM_MODELS = 4 << 30, 1.1


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    # As Ctrl-C does: through every `finally`, so that no daemon of ours is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    runs = asked.runs or (QUICK_RUNS if asked.quick else 5)
    directory = asked.model or default_directory().with_name("qwen-quick" if asked.quick else "qwen")
    if asked.model is None or not any(directory.glob("*.safetensors")):
        make_checkpoint(directory, QUICK_SCALE if asked.quick else 1.0)
    facts = report.host_facts() | {"quick": asked.quick, "runs": runs}
    loaders = [name for name, loader in LOADERS.items() if name == OURS or loader.version]
    _show_facts(facts)
    blocks = []
    try:
        subject = Subject.of(directory.name, directory)
        blocks.append(_block(cases.Run(subject, loaders, runs, _say), set(asked.only or CASES)))
        real = real_model()
        if real is None:
            print(f"{REAL_MODEL}: not installed, so that its block is missing; pip install tiermem[demo]")
        else:
            run = cases.Run(Subject.of(REAL_MODEL, real), loaders, runs, _say)
            blocks.append(_block(run, set(asked.only or CASES) & set("abd")))
    except DigestMismatch as wrong:
        print(f"verification failed: {wrong}", file=sys.stderr)
        return wrong.exit_code
    path = asked.json or default_directory().with_name(time.strftime("%Y%m%d-%H%M%S.json"))
    report.write(path, facts, blocks)
    missed = [
        f"  {block['label']} {case}. {row['what']}"
        for block in blocks for case, rows in block["rows"].items() for row in rows if row["met"] is False
    ]  # fmt: skip
    print("\n".join([f"targets missed: {len(missed)}", *missed, f"all samples: {path}"]))
    return 0


def _block(run: cases.Run, wanted: set[str]) -> dict[str, Any]:
    """All wanted cases of one checkpoint: measured, shown, and as JSON has them."""
    subject, raw, rows = run.subject, dict[str, cases.Results](), dict[str, list[Row]]()
    dram = int(subject.nbytes * DRAM_MODELS) + (256 << 20)
    with ExitStack() as stack:
        bare = stack.enter_context(daemon(dram))
        if wanted & set("ce"):
            spare = min(SPARE_BYTES, dram)
            ahead = stack.enter_context(daemon(dram + spare, spare))
            raw["cold"] = cases.cold(run, ahead, bare)
            rows |= {"c": figures.reading(raw["cold"], subject), "e": figures.staging(raw["cold"], subject)}
        if wanted & set("abd"):
            bare.client.load(subject.directory)
        if wanted & set("ab"):
            raw["resident"] = cases.resident(run, bare)
            rows |= {"a": figures.opening(raw["resident"]), "b": figures.touching(raw["resident"])}
        if "d" in wanted:
            raw["shared"] = cases.shared(run, bare)
            rows["d"] = figures.sharing(raw["shared"], subject)
    if "f" in wanted:
        raw["prefault"] = cases.prefault(run)
        rows["f"] = figures.first_use(raw["prefault"])
    rows = {case: rows[case] for case in CASES if case in rows and case in wanted}
    print(f"\n{subject.label}: {subject.nbytes / 1e9:.2f} GB, {len(subject.digests)} tensors, every byte verified\n")
    for case, of_case in rows.items():
        report.show(CASES[case], of_case)
    return {
        "label": subject.label, "directory": subject.directory, "bytes": subject.nbytes,
        "tensors": len(subject.digests), "rows": {case: report.plain(of) for case, of in rows.items()}, "raw": raw,
    }  # fmt: skip


def _show_facts(facts: dict[str, Any]) -> None:
    print(f"{facts['cpus']} CPUs {facts['cpu']}, {format_bytes(facts['memory_bytes'])}, Linux {facts['kernel']}, "
          f"load {facts['load_average'][0]:.1f}, revision {facts['revision'] or 'unknown'}")  # fmt: skip
    known = (f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    print(f"Python {facts['python']}, {', '.join(known)}; {facts['runs']} runs")
    if facts["quick"]:
        print("quick: a small checkpoint and few runs; this shows that the benchmark works, its figures mean nothing")


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of the checkpoint; made there if it has none")
    parser.add_argument("--runs", type=int, help="repetitions of each measurement (5)")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="a to f; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all samples are written")
    parser.add_argument("--quick", action="store_true", help="a small checkpoint and 2 runs: does the benchmark work?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
