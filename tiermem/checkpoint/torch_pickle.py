"""The pickle inside a PyTorch checkpoint, as data: bytes -> dicts, lists, scalars and stored tensors. Runs nothing.

A pickle is a program. This machine knows the instructions that `torch.save` writes (those of torch's own
`weights_only` unpickler) and the few globals that describe tensors, each of which it has a stand-in for; it imports
nothing, calls nothing by name and refuses everything else by its name. `pickletools` of the standard library splits the
bytes into instructions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

from tiermem.checkpoint.cursor import Unusable
from tiermem.checkpoint.strict_json import shown

_MAX_OPERATIONS = 2_000_000
"""A tensor takes about 45."""
_MAX_MEMO = 1 << 24


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage: the member of the archive that has its bytes, its dtype (None: bytes), and its elements."""

    key: str
    dtype: str | None
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a part of a storage; offset and strides in elements. Nothing of it has been checked but types."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# No stand-in is a tuple, because pickles make those.
@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


class _Mark:
    pass


_MARK = _Mark()

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "Bool": "BOOL", "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64", "Half": "F16",
    "BFloat16": "BF16", "Float": "F32", "Double": "F64", "ComplexFloat": "C64",
}  # fmt: skip


def unpickle(data: bytes) -> object:
    """What the pickle describes. Raises ValueError (damaged) and Unusable (holds what is no tensor, by its name)."""
    machine = _Machine()
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(data):
            count += 1
            if count > _MAX_OPERATIONS:
                raise ValueError(f"its pickle has more than {_MAX_OPERATIONS} instructions")
            if opcode.name == "STOP":
                return machine.pop()
            perform = _OPERATIONS.get(opcode.name)
            if perform is None:
                raise Unusable(f"its pickle has the instruction {opcode.name}; {_ADVICE}")
            perform(machine, argument)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__} at instruction {count})") from error
    raise ValueError("its pickle has no end")


_ADVICE = (
    "only tensors, names and plain values are read, because a pickle can run any program: save the model's "
    "state_dict alone, or as safetensors"
)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("its pickle is damaged (a mark where a value should be)")
        return value

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def pop_many(self, count: int) -> tuple[object, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def remember(self, place: object) -> None:
        assert isinstance(place, int)
        if place > _MAX_MEMO:
            raise ValueError(f"its pickle remembers a value as number {place}")
        self.memo[place] = self.stack[-1]

    def recall(self, place: object) -> None:
        assert isinstance(place, int)
        self.push(self.memo[place])

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle is damaged (sets an item of what is no dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else: hashing a nested tuple recurses without a bound.
            if not isinstance(key, str | int):
                raise Unusable(f"its pickle has a dict with the key {shown(key)}; {_ADVICE}")
            target[key] = value

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("its pickle is damaged (appends to what is no list)")
        target.extend(items)

    def refer(self, name: object) -> None:
        assert isinstance(name, str)
        known = _GLOBALS.get(name)
        if known is None:
            raise Unusable(f"its pickle names {shown(name.replace(' ', '.'))}; {_ADVICE}")
        self.push(known)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not (callable(function) and isinstance(arguments, tuple)):
            raise ValueError("its pickle is damaged (calls what is no function)")
        self.push(function(*arguments))

    def build(self) -> None:
        # An OrderedDict's attributes, such as the _metadata of a state_dict.
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise Unusable(f"its pickle sets the state of an object; {_ADVICE}")

    def find_storage(self) -> None:
        tag, kind, key, _, count = self.pop_tuple(5)
        if tag != "storage" or not (isinstance(kind, _StorageType) and isinstance(key, str) and type(count) is int):
            raise ValueError("its pickle is damaged (refers to what is no storage)")
        self.push(Storage(key, kind.dtype, count))

    def pop_tuple(self, length: int) -> tuple[object, ...]:
        value = self.pop()
        if not isinstance(value, tuple) or len(value) != length:
            raise ValueError(f"its pickle is damaged (no tuple of {length} where one should be)")
        return value


# The stand-ins. Their parameters are those of torch._utils, where `bits` is called metadata.


def _ordered_dict() -> dict[object, object]:
    return {}


def _tensor_v2(
    storage: object, offset: object, shape: object, strides: object, grad: object, hooks: object, bits: object = None
) -> StoredTensor:
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, _Dtype(dtype) if dtype else None, bits)


def _tensor_v3(
    storage: object, offset: object, shape: object, strides: object, grad: object, hooks: object, dtype: object,
    bits: object = None,
) -> StoredTensor:  # fmt: skip
    if bits:
        raise Unusable(f"its pickle has a tensor with a conjugate or negative bit; {_ADVICE}")
    if not (isinstance(storage, Storage) and isinstance(dtype, _Dtype) and type(offset) is int):
        raise ValueError("its pickle is damaged (a tensor without storage, dtype or offset)")
    return StoredTensor(storage, dtype.name, offset, _whole_numbers(shape), _whole_numbers(strides))


def _whole_numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(number) is int for number in value):
        raise ValueError("its pickle is damaged (a shape or strides that are no numbers)")
    return value


def _parameter(data: object, grad: object, hooks: object) -> object:
    return data


_GLOBALS: dict[str, object] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage UntypedStorage": _StorageType(None),
    **{f"torch {name}": _Dtype(dtype) for name, dtype in _DTYPES.items()},
    **{f"torch {name}Storage": _StorageType(dtype) for name, dtype in _STORAGES.items()},
}
"""`module name`, as pickletools has it -> its stand-in."""

_OPERATIONS: dict[str, Callable[[_Machine, object], None]] = {
    "PROTO": lambda machine, _: None,
    "MARK": lambda machine, _: machine.push(_MARK),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_many(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.pop_many(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _Machine.refer,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.find_storage(),
}
"""What each instruction of `torch.save` does, by pickletools' name for it."""
