"""Routed experts of vLLM over packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.integrations.modules import Contexts, array_of
from marlin_cy.integrations.vllm import operators
from marlin_cy.integrations.vllm.expert_weights import ALL, FIRST, SECOND, ExpertSizes, pack_experts
from marlin_cy.integrations.vllm.tensors import BIAS, LayerTensors, expected_dtypes, naming, refused
from marlin_cy.moe.layer import MoeLayer

if TYPE_CHECKING:
    from marlin_cy.formats.scheme import Scheme
    from marlin_cy.interface import MarlinExpertStack

__all__ = ["ExpertsMethod", "PackedExpertsMethod", "activation_of"]

FUSED_NAMES = {"_blocks": "weight", "_scales": "weight_scale"}
"""vLLM's names for gpt-oss's tensors, each of which holds all experts."""

KNOWN_ACTIVATIONS = {
    ("silu", None, None, None): "silu",
    ("silu", 10.0, None, None): "silu_clamp10",
    ("gelu", None, None, None): "gelu",
    ("gelu_tanh", None, None, None): "gelu_tanh",
    ("swigluoai", None, None, None): "swigluoai",
    ("swigluoai", 7.0, 1.702, 1.0): "swigluoai",
    ("relu2_no_mul", None, None, None): "relu2",
}
"""This library's activation by vLLM's name, limit, alpha and beta."""


PLAIN_SOFTMAX = ("Default", "RenormalizeNaive")
"""vLLM's names of routing by a softmax over all experts, whose largest values may be normalised."""


class ExpertsMethod(FusedMoEMethodBase):
    """How vLLM runs the routed experts of one layer, after they were packed.

    vLLM routes where :func:`is_plain_softmax` is false, and sums the outputs of its processes.

    Parameters
    ----------
    name : str
        The experts' name in vLLM.
    moe : FusedMoEConfig
    contexts : Contexts
    """

    def __init__(self, name: str, moe: Any, contexts: Contexts) -> None:
        super().__init__(moe)
        self._name, self._contexts = name, contexts
        self._packed: Any = None
        self._routes = False
        self._key = operators.known_as(name, self)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """No kernel of vLLM runs."""
        return

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM hands over the router's logits, not each token's experts and weights."""
        return self._routes

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The experts' weighted sum. Experts of other processes are skipped. vLLM itself runs the shared experts."""
        local = layer.expert_map
        ids = topk_ids if local is None else local[topk_ids.long()]
        if torch.compiler.is_compiling():
            output: torch.Tensor = operators.experts(x, ids, topk_weights, self._key)
            return output
        return self.compute(x, ids, topk_weights)

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Route, and sum the weighted outputs of the experts."""
        if torch.compiler.is_compiling():
            output: torch.Tensor = operators.routed_experts(x, router_logits, self._key)
            return output
        return self.route_and_compute(x, router_logits)

    def compute(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of this process's experts; ids of -1 are skipped."""
        rows = x.contiguous()
        out = torch.empty_like(rows)
        self._packed.forward_routed(self._contexts.ctx, rows, array_of(topk_ids), array_of(topk_weights), out=out)
        return out

    def route_and_compute(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts that the logits select."""
        rows = x.contiguous()
        out = torch.empty_like(rows)
        self._packed(self._contexts.ctx, rows, router_logits.contiguous(), out=out)
        return out

    def _use(
        self, layer: Any, gate_up: MarlinExpertStack, down: MarlinExpertStack, top_k: int, activation: str
    ) -> None:
        """Run these packed experts from now on."""
        self._routes = is_plain_softmax(layer)
        self._packed = MoeLayer(
            gate_up,
            down,
            top_k=top_k,
            activation=activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            norm_topk_prob=layer.renormalize,
        )


class PackedExpertsMethod(ExpertsMethod):
    """Packs the routed experts of one layer.

    Parameters
    ----------
    name : str
        The experts' name in vLLM.
    moe : FusedMoEConfig
    first, second : Scheme
        Of gate and up, and of down.
    dtypes : dict
        The dtype of the files by suffix.
    contexts : Contexts
    """

    def __init__(
        self, name: str, moe: Any, first: Scheme, second: Scheme, dtypes: dict[str, str], contexts: Contexts
    ) -> None:
        super().__init__(name, moe, contexts)
        self._dtypes = dtypes
        self._schemes = {FIRST: first, SECOND: second}

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Called by vLLM when the layer is made: expect the checkpoint's tensors."""
        self._activation = activation_of(layer, self._name)
        rank, ranks = layer.moe_config.tp_rank, layer.moe_config.tp_size
        inter, gated = intermediate_size_per_partition * ranks, ACTIVATIONS[self._activation].gated
        self._sizes = ExpertSizes(num_experts, hidden_size, intermediate_size_per_partition, rank, ranks, gated)
        self._tensors = LayerTensors(layer)
        for product, k, n in ((FIRST, hidden_size, inter), (SECOND, inter, hidden_size)):
            with naming(self._name):
                found = expected_dtypes([self._schemes[product]], k, n)
            for suffix, accepted in (*found.items(), (BIAS, ("F32",))):
                parameter = f"{product}_{FUSED_NAMES.get(suffix, suffix.lstrip('._'))}"
                dtype = self._dtypes.get(suffix, accepted[0])
                self._tensors.expect(parameter, dtype, self._loader(layer, product, suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM after the weights are loaded: pack them, and let go of each expert's tensors."""
        with naming(self._name):
            stacks = pack_experts(
                self._contexts.backend, self._tensors, self._schemes, self._sizes, self._name, torch.get_num_threads()
            )
            self._use(layer, *stacks, min(layer.top_k, self._sizes.num_experts), self._activation)
        self._tensors.close()

    def _loader(self, layer: Any, product: str, suffix: str) -> Any:
        """The ``weight_loader`` of a parameter."""

        def load(
            param: Any,
            loaded_weight: torch.Tensor,
            weight_name: str = "",
            shard_id: str | None = None,
            expert_id: int | None = None,
            return_success: bool = False,
        ) -> bool | None:
            expert = ALL if expert_id is None else layer._map_global_expert_id_to_local_expert_id(expert_id)
            is_local = expert_id is None or expert >= 0
            if is_local:
                self._tensors.add((expert, shard_id or product), suffix, loaded_weight)
            return is_local if return_success else None

        return load


def is_plain_softmax(layer: Any) -> bool:
    """Whether a process can route by itself, by a softmax over all experts.

    vLLM routes if the process has only some of the experts, or if something else is to see which experts a token has.
    """
    moe, config = layer.moe_config, get_current_vllm_config()
    return bool(
        moe.routing_method.name in PLAIN_SOFTMAX
        and layer.custom_routing_function is None
        and not layer.use_grouped_topk
        and layer.expert_map is None
        and not moe.is_lora_enabled
        and not config.aux_output_config.enable_return_routed_experts
    )


def activation_of(layer: Any, name: str) -> str:
    """This library's name of the activation of vLLM's experts.

    Raises
    ------
    UnsupportedError
        No kernel computes it. The message has ``name``.
    """
    limits = tuple(getattr(layer, f"swiglu_{part}", None) for part in ("limit", "alpha", "beta"))
    activation = layer.activation.value
    found = KNOWN_ACTIVATIONS.get((activation, *limits))
    if found is None:
        raise refused(name, f"activation {activation!r} with limit, alpha and beta {limits} has no kernel")
    return found
