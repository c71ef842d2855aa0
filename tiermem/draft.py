"""Draft: an image that this process fills. Writable shared memory, until it is sealed.

Owns the mapping and through it the lease. Never copies: the bytes are the pool's from the first write on, but
nobody is shown them before the seal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tiermem import _native
from tiermem.errors import Closed, ImageAbandoned, TensorNotFound
from tiermem.model import LeaseHolder, Model, map_segments, starts_of
from tiermem.types import TensorInfo


class Draft:
    """Tensors to be written, by name. Leave it unsealed, by `close` or by ending the process, and nothing stays.

    `Draft` and `Model` are alike as far as `tiermem.torch.tensors_of` goes.
    """

    writable = True

    def __init__(self, holder: LeaseHolder, seal: Callable[[], None]) -> None:
        """`seal` asks the pool to keep what was written, and returns once it did."""
        self.name = holder.name
        self.manifest = holder.manifest
        self._holder = holder
        self._seal = seal
        try:
            self._starts = starts_of(holder.manifest)
            self._range: _native.Range | None = map_segments(holder, self._starts, _native.Access.FILL)
            self._memory = self._range.buffer()
        except BaseException:
            holder.release()
            raise
        self._range.on_release(holder.release)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.by_name)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and extent of a tensor. Raises TensorNotFound."""
        number = self.manifest.by_name.get(name)
        if number is None:
            raise TensorNotFound(f"image {self.name} has no tensor {name!r}; it was created with {len(self)} others")
        return self.manifest.tensors[number]

    def place(self, tensor: TensorInfo) -> tuple[int, memoryview]:
        """Where a tensor's bytes start in the mapping of the image, and that mapping. Raises Closed."""
        if self._range is None:
            raise Closed(f"image {self.name} is sealed or closed here; open it")
        return self._starts[tensor.extent.segment] + tensor.extent.offset, self._memory

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, to be written."""
        tensor = self.info(name)
        start, memory = self.place(tensor)
        return memory[start : start + tensor.nbytes]

    def wait(self, names: Iterable[str] | None = None) -> None:
        """All of it may be written at once."""

    def seal(self) -> Model:
        """Keep the image: what was written is immutable from now on, here too, at the same addresses.

        A write through a tensor or buffer that was taken before ends the process with SIGSEGV. Raises
        DaemonUnreachable, Refused; the mapping then stays as it is, for this process alone.
        """
        if self._range is None:
            raise Closed(f"image {self.name} is sealed or closed here; open it")
        self._seal()
        self._range.protect()
        self._holder.ready[:] = True
        mapping, self._range, self._memory = self._range, None, memoryview(b"")
        return Model(self._holder, mapping=mapping)

    def close(self) -> None:
        """Give the draft up; tensors that were taken stay valid. After `seal`, nothing."""
        if self._range is not None:
            self._range, self._memory = None, memoryview(b"")
            self._holder.release()

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Draft {self.name!r}: {len(self)} tensors>"


Opened = TypeVar("Opened", bound=Draft | Model)


def usable(open_: Callable[[], Opened], timeout_s: float | None = None) -> Opened:
    """What `open_` gives, once a model of it is sealed; opened again where whoever was filling it left.

    Raises DeadlineExceeded.
    """
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        image = None
        try:
            image = open_()
            if isinstance(image, Model):
                image.wait(timeout_s=None if timeout_s is None else max(0.0, deadline_s - time.monotonic()))
            return image
        except BaseException as error:
            if image is not None:
                image.close()
            if not isinstance(error, ImageAbandoned):
                raise
