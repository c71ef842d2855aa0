"""mindspore: checkpoints as MindSpore parameters over the pool's memory; the interface of `mindspore.load_checkpoint`.

Owns that call's arguments and the making of parameters. Never copies weights on the CPU and never reads a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiermem.checkpoint.mindspore_ckpt import ENDING, SLICED
from tiermem.dtypes import numpy_dtype
from tiermem.errors import ConfigError, Refused
from tiermem.opening import open_model

if TYPE_CHECKING:
    from tiermem.model import Model

__all__ = ["load_checkpoint"]

_FORMATS = ("ckpt", "safetensors")
_INT4 = "Int4"
"""What MindSpore puts into the metadata of a safetensors file, as a tensor's name, for pairs of four bits."""

Prefix = str | Sequence[str] | None


def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Prefix = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Prefix = None,
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str | None = None,
) -> dict[str, Any]:
    """The parameters of a checkpoint by name, in its order, and the strings that were saved with them;
    `mindspore.load_checkpoint`, less the copies. Fit for `mindspore.load_param_into_net`, which `net` has done here.

    Takes a file, a directory, an index, or the name of a model in the pool. Parameters on the CPU are copy-on-write:
    they share the pool's memory until they are written to, and what is written stays in this process. They keep the
    model leased for as long as they live. `filter_prefix`, `specify_prefix` and `choice_func` choose among the names as
    in the original, whatever the format. `format` (None: either) must be that of the files.

    Raises ConfigError where nothing is chosen or the format is another, Refused for `dec_key`, for `crc_check` (the
    pool compares digests of its own) and for a dtype that MindSpore lacks, CheckpointNotFound, ModelNotFound,
    CheckpointError, CapacityError, DigestMismatch, ReadError; and from MindSpore what loading into `net` raises.
    """
    source = os.fspath(ckpt_file_name)
    _refuse(source, dec_key, crc_check)
    wanted = _choice(_prefixes(filter_prefix), _prefixes(specify_prefix), choice_func)
    model = open_model(source, writable=True)
    _check_format(model, format)
    parameters = dict(_values(model, wanted))
    if not parameters:
        raise ConfigError(
            f"{source}: nothing of it is chosen; its {len(model)} tensors do not pass filter_prefix, specify_prefix or "
            "choice_func"
        )
    if net is not None:
        from mindspore import load_param_into_net

        # The file knows whether it was saved without what other ranks hold as well.
        said = model.metadata.get("remove_redundancy", str(remove_redundancy))
        load_param_into_net(net, parameters, strict_load, said == "True")
    return parameters


def _refuse(source: str, dec_key: bytes | None, crc_check: bool) -> None:
    if dec_key is not None:
        raise Refused(
            f"{source}: a pool reads no encrypted checkpoint, so dec_key cannot be used; load it with "
            "mindspore.load_checkpoint and save it without enc_key"
        )
    if crc_check:
        raise Refused(
            f"{source}: a pool compares its own digest of every tensor and not the file's CRC; leave crc_check out, or "
            "check the file once with mindspore.load_checkpoint(..., crc_check=True)"
        )


def _check_format(model: Model, format: str | None) -> None:
    if format is None:
        return
    if format not in _FORMATS:
        raise ConfigError(f"format is {format!r}; it is one of {', '.join(_FORMATS)}, or None for either")
    for file in model.files:
        if not file.path.endswith(f".{format}"):
            raise ConfigError(f"{file.path}: is not of the format {format!r} that was asked for; leave format out")


def _prefixes(given: Prefix) -> tuple[str, ...] | None:
    if given is None:
        return None
    prefixes = (given,) if isinstance(given, str) else tuple(given)
    if not prefixes or not all(isinstance(prefix, str) and prefix for prefix in prefixes):
        raise ConfigError(f"filter_prefix and specify_prefix take text or several texts, none empty, but got {given!r}")
    return prefixes


def _choice(
    filtered: tuple[str, ...] | None, specified: tuple[str, ...] | None, choice_func: Callable[[str], bool] | None
) -> Callable[[str], bool]:
    """Whether a name is wanted. Prefixes override `choice_func`, as in the original."""
    if filtered is None and specified is None:
        return choice_func or (lambda name: True)
    return lambda name: (specified is None or name.startswith(specified)) and not name.startswith(filtered or ())


def _values(model: Model, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """Name and value of what is wanted, in the checkpoint's order, strings last."""
    metadata = model.metadata
    chosen = {name: slices for name, slices in _slices(model, metadata).items() if wanted(name)}
    model.wait([name for slices in chosen.values() for name in slices])
    for name, slices in chosen.items():
        whole = metadata.get(SLICED + name)
        shape = json.loads(whole) if whole else model.info(slices[0]).shape
        yield name, _parameter(name, _joined(model, slices).reshape(shape), metadata.get(name) == _INT4)
    for file in model.files:
        if file.path.endswith(ENDING):
            for key, text in (file.metadata or {}).items():
                if not key.startswith("tiermem.") and wanted(key):
                    yield key, text


def _slices(model: Model, metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """Name of every tensor as it was saved -> names of the tensors of the pool that it is in, in order."""
    found: dict[str, list[str]] = {}
    for name in model:
        tag = name.rpartition(".slice.")[0]
        found.setdefault(tag if SLICED + tag in metadata else name, []).append(name)
    return found


def _joined(model: Model, names: Sequence[str]) -> npt.NDArray[Any]:
    """All elements of tensors of one dtype: a view where they lie behind one another, as slices of 512 MiB do."""
    infos = [model.info(name) for name in names]
    dtype = _dtype(infos[0].dtype)
    starts = [model.place(info)[0] for info in infos]
    ends = [start + info.nbytes for start, info in zip(starts, infos, strict=True)]
    if starts[1:] != ends[:-1]:
        return np.concatenate([_joined(model, [name]) for name in names])
    length = ends[-1] - starts[0]
    if not length:
        return np.empty(0, dtype)
    return np.frombuffer(model.place(infos[0])[1], dtype, length // dtype.itemsize, starts[0])


def _dtype(name: str) -> np.dtype[Any]:
    if name != "BF16":
        return numpy_dtype(name)
    from mindspore.common import np_dtype

    if not np_dtype.np_dtype_valid(True):
        raise Refused("MindSpore has no BF16 beside this numpy; pip install 'numpy<2'")
    dtype: np.dtype[Any] = np.dtype(np_dtype.bfloat16)
    return dtype


def _parameter(name: str, array: npt.NDArray[Any], int4: bool) -> Any:
    from mindspore import Parameter, Tensor, qint4x2

    # A parameter takes a tensor over where it counts no other reference to it, and copies any other; a name beside it
    # counts as one.
    parameter = Parameter(Tensor(array, qint4x2)) if int4 else Parameter(Tensor.from_numpy(array))
    parameter.name = name
    return parameter
