"""Trees of /sys as kernels show them on some CPUs: {path: text}; only what describes units that sample addresses."""

from pathlib import Path

DEVICES = "sys/bus/event_source/devices"


def _unit(name: str, type: int, **files: dict[str, str] | str) -> dict[str, str]:
    found = {f"{DEVICES}/{name}/type": f"{type}\n"}
    for folder, content in files.items():
        if isinstance(content, str):
            found[f"{DEVICES}/{name}/{folder}"] = f"{content}\n"
        else:
            found |= {f"{DEVICES}/{name}/{folder}/{key}": f"{text}\n" for key, text in content.items()}
    return found


_CORE_FORMAT = {"event": "config:0-7", "umask": "config:8-15", "edge": "config:18", "ldlat": "config1:0-15"}
_SPE_FORMAT = {
    "ts_enable": "config:0", "pa_enable": "config:1", "pct_enable": "config:2", "jitter": "config:16",
    "branch_filter": "config:32", "load_filter": "config:33", "store_filter": "config:34",
    "event_filter": "config1:0-63", "min_latency": "config2:0-11",
}  # fmt: skip
_LOADS = {"mem-loads": "event=0xcd,umask=0x1,ldlat=3"}
_AUX = {"mem-loads-aux": "event=0x03,umask=0x82"}


def _kernel(release: str, cpus: str) -> dict[str, str]:
    return {"proc/sys/kernel/osrelease": f"{release}\n", "sys/devices/system/cpu/online": f"{cpus}\n"}


SKYLAKE = _kernel("5.4.0-100-generic", "0-3") | _unit(
    "cpu", 4, format=_CORE_FORMAT, events=_LOADS | {"mem-stores": "event=0xd0,umask=0x82"}, caps={"max_precise": "3"}
)
SAPPHIRE_RAPIDS = _kernel("6.1.0-18-amd64", "0-3") | _unit(
    "cpu", 4, format=_CORE_FORMAT, events=_LOADS | _AUX, caps={"max_precise": "3"}
)
ALDER_LAKE = (
    _kernel("6.8.0", "0-5")
    | _unit("cpu_core", 4, format=_CORE_FORMAT, events=_LOADS | _AUX, caps={"max_precise": "3"}, cpus="0-3")
    | _unit("cpu_atom", 10, format=_CORE_FORMAT, events={"mem-loads": "event=0xd0,umask=0x5,ldlat=3"},
            caps={"max_precise": "3"}, cpus="4-5")
)  # fmt: skip
VIRTUAL = _kernel("6.1.0", "0-1") | _unit("cpu", 4, format=_CORE_FORMAT, caps={"max_precise": "0"}, events=_LOADS)
ZEN3 = (
    _kernel("5.15.0", "0-3")
    | _unit("cpu", 4, format=_CORE_FORMAT, caps={"max_precise": "0"})
    | _unit("ibs_op", 9, format={"cnt_ctl": "config:19"})
    | _unit("ibs_fetch", 8, format={"rand_en": "config:57"})
)
ZEN4 = _kernel("6.6.0", "0-3") | _unit(
    "ibs_op", 9, format={"cnt_ctl": "config:19", "l3missonly": "config:16"}, caps={"zen4_ibs_extensions": "1"}
)
ZEN5 = _kernel("6.15.0", "0-3") | _unit(
    "ibs_op", 11, format={"cnt_ctl": "config:19", "l3missonly": "config:16", "swfilt": "config2:0"},
    caps={"zen4_ibs_extensions": "1"},
)  # fmt: skip
KUNPENG = _kernel("5.10.0", "0-7") | _unit(
    "arm_spe_0", 7, format=_SPE_FORMAT, caps={"min_interval": "256", "count_size": "12"}, cpumask="0-7"
)


def plant(root: Path, tree: dict[str, str]) -> Path:
    """Write the tree under `root`."""
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
