"""The archive of a PyTorch checkpoint: a zip file's directory -> where its members' bytes are. Never decompresses.

`zipfile` reads the directory, within a bound; every member is then checked against its own header in the file: stored,
not encrypted, and overlapping no other.
"""

from __future__ import annotations

import io
import struct
import zipfile

from tiermem.checkpoint.cursor import Cursor, Span, Unusable
from tiermem.checkpoint.strict_json import shown

MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY_BYTES = 16 << 20
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED, _UTF8 = 1, 0x800


class _Bounded(io.RawIOBase):
    """A file for zipfile, of which no single read is larger than a directory may be."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._cursor.at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._cursor.at, io.SEEK_END: self._cursor.size}[whence]
        if not 0 <= base + offset <= self._cursor.size:
            raise ValueError(f"its zip directory refers to byte {base + offset}, which is outside the file")
        self._cursor.at = base + offset
        return self._cursor.at

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._cursor.size - self._cursor.at
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"its zip directory has {size} bytes, more than the {_MAX_DIRECTORY_BYTES} allowed")
        return self._cursor.take(size)


def members(cursor: Cursor) -> dict[str, Span]:
    """Name -> place of the bytes of every member. Raises ValueError, and Unusable for what torch does not write."""
    try:
        with zipfile.ZipFile(_Bounded(cursor)) as archive:
            infos, directory = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, IndexError, struct.error) as error:
        raise ValueError(f"is no whole zip archive: {error}") from error
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("two members of its zip archive have the same name")
    found: dict[str, Span] = {}
    ends = [info.header_offset for info in infos[1:]] + [directory]
    for info, end in zip(infos, ends, strict=True):
        span = _member(cursor, info)
        if span.end > end:
            raise ValueError(f"member {shown(info.filename)} ends at byte {span.end}, but the next begins at {end}")
        found[info.filename] = span
    return found


def _member(cursor: Cursor, info: zipfile.ZipInfo) -> Span:
    if info.flag_bits & _ENCRYPTED:
        raise Unusable(f"member {shown(info.filename)} is encrypted; save the checkpoint again with torch.save")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Unusable(f"member {shown(info.filename)} is compressed; save the checkpoint again with torch.save")
    if not 0 <= info.header_offset < cursor.size:
        raise ValueError(f"member {shown(info.filename)} begins at byte {info.header_offset}, outside the file")
    cursor.at = info.header_offset
    magic, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack(cursor.take(_LOCAL.size))
    name = cursor.take(name_bytes)
    if magic != MAGIC or name != info.orig_filename.encode("utf-8" if flags & _UTF8 else "cp437"):
        raise ValueError(f"member {shown(info.filename)} is not at byte {info.header_offset}, as the directory says")
    if flags & _ENCRYPTED or method != zipfile.ZIP_STORED:
        raise ValueError(f"member {shown(info.filename)} is stored by the directory, but not by its own header")
    start = cursor.at + extra_bytes
    return Span(start, start + info.file_size)
