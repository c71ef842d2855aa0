"""Features: what a perf.data file says of the host, the command and the names of events. Reads no records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tiermem.perfdata.fields import Bytes, Fields, text_of

BUILD_ID_SIZED = 1 << 15
"""misc of a build-id event that says how long its id is; others have 20 bytes."""


@dataclass(slots=True)
class Features:
    """The feature sections that were read; what a file lacks is empty.

    `names` are the events' in the order of their attributes; `pmus` maps event types to names, `build_ids` paths to
    hex digests.
    """

    hostname: str = ""
    os_release: str = ""
    perf_version: str = ""
    arch: str = ""
    cpus_online: int = 0
    cpu: str = ""
    cpuid: str = ""
    memory_bytes: int = 0
    command: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    pmus: dict[int, str] = field(default_factory=dict)
    build_ids: dict[str, str] = field(default_factory=dict)

    def take(self, number: int, data: Bytes) -> None:
        """Read feature `number` of include/util/header.h; one that tells nothing of samples is passed over.

        Raises RecordingError where its counts or lengths leave its bytes.
        """
        reading = _READINGS.get(number)
        if reading is not None:
            name, read = reading
            read(self, Fields(data, f"the {name} feature"))

    def take_build_id(self, misc: int, record: Bytes) -> None:
        """A PERF_RECORD_HEADER_BUILD_ID, header included: pid, 24 bytes for the id, path."""
        fields = Fields(record, "a build-id record")
        fields.take(12)
        digest = fields.take(24)
        nbytes = min(digest[20], 20) if misc & BUILD_ID_SIZED else 20
        self.build_ids[text_of(fields.take(fields.left))] = bytes(digest[:nbytes]).hex()


def _text(name: str) -> Callable[[Features, Fields], None]:
    return lambda features, fields: setattr(features, name, fields.text())


def _cpus(features: Features, fields: Fields) -> None:
    fields.take(4)  # the number of those that could be online; it comes first, whatever the documentation says
    features.cpus_online = fields.u32()


def _memory(features: Features, fields: Fields) -> None:
    features.memory_bytes = fields.u64() << 10


def _command(features: Features, fields: Fields) -> None:
    features.command = tuple(fields.text() for _ in range(fields.u32()))


def _events(features: Features, fields: Fields) -> None:
    names = []
    count, attr_bytes = fields.u32(), fields.u32()
    for _ in range(count):
        fields.take(attr_bytes)
        ids = fields.u32()
        names.append(fields.text())
        fields.take(8 * ids)
    features.names = tuple(names)


def _pmus(features: Features, fields: Fields) -> None:
    for _ in range(fields.u32()):
        kind = fields.u32()
        features.pmus[kind] = fields.text()


def _build_ids(features: Features, fields: Fields) -> None:
    while fields.left >= 8:
        header = fields.take(8)
        misc, size = int.from_bytes(header[4:6], "little"), int.from_bytes(header[6:8], "little")
        features.take_build_id(misc, bytes(header) + bytes(fields.take(max(size, 8) - 8)))


_READINGS: dict[int, tuple[str, Callable[[Features, Fields], None]]] = {
    2: ("BUILD_ID", _build_ids),
    3: ("HOSTNAME", _text("hostname")),
    4: ("OSRELEASE", _text("os_release")),
    5: ("VERSION", _text("perf_version")),
    6: ("ARCH", _text("arch")),
    7: ("NRCPUS", _cpus),
    8: ("CPUDESC", _text("cpu")),
    9: ("CPUID", _text("cpuid")),
    10: ("TOTAL_MEM", _memory),
    11: ("CMDLINE", _command),
    12: ("EVENT_DESC", _events),
    16: ("PMU_MAPPINGS", _pmus),
}
