"""Away: what a module has for a weight while that is not there: its dtype, shape and device, and no memory.

Nothing can be computed with it. A tensor on `meta` would not do: torch's matrix product on cpu takes one without an
error, and answers with whatever lay in memory.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from tiermem.errors import Refused

if TYPE_CHECKING:
    import torch


def away(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Stands for the parameter, or buffer, `like`, whose weight is tensor `name`. Its use raises Refused."""
    import torch

    made: Any = torch.Tensor._make_wrapper_subclass(_kind(), like.shape, dtype=like.dtype, device=device)
    made.tensor_name = name
    # By this torch knows a parameter of a class that is not its own.
    made._is_param = isinstance(like, torch.nn.Parameter)
    stand_in: torch.Tensor = made
    return stand_in


@cache
def _kind() -> Any:
    """The class, which cannot be written down before torch is imported."""
    import torch

    members = {
        "__module__": __name__,
        "__torch_dispatch__": classmethod(_refuse),
        "__torch_function__": torch._C._disabled_torch_function_impl,
        "__repr__": lambda self, **_: f"<{self.tensor_name}, not on {self.device} now>",
    }
    return type("Away", (torch.Tensor,), members)


def _refuse(cls: type[Any], function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What every operation on one comes to."""
    from torch.utils._pytree import tree_leaves

    name = next((one.tensor_name for one in tree_leaves((args, kwargs)) if isinstance(one, cls)), "a weight")
    raise Refused(
        f"{function} needs {name}, which is on the device only while the layer that it belongs to is called; call that "
        "layer, or take the tensor from the model"
    )
