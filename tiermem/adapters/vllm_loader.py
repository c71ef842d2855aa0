"""vLLM's loader: the first engine fills an image with vLLM's own weight loaders, later ones map it read-only.

Owns the order of loading and what happens where something stands in its way: weights are then streamed from the pool
into the engine's own memory, or, where the pool itself fails, read by vLLM. Never touches a device. Imported by
`register` alone, in a process of vLLM, since its class is derived from one of vLLM's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from tiermem.adapters.module_image import ModuleImage
from tiermem.adapters.vllm_checkpoint import Checkpoint, evict
from tiermem.adapters.vllm_fingerprint import fingerprint_of, rank_label, version_trouble, why_not_shared
from tiermem.adapters.vllm_options import options_of
from tiermem.adapters.vllm_prepack import PlainGemm
from tiermem.adapters.vllm_reload import image_of, protect
from tiermem.errors import FingerprintMismatch, ModelNotFound, Refused, TiermemError
from tiermem.units import format_seconds

if TYPE_CHECKING:
    import torch

    from tiermem.client import Client
    from tiermem.draft import Draft
    from tiermem.model import Model

# Below vLLM's own logger, which has the handlers.
_log = init_logger("vllm.tiermem")


class PoolLoader(DefaultModelLoader):  # type: ignore[misc]
    """`--load-format tiermem`. Raises ConfigError for unusable options."""

    def __init__(self, load_config: Any) -> None:
        self._options = options_of(load_config.model_loader_extra_config)
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._warned = False
        self._client: Client | None = self._connected()

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """The loaded model: on an image where it can be, else in memory of its own.

        Raises FingerprintMismatch where the image that the options name was made from other inputs, and without
        `fallback` whatever keeps the pool from serving the model.
        """
        if self._client is not None:
            reason = self._why_streamed(vllm_config, model_config)
            if reason is None:
                return self._load_shared(vllm_config, model_config, prefix)
            self._say_streamed(model_config, reason)
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Have the model's own weight loaders take all weights, from the pool or, if that fails, from the files."""
        try:
            super().load_weights(model, model_config)
        except TiermemError as error:
            self._fall_back(error)
            super().load_weights(model, model_config)

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self._client is None:
            weights: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(source)
            return weights
        self.counter_before_loading_weights = time.perf_counter()  # logged by the caller
        found = self._checkpoint(source).tensors(self._client)
        return ((source.prefix + name, tensor) for name, tensor in found)

    # --- on an image ----------------------------------------------------------------------------------------------

    def _load_shared(self, vllm_config: Any, model_config: Any, prefix: str) -> torch.nn.Module:
        import torch

        from tiermem.draft import Draft

        began_s = time.perf_counter()
        with set_default_torch_dtype(model_config.dtype):
            with torch.device("cpu"):
                model: torch.nn.Module = initialize_model(vllm_config, model_config=model_config, prefix=prefix)
            content = ModuleImage(model)
            found = self._image(content, model_config)
            if found is None:
                self.load_weights(model, model_config)
                process_weights_after_loading(model, model_config, torch.device("cpu"))
            elif isinstance(found[0], Draft):
                with found[0]:
                    self._fill(content, found[0], found[1], model_config)
            else:
                self._attach(content, found[0], model_config)
        if (image := image_of(model)) is not None:
            took = format_seconds(time.perf_counter() - began_s)
            _log.info("Weights of %s are image %s, ready in %s", model_config.model, image.name, took)
        return model.eval()

    def _image(self, content: ModuleImage, model_config: Any) -> tuple[Draft | Model, Checkpoint] | None:
        """This rank's image, to be filled or read, and what it is of; None, having said why, if there is to be none."""
        assert self._client is not None
        model = content.module
        reason = "it takes weights from further checkpoints" if getattr(model, "secondary_weights", ()) else None
        if (reason := reason or content.unfit()) is not None:
            self._say_streamed(model_config, reason)
            return None
        try:
            checkpoint = self._checkpoint(self._source(model, model_config))
            fields = fingerprint_of(model_config, model, checkpoint=checkpoint.identity, layout=content.layout())
            name = (self._options.image or f"{checkpoint.name}.vllm") + rank_label(fields)
            if self._options.image is not None:
                with suppress(ModelNotFound):
                    return self._client.open_image(fields, name=name), checkpoint
            image = self._client.create_image(fields, content.tensors(), name=name)
            if self._options.image is not None and image.name != name:
                image.close()
                raise FingerprintMismatch(
                    f"these weights are image {image.name!r} already, not {name!r}; name that one"
                )
            return image, checkpoint
        except FingerprintMismatch:
            raise
        except TiermemError as error:
            self._fall_back(error)
            return None

    def _attach(self, content: ModuleImage, image: Model, model_config: Any) -> None:
        import torch

        content.attach(image)
        with PlainGemm(), content.watch_writes(_refuse_write):
            process_weights_after_loading(content.module, model_config, torch.device("cpu"))
        protect(content.module, image)

    def _fill(self, content: ModuleImage, draft: Draft, checkpoint: Checkpoint, model_config: Any) -> None:
        import torch

        model, cpu, client = content.module, torch.device("cpu"), self._client
        assert client is not None
        ours = checkpoint.absent(client)
        content.fill(draft)
        self.load_weights(model, model_config)
        reason = self._why_not_kept(content, checkpoint, model_config)
        if reason is not None:
            self._say_streamed(model_config, reason)
            content.detach()
            process_weights_after_loading(model, model_config, cpu)
            return
        content.keep_buffers(draft)
        before, written = content.digest(), list[str]()
        with PlainGemm() as plain, content.watch_writes(written.append):
            process_weights_after_loading(model, model_config, cpu)
        if written or content.moved() or content.digest() != before:
            where = (written or [content.moved() or "their bytes change"])[0]
            self._say_streamed(model_config, f"its class rewrites weights once they are loaded ({where})")
            content.detach()
            plain.prepack()
            return
        try:
            protect(model, draft.seal())
        except TiermemError as error:
            # What was filled stays memory of this process.
            self._warn(f"The pool did not keep image {draft.name}, so this engine alone has it: {error}")
        else:
            evict(client, ours)

    def _why_not_kept(self, content: ModuleImage, checkpoint: Checkpoint, model_config: Any) -> str | None:
        """Why what was loaded is no image of the checkpoint; None if it is."""
        try:
            now = self._checkpoint(self._source(content.module, model_config)).identity
        except TiermemError as error:
            now = str(error)
        if now != checkpoint.identity:
            return "the checkpoint changed while it was read"
        changed = content.changed_beside_weights() or content.moved()
        return f"loading it changes {changed}, which an image would lack" if changed else None

    # --- what stands in the way -----------------------------------------------------------------------------------

    def _connected(self) -> Client | None:
        import tiermem.torch  # noqa: F401  here, and not while the model waits
        from tiermem.client import shared_client

        try:
            return shared_client(self._options.address)
        except TiermemError as error:
            self._fall_back(error)
            return None

    def _why_streamed(self, vllm_config: Any, model_config: Any) -> str | None:
        import vllm

        trouble = version_trouble(vllm.__version__)
        if trouble is not None and not self._options.fallback:
            raise Refused(f"{trouble}, and the option fallback is off; turn it on to have weights streamed")
        device = str(vllm_config.load_config.device or vllm_config.device_config.device).partition(":")[0]
        return trouble or why_not_shared(vllm_config, model_config, device)

    def _fall_back(self, error: TiermemError) -> None:
        """Go on without the pool, after one warning; raises the error where the options say so."""
        self._client = None
        if not self._options.fallback:
            raise error
        self._warn(f"vLLM reads the weights itself, since the pool cannot serve them: {error}")

    def _warn(self, text: str) -> None:
        (_log.debug if self._warned else _log.warning)("%s", text)
        self._warned = True

    def _say_streamed(self, model_config: Any, reason: str) -> None:
        self._warn(f"Weights of {model_config.model} are streamed into this engine's own memory: {reason}")

    # --- the checkpoint -------------------------------------------------------------------------------------------

    def _source(self, model: torch.nn.Module, model_config: Any) -> Any:
        return self.Source(
            model_config.model,
            model_config.revision,
            fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
            allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
        )

    def _checkpoint(self, source: Any) -> Checkpoint:
        """The files that vLLM would read, downloaded if they are not there."""
        _, files, _, _ = self._prepare_weights(
            source.model_or_path, source.subfolder, source.revision, source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )  # fmt: skip
        return Checkpoint(files)


def _refuse_write(what: str) -> NoReturn:
    raise Refused(f"{what}, which is shared and read-only; start with --load-format auto")
