"""`tiermem trace` and `tiermem replay`: tables, JSON, pictures and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tiermem import cli

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--size", "1GiB", "--duration", "20s", "--models", "20")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tiermem` with these arguments: exit code, stdout, stderr."""

    def tiermem(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return tiermem


@pytest.fixture
def trace(tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "t.trace"
    assert run("trace", "switch", "-o", path, *SMALL)[0] == 0
    return path


def test_trace_tells_what_it_made(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("trace", "switch", "-o", tmp_path / "t", *SMALL, "--seed", 7, "--json")
    told = json.loads(out)
    assert (code, told["schema"]) == (0, "tiermem.trace/1")
    results = told["results"]
    assert (results["models"], results["seed"], results["duration_s"]) == (20, 7, 20.0)
    assert results["bytes"] == (tmp_path / "t").stat().st_size
    assert "touches of" in run("trace", "switch", "-o", tmp_path / "t", *SMALL)[1]


def test_a_table_of_policies_and_baselines(trace: Path, run: Run) -> None:
    code, out, err = run("replay", trace, "--policy", "hold,lru", "--tier", "dram=1/2,cxl=rest")
    assert (code, err) == (0, "")
    rows = [line.split()[0] for line in out.splitlines()[4:]]
    assert rows == ["hold", "lru", "all-fast", "all-slow", "interleave", "best-static", "oracle"]
    assert "a model of the tiers, not measured" in out


def test_json_has_every_figure_in_base_units(trace: Path, run: Run) -> None:
    code, out, _ = run("replay", trace, "--policy", "lru", "--quota", "64MiB", "--sampling", "present", "--json")
    results = json.loads(out)["results"]
    assert code == 0
    assert results["quota_bytes_per_s"] == 64 << 20
    assert results["sampling"] == "present"
    assert "not measured" in results["latency"]
    lru = results["rows"][0]
    assert lru["policy"] == "lru"
    assert lru["ticks"] == 20
    assert 0 < lru["hit_ratio"] < 1
    assert lru["oracle_share"] == pytest.approx(lru["hit_ratio"] / results["rows"][-1]["hit_ratio"])


def test_a_picture(trace: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("replay", trace, "--policy", "lru", "--plot", tmp_path / "p.png")
    assert (code, err) == (0, f"tiermem: drew {tmp_path / 'p.png'}\n")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_policy_that_fails_is_named_and_the_others_go_on(trace: Path, tmp_path: Path, run: Run) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("class Bad:\n    def plan(self, view):\n        raise ValueError('boom')\n")
    code, out, err = run("replay", trace, "--policy", f"{bad},hold")
    assert code == 0
    assert "boom" in err
    assert "replaced by hold" in err
    assert "(failed)" in out


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--policy", "nonsense"), 2, "nonsense"),
        (("--policy", "lru", "--tier", "dram=1/4"), 2, "cannot hold"),
        (("--policy", "lru", "--tier", "bogus"), 2, "is no tier"),
        (("--policy", "lru", "--quota", "0"), 2, "--quota 0"),
        (("--policy", ","), 2, "--policy"),
        ((), 2, "--policy"),
    ],
)
def test_usage_errors(trace: Path, run: Run, arguments: tuple[str, ...], code: int, what: str) -> None:
    ended, out, err = run("replay", trace, *arguments)
    assert (ended, out) == (code, "")
    assert what in err


def test_files_that_are_no_trace(trace: Path, tmp_path: Path, run: Run) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(trace.read_bytes()[:-100])
    for path, what in ((cut, "damaged"), (tmp_path / "none", "No such file"), (Path(__file__), "no recording")):
        code, _, err = run("replay", path, "--policy", "hold")
        assert code == 1
        assert what in err
        assert str(path) in err
