"""Stage: a part of a torch.nn.Module whose weights come and go together, and the slots that they are put into.

Owns what a slot had before, and what it has while its weight is away. Never copies, and never decides what comes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiermem.device.arena import whole
from tiermem.device.away import away
from tiermem.device.holding import Holding
from tiermem.device.replica import Replica, Weight
from tiermem.dtypes import torch_layout
from tiermem.errors import ModuleMismatch, Refused

if TYPE_CHECKING:
    import torch

    from tiermem.types import Manifest, TensorInfo

_TOLD = 12
"""Mismatches that an error lists."""


@dataclass(eq=False, slots=True)
class Slot:
    """The parameter or buffer `leaf` of a module, which is a tensor of the model. `before`: what was there; `absent`:
    what is there while the weight is away."""

    owner: torch.nn.Module
    leaf: str
    info: TensorInfo
    weight: Weight
    before: torch.Tensor
    absent: torch.Tensor

    def fill(self, replica: Replica) -> None:
        """Put the weight there, without gradient."""
        import torch

        value = replica.tensor(self.info.dtype, self.info.shape)
        if isinstance(self.before, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(self.owner, self.leaf, value)

    def clear(self) -> None:
        """The weight goes: nobody computes with it any more, nor does a backward pass that has kept it."""
        import torch

        torch.autograd.graph.increment_version(getattr(self.owner, self.leaf))
        setattr(self.owner, self.leaf, self.absent)

    def restore(self) -> None:
        """Put back what was there."""
        setattr(self.owner, self.leaf, self.before)


@dataclass(eq=False, slots=True)
class Stage:
    """`path`: of `module` within the whole. `inside`: the calls of it that have not ended."""

    number: int
    path: str
    module: torch.nn.Module
    slots: Sequence[Slot]
    weights: tuple[Weight, ...] = field(init=False)
    inside: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = tuple({slot.weight.key: slot.weight for slot in self.slots}.values())

    def fill(self, holding: Holding) -> None:
        """Put the weights in their slots."""
        import torch

        replicas: dict[Hashable, Replica] = {replica.weight.key: replica for replica in holding.replicas}
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            for slot in self.slots:
                slot.fill(replicas[slot.weight.key])

    def clear(self) -> None:
        """The weights go."""
        for slot in self.slots:
            slot.clear()


@dataclass(eq=False, slots=True)
class Call:
    """One call of a stage, by one thread; `holding` is None until its weights are held."""

    thread: int
    holding: Holding | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What of a module is a model's. `loose`: slots of modules that are in no stage. `strange`: buffers that no
    checkpoint has, by module and name."""

    stages: tuple[Stage, ...]
    loose: tuple[Slot, ...]
    strange: tuple[tuple[torch.nn.Module, str], ...]


def bytes_of(weights: Iterable[Weight]) -> int:
    """What they take in an arena, those of equal keys once."""
    return sum({weight.key: whole(weight.nbytes) for weight in weights}.values())


def survey(
    module: torch.nn.Module, prefix: str, manifest: Manifest, weights: Mapping[str, Weight], device: torch.device,
    staged: bool = True,
) -> Survey:  # fmt: skip
    """Find every parameter's tensor, and the stages: the largest modules that compute and have all their tensors in one
    segment, in the order in which the module has them; none unless `staged`.

    Raises ModuleMismatch.
    """
    slots, strange = _slots(module, prefix, manifest, weights, device)
    if not staged:
        return Survey((), tuple(slot for found in slots.values() for slot in found), strange)
    stages, loose = list[Stage](), list[Slot]()
    seen: set[torch.nn.Module] = set()

    def part(path: str, of: torch.nn.Module) -> None:
        if of in seen:
            return
        seen.add(of)
        below = [slot for inner in of.modules() for slot in slots.get(inner, ())]
        if below and _computes(of) and len({slot.info.extent.segment for slot in below}) == 1:
            stages.append(Stage(len(stages), path, of, below))
            return
        loose.extend(slots.get(of, ()))
        for name, child in of.named_children():
            part(f"{path}.{name}" if path else name, child)

    part("", module)
    return Survey(tuple(stages), tuple(loose), strange)


def _computes(module: torch.nn.Module) -> bool:
    """Whether it is ever called; a ModuleList is not."""
    import torch

    return type(module).forward is not torch.nn.Module.forward


def _slots(
    module: torch.nn.Module, prefix: str, manifest: Manifest, weights: Mapping[str, Weight], device: torch.device
) -> tuple[dict[torch.nn.Module, list[Slot]], tuple[tuple[torch.nn.Module, str], ...]]:
    """By module; and the buffers that no checkpoint has."""
    names = dict[int, list[str]]()  # all of one tensor: tied parameters, modules that are in several places
    for every in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in every:
            names.setdefault(id(tensor), []).append(name)
    slots: dict[torch.nn.Module, list[Slot]] = {}
    strange: list[tuple[torch.nn.Module, str]] = []
    faults = list[str]()
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None:
                continue
            own = f"{path}.{leaf}" if path else leaf
            tried = (prefix + name for name in dict.fromkeys((own, *names[id(tensor)])))
            found = next((name for name in tried if name in weights), None)
            if found is not None:
                info = manifest.tensors[manifest.by_name[found]]
                faults += _mismatch(own, tensor, info)
                absent = away(found, tensor, device)
                slots.setdefault(owner, []).append(Slot(owner, leaf, info, weights[found], tensor, absent))
            elif leaf in owner._parameters:
                faults.append(f"{own}: there is no tensor {prefix + own}")
            elif tensor.is_meta:
                faults.append(f"{own}: no checkpoint has this buffer, and it has no values; make it on cpu")
            else:
                strange.append((owner, leaf))
    if faults:
        more = f"; and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        raise ModuleMismatch(
            f"{type(module).__name__} does not fit the model's tensors, look at the prefix ({prefix!r}), configuration "
            f"and dtype: {'; '.join(faults[:_TOLD])}{more}"
        )
    return slots, tuple(strange)


def _mismatch(name: str, tensor: torch.Tensor, info: TensorInfo) -> list[str]:
    try:
        dtype, shape = torch_layout(info.dtype, info.shape)
    except Refused as error:
        return [f"{name}: tensor {info.name} is {info.dtype}: {error}"]
    if (dtype, shape) == (tensor.dtype, tuple(tensor.shape)):
        return []
    return [
        f"{name} is {_short(tensor.dtype)} {list(tensor.shape)}, tensor {info.name} is {_short(dtype)} {list(shape)}"
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
