"""Exception tree. Every error says what, which, how much and what to do next; none is ever returned as a value.

Each class has two parents, ours and the builtin that a caller would expect, a `code` that crosses the wire, and the
exit code that the command line ends with.
"""

from __future__ import annotations

import copy
from typing import ClassVar


class TiermemError(Exception):
    """Root of all errors of this package."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        # KeyError would print its argument's repr.
        return " ".join(str(arg) for arg in self.args)


class ConfigError(TiermemError, ValueError):
    """An option has an unknown name or an unusable value."""

    code = "config"
    exit_code = 2


class PolicyError(TiermemError, ValueError):
    """A policy raised, took too long, or asked for what cannot be."""

    code = "policy"


class DaemonUnreachable(TiermemError, ConnectionError):
    """No daemon answers at the address, or the connection to it broke."""

    code = "unreachable"
    exit_code = 3


class TransportUnavailable(TiermemError, OSError):
    """Weights cannot come by the way that was wanted; the message says what it lacks."""

    code = "transport"


class ModelNotFound(TiermemError, KeyError):
    """No model of that name is in the pool."""

    code = "model-not-found"
    exit_code = 4


class ImageNotFound(ModelNotFound):
    """No image of that fingerprint is in the pool."""

    code = "image-not-found"


class TensorNotFound(TiermemError, KeyError):
    """The model has no tensor of that name."""

    code = "tensor-not-found"
    exit_code = 4


class CheckpointNotFound(TiermemError, FileNotFoundError):
    """The path holds no checkpoint."""

    code = "checkpoint-not-found"
    exit_code = 4


class CapacityError(TiermemError, MemoryError):
    """A tier lacks room, and nothing in it may be evicted."""

    code = "capacity"
    exit_code = 5


class Refused(TiermemError, RuntimeError):
    """The pool declines: the model is leased, pinned, or the name is taken."""

    code = "refused"
    exit_code = 5


class FingerprintMismatch(Refused):
    """The image of that name was made from other inputs."""

    code = "fingerprint"


class ImageAbandoned(Refused):
    """Who was filling the image left before it was whole."""

    code = "image-abandoned"


class AccessDenied(TiermemError, PermissionError):
    """The caller is not who may do this."""

    code = "access-denied"
    exit_code = 5


class SessionUnknown(AccessDenied):
    """The call's token is of no session: the pool has ended it, or is another one since."""

    code = "session-unknown"


class CheckpointError(TiermemError, ValueError):
    """A checkpoint is malformed; nothing of it was loaded."""

    code = "checkpoint"
    exit_code = 6


class CheckpointChanged(CheckpointError):
    """A checkpoint changed while it was read, or since its digests were taken."""

    code = "checkpoint-changed"


class DigestMismatch(TiermemError, ValueError):
    """Bytes do not have the digest that they must have; they are not served."""

    code = "digest"
    exit_code = 6


class ReadError(TiermemError, OSError):
    """A source could not deliver bytes."""

    code = "read"


class NativeError(TiermemError, OSError):
    """The native core failed; `errno` holds the system's number where there is one."""

    code = "native"

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.errno = number

    def __reduce__(self) -> tuple[type[NativeError], tuple[str, int]]:
        return type(self), (str(self), self.errno or 0)


class DeviceUnavailable(TiermemError, RuntimeError):
    """There is no such device, or torch cannot use it; the message says what is missing."""

    code = "device-unavailable"


class DeviceFull(TiermemError, MemoryError):
    """A device, or the part of it that was set aside, lacks room; `lacking_bytes` is how much."""

    code = "device-full"
    exit_code = 5

    def __init__(self, message: str, lacking_bytes: int = 0) -> None:
        super().__init__(message)
        self.lacking_bytes = lacking_bytes

    def __reduce__(self) -> tuple[type[DeviceFull], tuple[str, int]]:
        return type(self), (str(self), self.lacking_bytes)


class DeviceLost(TiermemError, RuntimeError):
    """A device answers no more; what was on it is gone, and this process cannot use it again."""

    code = "device-lost"


class ModuleMismatch(Refused):
    """Parameters of a module are not the model's tensors; the message lists them."""

    code = "module-mismatch"


class CopyFailed(TiermemError, OSError):
    """Bytes did not get to a device; what is in their place there must not be used."""

    code = "copy"


class RecordingError(TiermemError, ValueError):
    """A recording or a perf.data file is damaged, or of a kind that is not read."""

    code = "recording"


class ProtocolError(TiermemError, ValueError):
    """A message is not of the protocol, or the two ends speak different versions of it."""

    code = "protocol"


class DeadlineExceeded(TiermemError, TimeoutError):
    """The time given for an operation passed before it ended."""

    code = "deadline"


class Closed(TiermemError, ValueError):
    """A model, pool or client was used after it was closed."""

    code = "closed"


def own(error: Exception) -> Exception:
    """The same error as an object of its own, for one of several who are told of it: an error keeps the frames through
    which it was raised, and with them the models that they hold."""
    return copy.copy(error).with_traceback(error.__traceback__)


def _walk(root: type[TiermemError]) -> list[type[TiermemError]]:
    return [root] + [cls for child in root.__subclasses__() for cls in _walk(child)]


BY_CODE: dict[str, type[TiermemError]] = {cls.code: cls for cls in _walk(TiermemError)}
"""Wire code -> class; an unknown code becomes TiermemError."""
