"""`tiermem report`: tables, JSON, pictures and errors, for recordings and for perf.data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.perf_script import needs_perf, record_faults
from tests.recordings import PID, end, events, mapped, record, sampled, window
from tiermem import cli
from tiermem.recording import MAGIC, frame

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tiermem report` with these arguments: exit code, stdout, stderr."""
    monkeypatch.setitem(cli.COMMANDS, "report", ("tiermem.cli.report", "Show what a recording holds."))

    def report(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return report


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record(
        tmp_path / "r", frame("process", 0.0, pid=PID, start_ticks=1, comm="a\x1b[2Jb\udcff"), mapped(),
        window(0.0, 1.0, [0, 1, 2], [0]), events("mem-loads"), sampled([(1 + i / 10, (i + 3) % 8) for i in range(50)]),
        end(10.0),
    )  # fmt: skip


def results(text: str) -> dict[str, Any]:
    envelope = json.loads(text)
    assert envelope["schema"] == "tiermem.report/1"
    told: dict[str, Any] = envelope["results"]
    return told


def test_heat_as_a_table_and_as_json(run: Run, recorded: Path) -> None:
    code, out, err = run("heat", recorded)
    assert (code, err) == (0, "")
    assert "10.00 s of 1 models, 1 windows, 50 samples, events mem-loads" in out.replace("\n", " ")
    assert [line.split()[:4] for line in out.splitlines()[3:]] == [
        ["embeddings", "2", "4.0", "MiB"], ["model.layers.0", "2", "4.0", "MiB"], ["model.layers.1", "2", "4.0", "MiB"],
        ["head", "2", "4.0", "MiB"],
    ]  # fmt: skip
    code, out, _ = run("heat", recorded, "--by", "page", "--json")
    told = results(out)
    assert (code, told["heat"]["by"], told["heat"]["total_rows"]) == (0, "page", 8)
    observed = [row["observed"] for row in told["heat"]["rows"]]
    assert observed == sorted(observed, reverse=True) != observed[::-1]  # the hottest first
    assert told["heat"]["rows"][0].keys() >= {"page", "bytes", "touched", "cold", "unknown", "touches_per_s", "age_s"}


@pytest.mark.parametrize("by", ["model", "layer", "tensor", "expert", "page"])
def test_each_kind_of_row_has_a_table(run: Run, recorded: Path, by: str) -> None:
    assert run("heat", recorded, "--by", by)[0] == 0


def test_rows_beyond_the_limit_are_counted(run: Run, recorded: Path) -> None:
    _, out, err = run("heat", recorded, "--by", "page", "--limit", 3)
    assert len(out.splitlines()) == 3 + 3
    assert err == "tiermem: 5 more rows of heat; --limit 0 shows all\n"
    _, out, err = run("accesses", recorded)
    assert err == "tiermem: 10 more rows of accesses; --limit 0 shows all\n"
    assert len(results(run("accesses", recorded, "--json")[1])["accesses"]["rows"]) == 50
    assert run("accesses", recorded, "--limit", 0)[2] == ""


def test_accesses_begin_with_the_passes(run: Run, recorded: Path) -> None:
    _, out, _ = run("accesses", recorded)
    assert "in checkpoint" in " ".join(out.split())
    order = results(run("accesses", recorded, "--json")[1])["accesses"]["orders"][0]
    assert order["verdict"] == "in checkpoint order (cyclic)"
    assert order["passes"][1]["layers"] == ["embeddings", "model.layers.0", "model.layers.1", "head"]


def test_names_cannot_steer_the_terminal(run: Run, recorded: Path) -> None:
    _, out, _ = run("threads", recorded)
    assert "\x1b" not in out
    assert "a\\x1b[2Jb" in out
    assert results(run("threads", recorded, "--json")[1])["threads"]["rows"][0]["comm"] == "a\x1b[2Jb\udcff"


def test_functions(run: Run, recorded: Path) -> None:
    _, out, _ = run("functions", recorded)
    assert out.splitlines()[-1].split() == ["unknown", "50", "100.0%"]


def test_what_only_samples_tell_says_so(run: Run, tmp_path: Path) -> None:
    path = record(tmp_path / "r", mapped(), window(0.0, 1.0, [0], [0]))
    code, _, err = run("threads", path)
    assert code == 0
    assert err.splitlines() == [
        "tiermem: the recording has no end: its recorder was killed, or still runs",
        "tiermem: there are no samples, and only those tell threads; record with perf events",
    ]


def test_a_picture(run: Run, recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="lacks matplotlib: pip install 'tiermem[report]'")
    code, _, err = run("heat", recorded, "--png", tmp_path / "heat.png")
    assert (code, err) == (0, f"tiermem: drew {tmp_path}/heat.png\n")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "name one FILE"),
        (["heat"], 2, "name one FILE"),
        (["heat", "r", "--perf-data", "p"], 2, "name one FILE"),
        (["warmth", "r"], 2, "'warmth' is not one of"),
        (["heat", "r", "--by", "colour"], 2, "'colour' is not one of"),
        (["threads", "r", "--png", "x.png"], 2, "--png draws heat, not threads"),
        (["heat", "absent"], 1, "No such file or directory"),
        (["heat", "."], 1, "Is a directory"),
        (["heat", "empty"], 1, "empty is empty; a report reads what tiermem record, or perf record --data, wrote"),
        (["heat", "text"], 1, "text begins with b'hello wo'"),
        (["heat", "torn"], 1, "torn: it has no header"),
        (["--perf-data", "r"], 1, "leave --perf-data away"),
        (["heat", "foreign"], 1, "foreign"),
        (["heat", "r", "--png", "missing/x.png"], 1, "No such file or directory"),
    ],
)
def test_errors_say_what_to_do(
    run: Run, recorded: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, complaint: str
) -> None:
    monkeypatch.chdir(recorded.parent)
    for name, data in {
        "empty": b"",
        "text": b"hello world",
        "torn": MAGIC,
        "foreign": b"PERFILE2" + b"\xff" * 96,
    }.items():
        Path(name).write_bytes(data)
    ended, _, err = run(*arguments)
    assert ended == code
    assert complaint in err
    assert len(err.splitlines()) == 1


@needs_perf
def test_a_file_of_perf_record(run: Run, tmp_path: Path) -> None:
    path = record_faults(tmp_path / "perf.data")
    code, out, _ = run("--perf-data", path, "--json")
    told = results(out)
    assert code == 0
    rows = told["heat"]["rows"]
    assert sum(row["samples"] for row in rows) == told["accesses"]["total_rows"] > 50
    assert "[anon]" in {row["file"] for row in rows}
    assert any("libc" in row["file"] or "python" in row["file"] for row in rows)
    for what in ("heat", "accesses", "threads", "functions"):
        code, out, _ = run(what, path, "--by", "page")
        assert code == 0
        assert "events page-faults:u" in out.replace("\n", " ")
