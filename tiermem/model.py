"""Model: a leased model as a read-only Mapping of tensor names to numpy arrays that alias the pool's segments.

Owns one mapping of all segments side by side, and through it the lease. Never copies weights and never reads files.
"""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.carrier import Carrier, Link
from tiermem.dtypes import numpy_dtype
from tiermem.errors import Closed, NativeError, Refused, TensorNotFound
from tiermem.fingerprint import metadata_of
from tiermem.types import PAGE_BYTES, CheckpointFile, Manifest, TensorInfo
from tiermem.units import format_bytes

if TYPE_CHECKING:
    from tiermem.device.placed import DeviceModel

_MAPPINGS_PER_FETCH = 128

_log = logging.getLogger(__name__)


class LeaseHolder(Protocol):
    """A lease as its holder has it: what a client and an embedded pool both give."""

    name: str
    model_id: str
    manifest: Manifest
    files: tuple[int, ...] | None
    ready: npt.NDArray[np.bool_]

    def descriptors(self, segments: Sequence[int]) -> dict[int, int]:
        """New read-only descriptors of segments, for the caller to close."""

    def wait(self, tensors: Sequence[int] | None, timeout_s: float | None) -> None:
        """Return when these tensors (None: all) may be read. Raises the load's error, or DeadlineExceeded."""

    def residency(self) -> dict[str, str]:
        """Layer -> name of the tier that holds it."""

    def mapped(self, mapping: _native.Range) -> None:
        """All segments are mapped there now: what samples this process may look at it. Takes no lock."""

    def pinned(self, pages: Sequence[int]) -> None:
        """A device reads these pages of the model, unseen by whatever samples this process."""

    def carry(self, carrier: Carrier) -> Link:
        """Show the pool what the carrier copies of the model, and give the carrier the pool's orders, until the link
        is closed or collected, or the lease ends."""

    def digests(self) -> list[bytes | None]:
        """BLAKE3 of each tensor of the manifest, 32 bytes; None: not known yet."""

    def release(self) -> None:
        """End the lease; takes no lock, so that a garbage collection may call it."""


class Model(Mapping[str, npt.NDArray[Any]]):
    """Tensors of a model, or of the files of it that were opened.

    Arrays are views of shared memory: read-only, or with `writable` copy-on-write, so that writes stay in this
    process. They stay valid for as long as they live, also after `close`, which only ends the lease. Until a tensor is
    loaded, asking for it waits.
    """

    def __init__(self, holder: LeaseHolder, writable: bool = False, mapping: _native.Range | None = None) -> None:
        """`mapping`: where the segments are mapped already, and whose end ends the lease."""
        self.name = holder.name
        self.manifest = holder.manifest
        self.writable = writable
        self._holder = holder
        self._closed = False
        manifest, files = holder.manifest, holder.files
        self._tensors = {
            tensor.name: i for i, tensor in enumerate(manifest.tensors) if files is None or tensor.file in files
        }
        self._ready = holder.ready
        self._all_ready = bool(self._ready.all())
        try:
            self._starts, self._memory = _mapped(holder, writable, mapping)
        except BaseException:
            holder.release()
            raise
        if not self._memory:
            # No mapping ends this lease, so the model does.
            weakref.finalize(self, holder.release).atexit = False

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A numpy array over the tensor's bytes. Raises TensorNotFound, and Refused for a dtype that numpy lacks."""
        tensor = self.info(name)
        dtype = numpy_dtype(tensor.dtype)
        self.wait([name])
        start, memory = self.place(tensor)
        count = tensor.nbytes // dtype.itemsize
        if count == 0:
            return np.empty(tensor.shape, dtype)
        return np.frombuffer(memory, dtype, count, start).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and extent of a tensor, without waiting for it. Raises TensorNotFound."""
        return self.manifest.tensors[self._number(name)]

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        tensor = self.info(name)
        self.wait([name])
        start, memory = self.place(tensor)
        return memory[start : start + tensor.nbytes]

    def copy_to(self, name: str, destination: Any, threads: int = 2) -> None:
        """Copy a tensor's bytes into a writable, contiguous buffer of exactly their size, for engines that must own
        their memory. Raises Refused where the sizes differ."""
        source = np.frombuffer(self.raw(name), np.uint8)
        target = np.frombuffer(destination, np.uint8)
        if target.nbytes != source.nbytes or not target.flags.writeable:
            raise Refused(f"{name} has {source.nbytes} bytes, the destination {target.nbytes}, or it is read-only")
        _native.copy(target.ctypes.data, source.ctypes.data, source.nbytes, threads)

    def place(self, tensor: TensorInfo) -> tuple[int, memoryview]:
        """Where a tensor's bytes start in the mapping of the model, and that mapping. Does not wait. Raises Closed."""
        memory = self._memory
        self._check_open()
        return self._starts[tensor.extent.segment] + tensor.extent.offset, memory

    def wait(self, names: Iterable[str] | None = None, timeout_s: float | None = None) -> None:
        """Return when these tensors (None: the whole model) may be read; they jump the loader's queue.

        Raises what stopped the load (CheckpointChanged, DigestMismatch, ReadError), DeadlineExceeded, Closed, or
        TensorNotFound.
        """
        self._check_open()
        numbers = None if names is None else [self._number(name) for name in names]
        if self._all_ready:
            return
        if numbers is None and self._holder.files is None:
            self._holder.wait(None, timeout_s)
            self._all_ready = True
            return
        missing = [i for i in (self._tensors.values() if numbers is None else numbers) if not self._ready[i]]
        if missing:
            self._holder.wait(missing, timeout_s)
            self._ready[missing] = True

    def mark_pinned(self, names: Iterable[str] | None = None) -> None:
        """Tell that these tensors (None: all) were registered with a device (cudaHostRegister, RDMA): it reads
        them past this process's page tables, so that their pages are reported as untrackable and not as cold."""
        self._check_open()
        pages = set[int]()
        for name in self if names is None else names:
            tensor = self.info(name)
            start, _ = self.place(tensor)
            pages.update(range(start // PAGE_BYTES, -(-(start + tensor.nbytes) // PAGE_BYTES)))
        self._holder.pinned(sorted(pages))

    @property
    def metadata(self) -> dict[str, str]:
        """What the checkpoint's writer, or the image's creator, noted beside the tensors."""
        return metadata_of(self.manifest, self.files)

    @property
    def files(self) -> tuple[CheckpointFile, ...]:
        """The files of the checkpoint that were opened."""
        opened, files = self._holder.files, self.manifest.files
        return files if opened is None else tuple(files[i] for i in opened)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"model {self.name} is closed; open it again")

    def _number(self, name: str) -> int:
        try:
            return self._tensors[name]
        except KeyError:
            raise TensorNotFound(f"{self.name} has no tensor {name!r}; it has {len(self._tensors)} others") from None

    def residency(self) -> dict[str, str]:
        """Layer -> name of the tier that holds it now."""
        return self._holder.residency()

    def digests(self, names: Iterable[str] | None = None) -> dict[str, bytes | None]:
        """BLAKE3 of the bytes of these tensors (None: all), 32 bytes each; None where it is not known yet. Raises
        TensorNotFound, Closed."""
        self._check_open()
        wanted = {name: self._number(name) for name in (self if names is None else names)}
        known = self._holder.digests()
        return {name: known[number] for name, number in wanted.items()}

    def to(self, device: str, *, register: bool = False) -> DeviceModel:
        """All weights in the memory of a device (`npu:0`, `cuda:1`, `cpu`), ready to compute with: a Mapping of tensor
        name -> torch tensor. Waits for the load. See `stream` for a device that has less room, and for `register`.

        Raises DeviceUnavailable, DeviceFull, CopyFailed, DeviceLost, and what stopped the load.
        """
        from tiermem.device.placed import place

        return place(self, device, register)

    def stream(
        self, device: str, budget: int | str | None = None, *, policy: str = "layer_prefetch", ahead: int = 1,
        register: bool = False,
    ) -> DeviceModel:  # fmt: skip
        """The model on a device of which it may take `budget` (bytes, or text as `8GiB`; None: what is free, less a
        reserve for who computes there): weights are copied when they are asked for or used, and ahead of that.

        `attach(module)` of what it returns has a torch.nn.Module compute so: while one of its layers computes, the
        weights of the next `ahead` are copied. `policy`, by name or by its file, says which layers stay meanwhile. With
        `register` the device reads the host's memory by itself, where its runtime can (CUDA): copies do not go through
        staging then, and the pages can neither move nor be sampled. The model must stay open.

        Raises ConfigError, DeviceUnavailable, DeviceFull, DeviceLost.
        """
        from tiermem.device.placed import stream

        return stream(self, device, budget, policy, ahead, register)

    def close(self) -> None:
        """End the lease. Arrays that were taken stay valid, and without any the memory is unmapped; taking further ones
        raises Closed."""
        if not self._closed:
            self._closed = True
            self._memory = memoryview(b"")
            self._holder.release()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {len(self)} tensors{', closed' if self._closed else ''}>"


def starts_of(manifest: Manifest) -> list[int]:
    """Start of each segment in one mapping of all of them, and its end."""
    starts = [0]
    for segment in manifest.segments:
        starts.append(starts[-1] + segment.page_bytes)
    return starts


def map_segments(holder: LeaseHolder, starts: Sequence[int], access: _native.Access) -> _native.Range:
    """Map all segments of a lease side by side. Raises NativeError, or what the pool answers."""
    mapping = _native.Range.reserve(starts[-1], access)
    numbers = range(len(holder.manifest.segments))
    for first in range(0, len(numbers), _MAPPINGS_PER_FETCH):
        fds = holder.descriptors(numbers[first : first + _MAPPINGS_PER_FETCH])
        try:
            for number, fd in fds.items():
                mapping.map(starts[number], fd, starts[number + 1] - starts[number])
        finally:
            for fd in fds.values():
                os.close(fd)
    return mapping


def _mapped(holder: LeaseHolder, writable: bool, mapping: _native.Range | None) -> tuple[list[int], memoryview]:
    """Start of each segment in one mapping of all of them, and that mapping; its end ends the lease."""
    starts = starts_of(holder.manifest)
    if starts[-1] == 0:
        return starts, memoryview(b"")
    if mapping is None:
        try:
            mapping = map_segments(holder, starts, _native.Access.COW if writable else _native.Access.SHARED)
        except NativeError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return starts, _private_copy(holder, starts)
        mapping.on_release(holder.release)
    holder.mapped(mapping)
    return starts, mapping.buffer()


def _private_copy(holder: LeaseHolder, starts: Sequence[int]) -> memoryview:
    """Writable memory where segments lie on reserved 2 MiB pages, which have no copy-on-write. Waits for the load."""
    _log.warning("%s is copied (%s): its pool is on hugetlb; open it with writable=False, or serve with --backing shm",
                 holder.name, format_bytes(starts[-1]))  # fmt: skip
    shared = map_segments(holder, starts, _native.Access.SHARED)
    holder.wait(None, None)
    copy = np.empty(starts[-1], np.uint8)
    _native.copy(copy.ctypes.data, shared.address, copy.nbytes, threads=2)
    weakref.finalize(copy, holder.release).atexit = False
    return copy.data
