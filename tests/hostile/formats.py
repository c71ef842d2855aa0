"""Small checkpoints of every format but safetensors, byte by byte, good and bad. Asserts nothing itself.

Written without any format's own library, so that each number can be made wrong. `GOOD` maps an ending to a good file's
bytes; `CORPUS` maps a name to a case, as `tests.hostile.checkpoints` has them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile.checkpoints import Builder, Case
from tiermem.errors import CheckpointError, CheckpointNotFound

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
"""Types of GGUF values."""


def gguf_text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def gguf_key(name: bytes, kind: int, value: bytes) -> bytes:
    return gguf_text(name) + struct.pack("<I", kind) + value


def gguf_info(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`dims` as GGUF has them: the last of numpy's first."""
    return gguf_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    infos: bytes, count: int, data: int, keys: bytes = b"", key_count: int = 0, version: int = 3, alignment: int = 32
) -> bytes:
    """A file of `count` tensors that `infos` describes, with `data` bytes of them."""
    header = b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + infos
    return header + bytes(-len(header) % alignment) + bytes(i % 251 for i in range(data))


def torch_file(data: bytes, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save writes it, of the pickle `data` and further members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", **members}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content, compression)
    return stream.getvalue()


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    return (
        b"(X" + struct.pack("<I", 7) + b"storage" + f"ctorch\n{kind}\n".encode()
        + text(key) + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
    )  # fmt: skip


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def stored(key: str, held: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The instructions that leave a F32 tensor on the stack."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, held) + b"J" + struct.pack("<i", offset)
        + numbers(*shape) + numbers(*strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state(**entries: bytes) -> bytes:
    """A whole pickle of a dict whose values these instructions leave."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def varint(value: int) -> bytes:
    digits = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        digits.append(low | 0x80 * (value > 0))
        if value == 0:
            return bytes(digits)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message: numbers as varints, bytes with their length."""
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def onnx(*tensors: bytes) -> bytes:
    return message((1, 13), (2, b"writer"), (7, message((2, b"graph"), *((5, tensor) for tensor in tensors))))


def external(**entries: str) -> tuple[tuple[int, int | bytes], ...]:
    pairs = [(13, message((1, key.encode()), (2, value.encode()))) for key, value in entries.items()]
    return (*pairs, (14, 1))


def ckpt(*values: tuple[str, str, tuple[int, ...], bytes]) -> bytes:
    """A MindSpore checkpoint of (tag, type, dims, content)."""
    return b"".join(
        message((1, message((1, tag.encode()), (2, message(*((1, size % (1 << 64)) for size in dims),
                                                           (2, kind.encode()), (3, content))))))
        for tag, kind, dims, content in values
    )  # fmt: skip


_TENSOR = stored("0", 6, 0, (2, 3), (3, 1))
_INFO = gguf_info(b"blk.0.w", (4, 2), 0, 0)
_KEYS = (
    gguf_key(b"general.architecture", STRING, gguf_text(b"llama"))
    + gguf_key(b"tokens", ARRAY, struct.pack("<IQ", STRING, 3) + gguf_text(b"a") + gguf_text(b"") + gguf_text(b"bc"))
    + gguf_key(b"scores", ARRAY, struct.pack("<IQ3f", F32, 3, 1, 2, 0.5))
    + gguf_key(b"tied", BOOL, b"\1")
)

GOOD: dict[str, bytes] = {
    "gguf": gguf(_INFO + gguf_info(b"output.weight", (64,), 2, 32), 2, 68, _KEYS, 4),
    "bin": torch_file(state(a=_TENSOR, b=stored("0", 6, 3, (3,), (1,))), {"data/0": bytes(range(24))}),
    "onnx": onnx(
        message((1, 2), (1, 3), (2, 1), (8, b"a"), (9, bytes(24))),
        message((1, varint(2)), (2, 7), (7, varint(5) + varint(6)), (8, b"shape")),
        message((1, 3), (2, 22), (8, b"four"), (9, b"\x21\3")),
    ),
    "ckpt": ckpt(("layers.0.w", "Float32", (2, 2), bytes(16)), ("step", "Int32", (), bytes(4))),
}


def _file(ending: str, content: bytes) -> Builder:
    def build(directory: Path) -> Path:
        path = directory / f"bad.{ending}"
        path.write_bytes(content)
        return path

    return build


def _bad(ending: str, content: bytes, words: str) -> Case:
    return Case(_file(ending, content), CheckpointError, words)


def _gguf(infos: bytes, words: str, count: int = 1, data: int = 32, **more: int | bytes) -> Case:
    return _bad("gguf", gguf(infos, count, data, **more), words)  # type: ignore[arg-type]


def _gguf_key(key: bytes, words: str) -> Case:
    return _gguf(_INFO, words, keys=key, key_count=1)


def _torch(data: bytes, words: str, held: int = 24) -> Case:
    return _bad("bin", torch_file(data, {"data/0": bytes(held)}), words)


def _onnx(words: str, *fields: tuple[int, int | bytes]) -> Case:
    return _bad("onnx", onnx(message((8, b"a"), *fields)), words)


def _external(words: str, prepare: Callable[[Path], None] = lambda folder: None, **entries: str) -> Case:
    def build(directory: Path) -> Path:
        folder = directory / "model"
        folder.mkdir()
        (directory / "secret").write_bytes(bytes(64))
        (folder / "data").write_bytes(bytes(8))
        prepare(folder)
        path = folder / "bad.onnx"
        path.write_bytes(onnx(message((8, b"a"), (1, 2), (2, 1), *external(**entries))))
        return path

    return Case(build, CheckpointError, words)


def _split(directory: Path) -> Path:
    path = directory / "m-00001-of-00002.gguf"
    path.write_bytes(GOOD["gguf"])
    return path


def _several(*names: str) -> Builder:
    def build(directory: Path) -> Path:
        for name in names:
            (directory / name).write_bytes(b"")
        return directory

    return build


def _patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


class _Command:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("__import__('os').abort()",)


_SURROGATE = b"X\3\0\0\0\xed\xa0\x80"
_SPLIT_KEYS = gguf_key(b"split.count", 2, struct.pack("<H", 3)) + gguf_key(b"split.no", 2, struct.pack("<H", 0))
_NESTED = b"\x80\x02}" + text("a") + b"]" * 100 + b"a" * 99 + b"s."
_BOMB = b"\x80\x02}" + text("a") + b"]q\0" + b"".join(
    b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(30)
) + b"s."  # fmt: skip

CORPUS: dict[str, Case] = {
    # GGUF.
    "gguf empty": _bad("gguf", b"", "does not begin with GGUF"),
    "gguf of nothing but its magic": _bad("gguf", b"GGUF", "the file ends at 4"),
    "gguf big-endian": _bad("gguf", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "gguf of version 1": _gguf(_INFO, "GGUF of version 1", version=1),
    "gguf of 2^63 tensors": _gguf(_INFO, "claims 9223372036854775808 tensors", count=1 << 63),
    "gguf of more tensors than it has": _gguf(_INFO, "gguf: ", count=1000),
    "gguf of 2^60 keys": _gguf(_INFO, "claims 1152921504606846976 keys", key_count=1 << 60),
    "gguf key twice": _gguf(_INFO, "key 'a' occurs twice", keys=gguf_key(b"a", U8, b"\1") * 2, key_count=2),
    "gguf key of 2^62 bytes": _gguf_key(gguf_text(b"a", 1 << 62), "the name of a key has"),
    "gguf string of 2^62 bytes": _gguf_key(gguf_key(b"a", STRING, gguf_text(b"", 1 << 62)), "but the file ends at"),
    "gguf array of 2^62 strings": _gguf_key(gguf_key(b"a", ARRAY, struct.pack("<IQ", STRING, 1 << 62)), "gguf: "),
    "gguf array of 2^62 numbers": _gguf_key(gguf_key(b"a", ARRAY, struct.pack("<IQ", F32, 1 << 62)), "but the file"),
    "gguf nested array": _gguf_key(gguf_key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1)), "has a value of type 9"),
    "gguf value of no type": _gguf_key(gguf_key(b"a", 13, b""), "has a value of type 13"),
    "gguf alignment 0": _gguf_key(gguf_key(b"general.alignment", U32, bytes(4)), "is 0, and no power"),
    "gguf alignment 48": _gguf_key(gguf_key(b"general.alignment", U32, b"\x30\0\0\0"), "is 48, and no power"),
    "gguf alignment a string": _gguf_key(gguf_key(b"general.alignment", STRING, gguf_text(b"32")), "has type 8"),
    "gguf name not UTF-8": _gguf(gguf_info(b"\xff", (8,), 0, 0), "utf-8"),
    "gguf tensor twice": _gguf(_INFO + gguf_info(b"blk.0.w", (4, 2), 0, 32), "the same name", count=2, data=64),
    "gguf of 5 dimensions": _gguf(gguf_info(b"a", (1,) * 5, 0, 0), "has 5 dimensions"),
    "gguf shape overflows": _gguf(gguf_info(b"a", (1 << 40, 1 << 40), 0, 0), "overflows"),
    "gguf shape overflows beside a zero": _gguf(gguf_info(b"a", (0, 1 << 40, 1 << 40), 0, 0), "overflows"),
    "gguf of an unknown type": _gguf(gguf_info(b"a", (8,), 4, 0), "has the unknown type 4"),
    "gguf blocks cut": _gguf(gguf_info(b"a", (33,), 2, 0), "no whole blocks a row"),
    "gguf quantised scalar": _gguf(gguf_info(b"a", (), 2, 0), "no whole blocks a row"),
    "gguf tensor not aligned": _gguf(gguf_info(b"a", (4,), 0, 4), "begins at 4"),
    "gguf overlap": _gguf(_INFO + gguf_info(b"b", (4,), 0, 0), "tensor 'b' begins at 0", count=2),
    "gguf hole": _gguf(_INFO + gguf_info(b"b", (4,), 0, 96), "tensor 'b' begins at 96", count=2, data=128),
    "gguf offset 2^63": _gguf(gguf_info(b"a", (4,), 0, 1 << 63), "begins at 9223372036854775808"),
    "gguf truncated": _gguf(_INFO, "truncated by 1 bytes", data=31),
    "gguf part without its number": _gguf(_INFO, "is one of 3 files", keys=_SPLIT_KEYS, key_count=2),
    "gguf split, a part missing": Case(_split, CheckpointNotFound, "file 2 of 2"),
    # PyTorch.
    "torch not a zip": _bad("bin", bytes(100), "does not begin as a zip"),
    "torch before 1.6": _bad("pt", pickle.dumps(0x1950A86A20F9469CFC6C, 2), "format before torch 1.6"),
    "torch before 0.1.10": _bad("pth", bytes(257) + b"ustar" + bytes(300), "format before torch 1.6"),
    "torch compressed": _bad(
        "bin", torch_file(state(), {"data/0": bytes(9999)}, zipfile.ZIP_DEFLATED), "is compressed"
    ),
    "torch encrypted": _bad(
        "bin", _patched(GOOD["bin"], b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "encrypted"
    ),
    "torch directory moved": _bad(
        "bin", b"PK\3\4" + _patched(GOOD["bin"][4:], b"PK\3\4", b"PK\3\5"), "as the directory says"
    ),
    "torch member larger than its place": _bad(
        "bin", _patched(GOOD["bin"], struct.pack("<II", 24, 24), struct.pack("<II", 999, 999)), "but the next begins at"
    ),
    "torch without a pickle": _bad("bin", _patched(GOOD["bin"], b"data.pkl", b"data.pkk"), "has 0 members"),
    "torch big-endian": _bad("bin", torch_file(state(a=_TENSOR), {"byteorder": b"big", "data/0": bytes(24)}), "b'big'"),
    "torch runs eval": _torch(pickle.dumps(_Command(), 2), "its pickle names '__builtin__.eval'"),
    "torch runs os.system": _torch(b"\x80\x02cos\nsystem\n" + text("id") + b"\x85R.", "its pickle names 'os.system'"),
    "torch names a module": _torch(
        b"\x80\x02}" + text("a") + b"ctorch.nn.modules.linear\nLinear\ns.", "modules.linear"
    ),
    "torch new object": _torch(b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ"),
    "torch instance by text": _torch(b"(S'id'\nios\nsystem\n.", "the instruction STRING"),
    "torch protocol 4": _torch(pickle.dumps({"a": 1}, 4), "the instruction FRAME"),
    "torch builds a tensor's state": _torch(b"\x80\x02" + _TENSOR + b"}b.", "sets the state of an object"),
    "torch no end": _torch(b"\x80\x02}", "bin: "),
    "torch stack empty": _torch(b"\x80\x02s.", "is damaged"),
    "torch mark as value": _torch(b"\x80\x02((\x85.", "is damaged"),
    "torch memo of 2^31": _torch(b"\x80\x02}r\xff\xff\xff\x7f.", "remembers a value as number 2147483647"),
    "torch memo unknown": _torch(b"\x80\x02h\x07.", "is damaged"),
    "torch calls a storage type": _torch(b"\x80\x02ctorch\nFloatStorage\n)R.", "calls what is no function"),
    "torch key a tuple": _torch(b"\x80\x02}" + b")" + b"\x85" * 50 + b"Ns.", "a dict with the key"),
    "torch nested 100 deep": _torch(_NESTED, "too deep"),
    "torch names multiplied": _torch(_BOMB, "bin: "),
    "torch list inside itself": _torch(b"\x80\x02}" + text("a") + b"]q\0h\0as.", "too deep"),
    "torch a list": _torch(b"\x80\x02].", "holds a list"),
    "torch a storage alone": _torch(state(a=storage("0", 6)), "is a Storage"),
    "torch name a lone surrogate": _torch(
        b"\x80\x02}" + _SURROGATE + _TENSOR + b"s.", "the name '\\ud800' is no UTF-8"
    ),
    "torch name twice": _torch(
        b"\x80\x02}(" + text("a.b") + _TENSOR + text("a") + b"}" + text("b") + _TENSOR + b"su.",
        "two entries have the name 'a.b'",
    ),
    "torch storage missing": _torch(state(a=stored("1", 6, 0, (6,), (1,))), "storage '1', which the archive lacks"),
    "torch storage too short": _torch(state(a=_TENSOR), "has 20", held=20),
    "torch past its storage": _torch(state(a=stored("0", 6, 4, (3,), (1,))), "12 bytes from byte 16"),
    "torch before its storage": _torch(state(a=stored("0", 6, -1, (3,), (1,))), "from byte -4"),
    "torch shape negative": _torch(state(a=stored("0", 6, 0, (-2,), (1,))), "-2 is no size"),
    "torch shape overflows": _torch(state(a=stored("0", 6, 0, (1 << 30,) * 3, (1 << 30, 1 << 30, 1))), "overflows"),
    "torch transposed": _torch(state(a=stored("0", 6, 0, (3, 2), (1, 3))), "not contiguous"),
    "torch expanded": _torch(state(a=stored("0", 6, 0, (6, 6), (0, 1))), "not contiguous"),
    "torch strides missing": _torch(state(a=stored("0", 6, 0, (2, 3), (1,))), "not contiguous"),
    # ONNX.
    "onnx empty": _bad("onnx", b"", "has 0 graphs"),
    "onnx with two graphs": _bad("onnx", message((7, b""), (7, b"")), "has 2 graphs"),
    "onnx graph a number": _bad("onnx", message((7, 1)), "has wire type 0"),
    "onnx length past the end": _bad("onnx", b"\x3a\xff\xff\xff\xff\x0f", "but its message at 6"),
    "onnx number of 11 bytes": _bad("onnx", b"\x08" + b"\xff" * 10 + b"\1", "cut off or longer than 64 bits"),
    "onnx number of 70 bits": _bad("onnx", b"\x08" + b"\xff" * 9 + b"\x7f", "cut off or longer than 64 bits"),
    "onnx number cut off": _bad("onnx", b"\x08\xff", "cut off or longer than 64 bits"),
    "onnx field 0": _bad("onnx", b"\0\0", "has the number 0"),
    "onnx group": _bad("onnx", b"\x3b\x3c", "wire type 3"),
    "onnx size wrong": _onnx("takes 8 bytes, but has 9", (1, 2), (2, 1), (9, bytes(9))),
    "onnx no bytes": _onnx("takes 8 bytes, but has 0", (1, 2), (2, 1)),
    "onnx shape negative": _onnx("-1 is no size", (1, (1 << 64) - 1), (2, 1), (9, b"")),
    "onnx shape overflows": _onnx("overflows", (1, 1 << 62), (1, 1 << 62), (2, 1), (9, b"")),
    "onnx of 65 dimensions": _onnx("more than 64", (1, b"\1" * 65), (2, 1), (9, b"")),
    "onnx of type 15": _onnx("ONNX data type 15", (1, 1), (2, 15), (9, bytes(16))),
    "onnx in segments": _onnx("is stored in segments", (3, b""), (2, 1), (9, b"")),
    "onnx name a number": _onnx("should be text", (8, 5)),
    "onnx name not UTF-8": _onnx("utf-8", (8, b"\xff")),
    "onnx name of a megabyte": _onnx("should be text of at most 4096", (8, bytes(1 << 20))),
    "onnx tensor twice": _bad("onnx", onnx(*[message((8, b"a"), (2, 1), (9, bytes(4)))] * 2), "'a' occurs twice"),
    "onnx raw and external": _onnx("outside the model", (1, 2), (2, 1), *external(location="")),
    "onnx external upwards": _external("which is outside the model", location="../secret"),
    "onnx external up and down": _external("which is outside the model", location="x/../data"),
    "onnx external absolute": _external("which is outside the model", location="/etc/passwd"),
    "onnx external by a link": _external(
        "which is outside the model", lambda folder: (folder / "l").symlink_to("../secret"), location="l"
    ),
    "onnx external by a linked folder": _external(
        "which is outside the model", lambda folder: (folder / "l").symlink_to(".."), location="l/secret"
    ),
    "onnx external with NUL": _external("which is outside the model", location="data\0"),
    "onnx external missing": _external("which is missing", location="gone"),
    "onnx external a folder": _external("is not a regular file", lambda folder: (folder / "d").mkdir(), location="d"),
    "onnx external too short": _external("of a file of 8", location="data", offset="4"),
    "onnx external of another length": _external("but its external data has 4", location="data", length="4"),
    "onnx external offset negative": _external("the offset '-8'", location="data", offset="-8"),
    "onnx external offset of 5,000 digits": _external("should be text", location="data", offset="9" * 5000),
    "onnx external offset a superscript": _external("the offset '\u00b2'", location="data", offset="\u00b2"),
    # MindSpore.
    "ckpt of garbage": _bad("ckpt", b"\xff" * 64, "cut off or longer"),
    "ckpt of another message": _bad("ckpt", message((2, b"")), "no value of a checkpoint"),
    "ckpt without a tag": _bad("ckpt", message((1, message((2, b"")))), "has no tag"),
    "ckpt without content": _bad("ckpt", message((1, message((1, b"a"), (2, message((2, b"Int8")))))), "no content"),
    "ckpt of a map": _bad("ckpt", message((1, message((1, b"a"), (3, b"")))), "is a map parameter"),
    "ckpt of an unknown type": _bad("ckpt", ckpt(("a", "Int4", (2,), b"\0")), "has the type 'Int4'"),
    "ckpt size wrong": _bad("ckpt", ckpt(("a", "Int8", (2,), bytes(3))), "takes 2 bytes, but has 3"),
    "ckpt slices too short": _bad(
        "ckpt", ckpt(("a", "Int8", (4,), bytes(2)), ("a", "Int8", (4,), bytes(1))), "has 3 in 2 slices"
    ),
    "ckpt tensor twice": _bad("ckpt", ckpt(*[("a", "Int8", (4,), bytes(4))] * 2), "has 8 in 2 slices"),
    "ckpt shape negative": _bad("ckpt", ckpt(("a", "Int8", (-4,), bytes(4))), "-4 is no size"),
    "ckpt encrypted": _bad("ckpt", bytes.fromhex("d85e3a7f") + bytes(60), "is an encrypted MindSpore checkpoint"),
    "ckpt truncated": _bad("ckpt", GOOD["ckpt"][:-1], "but its message at"),
    # Directories and endings.
    "several ggufs": Case(_several("a.gguf", "b.gguf"), CheckpointError, "holds 2 files *.gguf, ['a.gguf', 'b.gguf']"),
    "several pths": Case(_several("a.pth", "b.pth"), CheckpointError, "holds 2 files *.pth"),
    "no format": _bad("xyz", bytes(100), "is of no format that is read here"),
    "no format, empty": _bad("xyz", b"", "is of no format that is read here"),
}
