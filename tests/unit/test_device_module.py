"""A module that streams: it computes what it does without us, within the budget, and gets back what it had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ConfigMaker
from tests.unit.nets import (
    BLOCK_BYTES,
    LOOSE_BYTES,
    Block,
    Net,
    X,
    away,
    blank,
    held,
    opened,
    rounded,
    seeded,
    streamed,
)
from tiermem.device import ALIGN
from tiermem.errors import DeviceFull, ModuleMismatch, Refused
from tiermem.model import Model


@pytest.fixture
def plain() -> Net:
    return seeded()


@pytest.fixture
def model(config: ConfigMaker, tmp_path: Path, plain: Net) -> Iterator[Model]:
    with opened(config, tmp_path / "model.safetensors", plain.state_dict()) as model:
        yield model


@pytest.mark.parametrize("stages", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_a_streamed_module_computes_the_same(model: Model, plain: Net, stages: int, ahead: int) -> None:
    net = blank()
    with streamed(model, net, stages, ahead=ahead) as (on, attached), torch.no_grad():
        assert [stage.path for stage in attached.stages] == [f"layers.{i}" for i in range(6)]
        for scale in (1, 2, 3):
            assert torch.equal(net(X * scale), plain(X * scale))
            assert away(net.layers)
            assert held(on) == 2 * 16 * 4, "what is in no stage"
            on.residency.check()
        assert on.peak_bytes <= on.budget_bytes


def test_all_of_it_needs_no_hooks(model: Model, plain: Net) -> None:
    net = blank()
    with model.to("cpu") as on, on.attach(net) as attached:
        assert not attached.stages
        assert not net.layers[0]._forward_pre_hooks
        copied = on.residency.copied_bytes
        assert torch.equal(net(X), plain(X))
        assert on.residency.copied_bytes == copied
        assert net.layers[2].up.weight.data_ptr() == on["layers.2.up.weight"].data_ptr()
    assert net.layers[2].up.weight.is_meta


def test_what_the_module_had_comes_back(model: Model) -> None:
    net = seeded(5)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in net.modules()]
    with model.stream("cpu", "1MiB") as on:
        attached = on.attach(net)
        net(X)
        net.shift = net.shift + 1
        attached.detach()
        attached.detach()
        assert attached.detached
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            number, value = before[name]
            if name == "shift":
                value = value + 1
            else:
                assert id(tensor) == number, name
            assert torch.equal(tensor, value), name
        assert [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in net.modules()] == hooks
        assert held(on) == 0
        with on.attach(net):
            net(X)


def test_parameters_have_no_gradient_and_a_backward_pass_is_refused(model: Model) -> None:
    net = blank()
    with streamed(model, net, 2):
        seen = list[bool]()
        net.layers[1].register_forward_pre_hook(lambda part, *_: seen.append(part.up.weight.requires_grad))
        out = net(X.clone().requires_grad_())
        assert seen == [False]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_torch_may_follow_each_other(model: Model, plain: Net, mode: Any) -> None:
    net = blank()
    with mode(), streamed(model, net, 2, ahead=2):
        with torch.inference_mode():
            assert torch.equal(net(X), plain(X))
        with torch.no_grad():
            assert torch.equal(net(X), plain(X))
        assert torch.equal(net(X), plain(X))


def test_what_is_put_in_place_in_inference_mode_can_be_used_outside(model: Model, plain: Net) -> None:
    net, x = blank(), X.clone().requires_grad_()
    with model.to("cpu") as on:
        with torch.inference_mode():
            attached = on.attach(net)
        net(x).sum().backward()
        attached.detach()
    assert x.grad is not None
    assert x.grad.any()


def test_a_part_of_a_layer_may_be_called_by_itself(model: Model, plain: Net) -> None:
    net = blank()
    net.shortcut = net.layers[2].up
    with streamed(model, net, 2), torch.no_grad():
        for _ in range(2):
            assert torch.equal(net.shortcut(X), plain.layers[2].up(X))
            assert torch.equal(net(X), plain(X))
        assert away(net.layers)


class Tied(torch.nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 16)
        self.layers = torch.nn.ModuleList([Block(16) for _ in range(3)])
        self.head = torch.nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def test_tied_parameters_are_one_replica(config: ConfigMaker, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, ids = Tied().eval(), torch.arange(20)
    state = {name: tensor for name, tensor in plain.state_dict().items() if name != "head.weight"}
    budget = rounded(plain.embed.weight) + BLOCK_BYTES
    with opened(config, tmp_path / "tied.safetensors", state) as model, model.stream("cpu", budget) as on:
        with torch.device("meta"):
            net = Tied().eval()
        with on.attach(net) as attached, torch.no_grad():
            assert [stage.path for stage in attached.stages] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
            for _ in range(3):
                copied = on.residency.copied_bytes
                assert torch.equal(net(ids), plain(ids))
            assert on.residency.copied_bytes - copied <= sum(t.nbytes for t in state.values())
        assert net.head.weight is net.embed.weight


class Shared(torch.nn.Module):
    """Layers in an odd order: one of them twice, backwards every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(16) for _ in range(4)])
        self.again = self.layers[1]
        self.backwards = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = [0, 1, 2, 1, 3]
        for number in reversed(order) if self.backwards else order:
            x = self.layers[number](x)
        return self.again(x)  # type: ignore[no-any-return]


def test_layers_may_be_called_twice_and_in_another_order(config: ConfigMaker, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Shared().eval()
    state = {name: tensor for name, tensor in plain.state_dict().items() if "again" not in name}
    with opened(config, tmp_path / "shared.safetensors", state) as model:
        with torch.device("meta"):
            net = Shared().eval()
        with streamed(model, net, 2) as (on, attached), torch.no_grad():
            assert len(attached.stages) == 4
            for number in range(6):
                plain.backwards = net.backwards = number % 3 == 2
                assert torch.equal(net(X), plain(X))
                on.residency.check()


def test_in_any_order_that_comes_again_the_next_layer_is_there_ahead(
    config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, late = Shared().eval(), list[int]()
    state = {name: tensor for name, tensor in plain.state_dict().items() if "again" not in name}
    with opened(config, tmp_path / "shared.safetensors", state) as model:
        net = Shared().eval()
        net.backwards = True
        with streamed(model, net, 2, policy="hold") as (on, _), torch.no_grad():
            genuine = on.residency.hold

            def hold(weights: Any) -> Any:
                holding = genuine(weights)
                late.append(holding.bytes_copied)
                return holding

            net(X)
            net(X)
            monkeypatch.setattr(on.residency, "hold", hold)
            for _ in range(3):
                net(X)
            assert late == [0] * 18


class Tree(torch.nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Linear(16, 16)
        self.twig = _Twig()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twig(self.part(x), 3)  # type: ignore[no-any-return]


class _Twig(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        below = self(x, depth - 1) if depth else x
        result: torch.Tensor = below + x * self.weight
        return result


def test_a_layer_may_call_itself(config: ConfigMaker, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Tree().eval()
    state = {f"a.{1 if 'twig' in name else 0}.{name}": tensor for name, tensor in plain.state_dict().items()}
    del state["a.1.twig.weight"]
    state["twig.weight"] = plain.twig.weight.data
    state = {name.removeprefix("a.0."): tensor for name, tensor in state.items()}
    state["embeddings.1.unused"] = torch.rand(3)
    with opened(config, tmp_path / "tree.safetensors", state) as model:
        with torch.device("meta"):
            net = Tree().eval()
        with model.stream("cpu", "1MiB") as on, on.attach(net), torch.no_grad():
            assert torch.equal(net(X), plain(X))
            assert held(on) == 0


def test_a_module_fits_by_its_prefix_and_a_part_of_it_alone(model: Model, plain: Net) -> None:
    with torch.device("meta"):
        layer = Block(16).eval()
    with model.stream("cpu", BLOCK_BYTES) as on, on.attach(layer, prefix="layers.4."), torch.no_grad():
        assert torch.equal(layer(X), plain.layers[4](X))
        assert torch.equal(layer(X), plain.layers[4](X))


def test_a_list_of_layers_computes_nothing_itself(model: Model, plain: Net) -> None:
    net = blank()
    with model.stream("cpu", 2 * BLOCK_BYTES) as on, on.attach(net.layers, prefix="layers."), torch.no_grad():
        x, wanted = X, X
        for ours, theirs in zip(net.layers, plain.layers, strict=True):
            x, wanted = ours(x), theirs(wanted)
        assert torch.equal(x, wanted)


def test_what_does_not_fit_is_listed(model: Model) -> None:
    net = Net(width=8, blocks=7)
    net.layers[0] = Block(16).to(torch.float64)
    net.register_buffer("cache", torch.empty(3, device="meta"), persistent=False)
    with model.stream("cpu", "1MiB") as on:
        with pytest.raises(ModuleMismatch) as caught:
            on.attach(net)
        said = str(caught.value)
        assert "gain is float32 [8], tensor gain is float32 [16]" in said
        assert "layers.0.up.weight is float64 [32, 16], tensor layers.0.up.weight is float32 [32, 16]" in said
        assert "; and " in said
        with pytest.raises(ModuleMismatch, match=r"layers\.0\.up\.weight: there is no tensor model\.layers"):
            on.attach(seeded(), prefix="model.")
        cached = seeded()
        cached.register_buffer("cache", torch.empty(3, device="meta"), persistent=False)
        with pytest.raises(ModuleMismatch, match="cache: no checkpoint has this buffer, and it has no values"):
            on.attach(cached)
        assert on.residency.used_bytes == 0
        with on.attach(seeded()), pytest.raises(Refused, match="attached to a module already"):
            on.attach(seeded())


def test_too_small_a_budget_names_the_least(model: Model, plain: Net) -> None:
    least = LOOSE_BYTES + BLOCK_BYTES
    net = blank()
    with model.stream("cpu", least - ALIGN) as on:
        with pytest.raises(
            DeviceFull, match=rf"its part 'layers\.0' takes .*; give it a budget of at least {least} bytes"
        ) as caught:
            on.attach(net)
        assert caught.value.lacking_bytes == ALIGN
        assert on.residency.used_bytes == 0
        assert not net._forward_pre_hooks
    with model.stream("cpu", least) as on, on.attach(net), torch.no_grad():
        assert torch.equal(net(X), plain(X))


def test_weights_that_are_away_cannot_be_computed_with(model: Model) -> None:
    net = seeded(5)
    with streamed(model, net, 2), torch.no_grad():
        layer = net.layers[0]
        for _ in range(2):
            for use in (
                lambda: torch.nn.functional.linear(X, layer.up.weight),  # on meta torch would take it without an error
                lambda: layer.up(X),
                lambda: torch.cat([X, layer.up.weight[:, :3]], 1),
                lambda: layer.up.weight.sum(),
                lambda: net.state_dict(),
                lambda: net.to(torch.float16),
            ):
                with pytest.raises(Refused, match=r"needs layers\.0\.up\.weight, which is on the device only while"):
                    use()
            weight = layer.up.weight
            assert (weight.shape, weight.dtype, weight.device.type) == ((32, 16), torch.float32, "cpu")
            assert isinstance(weight, torch.nn.Parameter)
            assert repr(weight) == "<layers.0.up.weight, not on cpu now>"
            assert next(net.parameters()).numel()
            net(X)
