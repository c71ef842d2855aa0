"""onnxruntime: inference sessions whose weights are the pool's memory, shared and read-only.

Owns which initializers of a model the runtime gets as values over the pool, and how long they live. Never copies a
weight; what the runtime computes out of weights is its own and private to the process.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiermem.checkpoint import check_unchanged
from tiermem.checkpoint.onnx_outline import Weight, outline_of
from tiermem.errors import Refused
from tiermem.opening import open_model
from tiermem.types import DTYPE_BITS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

    from tiermem.model import Model

__all__ = ["session"]

_DIRECTORY = "session.model_external_initializers_file_folder_path"
_NO_PREPACKING = "session.disable_prepacking"
_OWNER = "tiermem.model"
"""Configuration entry of ours: the model whose weights the options carry."""

_SKIPPED = "tiermem.skipped"
"""Of a checkpoint's metadata: with a tensor's name behind it, or alone with the number of sparse ones."""

_log = logging.getLogger(__name__)


def session(
    path_or_name: str | os.PathLike[str],
    sess_options: SessionOptions | None = None,
    *,
    providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    address: str | None = None,
    **kwargs: Any,
) -> InferenceSession:
    """An `onnxruntime.InferenceSession` over the ONNX model at a path (or by the name that it has in the pool).

    Initializers of 1 KiB and more, inline or in files of external data, alias the pool's memory for as long as the
    session lives. `providers` and `kwargs` are InferenceSession's; a provider of another device copies weights there.

    `sess_options` serves this one session: the model's initializers, the directory of its files and
    `session.disable_prepacking=1` are added to it, and it keeps the weights in memory for as long as it lives. With
    `session.disable_prepacking` set to 0 beforehand, the runtime repacks matrices, which makes many rows at a time
    several times faster and costs each process a copy of them.

    Raises Refused (no ONNX model, onnxruntime missing or too old, options that served before), CheckpointNotFound,
    ModelNotFound, CheckpointError, CheckpointChanged, CapacityError, DigestMismatch, ReadError, DaemonUnreachable (for
    an `address` that was given), and what InferenceSession raises.
    """
    runtime = _runtime()
    options = runtime.SessionOptions() if sess_options is None else sess_options
    model = open_model(path_or_name, address=address)
    try:
        outline = outline_of(model.manifest)
        for file in model.manifest.files:
            check_unchanged(file)
        values = _values(runtime, model, outline.weights)
        _configure(options, model.name, outline.directory)
    except BaseException:
        model.close()
        raise
    # Options and session keep the addresses of values and not the values, which hold the mapping and the lease.
    weakref.finalize(options, len, values).atexit = False
    for name, value in values.items():
        options.add_initializer(name, value)
    made: InferenceSession = runtime.InferenceSession(outline.proto, options, providers=providers, **kwargs)
    weakref.finalize(made, len, values).atexit = False
    return made


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise Refused("onnxruntime is not installed; pip install onnxruntime") from None
    if not hasattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type"):
        raise Refused(
            f"onnxruntime {onnxruntime.__version__} cannot take weights of every type from memory; pip install "
            "--upgrade onnxruntime"
        )
    return onnxruntime


def _configure(options: SessionOptions, name: str, directory: str) -> None:
    """Raises Refused where the options carry a model's weights already: they would be taken for this one's too."""
    if (owner := _entry(options, _OWNER)) is not None:
        raise Refused(f"the session options carry the weights of {owner} already; make new ones for {name}")
    options.add_session_config_entry(_OWNER, name)
    options.add_session_config_entry(_DIRECTORY, directory)
    if _entry(options, _NO_PREPACKING) is None:
        options.add_session_config_entry(_NO_PREPACKING, "1")


def _entry(options: SessionOptions, key: str) -> str | None:
    try:
        value: str = options.get_session_config_entry(key)
    except RuntimeError:  # there is none
        return None
    return value


def _values(runtime: Any, model: Model, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Values over the pool's memory by name, once all of it may be read."""
    model.wait()
    metadata = model.manifest.files[0].metadata or {}
    left = [key[len(_SKIPPED) + 1 :] or text for key, text in metadata.items() if key.startswith(_SKIPPED)]
    if left:
        _log.info(
            "%s: each process has its own copy of what the pool does not hold: %s; save the model with raw data",
            model.name, ", ".join(left),
        )  # fmt: skip
    from_memory = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    return {name: from_memory(_array(model, name, dims), number) for name, (number, dims) in weights.items()}


def _array(model: Model, name: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    """The tensor's memory as unsigned numbers of its elements' size, in the shape that the runtime knows it by."""
    info = model.info(name)
    flat = np.frombuffer(model.raw(name), f"u{DTYPE_BITS[info.dtype] // 8}")
    # Elements of less than a byte share one. Of such an array the runtime takes the address and the shape alone.
    return flat.reshape(dims) if dims == info.shape else np.broadcast_to(flat[:1], dims)
