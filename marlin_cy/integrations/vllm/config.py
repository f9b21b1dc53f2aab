"""vLLM's quantisation method ``marlin_cy``: which layers of a checkpoint run packed, and how."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.packed import is_packed
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.registry import FILES, scheme_of
from marlin_cy.formats.scheme import Scheme
from marlin_cy.integrations.modules import Contexts
from marlin_cy.integrations.vllm.attention import replace_attention
from marlin_cy.integrations.vllm.dense import dense_method, has_own_kernels
from marlin_cy.integrations.vllm.experts import PackedExpertsMethod
from marlin_cy.integrations.vllm.linear import PackedLinearMethod
from marlin_cy.integrations.vllm.packed_folder import (
    PASSED_OVER,
    StoredExpertsMethod,
    StoredLinearMethod,
    experts_prefixes,
    stored_linears,
)
from marlin_cy.integrations.vllm.tensors import refused

__all__ = ["NAME", "OPTIONS", "VllmConfig"]

NAME = "marlin_cy"
"""The method's name in vLLM, and the key of its options in ``additional_config``."""

OPTIONS = ("compute_dtype", "num_threads", "isa")
"""The options that :class:`marlin_cy.cpu.CpuContext` takes."""

VLLM_NAMES = {"gpt_oss_mxfp4": "mxfp4"}
"""The method in a checkpoint by the name that vLLM gives it."""

FUSED_SECONDS = ("down_proj", "w2_weight")
"""The second product where one tensor holds all experts: in the files of gpt-oss, and by vLLM's mapper for them."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes of weights that are not quantised."""


@register_quantization_config(NAME)
class VllmConfig(QuantizationConfig):
    """The quantised layers of one checkpoint.

    Parameters
    ----------
    scheme : Scheme
        What the checkpoint's configuration says.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        # The scheme of each quantised module, or a str that says why the module is refused.
        self.modules: dict[str, Scheme | str] = {}
        # The dtype of the first tensor of each suffix.
        self.dtypes: dict[str, str] = {}

    # What vLLM asks before it loads ------------------------------------------------------------

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """:data:`NAME` for checkpoints that this library reads, unless the user chose another method."""
        if user_quant not in (None, NAME):
            return None
        if is_packed({"quantization_config": hf_quant_cfg}):
            return NAME
        if hf_quant_cfg.get("quant_method") == "fp8":
            return None  # it does not say whether experts have 4 or 8 bits; vLLM reads both
        try:
            scheme_of(by_own_name(hf_quant_cfg), "config.json")
        except (UnsupportedError, CheckpointError):
            return None
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """From the ``quantization_config`` of a checkpoint.

        Raises
        ------
        CheckpointError, UnsupportedError
        """
        if is_packed({"quantization_config": config}):
            return PackedFolderConfig()
        return cls(scheme_of(by_own_name(config), "config.json"))

    @classmethod
    def get_name(cls) -> str:
        """The method's name."""
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is needed."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where vLLM looks if ``config.json`` does not say how the model is quantised."""
        return list(FILES)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations that packed layers take."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """All tensors are needed, ``g_idx`` too."""
        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called by vLLM with the model's name or folder: see which modules are quantised."""
        infos = get_safetensors_params_metadata(model_name, revision=revision)
        if not infos:
            raise UnsupportedError(f"{model_name}: got no *.safetensors, which the plugin of marlin_cy needs")
        self.see_tensors({name: info["dtype"] for name, info in infos.items() if "dtype" in info})

    def see_tensors(self, dtypes: dict[str, str]) -> None:
        """Find the quantised modules by the names and dtypes of a checkpoint's tensors."""
        for name, dtype in dtypes.items():
            for suffix in self.suffixes():
                if name.endswith(suffix):
                    self.dtypes.setdefault(suffix, dtype)
            if name.endswith(self.scheme.marker):
                module = name.removesuffix(self.scheme.marker)
                try:
                    self.modules[module] = self.scheme.for_module(module)
                except UnsupportedError as error:
                    self.modules[module] = str(error).removeprefix(f"{module}: ")
            elif name.endswith(".weight") and dtype not in FLOATS:
                self.modules[name.removesuffix(".weight")] = f"{dtype} weights, not of format {self.scheme.format!r}"

    def suffixes(self) -> list[str]:
        """The suffixes of the tensors of quantised layers."""
        return [self.scheme.marker, self.scheme.scales, *([self.scheme.order] if self.scheme.order else [])]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called by vLLM with the names that it has for the checkpoint's modules."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    # Layers ------------------------------------------------------------------------------------

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How vLLM runs a layer. None: vLLM decides.

        Raises
        ------
        UnsupportedError
            The layer is quantised, and cannot run packed. The message has the layer's name.
        """
        if isinstance(layer, Attention):
            if not has_own_kernels():
                replace_attention(layer, contexts(**options()))
            return None
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        names = self._names(prefix)
        is_quantised = any(name in self.modules for name in names)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            if is_quantised and isinstance(layer, VocabParallelEmbedding):
                raise refused(prefix, "quantised embeddings are not supported in vLLM")
            return None
        if not is_quantised:
            return dense_method(layer, prefix, contexts(**options()))
        return self._linear_method(prefix, names)

    def _linear_method(self, prefix: str, names: list[str]) -> Any:
        schemes = [self._scheme(name) for name in names]
        return PackedLinearMethod(prefix, schemes, self.dtypes, contexts(**options()))

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> Any:
        start = f"{prefix}."
        modules = [name for name in self.modules if name.startswith(start)]
        if not modules:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        seconds = (layer.ckpt_down_proj_name, *FUSED_SECONDS)
        products: list[list[Scheme]] = [[], []]
        for name in modules:
            product = products[name.rpartition(".")[2] in seconds]
            scheme = self._scheme(name)
            if scheme not in product:
                product.append(scheme)
        for product in products:
            if len(product) != 1:
                raise refused(prefix, f"got {len(product)} different formats, expected one for all experts")
        (first,), (second,) = products
        return PackedExpertsMethod(prefix, layer.moe_config, first, second, self.dtypes, contexts(**options()))

    def _names(self, prefix: str) -> list[str]:
        """The modules of the checkpoint that a layer of vLLM consists of."""
        parent, dot, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last)
        if parts is None or prefix in self.modules:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in parts]

    def _scheme(self, name: str) -> Scheme:
        found = self.modules.get(name, "not quantised, but vLLM runs it as one layer with others that are")
        if isinstance(found, str):
            raise refused(name, found)
        return found


class PackedFolderConfig(VllmConfig):
    """The layers of a packed folder."""

    def __init__(self) -> None:
        QuantizationConfig.__init__(self)
        self._folder = ""
        self._experts: dict[str, str] = {}
        self.modules = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """vLLM's loader passes over packed tensors."""
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys(PASSED_OVER))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called by vLLM with the model's folder: see which modules are packed."""
        self._folder = model_name
        self.modules = {name: name for name in stored_linears(model_name)}
        self._experts = {name: name for name in experts_prefixes(model_name)}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called by vLLM with the names that it has for the folder's modules."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self._experts = hf_to_vllm_mapper.apply_dict(self._experts)

    def _linear_method(self, prefix: str, names: list[str]) -> Any:
        for name in names:
            if name not in self.modules:
                self._scheme(name)  # refused
        stored = [str(self.modules[name]) for name in names]
        return StoredLinearMethod(prefix, self._folder, stored, contexts(**options()))

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> Any:
        if prefix not in self._experts:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return StoredExpertsMethod(prefix, layer.moe_config, self._folder, contexts(**options()))


def by_own_name(config: dict[str, Any]) -> dict[str, Any]:
    """A quantisation config with the method's name in the checkpoint, where vLLM has replaced it."""
    method = str(config.get("quant_method"))
    return {**config, "quant_method": VLLM_NAMES[method]} if method in VLLM_NAMES else config


def options() -> dict[str, Any]:
    """The options that the user gave as ``additional_config={"marlin_cy": {...}}``.

    Raises
    ------
    ValueError
        An unknown option.
    """
    given: Any = get_current_vllm_config().additional_config
    found: dict[str, Any] = dict(given.get(NAME, {})) if isinstance(given, dict) else {}
    for name in found:
        if name not in OPTIONS:
            raise ValueError(f"additional_config, {NAME}: got {name!r}, expected some of {', '.join(OPTIONS)}")
    return found


@cache
def contexts(**given: Any) -> Contexts:
    """The contexts of this process. vLLM has set the number of threads that its process may use."""
    return Contexts(get_backend("cpu"), {"num_threads": torch.get_num_threads(), **given})
