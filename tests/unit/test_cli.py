"""The command line: what is imported, what is printed where, and how a command ends."""

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.certificates import Authority
from tiermem import cli, errors, host
from tiermem.cli import output
from tiermem.cli.flags import config_flags
from tiermem.config import BY_KEY, OPTIONS
from tiermem.peer import transport

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "grpc", "numpy", "cffi", "tiermem._native", "tiermem._ffi", "tiermem.pool", "rich")


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the machine's, and a runtime directory of our own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIERMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def command_that(function: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `tiermem doctor` run `function`."""
    command = click.Command("doctor", callback=function)
    monkeypatch.setattr(importlib.import_module("tiermem.cli.doctor"), "command", command)


def python(code: str) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    run = python(f"import sys, tiermem.cli as c; c.main(['--help']); print([m for m in {HEAVY} if m in sys.modules])")
    assert run.returncode == 0, run.stderr
    *text, heavy = run.stdout.splitlines()
    assert heavy == "[]"  # modules that were imported
    listed = [line.split()[0] for line in text[text.index("Commands:") + 1 :]]
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: tiermem {name}")


@pytest.mark.parametrize("code", errors.BY_CODE)
def test_an_error_is_one_line_and_its_class_is_the_exit_code(
    code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = errors.BY_CODE[code]

    def fail() -> None:
        raise kind("model 'a' went\naway")

    command_that(fail, monkeypatch)
    assert cli.main(["doctor"]) == kind.exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "tiermem: error: model 'a' went away\n")


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (FileNotFoundError(2, "No such file", "/x"), 1, "tiermem: error: [Errno 2] No such file: '/x'\n"),
        (ZeroDivisionError("ratio"), 1, "tiermem: error: unexpected ZeroDivisionError: ratio; tiermem --debug shows"),
    ],
)
def test_other_ends(
    problem: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise problem

    command_that(fail, monkeypatch)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err.strip().startswith(text.strip())


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise errors.CapacityError("full")

    command_that(fail, monkeypatch)
    assert cli.main(["--debug", "doctor"]) == 5
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    assert last == "tiermem: error: full"


@pytest.mark.parametrize("arguments", [[], ["doctr"], ["doctor", "--nope"], ["doctor", "a", "b"]])
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tiermem" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tiermem {output.version()}\n"


def test_a_reader_that_goes_away_is_no_noise() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for arguments in ("doctor", "doctor --json", "--help"):
            run = subprocess.run(
                [sys.executable, "-m", "tiermem", *arguments.split()], stdout=writer, stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}, timeout=60,
            )  # fmt: skip
            assert (run.returncode, run.stderr) == (1, b""), arguments
    finally:
        os.close(writer)


def test_rows_of_the_option_table_become_flags() -> None:
    seen: dict[str, object] = {}

    @click.command()
    @config_flags(*BY_KEY)
    def command(**flags: object) -> None:
        seen.update(flags)

    command.main([], standalone_mode=False)
    assert seen == dict.fromkeys(BY_KEY)
    command.main(["--read-threads", "7", "--no-keep"], standalone_mode=False)
    assert (seen["read_threads"], seen["keep"]) == ("7", False)
    assert [parameter.name for parameter in command.params] == [option.key for option in OPTIONS]


def test_doctor_prints_one_json_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", "--json", "--tier", "dram=64MiB", "--backing", "memfd"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["schema", "version", "host", "results"]
    assert report["schema"] == "tiermem.doctor/1"
    results = report["results"]
    assert list(results) == ["facts", "storage", "tiers", "tiers_error", "backing", "daemon", "sampling", "remote"]
    assert (results["tiers"], results["tiers_error"]) == (["dram=64MiB", "disk"], "")
    assert results["backing"]["kind"] == "memfd"
    assert set(results["facts"]["rdma"]) == set(results["facts"]["memlock"]) == {"available", "reason"}
    assert results["daemon"]["address"] == f"unix:{tmp_path}/tiermem/tiermem.sock"
    assert results["daemon"]["available"] is False
    rungs = {row["rung"]: row["available"] for row in results["sampling"]}
    assert list(rungs) == ["perf (whole host)", "perf (own processes)", "present", "accessed", "declared"]
    assert rungs["declared"] is True


def test_doctor_tells_whether_a_daemon_listens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "d.sock"))
        daemon.listen()
        assert cli.main(["doctor", "--json", "--address", f"unix:{tmp_path}/d.sock"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["daemon"]["available"] is True
    assert cli.main(["doctor", "--json", "--address", "localhost:1"]) == 0
    assert "Unix sockets only" in json.loads(capsys.readouterr().out)["results"]["daemon"]["reason"]


def test_doctor_fits_80_columns_and_names_every_capability(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= output.PIPE_COLUMNS
    for name in (
        "tmpfs",
        "hugetlb",
        "shm",
        "memfd",
        "cxl",
        "migration",
        "rdma",
        "memlock",
        "accelerator",
        "segments",
        "daemon",
        "present",
        "listen",
        "tls",
        "pyverbs",
        "transport",
    ):
        assert any(line.startswith(name) for line in lines), name


def test_doctor_config_tells_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiermem.toml").write_text('spare = "4MiB"\n')
    monkeypatch.setenv("TIERMEM_GRACE", "250ms")
    assert cli.main(["doctor", "--config", "--json", "--tier", "dram=3.1GB"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "tiermem.config/1"
    rows = {row["key"]: (row["value"], row["unit"], row["origin"]) for row in report["results"]}
    assert list(rows) == list(BY_KEY)
    assert rows["tier"] == (f"dram={3_100_000_000 >> 21 << 1}MiB,disk", None, "--tier")
    assert rows["spare"] == (4 << 20, "bytes", "tiermem.toml")
    assert rows["grace"] == (0.25, "seconds", "TIERMEM_GRACE")
    assert rows["keep"] == (False, None, "default")
    assert cli.main(["doctor", "--config"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["grace", "250.0", "ms", "TIERMEM_GRACE"] in lines
    for key in ("tls_cert", "listen", "peer", "metrics_port"):
        assert [key, "unset", "default"] in lines
    assert ["keep", "false", "default"] in lines
    assert ["data_port", "0", "default"] in lines


def remote(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """What doctor finds of other hosts' pools."""
    assert cli.main(["doctor", "--json", "--tier", "dram=64MiB", "--backing", "memfd", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["results"]["remote"]
    return found


def test_doctor_says_why_weights_come_by_tcp(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = remote(capsys)
    assert (alone["listen"], alone["peers"], alone["tls"]["available"]) == ("", [], False)
    able = host.Capability(True, "")
    for has, reason in (
        (able, "pyverbs cannot be imported"),
        (host.Capability(False, ""), "lacks an RDMA device, pyverbs"),
    ):
        monkeypatch.setattr(host, "rdma", lambda _root, has=has: has)
        monkeypatch.setattr(host, "memlock", lambda _root: able)
        monkeypatch.setattr("tiermem.peer.transport.pyverbs", lambda has=has: has)
        own = transport.Transports().own()
        assert own.name == "tcp"
        assert reason in own.reason
    assert "--transport tcp is given" in remote(capsys, "--transport", "tcp")["transport"]["reason"]


def test_doctor_tells_what_is_wrong_with_the_tls_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, other = Authority(tmp_path).issue("pool-a"), Authority(tmp_path, "other").issue("pool-b")
    assert remote(capsys, *good.flags)["tls"] == {"available": True, "reason": "both ways, as pool-a"}
    for flags, reason in (
        (["--listen", "0.0.0.0:7070"], "0.0.0.0:7070 is not of the loopback"),
        (["--tls-cert", str(good.cert)], "give --tls-key and --tls-ca too"),
        ([*good.flags[:4], "--tls-ca", str(other.ca)], "peers would refuse it"),
        ([*good.flags[:2], "--tls-key", str(other.key), *good.flags[4:]], "not the key of"),
    ):
        found = remote(capsys, *flags)["tls"]
        assert not found["available"]
        assert reason in found["reason"], flags
    assert "for --insecure is given" in remote(capsys, "--listen", "0.0.0.0:7070", "--insecure")["tls"]["reason"]


def test_doctor_asks_every_peer_and_says_why_one_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    first, second = remote(capsys, "--peer", nobody, "--peer", "192.0.2.1:7070")["peers"]
    assert (first["address"], first["available"]) == (nobody, False)
    assert f"no pool listens at {nobody} (Connection refused)" in first["reason"]
    assert "--insecure" in second["reason"], "nobody is called in the clear who may not be"


def test_text_of_users_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("name", ">bytes"), [("[red]a[/red]", 1), ("b", 1000)])
    output.line("[bold]" + "x" * 200)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["name", "bytes"], ["[red]a[/red]", "1"], ["b", "1000"]]
    assert lines[3] == ["[bold]" + "x" * 200]


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("load", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
