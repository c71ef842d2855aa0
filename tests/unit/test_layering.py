"""Who may import whom, kept by reading every import of the tree (docs/design.md, section 4)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LINES = 400

# A room imports from its own layer and from those below; a new room belongs into one of them.
LAYERS = (
    {"errors", "observations", "samples", "types", "units"},
    {"tier_spec"},
    {"_native", "config", "content", "dtypes", "durable", "host", "option_kind", "peer", "policy", "rpc", "runner"},
    {"addresses", "adoption", "catalog", "catalog_files", "checkpoint", "copying", "data_source", "digests", "heat",
     "fingerprint", "lease", "load", "loader", "lookup", "memory", "page_facts", "paths", "peers", "perfdata", "pins",
     "rollup", "sampler", "segment", "source", "spare", "symbols", "tier", "view"},
    {"journal", "recording"},
    {"eviction", "migrator", "statistics", "steering", "tier_watch"},
    {"control", "tiering"},
    {"pool"},
    {"images", "metrics", "observer", "opener", "peer_listener", "peer_service", "replay", "report", "server",
     "status"},
    {"agent", "attachment", "capture", "carrier", "carrying", "client", "device", "draft", "embedded", "model",
     "opening", "reporting"},
    {"export", "mindspore", "numpy", "onnxruntime", "safe_open", "torch", "transformers"},
    {"adapters", "bench", "cli", "__init__", "__main__"},
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# These see less than their layer would let them.
ONLY = {
    "_native": {"errors", "samples", "types", "units", "_ffi", "_native"},
    "policies": {"policy", "types"},
    "policy": {"errors", "policy", "types"},
    "rpc": {"errors", "types", "rpc"},
}
HEAVY = {"grpc", "mindspore", "onnxruntime", "sglang", "torch", "transformers", "vllm"}
HEAVY_AT_TOP = {
    "tiermem.torch", "tiermem.client", "tiermem.server", "tiermem.rpc.server", "tiermem.rpc.channel",
    "tiermem.adapters.vllm_loader", "tiermem.adapters.sglang_loader",
}  # fmt: skip


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every module; rpc/ and policies/ are imported as tiermem.rpc and tiermem.policies."""
    for folder, name in (("tiermem", "tiermem"), ("rpc", "tiermem.rpc"), ("policies", "tiermem.policies")):
        for path in sorted((root / folder).rglob("*.py")):
            yield ".".join((name, *path.relative_to(root / folder).with_suffix("").parts)), path


def imports(name: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            source = ".".join((*base, *filter(None, (node.module,))))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: no functions, nothing under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def faults(root: Path) -> list[str]:
    found = []
    for name, path in modules(root):
        room, text = room_of(name), path.read_text()
        tree = ast.parse(text)
        if text.count("\n") >= MAX_LINES:
            found.append(f"{name} has {text.count(chr(10))} lines")
        if room not in RANK and room not in ONLY:
            found.append(f"{name} is in no layer")
            continue
        for target in imports(name, ast.walk(tree)):
            if target.split(".")[0] in ("rpc", "policies"):
                found.append(f"{name} imports {target} past tiermem")
            if target.split(".")[0] == "tiermem" and not may(room, room_of(target)):
                found.append(f"{name} imports {target}")
        heavy = {target for target in imports(name, at_import(tree)) if target.split(".")[0] in HEAVY}
        if name not in HEAVY_AT_TOP:
            found += [f"{name} imports {target} at its top" for target in sorted(heavy)]
    return found


def may(room: str, target: str) -> bool:
    if room in ONLY:
        return target in ONLY[room]
    # Names that are no room (tiermem.open) come from tiermem/__init__.py, the top layer.
    return target != "_ffi" and RANK.get(target, len(LAYERS) - 1) <= RANK[room]


def test_the_tree_keeps_the_rules() -> None:
    assert len(list(modules(REPOSITORY))) > 10
    assert faults(REPOSITORY) == []


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("tiermem/catalog.py", "from tiermem.pool import Pool", "tiermem.catalog imports tiermem.pool.Pool"),
        ("tiermem/catalog.py", "def f():\n    from tiermem import server", "tiermem.catalog imports tiermem.server"),
        ("tiermem/source/file.py", "from ..client import a", "tiermem.source.file imports tiermem.client.a"),
        ("tiermem/segment.py", "from tiermem._ffi import lib", "tiermem.segment imports tiermem._ffi.lib"),
        ("tiermem/policy.py", "import tiermem.units", "tiermem.policy imports tiermem.units"),
        ("policies/lru.py", "from tiermem.catalog import C", "tiermem.policies.lru imports tiermem.catalog.C"),
        ("rpc/codec.py", "import tiermem._native", "tiermem.rpc.codec imports tiermem._native"),
        ("tiermem/server.py", "from rpc import codec", "tiermem.server imports rpc.codec past tiermem"),
        ("tiermem/pool.py", "if True:\n    import torch.cuda", "tiermem.pool imports torch.cuda at its top"),
        ("tiermem/adapters/vllm.py", "import grpc", "tiermem.adapters.vllm imports grpc at its top"),
        ("tiermem/helpers.py", "", "tiermem.helpers is in no layer"),
        ("tiermem/tier.py", "x = 1\n" * 400, "tiermem.tier has 400 lines"),
    ],
)
def test_each_rule_finds_its_fault(tmp_path: Path, path: str, text: str, fault: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert faults(tmp_path) == [fault]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tiermem/pool.py", "if TYPE_CHECKING:\n    import torch\nfrom tiermem import tier"),
        ("tiermem/adapters/vllm.py", "def f():\n    import torch, tiermem"),
        ("tiermem/_native/door.py", "from tiermem import _ffi, errors"),
        ("tiermem/client.py", "import grpc\nfrom tiermem.rpc import channel"),
        ("policies/lru.py", "import numpy\nfrom tiermem.policy import Plan"),
        ("rpc/server.py", "import grpc\nfrom tiermem.rpc.codec import pack"),
    ],
)
def test_what_the_rules_allow(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert faults(tmp_path) == []
