"""The benchmarks: what they load, that they notice a wrong byte, what `tiermem bench` prints. Judges no timing."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench import figures, worker
from tests.bench.make_checkpoint import INDEX, make_checkpoint, shapes
from tests.bench.subject import Subject
from tiermem import cli
from tiermem.bench import page_cache, timings
from tiermem.bench.samples import Samples
from tiermem.checkpoint import open_checkpoint
from tiermem.config import load_config
from tiermem.embedded import EmbeddedPool
from tiermem.errors import DigestMismatch, Refused
from tiermem.model import Model

TINY = 1 / 128


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    assert make_checkpoint(directory, TINY)
    return directory


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of this process, with nothing of the machine's."""
    for name, value in {"ADDRESS": f"unix:{tmp_path}/none.sock", "STATE": f"{tmp_path}/state",
                        "DIGESTS": f"{tmp_path}/digests", "TIER": "dram=256MiB"}.items():  # fmt: skip
        monkeypatch.setenv(f"TIERMEM_{name}", value)


@pytest.fixture
def pool() -> Iterator[EmbeddedPool]:
    with EmbeddedPool(load_config()) as pool:
        yield pool


def test_the_checkpoint_has_the_shapes_of_the_model_that_it_stands_for() -> None:
    full = shapes()
    assert len(full) == 338
    assert sum(map(math.prod, full.values())) == 1_543_714_304  # parameters of Qwen2.5-1.5B, tied embeddings
    assert full["model.embed_tokens.weight"] == (151936, 1536)
    assert full["model.layers.27.self_attn.k_proj.weight"] == (256, 1536)
    assert full["model.layers.0.mlp.down_proj.weight"] == (1536, 8960)
    assert full["model.layers.0.self_attn.q_proj.bias"] == (1536,)


def test_a_small_checkpoint_has_every_tensor_and_layer_and_finite_weights(tiny: Path, pool: EmbeddedPool) -> None:
    manifest = open_checkpoint(tiny)
    assert (len(manifest.tensors), len(manifest.segments), len(manifest.files)) == (338, 30, 2)
    assert {tensor.name: tensor.shape for tensor in manifest.tensors} == shapes(TINY)
    with pool.open(tiny) as model:
        bits = np.concatenate([np.frombuffer(model.raw(name), np.uint16) for name in model])
    exponents = bits >> 7 & 0xFF
    assert exponents.max() < 0xFF  # neither infinite nor NaN
    assert len(np.unique(bits)) > 3000
    assert 0.49 < (bits >> 15).mean() < 0.51


def test_a_complete_checkpoint_is_left_alone_and_any_other_is_written_again(tiny: Path, tmp_path: Path) -> None:
    index = tiny / INDEX
    written = index.stat().st_mtime_ns
    assert not make_checkpoint(tiny, TINY)
    assert index.stat().st_mtime_ns == written
    assert make_checkpoint(tmp_path, TINY)
    shard = next(tmp_path.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert make_checkpoint(tmp_path, TINY)
    assert shard.read_bytes() == content  # the same seed gives the same bytes
    assert make_checkpoint(tmp_path, TINY, seed=1)
    assert shard.read_bytes() != content


def test_the_benchmark_notices_a_wrong_byte_a_missing_and_a_surplus_tensor(tiny: Path) -> None:
    subject = Subject.of("tiny", tiny)
    assert len(subject.digests) == 338
    loaded = {name: content.copy() for name, content in _bytes(tiny).items()}
    assert worker.wrong_tensors(loaded, subject.digests) == []
    loaded["model.norm.weight"][3] ^= 1
    assert worker.wrong_tensors(loaded, subject.digests) == ["model.norm.weight"]
    loaded["surplus"] = loaded.pop("model.embed_tokens.weight")
    assert worker.wrong_tensors(loaded, subject.digests) == [
        "model.embed_tokens.weight", "model.norm.weight", "surplus",
    ]  # fmt: skip


def _bytes(directory: Path) -> worker.Bytes:
    from safetensors.torch import load_file

    return worker.bytes_of({n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()})


def test_a_pool_that_serves_a_wrong_byte_fails_the_users_benchmark(tiny: Path, pool: EmbeddedPool) -> None:
    digests = timings.digests_of(open_checkpoint(tiny))
    with pool.open(tiny, writable=True) as model:
        assert timings.verify(model, digests) == 338
        model.raw("model.norm.weight")[0] ^= 1
        with pytest.raises(DigestMismatch, match=r"1 of 338 .*model\.norm\.weight"):
            timings.verify(model, digests)


@pytest.mark.parametrize("verb", ["load", "open"])
def test_failed_verification_is_exit_code_6(
    verb: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Model.raw

    def damaged(model: Model, name: str) -> memoryview:
        return memoryview(bytes(honest(model, name).nbytes)) if name == "model.norm.weight" else honest(model, name)

    monkeypatch.setattr(Model, "raw", damaged)
    assert cli.main(["bench", verb, str(tiny), "--runs", "1"]) == 6
    assert "model.norm.weight" in capsys.readouterr().err


def test_bench_load_prints_its_schema(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        page_cache.drop([str(path) for path in tiny.glob("*.safetensors")])
    except Refused:
        pytest.skip("temporary files are in memory here (tmpfs); no read of them is ever cold")
    results = _json(["bench", "load", str(tiny), "--runs", "2", "--json"], "tiermem.bench.load/1", capsys)
    assert (results["cache"], results["runs"], results["pool"]) == ("cold", 2, "embedded pool")
    assert all(load["cached"] < page_cache.COLD for load in results["loads"])
    assert {"load_s", "cached", "prefault_thread_s", "read_thread_s", "digest_thread_s"} == set(results["loads"][0])
    assert results["seconds"] == [load["load_s"] for load in results["loads"]]


def test_bench_load_warm_says_that_the_cache_was_warm(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "load", str(tiny), "--runs", "1", "--warm"]) == 0
    printed = capsys.readouterr()
    assert "338 tensors have the digests of their files" in printed.out
    assert "time it with --cold" in printed.err


def test_bench_open_prints_its_schema(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _json(["bench", "open", str(tiny), "--runs", "2", "--json"], "tiermem.bench.open/1", capsys)
    assert len(results["touch_s"]) == len(results["touch_again_s"]) == 2


def _json(arguments: list[str], schema: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == schema
    results: dict[str, Any] = report["results"]
    assert results["verified_tensors"] == 338
    assert len(results["seconds"]) == results["runs"]
    assert results["min_s"] <= results["median_s"] <= results["p95_s"] <= results["max_s"]
    return results


def test_bench_without_a_path_needs_one_model_in_the_pool(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "load"]) == 4
    assert "name the checkpoint" in capsys.readouterr().err


def test_a_pool_is_left_as_it_was_found(tiny: Path, pool: EmbeddedPool) -> None:
    manifest = open_checkpoint(tiny)
    digests = timings.digests_of(manifest)
    with timings.kept_as_found(pool, manifest):
        timings.time_load(pool, manifest, digests, cold=False)
    assert pool.status()["models"] == []
    pool.load(tiny)
    with timings.kept_as_found(pool, manifest):
        timings.time_load(pool, manifest, digests, cold=False)
    assert [model["state"] for model in pool.status()["models"]] == ["resident"]


def test_quantiles_interpolate_and_targets_bound_the_median() -> None:
    samples = Samples.of([4.0, 1.0, 2.0, 3.0])
    assert (samples.median, samples.least, samples.most, samples.count) == (2.5, 1.0, 4.0, 4)
    assert samples.p95 == pytest.approx(3.85)
    assert samples.spread == pytest.approx(1.2)
    assert figures.Row("x", samples, "s", target=2.5).met
    assert not figures.Row("x", samples, "s", target=2.4).met
    assert not figures.Row("x", samples, "x", target=2.6, at_least=True).met
    assert figures.Row("x", samples, "s").met is None
