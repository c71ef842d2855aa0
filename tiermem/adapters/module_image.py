"""Module image: the weights of a torch module as the tensors of an image, and the module on the image's memory.

Owns which tensors of a module are its weights, and where each of them points. Knows no engine. Never changes a byte of
an image that is sealed: parameters are put on its read-only memory, buffers are copied out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

from tiermem.dtypes import torch_names
from tiermem.errors import Refused
from tiermem.types import ImageTensor

if TYPE_CHECKING:
    import torch

    from tiermem.draft import Draft
    from tiermem.model import Model


class ModuleImage:
    """Of one module on the CPU, between its construction and its first use.

    Parameters are what an image holds, and persistent buffers, since loading may change those. Buffers that are not
    persistent are what the module computed when it was constructed.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self._parameters = {name: p for name, p in module.named_parameters() if _counted(p)}
        buffers = list(_buffers(module))
        self._buffers = {name: b for name, b, persistent in buffers if persistent and b.numel()}
        self._computed = {name: b for name, b, persistent in buffers if not persistent}
        self._before: dict[str, object] = {}

    def unfit(self) -> str | None:
        """Why the module's parameters cannot be in an image; None where they can."""
        owners: dict[int, str] = {}
        for name, p in self._parameters.items():
            if (why := _unfit(p)) is not None:
                return f"parameter {name} {why}"
            if (other := owners.setdefault(p.untyped_storage().data_ptr(), name)) != name:
                return f"parameter {name} shares its memory with {other}"
        names = _dtype_names()
        odd = [name for name, tensor in self._tensors().items() if tensor.dtype not in names]
        return f"{odd[0]} is of {self._tensors()[odd[0]].dtype}" if odd else None

    def tensors(self) -> tuple[ImageTensor, ...]:
        """What the image holds, in the order in which it lies."""
        names = _dtype_names()
        return tuple(ImageTensor(name, names[t.dtype], tuple(t.shape)) for name, t in self._tensors().items())

    def layout(self) -> str:
        """Hex digest of names, dtypes and shapes: modules of equal layout can take each other's image."""
        return blake3(repr([(t.name, t.dtype, t.shape) for t in self.tensors()]).encode()).hexdigest()[:32]

    def fill(self, draft: Draft) -> None:
        """Put the parameters on the draft's memory, with what they hold now: loading writes them there."""
        import torch

        self._before = self._beside_weights()
        with torch.no_grad():
            for name, tensor in self._of(draft, self._parameters).items():
                # What the checkpoint lacks keeps what the module's constructor gave it.
                tensor.copy_(self._parameters[name].data)
                self._parameters[name].data = tensor

    def keep_buffers(self, draft: Draft) -> None:
        """Copy the buffers, as loading left them, into the draft."""
        for name, tensor in self._of(draft, self._buffers).items():
            tensor.copy_(self._buffers[name])

    def attach(self, image: Model) -> None:
        """Put the parameters on the image's memory, read-only, and copy the buffers out of it.

        Raises Refused, before anything is changed, where the image holds other tensors than the module has.
        """
        held = [(t.name, t.dtype, t.shape) for t in image.manifest.tensors]
        wanted = [(t.name, t.dtype, t.shape) for t in self.tensors()]
        if held != wanted:
            odd = sorted(set(held) ^ set(wanted))[:3]
            raise Refused(f"image {image.name} and the model differ in {odd}; remove it: tiermem unload {image.name}")
        for name, tensor in self._of(image, self._parameters).items():
            self._parameters[name].data = tensor
        for name, tensor in self._of(image, self._buffers).items():
            self._buffers[name].copy_(tensor)

    def detach(self) -> None:
        """Move the parameters that are the module's still to memory of this process, and keep what they hold."""
        for p in self.module.parameters():
            p.data = p.data.clone()

    def digest(self) -> str:
        """Hex digest of the parameters' bytes, wherever they are."""
        import torch

        state = blake3(max_threads=blake3.AUTO)
        for p in self._parameters.values():
            state.update(p.data.view(-1).view(torch.uint8).numpy().data)
        return str(state.hexdigest())

    def moved(self) -> str | None:
        """Which parameter of the module is not where it was put; None if all are. What was tied since is one."""
        places = {p.data_ptr() for p in self._parameters.values()}
        for name, p in self.module.named_parameters():
            if p.numel() and p.data_ptr() not in places:
                return name
        return None

    def changed_beside_weights(self) -> str | None:
        """What else of the module changed since `fill`, and an image would lack: a computed buffer, or an attribute."""
        before, now = self._before, self._beside_weights()
        return next((name for name in sorted(now | before) if now.get(name) != before.get(name)), None)

    @contextmanager
    def watch_writes(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Tell of each operation that writes to a parameter's memory, before it does."""
        from torch.utils._python_dispatch import TorchDispatchMode

        places = {p.untyped_storage().data_ptr(): name for name, p in self._parameters.items()}

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                for storage in _written(func, args, kwargs or {}):
                    if storage in places:
                        tell(f"{func} writes to {places[storage]}")
                return func(*args, **(kwargs or {}))

        with Watch():  # type: ignore[no-untyped-call]
            yield

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self._parameters, **self._buffers}

    def _of(self, image: Model | Draft, names: dict[str, Any]) -> dict[str, torch.Tensor]:
        from tiermem.torch import tensors_of

        return tensors_of(cast("Model", image), list(names), "cpu")

    def _beside_weights(self) -> dict[str, object]:
        found: dict[str, object] = {f"buffer {name}": _digest(b) for name, b in self._computed.items()}
        for path, module in self.module.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, bool | int | float | str | None):
                    found[f"attribute {path}.{name}"] = value
        return found


def _counted(p: torch.nn.Parameter) -> bool:
    from torch.nn.parameter import is_lazy

    return is_lazy(p) or p.numel() > 0


def _unfit(p: torch.nn.Parameter) -> str | None:
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(p):
        return "has no shape before it is loaded"
    if p.device.type != "cpu":
        return f"is on {p.device}"
    if p.layout is not torch.strided or p.is_quantized or not p.is_contiguous():
        return "is not plain and dense"
    if p.nbytes != p.untyped_storage().nbytes():
        return "is a part of other memory"
    return None


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, buffer, and whether it is of the module's state."""
    seen = set[int]()
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{path}.{name}" if path else name, buffer, name not in child._non_persistent_buffers_set


def _dtype_names() -> dict[torch.dtype, str]:
    # A packed dtype counts its elements otherwise than torch does.
    return {dtype: name for dtype, name in torch_names().items() if name != "F4"}


def _digest(tensor: torch.Tensor) -> str:
    import torch

    flat = tensor.detach().contiguous().view(-1)
    return str(blake3(flat.view(torch.uint8).numpy().data).hexdigest()) if flat.numel() else ""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
    """Addresses of the storages that an operation writes to, as its schema says."""
    import torch

    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    yield tensor.untyped_storage().data_ptr()
