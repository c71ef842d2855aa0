"""transformers: models of Hugging Face's library whose weights are a pooled model's, by one call.

Owns how class, configuration and generation settings are found beside a checkpoint. Never copies a weight itself, and
patches nothing: the library is handed a state dict.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tiermem.errors import CheckpointNotFound, Refused
from tiermem.opening import open_model
from tiermem.paths import path_or_name_of
from tiermem.torch import tensors_of

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["from_pretrained"]

_CONFIG_NAME = "config.json"
_NOT_CONFIGURATION = ("quantization_config", "torch_dtype", "generation_config", "output_loading_info")
"""Arguments that the configuration would take for its own."""


def from_pretrained(
    path_or_name: str | os.PathLike[str],
    model_class: type[Any] | None = None,
    *,
    address: str | None = None,
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> PreTrainedModel:
    """A model of transformers over the weights of a checkpoint, or of a name in the pool.

    `model_class` is a class of models, or one like `AutoModel`; without it, the class that the configuration names.
    Configuration and generation settings come from the checkpoint's directory. Further arguments are those of
    `PreTrainedModel.from_pretrained`.

    Weights are copy-on-write: every process that has the model shares one copy, and what is written (training, in-place
    operations) stays in this process. **A `dtype` other than the checkpoint's makes a private copy of the weights**, as
    does any other device. The daemon at `address` (default TIERMEM_ADDRESS, then the host's socket) has the model if it
    answers, else a pool inside this process.

    Raises CheckpointNotFound (no checkpoint, or no config.json beside it), ModelNotFound, CheckpointError,
    CapacityError, DigestMismatch, Refused (a format or class that transformers cannot take from here), ImportError
    without transformers, and whatever transformers raises.
    """
    if "state_dict" in kwargs:
        raise Refused("the weights are the pool's; leave state_dict out, or call transformers itself with it")
    # The pool begins to read now, while the library is imported and the configuration parsed.
    model = open_model(path_or_name, address=address, writable=True)
    directory = _directory(path_or_name_of(path_or_name)[0] or model.manifest.path)
    config, kwargs = _config(directory, kwargs)
    cls = _class(model_class, config, directory)
    if _is_part(cls, config):
        config = config.get_text_config()
    weights = tensors_of(model, model, "cpu")
    dtype = kwargs.pop("torch_dtype", dtype)
    result: Any = cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
    made: PreTrainedModel = result[0] if kwargs.get("output_loading_info") else result
    # Where processors are looked for, and what is written into a model card.
    made.name_or_path = made.config.name_or_path = directory
    if made.can_generate() and kwargs.get("generation_config") is None:
        made.generation_config = _generation_config(directory)
    return result


def _directory(path: str) -> str:
    if path.endswith((".gguf", ".onnx")):
        raise Refused(f"{path}: transformers takes no weights of this format from a pool; load safetensors")
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.exists(os.path.join(directory, _CONFIG_NAME)):
        raise CheckpointNotFound(f"{directory}: has no {_CONFIG_NAME}, which says what model it is; put it there")
    return directory


def _config(directory: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the arguments that did not become a part of it, as the Auto classes split them."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return kwargs["config"], {key: value for key, value in kwargs.items() if key != "config"}
    kept = {key: kwargs[key] for key in _NOT_CONFIGURATION if key in kwargs}
    asked = {key: value for key, value in kwargs.items() if key not in {*kept, "config"}}
    config, unused = AutoConfig.from_pretrained(kwargs.get("config") or directory, return_unused_kwargs=True, **asked)
    return config, {**unused, **kept}


def _class(model_class: type[Any] | None, config: Any, directory: str) -> type[Any]:
    import transformers

    names = config.architectures or ()
    if model_class is None:
        named: list[type[Any]] = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        if not named:
            told = f"has no class {', '.join(names)}" if names else "is not told the class"
            raise Refused(f"{directory}: transformers {transformers.__version__} {told}; pass it as model_class")
        return named[0]
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise Refused(
            f"{directory}: {model_class.__name__} knows no class for {type(config).__name__}; pass the class itself"
        )
    found = mapping[type(config)]
    classes: tuple[type[Any], ...] = tuple(found) if isinstance(found, list | tuple) else (found,)
    return next((cls for cls in classes if cls.__name__ in names), classes[0])


def _is_part(cls: type[Any], config: Any) -> bool:
    """Whether the class is that of the text model of a composite one."""
    text = config.sub_configs.get("text_config")
    return text is not None and cls.config_class is text


def _generation_config(directory: str) -> GenerationConfig:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:  # Older checkpoints have it in their configuration.
        return GenerationConfig.from_pretrained(directory, config_file_name=_CONFIG_NAME, _from_model_config=True)
