"""The quantisation method ``marlin_cy`` of transformers: ``from_pretrained`` loads folders whose layers run packed.

::

    from_pretrained ── model on the meta device ── replace modules ── transformers loads dense weights ── pack the rest
                             (transformers)          (before)                                              (after)

A packed folder names the method in its ``config.json``. Other checkpoints get it by
:meth:`MarlinCyConfig.for_folder`, or by :func:`register`, which takes over their own methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.modules import Contexts
from marlin_cy.integrations.packed_modules import PackedModules, Progress

with needs_extra():
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint
    from marlin_cy.interface import Backend

__all__ = ["METHODS", "NAME", "MarlinCyConfig", "MarlinCyQuantizer", "register"]

NAME = "marlin_cy"
"""Name of the experts implementation and of the quantisation method in transformers' registries."""

METHODS = ("gptq", "awq", "compressed-tensors", "auto-round", "mxfp4")
"""The methods of transformers that :func:`register` can take over."""


def register(*methods: str) -> None:
    """Let checkpoints of these methods run packed, from now on and for the whole process.

    Parameters
    ----------
    *methods : str
        Names in :data:`METHODS`, as ``quant_method`` in ``config.json`` has them.

    Raises
    ------
    ValueError
        An unknown method. None is registered then.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"methods: got {method!r}, expected some of {', '.join(METHODS)}")
    for method in methods:
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = MarlinCyConfig
        AUTO_QUANTIZER_MAPPING[method] = MarlinCyQuantizer


@register_quantization_config(NAME)
class MarlinCyConfig(QuantizationConfigMixin):
    """How a model's quantised layers run.

    Parameters
    ----------
    backend : str or Backend
    progress : callable, optional
        As for :func:`~marlin_cy.integrations.transformers.load`.
    replace : callable, optional
        Replaces the modules of a model, in place of what the folder says: for loaders that open the checkpoint.
    **context_options
        Options of the backend's ``new_context``: ``num_threads`` and ``compute_dtype`` on the CPU.
    """

    def __init__(
        self,
        backend: str | Backend = "cpu",
        *,
        progress: Callable[[float, int, str], None] | None = None,
        replace: Callable[[Any], None] | None = None,
        **context_options: Any,
    ) -> None:
        self.quant_method = NAME
        self.backend, self.progress, self.replace = backend, progress, replace
        self.context_options = context_options

    @classmethod
    def for_folder(cls, folder: str | PathLike[str], **options: Any) -> Any:
        """The config of a folder's model with this quantisation, for ``from_pretrained(folder, config=...)``.

        ``options`` are the parameters of this class.

        Raises
        ------
        CheckpointError
            transformers cannot read the config.
        """
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many types; all concern the file
            raise CheckpointError(
                f"transformers {transformers.__version__}: {error}", file=Path(folder) / "config.json"
            ) from error
        config.get_text_config().__dict__.pop("quantization_config", None)
        config.quantization_config = cls(**options)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The default options. What the folder says about its format is read when the checkpoint is opened."""
        return (cls(), kwargs) if return_unused_kwargs else cls()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute: transformers also reads a model's quantisation as a dict."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"quant_method": self.quant_method}

    def __deepcopy__(self, memo: dict[int, Any]) -> MarlinCyConfig:
        return self


@register_quantizer(NAME)
class MarlinCyQuantizer(HfQuantizer):
    """Replaces the quantised modules before transformers loads the other weights, and packs them afterwards."""

    def __init__(self, quantization_config: MarlinCyConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._packing: _Packing | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuse devices other than the host.

        Raises
        ------
        UnsupportedError
        """
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if others := [place for place in places if place not in (None, "auto") and torch.device(place).type != "cpu"]:
            raise UnsupportedError(
                f"device_map: got {others[0]!r}, expected 'cpu': packed layers run on the backend of MarlinCyConfig"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The dense weights are on the host, whatever else the machine has."""
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        config = self.quantization_config
        if config.replace is not None:
            config.replace(model)
            config.replace = None  # frees the checkpoint, which the function refers to
            return
        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise UnsupportedError(f"checkpoint: got the files {checkpoint_files}, expected *.safetensors")
        self._packing = _Packing(Path(checkpoint_files[0]).parent, config, dtype)
        checkpoint_files += self._packing.replace(model)  # the list that the loader reads afterwards

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if self._packing is not None:
            self._packing.fill(model)
            self._packing = None
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed weights cannot be saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` passes over packed layers."""
        return True


class _Packing:
    """A checkpoint between the two calls of transformers' loader."""

    def __init__(self, folder: Path, config: MarlinCyConfig, dtype: torch.dtype) -> None:
        self._report = Progress(config.progress)
        self._checkpoint = open_checkpoint(folder, config.backend, progress=self._report)
        self._contexts = Contexts(self._checkpoint.backend, config.context_options)
        self._tensors: dict[str, torch.Tensor] = {}
        self._modules = PackedModules(self._checkpoint, self._tensors, dtype)
        self._dense: TemporaryDirectory[str] | None = None

    def replace(self, model: Any) -> list[str]:
        """Remove the quantised weights from a model on the meta device, and let the loader pass over them.

        Returns
        -------
        list of str
            A file with weights that the loader must read too: quantised ones that do not run packed, dequantised.
        """
        self._modules.replace(model)
        model.set_experts_implementation(NAME)
        passed_over = model._keys_to_ignore_on_load_unexpected  # None, a list or a set, by the version of transformers
        kind = list if passed_over is None else type(passed_over)
        patterns = name_patterns(_quantised(self._checkpoint) - self._tensors.keys())
        model._keys_to_ignore_on_load_unexpected = kind([*(passed_over or ()), *patterns])
        if not self._tensors:
            return []
        self._dense = TemporaryDirectory()
        file = str(Path(self._dense.name) / "dequantised.safetensors")
        save_file(self._tensors, file, metadata={"format": "pt"})
        return [file]

    def fill(self, model: Any) -> None:
        """Pack the layers."""
        self._modules.check_shapes(model)
        self._modules.fill(self._contexts, self._report)
        self._checkpoint.close()
        if self._dense is not None:
            self._dense.cleanup()
        model.requires_grad_(False)


def name_patterns(names: Iterable[str]) -> set[str]:
    """Regular expressions that match these names, wherever they begin: one for names that differ in numbers only."""
    return {r"(?:^|\.)" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in names}


def _quantised(checkpoint: Checkpoint) -> set[str]:
    """The names of tensors that belong to quantised layers."""
    float8 = {name for module in checkpoint.float8.scales for name in checkpoint.float8.tensors_of(module)}
    return {*checkpoint.quantized_tensors, *(f"{name}.bias" for name in checkpoint.linears), *float8}
