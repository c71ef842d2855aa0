"""Module image: a torch module's weights as an image of a pool, and what keeps a module from having one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tiermem.adapters.module_image import ModuleImage
from tiermem.draft import Draft
from tiermem.embedded import EmbeddedPool
from tiermem.errors import Refused
from tiermem.model import Model

FIELDS = {"engine": "test"}


class Layer(nn.Module):
    """A parameter of each kind that an image holds, and buffers of both kinds."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 3), value, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.full((4,), float(value)), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("mean", torch.full((2,), value, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(int(value)))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


class Stack(nn.Module):
    """Two layers, and a head that is tied to the first."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(value), Layer(value)])
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.layers[0].weight


def filled(pool: EmbeddedPool, module: Stack) -> Model:
    """The sealed image of a module that was loaded with ones, and a two in each buffer."""
    content = ModuleImage(module)
    with pool.create_image(FIELDS, content.tensors()) as draft:
        assert isinstance(draft, Draft)
        content.fill(draft)
        with torch.no_grad():
            for layer in module.layers:
                layer.weight.data.fill_(1)
                layer.mean.fill_(2)
                layer.count.fill_(2)
        content.keep_buffers(draft)
        assert content.moved() is None
        assert content.changed_beside_weights() is None
        return draft.seal()


def test_a_module_reads_what_another_was_loaded_with(pool: EmbeddedPool) -> None:
    image = filled(pool, Stack(value=7))
    other = Stack()
    ModuleImage(other).attach(image)
    for layer in other.layers:
        assert layer.weight.eq(1).all()
        assert layer.bias.eq(7).all()  # loading left it as its constructor made it
        assert layer.mean.tolist() == [2, 2]
        assert int(layer.count) == 2
        assert layer.table.tolist() == [0, 1, 2, 3, 4]
    assert other.head.weight is other.layers[0].weight


def test_parameters_lie_in_the_image_and_buffers_do_not(pool: EmbeddedPool) -> None:
    image = filled(pool, Stack())
    module = Stack()
    ModuleImage(module).attach(image)
    again = Stack()
    ModuleImage(again).attach(image)
    assert module.layers[1].weight.data_ptr() == again.layers[1].weight.data_ptr()
    module.layers[1].mean.fill_(9)
    assert again.layers[1].mean.tolist() == [2, 2]


def test_tied_parameters_are_one_tensor_and_empty_ones_none() -> None:
    names = [tensor.name for tensor in ModuleImage(Stack()).tensors()]
    assert names == [
        "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
        "layers.0.mean", "layers.0.count", "layers.1.mean", "layers.1.count",
    ]  # fmt: skip


def test_an_image_of_other_tensors_is_refused_before_anything_changes(pool: EmbeddedPool) -> None:
    image = filled(pool, Stack())
    module = Stack(value=3)
    module.layers[1].bias = nn.Parameter(torch.full((5,), 3.0), requires_grad=False)
    with pytest.raises(Refused, match=r"layers\.1\.bias"):
        ModuleImage(module).attach(image)
    assert module.layers[0].weight.eq(3).all()


def test_the_layout_tells_shapes_dtypes_and_names_apart() -> None:
    same, longer, wider = Stack(1), Stack(), Stack()
    longer.layers.append(Layer())
    wider.layers[0].bias.data = wider.layers[0].bias.data.double()
    layouts = [ModuleImage(module).layout() for module in (Stack(), same, longer, wider)]
    assert layouts[0] == layouts[1]
    assert len(set(layouts)) == 3


def strided(module: Stack) -> None:
    module.head.weight = nn.Parameter(torch.empty(3, 4).t())


def shared(module: Stack) -> None:
    module.layers[1].weight.data = module.layers[0].weight.data


def part(module: Stack) -> None:
    module.layers[1].bias.data = torch.empty(8)[:4]


def lazy(module: Stack) -> None:
    module.layers.append(nn.LazyLinear(3))


def elsewhere(module: Stack) -> None:
    module.layers[1].bias = nn.Parameter(torch.empty(4, device="meta"))


def odd(module: Stack) -> None:
    module.layers[1].bias.data = torch.empty(4, dtype=torch.complex128)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (strided, "parameter head.weight is not plain and dense"),
        (shared, "parameter layers.1.weight shares its memory with layers.0.weight"),
        (part, "parameter layers.1.bias is a part of other memory"),
        (lazy, "parameter layers.2.weight has no shape before it is loaded"),
        (elsewhere, "parameter layers.1.bias is on meta"),
        (odd, "layers.1.bias is of torch.complex128"),
    ],
)
def test_what_no_image_can_hold(spoil: Callable[[Stack], None], reason: str) -> None:
    module = Stack()
    assert ModuleImage(module).unfit() is None
    spoil(module)
    assert ModuleImage(module).unfit() == reason


@pytest.fixture
def content(pool: EmbeddedPool) -> ModuleImage:
    """A module on a draft."""
    content = ModuleImage(Stack())
    draft = pool.create_image(FIELDS, content.tensors())
    assert isinstance(draft, Draft)
    content.fill(draft)
    return content


def test_writes_are_told_before_they_happen(content: ModuleImage) -> None:
    told: list[str] = []
    weight, digest = content.module.layers[0].weight, content.digest()
    with content.watch_writes(told.append):
        copy = weight * 2
        copy.add_(1)
        content.module.layers[0].mean.add_(1)
    assert told == []
    assert content.digest() == digest
    with content.watch_writes(told.append):
        weight.data[1].copy_(weight.data[1])
        torch.add(weight, 1, out=weight.data)
    assert [line.split(".")[1] for line in told] == ["copy_", "add"]
    assert all(line.endswith("writes to layers.0.weight") for line in told)
    assert content.digest() != digest


def test_a_write_can_be_stopped(content: ModuleImage) -> None:
    def refuse(what: str) -> None:
        raise Refused(what)

    with pytest.raises(Refused, match="fill_"), content.watch_writes(refuse):
        content.module.layers[1].weight.data.fill_(5)
    assert content.module.layers[1].weight.eq(0).all()


def test_a_replaced_parameter_is_noticed_and_a_tied_one_is_none(content: ModuleImage) -> None:
    first, second = content.module.layers
    second.weight = first.weight
    assert content.moved() is None
    second.bias = nn.Parameter(torch.zeros(4))
    assert content.moved() == "layers.1.bias"


def test_changes_beside_weights_are_noticed(content: ModuleImage) -> None:
    content.module.layers[0].mean.add_(1)
    assert content.changed_beside_weights() is None
    content.module.layers[0].factor = 2.0
    assert content.changed_beside_weights() == "attribute layers.0.factor"
    del content.module.layers[0].factor
    content.module.layers[1].table[3] = 0
    assert content.changed_beside_weights() == "buffer layers.1.table"


def test_a_detached_module_keeps_its_weights_in_memory_of_its_own(content: ModuleImage) -> None:
    weight = content.module.layers[0].weight
    weight.data.fill_(4)
    before = weight.data_ptr()
    content.detach()
    assert weight.data_ptr() != before
    assert weight.eq(4).all()
