"""Faulty disk: a FUSE mount of a directory of files, where reads wait at a gate or fail, at the byte that a test names.

Speaks the kernel's FUSE protocol 7.31 itself (include/uapi/linux/fuse.h). Never writes. Needs CAP_SYS_ADMIN and
/dev/fuse. Facts and bytes come from the directory at every request and are never cached, so a change of a file there
is seen at once. A reader that waits at a gate cannot die before the gate opens: the kernel waits for the answer.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_IN = struct.Struct("<IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, padding
_OUT = struct.Struct("<IiQ")  # len, error, unique
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_READ_IN = struct.Struct("<QQI")  # fh, offset, size; the rest is not looked at
_LOOKUP, _GETATTR, _OPEN, _READ, _STATFS, _INIT, _OPENDIR, _READDIR = 1, 3, 14, 15, 17, 26, 27, 28
_SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET take no answer
_EMPTY = (18, 25, 29, 38)  # RELEASE, FLUSH, RELEASEDIR, DESTROY
_ROOT = 1
_DIRECT_IO = 1  # FOPEN_DIRECT_IO: reads come as they were asked for, with no read-ahead
_MAX_PAGES, _ASYNC_DIO, _ASYNC_READ = 1 << 22, 1 << 15, 1
_REQUEST_BYTES = 1 << 20


class Gate:
    """Reads of a file's byte `offset` wait here until the gate opens, and then fail if there is an `error`."""

    def __init__(self, node: tuple[int, int], offset: int, error: int = 0) -> None:
        self.node, self.offset, self.error = node, offset, error
        self._reached, self._opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self._reached.set()
        assert self._opened.wait(60), "a test left its gate closed"

    def await_reached(self) -> None:
        """Return when a reader waits."""
        assert self._reached.wait(20), "nobody reads there"

    def open(self) -> None:
        self._opened.set()


class FaultyDisk:
    """Shows the files of `source` at the new directory `path`. A path of the one is a path of the other."""

    def __init__(self, source: Path, path: Path) -> None:
        self.source, self.path = source, path
        path.mkdir()
        self._gates: list[Gate] = []
        self._nodes: dict[tuple[int, int], int] = {}
        self._fds: dict[int, int] = {_ROOT: os.open(source, os.O_RDONLY)}
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_REQUEST_BYTES}"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "tiermem-test", str(path)]
        subprocess.run(command, check=True, pass_fds=[self._device])
        self._thread = threading.Thread(target=self._serve, name="faulty-disk", daemon=True)
        self._thread.start()

    def gate(self, name: str, offset: int) -> Gate:
        """Close a gate before byte `offset` of file `name`, header included."""
        return self._put(name, offset, 0)

    def fail(self, name: str, offset: int, error: int = errno.EIO) -> None:
        """Reads of byte `offset` of file `name` fail."""
        self._put(name, offset, error).open()

    def heal(self) -> None:
        """Reads fail no more."""
        for gate in self._gates:
            gate.error = 0

    def close(self) -> None:
        for gate in self._gates:
            gate.open()
        # Forced, so that the device ends also while somebody has a file open; a closed number may be another's at once.
        subprocess.run(["umount", "--force", "--lazy", str(self.path)], check=True)
        self._thread.join(10)
        assert not self._thread.is_alive()
        os.close(self._device)
        for fd in self._fds.values():
            os.close(fd)

    def __enter__(self) -> FaultyDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, name: str, offset: int, error: int) -> Gate:
        status = os.stat(self.source / name)
        gate = Gate((status.st_dev, status.st_ino), offset, error)
        self._gates.append(gate)
        return gate

    def _serve(self) -> None:
        # Ends with ENODEV after the unmount.
        with suppress(OSError):
            while True:
                request = os.read(self._device, _REQUEST_BYTES + 4096)
                opcode = _IN.unpack_from(request)[1]
                if opcode == _READ:
                    threading.Thread(target=self._answer, args=(request,), daemon=True).start()
                elif opcode not in _SILENT:
                    self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        try:
            body, error = self._body(opcode, node, request[_IN.size :]), 0
        except OSError as failure:
            body, error = b"", failure.errno or errno.EIO
        with suppress(OSError):
            os.write(self._device, _OUT.pack(_OUT.size + len(body), -error, unique) + body)

    def _body(self, opcode: int, node: int, arguments: bytes) -> bytes:
        handlers: dict[int, Callable[[int, bytes], bytes]] = {
            _LOOKUP: self._lookup,
            _GETATTR: lambda node, _: struct.pack("<QII", 0, 0, 0) + self._attr(node),
            _OPEN: lambda *_: struct.pack("<QII", 0, _DIRECT_IO, 0),
            _OPENDIR: lambda *_: struct.pack("<QII", 0, 0, 0),
            _READ: self._read,
            _READDIR: self._list,
            _STATFS: lambda *_: bytes(80),
            _INIT: self._init,
        }
        if opcode in handlers:
            return handlers[opcode](node, arguments)
        if opcode in _EMPTY:
            return b""
        raise OSError(errno.ENOSYS, "not of this file system")

    def _init(self, _: int, arguments: bytes) -> bytes:
        flags = struct.unpack_from("<IIII", arguments)[3] & (_MAX_PAGES | _ASYNC_DIO | _ASYNC_READ)
        sizes = struct.pack("<HHIIHHI", 64, 48, 4096, 1, _REQUEST_BYTES // 4096, 0, 0)
        return struct.pack("<IIII", 7, 31, 0, flags) + sizes + bytes(28)

    def _lookup(self, _: int, arguments: bytes) -> bytes:
        fd = os.open(os.fsdecode(self.source) + "/" + os.fsdecode(arguments.rstrip(b"\0")), os.O_RDONLY)
        status = os.fstat(fd)
        node = self._nodes.setdefault((status.st_dev, status.st_ino), len(self._nodes) + 2)
        os.close(fd) if node in self._fds else self._fds.setdefault(node, fd)
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attr(node)

    def _attr(self, node: int) -> bytes:
        status = os.fstat(self._fds[node])
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        seconds, rest = zip(*(divmod(time, 10**9) for time in times), strict=True)
        mode, links = status.st_mode, status.st_nlink
        return _ATTR.pack(
            node, status.st_size, 0, *seconds, *rest, mode, links, status.st_uid, status.st_gid, 0, 4096, 0
        )

    def _read(self, node: int, arguments: bytes) -> bytes:
        _, offset, size = _READ_IN.unpack_from(arguments)
        status = os.fstat(self._fds[node])
        for gate in self._gates:
            if gate.node == (status.st_dev, status.st_ino) and offset <= gate.offset < offset + size:
                gate.pass_through()
                if gate.error:
                    raise OSError(gate.error, os.strerror(gate.error))
        return os.pread(self._fds[node], size, offset)

    def _list(self, _: int, arguments: bytes) -> bytes:
        _, offset, size = _READ_IN.unpack_from(arguments)
        body = b""
        for number, name in enumerate(sorted(os.listdir(os.fsencode(self.source)))):
            entry = struct.pack("<QQII", number + 2, number + 1, len(name), stat.S_IFREG >> 12) + name
            entry += bytes(-len(entry) % 8)
            if number >= offset and len(body) + len(entry) <= size:
                body += entry
        return body
