"""Reloading of weights in place, refused for a model whose weights are an image: they are shared and read-only.

A write to them would end the process, so vLLM's ways to write are closed before they touch anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn

from tiermem.errors import Refused

if TYPE_CHECKING:
    import torch

    from tiermem.model import Model

_MARK = "tiermem_image"


def protect(model: torch.nn.Module, image: Model) -> None:
    """From now on `model` refuses to be loaded again; it keeps the image open."""

    def refuse(*_: object, **__: object) -> NoReturn:
        _refuse(image.name)

    setattr(model, _MARK, image)
    model.load_weights = refuse  # type: ignore[assignment]
    _guard()


def image_of(model: torch.nn.Module) -> Model | None:
    """The image that a model's weights are in, if they are."""
    return getattr(model, _MARK, None)


@cache
def _guard() -> None:
    """Each of these begins a way to reload, from a checkpoint or from tensors in the engine's layout: it takes the
    model apart, or leads to a write to it, before a method of the model's is called."""
    from vllm.model_executor.model_loader.reload import inplace

    for name in ("initialize_layerwise_reload", "get_parameter_for_reload"):
        setattr(inplace, name, _guarded(getattr(inplace, name)))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        image = image_of(model)
        if image is not None:
            _refuse(image.name)
        return function(model, *args, **kwargs)

    return guarded


def _refuse(name: str) -> NoReturn:
    raise Refused(
        f"the weights are image {name}, which other engines read as well, so they are not reloaded in place; start an "
        "engine on the new checkpoint, or this one with --load-format auto"
    )
