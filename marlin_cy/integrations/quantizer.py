"""The quantisation method ``marlin_cy`` of transformers: ``from_pretrained`` loads folders whose layers run packed.

::

    from_pretrained ── model on the meta device ── replace modules ── transformers loads dense weights ── pack the rest
                             (transformers)          (before)                                              (after)

A packed folder names the method in its ``config.json``. Other checkpoints get it by
:meth:`MarlinCyConfig.for_folder`, or by :func:`register`, which takes over their own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy.arguments import flag
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.configs import check_device_map, read_config
from marlin_cy.integrations.decoder_model import decoder_config
from marlin_cy.integrations.derived_family import derived_family
from marlin_cy.integrations.packed_modules import Progress
from marlin_cy.integrations.packing import NAME, Packing

with needs_extra():
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from marlin_cy.interface import Backend

__all__ = ["METHODS", "MarlinCyConfig", "MarlinCyQuantizer", "register"]

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
    packing : Packing, optional
        Of a checkpoint that the caller has opened; the caller then fills the modules. By default, the quantiser opens
        the folder of the files that transformers loads.
    **context_options
        Options of the backend's ``new_context``: ``num_threads`` and ``compute_dtype`` on the CPU.
    """

    def __init__(
        self,
        backend: str | Backend = "cpu",
        *,
        progress: Callable[[float, int, str], None] | None = None,
        packing: Packing | None = None,
        **context_options: Any,
    ) -> None:
        self.quant_method = NAME
        self.backend, self.progress, self.packing = backend, progress, packing
        self.context_options = context_options

    @classmethod
    def for_folder(cls, folder: str | PathLike[str], *, decoder: bool = False, **options: Any) -> Any:
        """The config of a folder's model with this quantisation, for ``from_pretrained(folder, config=...)``.

        Parameters
        ----------
        folder : path-like
        decoder : bool
            Let this library's decoder run the whole model, if it has the family. The model is a
            :class:`~marlin_cy.integrations.decoder_model.DecoderForCausalLM`.
        **options
            The parameters of this class; with ``decoder`` those of :func:`~marlin_cy.load_model`.

        Raises
        ------
        CheckpointError
            transformers cannot read the config.
        """
        if flag("decoder", decoder):
            return decoder_config(folder, cls(**options))
        config = read_config(Path(folder))
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
        self._packing: Packing | None = None  # of a checkpoint that the quantiser has opened

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuse devices other than the host.

        Raises
        ------
        UnsupportedError
        """
        check_device_map(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """The dense weights are on the host, whatever else the machine has."""
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        config = self.quantization_config
        if config.packing is not None:
            config.packing.replace(model)
            config.packing = None  # frees the checkpoint, which it refers to
            return
        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise UnsupportedError(f"checkpoint: got the files {checkpoint_files}, expected *.safetensors")
        folder, report = Path(checkpoint_files[0]).parent, Progress(config.progress)
        described = partial(derived_family, model)
        checkpoint = open_checkpoint(folder, config.backend, progress=report, describe=described)
        for problem in checkpoint.problems():
            raise problem
        self._packing = Packing(checkpoint, {}, dtype, config.context_options, report)
        self._packing.replace(model)
        checkpoint_files += self._packing.write_tensors()  # the list that the loader reads afterwards

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
