"""safe_open: one safetensors file of a model, through the interface of `safetensors.safe_open` 0.8.

Owns the arguments, the errors and the life of that interface; how bytes become tensors is its framework's
(`tiermem.torch`, `tiermem.numpy`). Never reads the file: the host's daemon does, or the pool of this process, and a
file of a model that is resident already is found inside that model.
"""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from tiermem.errors import CheckpointError, CheckpointNotFound, TiermemError
from tiermem.opening import open_model

if TYPE_CHECKING:
    from tiermem.model import Model

try:
    from safetensors import SafetensorError
except ModuleNotFoundError:

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """Stands for the original's error where that is not installed."""


class ReaderError(TiermemError, ValueError, SafetensorError):
    """The file has no such tensor, is closed, or an argument is unusable; the original raises SafetensorError."""


class FileRefused(CheckpointError, SafetensorError):
    """The file is malformed; the original raises SafetensorError."""


class Framework(Protocol):
    """What a framework's module does for its readers."""

    def check_device(self, device: Device) -> None:
        """Raise ReaderError unless tensors of this framework can be on `device`."""

    def tensors_of(self, model: Model, names: Iterable[str], device: Device) -> dict[str, Any]:
        """Whole tensors by name, once they may be read."""

    def part_of(self, model: Model, name: str, index: Any, device: Device) -> Any:
        """`tensor[index]`, by the rules that the original has for this framework."""


Device = str | int
"""`cpu`, `cuda:1`, or the number of an accelerator that torch chooses."""

_FRAMEWORKS = {
    "pt": "tiermem.torch", "torch": "tiermem.torch", "pytorch": "tiermem.torch",
    "np": "tiermem.numpy", "numpy": "tiermem.numpy",
}  # fmt: skip
_NOT_SERVED = ("tf", "tensorflow", "jax", "flax", "mlx", "paddle")
_BACKENDS = ("mmap", "pread")
_NUMBERED_DEVICES = ("cuda", "musa", "npu", "xpu", "xla", "mlu", "hpu")


class safe_open:
    """One safetensors file, lazily: `with safe_open(path, framework="pt") as file: file.get_tensor("name")`.

    `framework` is pt, torch or pytorch, np or numpy. `device` is a device's name, number or torch.device. `backend` is
    checked as the original does and otherwise without meaning: bytes come from the pool. Tensors on the CPU are
    writable, zero-copy and copy-on-write: writes stay in this process, and tensors of one open file share them. They
    outlive this object; the lease ends with the last of them.

    Raises FileNotFoundError, ReaderError and FileRefused (both are safetensors' SafetensorError), CapacityError.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: Any = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        self._model: Model | None = None
        path = _path(filename)
        self._framework = _framework(framework)
        self._device = parse_device(device)
        if _text("backend", backend) not in _BACKENDS:
            raise ReaderError(f'backend "{backend}" is invalid (expected one of: "mmap", "pread")')
        if not os.path.exists(path):
            raise CheckpointNotFound(f"No such file or directory: {path}")
        if os.path.isdir(path):
            raise FileRefused(f"{path}: is a directory; load_model takes directories")
        self._framework.check_device(self._device)
        try:
            self._model = open_model(_seen_from_anywhere(path), writable=True)
        except CheckpointError as error:
            raise FileRefused(f"Error while deserializing header: {error}") from error

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._open())

    def offset_keys(self) -> list[str]:
        """Names of the tensors in the order of their bytes."""
        return list(self._open())

    def metadata(self) -> dict[str, str] | None:
        """The free text of the header, or None."""
        metadata = self._open().files[0].metadata
        return None if metadata is None else dict(metadata)

    def get_tensor(self, name: str) -> Any:
        """The whole tensor; waits until it is loaded. Raises ReaderError for an unknown name."""
        return self._framework.tensors_of(self._having(name), (name,), self._device)[name]

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in the order of their bytes."""
        model = self._open()
        return self._framework.tensors_of(model, model, self._device)

    def get_slice(self, name: str) -> SafeSlice:
        """The tensor, to be indexed; waits for nothing. Raises ReaderError for an unknown name."""
        return SafeSlice(self._having(name), name, self._framework, self._device)

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        # Dropped, not closed: the lease must last as long as the tensors.
        self._model = None

    def _open(self) -> Model:
        if self._model is None:
            raise ReaderError("File is closed")
        return self._model

    def _having(self, name: str) -> Model:
        model = self._open()
        if _text("name", name) not in model:
            raise ReaderError(f"File does not contain tensor {name}")
        return model


class SafeSlice:
    """One tensor of an open file, read by index: `file.get_slice(name)[:, :64]`. Outlives the file."""

    def __init__(self, model: Model, name: str, framework: Framework, device: Device) -> None:
        self._model = model
        self._name = name
        self._framework = framework
        self._device = device

    def get_shape(self) -> list[int]:
        """Elements along each dimension of the whole tensor."""
        return list(self._model.info(self._name).shape)

    def get_dtype(self) -> str:
        """The dtype's name in the safetensors format, such as `BF16`."""
        return self._model.info(self._name).dtype

    def __getitem__(self, index: Any) -> Any:
        return self._framework.part_of(self._model, self._name, index, self._device)


def safe_open_handle(file: Any, framework: str, device: Any = "cpu", *, backend: str = "mmap") -> safe_open:
    """`safe_open` of the file that an open file object names; AttributeError for one without `fileno` and `name`."""
    _ = file.fileno
    return safe_open(file.name, framework, device, backend=backend)


def parse_device(device: Any) -> Device:
    """The device that a caller named, as safetensors understands it. Raises ReaderError.

    A torch.device is taken as well, with whatever it names.
    """
    torch = sys.modules.get("torch")
    if device is None:
        return "cpu"
    if torch is not None and isinstance(device, torch.device):
        return str(device)
    if not isinstance(device, str):
        try:
            number = operator.index(device)
        except TypeError:
            number = -1
        if number < 0:
            raise ReaderError(f"device {device!r} is invalid")
        return number
    kind, _, index = device.partition(":")
    if device in ("cpu", "mps"):
        return str(device)
    if kind == "mps" and index.isdecimal():
        if int(index):
            raise ReaderError(f"device {device} is invalid: only mps or mps:0 is supported")
        return "mps"
    if kind not in _NUMBERED_DEVICES or not (device == kind or index.isdecimal()):
        raise ReaderError(f"device {device} is invalid")
    return f"{kind}:{index or 0}"


def _framework(name: str) -> Framework:
    if _text("framework", name) in _NOT_SERVED:
        raise ReaderError(f"framework {name} is not served by tiermem; open the file as framework='np' and convert")
    if name not in _FRAMEWORKS:
        raise ReaderError(f"framework {name} is invalid")
    framework: Framework = importlib.import_module(_FRAMEWORKS[name])
    return framework


def _path(filename: Any) -> str:
    return _text("filename", os.fspath(filename))


def _seen_from_anywhere(path: str) -> str:
    """The path for a daemon, which has another working directory and other open files; never a model's name."""
    own = f"/proc/{os.getpid()}/"
    return os.path.abspath(path).replace("/dev/fd/", f"{own}fd/", 1).replace("/proc/self/", own, 1)


def _text(argument: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"argument '{argument}': {_kind(value)} is not an instance of 'str'")
    return value


def _kind(value: object) -> str:
    return "'None'" if value is None else f"'{type(value).__name__}' object"
