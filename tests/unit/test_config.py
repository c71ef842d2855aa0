"""The option table: where a value comes from, and how a wrong one is refused."""

from dataclasses import fields
from pathlib import Path

import pytest

from tiermem import host
from tiermem.config import OPTIONS, Config, load_config, origins, socket_path
from tiermem.errors import ConfigError
from tiermem.tier_spec import DISK
from tiermem.types import PAGE_BYTES


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of our own, with an empty current directory."""
    monkeypatch.chdir(tmp_path)
    return {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "XDG_RUNTIME_DIR": "/run/user/7", "XDG_CACHE_HOME": "/caches"}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_table_the_config_and_the_names_agree() -> None:
    assert [option.key for option in OPTIONS] == [field.name for field in fields(Config)]
    for option in OPTIONS:
        assert option.flag == "--" + option.key.replace("_", "-")
        assert option.env in (None, "TIERMEM_" + option.key.upper())
        assert option.kind.read(option.kind.example) is not None
    assert sum(option.env is not None for option in OPTIONS) <= 12


def test_every_default_is_a_value_that_its_own_option_accepts(environ: dict[str, str]) -> None:
    config = load_config(environ=environ, files=())
    for option in OPTIONS:
        assert option.kind.read(getattr(config, option.key)) == getattr(config, option.key), option.key


def test_defaults(environ: dict[str, str]) -> None:
    config = load_config(environ=environ, files=())
    assert config.address == "unix:/run/user/7/tiermem/tiermem.sock"
    assert config.state == Path("/run/user/7/tiermem/pool")
    assert config.digests == Path("/caches/tiermem/digests")
    dram, disk = config.tier
    assert (dram.kind, dram.nodes, disk) == ("dram", (), DISK)
    assert dram.capacity_bytes is not None
    assert dram.capacity_bytes % PAGE_BYTES == 0
    assert 0 <= host.memory().usable_bytes // 2 - dram.capacity_bytes < PAGE_BYTES
    assert (config.spare, config.staging, config.read_threads, config.grace) == (0, 64 << 20, 12, 30.0)
    assert (config.backing, config.policy, config.keep, config.log_level) == ("auto", "lru", False, "info")


@pytest.mark.parametrize(("user", "runtime"), [(0, "/run/tiermem"), (1234, "/tmp/tiermem-1234")])
def test_places_without_xdg_variables(user: int, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(environ={}, files=())
    assert config.address == f"unix:{runtime}/tiermem.sock"
    assert str(config.digests) == ("/home/me/.cache/tiermem/digests" if user else "/var/cache/tiermem/digests")


def test_precedence_one_step_at_a_time(environ: dict[str, str], tmp_path: Path) -> None:
    xdg = write(tmp_path / "xdg/tiermem/config.toml", 'read_threads = 2\npolicy = "xdg"\n')
    assert load_config(environ=environ).read_threads == 2
    write(tmp_path / "tiermem.toml", "read_threads = 3\n")
    assert load_config(environ=environ).read_threads == 3
    environ["TIERMEM_READ_THREADS"] = "5"
    assert load_config(environ=environ).read_threads == 5
    assert load_config({"read_threads": "6"}, environ).read_threads == 6
    # A higher file hides only the keys that it has.
    assert origins(environ=environ)["policy"].origin == str(xdg)


def test_origins_name_flag_variable_file_and_default(environ: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "own.toml", 'grace = "2min"\n')
    environ["TIERMEM_KEEP"] = "yes"
    found = origins({"tier": "dram=1GiB", "spare": None}, environ, [file])
    assert {key: setting.origin for key, setting in found.items() if setting.origin != "default"} == {
        "tier": "--tier", "keep": "TIERMEM_KEEP", "grace": str(file)}  # fmt: skip
    assert (found["tier"].value[0].capacity_bytes, found["keep"].value, found["grace"].value) == (1 << 30, True, 120.0)
    assert list(found) == [option.key for option in OPTIONS]


def test_an_empty_variable_counts_as_unset(environ: dict[str, str]) -> None:
    assert origins(environ=environ | {"TIERMEM_TIER": ""}, files=())["tier"].origin == "default"


def test_explicit_files_replace_the_standard_ones(environ: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "tiermem.toml", "read_threads = 3\n")
    own = write(tmp_path / "own.toml", 'policy = "own"\n')
    config = load_config(environ=environ, files=[own])
    assert (config.policy, config.read_threads) == ("own", 12)
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(environ=environ, files=[tmp_path / "absent.toml"])


def test_an_unknown_key_names_its_file_and_the_nearest_option(environ: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "tiermem.toml", "read_thread = 4\n")
    with pytest.raises(ConfigError, match=rf"'read_thread' in {file.name}; did you mean 'read_threads'\?"):
        load_config(environ=environ)
    with pytest.raises(ConfigError, match=r"'capacty' in flags; the options are address, "):
        load_config({"capacty": 1}, environ, ())


def test_a_mistyped_variable_is_an_error_and_a_foreign_one_is_not(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"TIERMEM_READ_THREAD; did you mean TIERMEM_READ_THREADS\?"):
        load_config(environ=environ | {"TIERMEM_READ_THREAD": "4"}, files=())
    foreign = {"TIERMEM_PORT": "tcp://10.0.0.1:80", "TIERMEM_SERVICE_HOST": "10.0.0.1", "TIERMEM_PORT_80_TCP": "x"}
    load_config(environ=environ | foreign, files=())


def test_a_file_that_is_not_toml_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "bad.toml", "tier = dram=4GiB\n")
    with pytest.raises(ConfigError, match=rf"{file} is not TOML"):
        load_config(environ=environ, files=[file])


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("spare", "lots", "a size"), ("spare", True, "a size"), ("spare", [1], "a size"), ("quota", "1MiB", "from 2.0"),
        ("tier", "dram", "needs a size"), ("tier", True, "text such as"), ("tier", [1], "text such as"),
        ("tier", [], "text such as"),
        ("staging", "1023K", "from 1.0 MiB"), ("staging", 2 << 30, "to 1.0 GiB"),
        ("read_threads", 0, "from 1 to 64"), ("read_threads", "65", "from 1 to 64"), ("read_threads", 2.0, "whole"),
        ("read_threads", True, "whole"), ("backing", "hbm", "auto, tmpfs"), ("log_level", 3, "debug, info"),
        ("grace", "soon", "a duration"), ("grace", -1, "negative"), ("grace", float("nan"), "negative"),
        ("keep", 1, "true or false"), ("keep", "maybe", "true or false"), ("policy", " ", "empty"),
        ("state", 7, "text"), ("address", "/run/a.sock", "HOST:PORT"), ("address", "unix:a.sock", "absolute"),
        ("address", "host:0", "HOST:PORT"), ("address", "host:65536", "HOST:PORT"), ("address", ":80", "HOST:PORT"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_key_value_origin_and_example(
    key: str, value: object, complaint: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({key: value}, environ, ())
    text = str(caught.value)
    option = next(option for option in OPTIONS if option.key == key)
    assert text.startswith(f"{key} = {value!r} ({option.flag}): ")
    assert complaint in text
    assert text.endswith(f"for example {key} = {option.kind.example}")


def test_values_from_a_file_may_be_typed_or_text(environ: dict[str, str], tmp_path: Path) -> None:
    text = 'tier = "dram=8388609"\nspare = "3.1GB"\ngrace = 5\nkeep = true\nstate = "~/pool"\naddress = "[::1]:50051"\n'
    config = load_config(environ=environ, files=[write(tmp_path / "a.toml", text)])
    assert (config.tier[0].capacity_bytes, config.spare) == (8 << 20, 3_100_000_000 // PAGE_BYTES * PAGE_BYTES)
    assert (config.grace, config.keep, config.address) == (5.0, True, "[::1]:50051")
    assert config.state == Path.home() / "pool"


def test_a_relative_directory_becomes_absolute(environ: dict[str, str], tmp_path: Path) -> None:
    assert load_config({"state": "here"}, environ, ()).state == tmp_path / "here"


def test_socket_paths() -> None:
    assert socket_path("unix:/run/a.sock") == Path("/run/a.sock")
    assert socket_path("unix:///run/a.sock") == Path("/run/a.sock")
    longest = "/" + "é" * 51 + "x"  # with .fd, the descriptor socket's, 107 bytes
    assert socket_path("unix:" + longest) == Path(longest)
    with pytest.raises(ConfigError, match="108 bytes, a Unix socket's may be 107"):
        socket_path("unix:" + longest + "x")
    with pytest.raises(ConfigError, match="this version serves Unix sockets only"):
        socket_path("localhost:50051")
