"""Replica: the bytes of one weight on a device, and the weight that they are of.

Owns what is known of one copy. Never decides whether it stays: its residency does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tiermem.device.arena import Block
from tiermem.device.copier import Ticket
from tiermem.dtypes import torch_layout
from tiermem.errors import Refused

if TYPE_CHECKING:
    import torch

    from tiermem.model import Model


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor as a residency sees it.

    key      of equal keys the bytes are equal: its digest where that is known, else (model id, tensor number)
    name     for errors
    source   gives its bytes: contiguous host memory that nobody changes; asked when they are copied, by the copier's
             thread, and what it raises, `Holding.wait` raises
    """

    key: Hashable
    name: str
    nbytes: int
    source: Callable[[], memoryview]


def weights_of(
    model: Model, digests: Mapping[str, bytes | None], source: Callable[[str], memoryview]
) -> dict[str, Weight]:
    """Of the tensors of a model whose `digests` are given, by name; `source(name)` gives the bytes of one. A tensor
    without a digest is equal to itself alone."""
    manifest = model.manifest
    return {
        name: Weight(
            digest or (manifest.identity, manifest.by_name[name]), name, model.info(name).nbytes, partial(source, name)
        )
        for name, digest in digests.items()
    }


@dataclass(eq=False, slots=True)
class Replica:
    """`holds`: how many holdings have it. `used`: when the last of them ended, counted in holdings."""

    weight: Weight
    block: Block = field(repr=False)
    ticket: Ticket = field(repr=False)
    holds: int = 0
    used: int = 0

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def view(self) -> torch.Tensor:
        """Its bytes, uint8 [nbytes] on the device; only while it is held, and to be read in streams that waited."""
        return self.block.view

    @property
    def arrived(self) -> bool:
        """Whether its copy is done, and well."""
        return self.ticket.done() and self.ticket.error is None

    @property
    def failed(self) -> bool:
        """Whether its copy is known to have failed."""
        return self.ticket.done() and self.ticket.error is not None

    def tensor(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Its bytes as a tensor of that dtype, by its name in the safetensors format, and shape; no copy.

        Raises Refused where torch, or the device, has no such dtype, or the bytes are not of that shape.
        """
        wanted, layout = torch_layout(dtype, shape)
        try:
            return self.view.view(wanted).view(layout)
        except (RuntimeError, TypeError) as error:
            raise Refused(
                f"{self.weight.name}, {self.nbytes} bytes on {self.view.device}, cannot be {dtype} {list(shape)}: "
                f"{error}; take its bytes"
            ) from error
