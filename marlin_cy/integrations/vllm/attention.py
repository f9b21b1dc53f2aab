"""Attention of vLLM by this library's kernels, on CPUs without AVX512.

vLLM's own kernels are written for vectors of AVX512. With AVX2, they take one and a half times as long as the kernels
here. The blocks of vLLM's cache stay vLLM's, which also copies and shares them as before; inside a block, keys and
values lie as the kernels here read them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from marlin_cy.cpu import fork
from marlin_cy.cpu._block_attention import BlockBatch, are_supported
from marlin_cy.cpu.context import workspace_of
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations.modules import Contexts

__all__ = ["BlockAttention", "BlockAttentionBackend", "BlockBatchBuilder", "can_replace", "replace_attention"]

COMPILED_WITH = "marlin_cy_attention"
"""The key in ``additional_config`` that says that layers are replaced."""


class BlockBatchBuilder(AttentionMetadataBuilder):
    """Makes the :class:`BlockBatch` of each step, for the layers of one group of vLLM's cache."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> BlockBatch:
        """Called by vLLM before each step.

        Raises
        ------
        UnsupportedError
            Rows are to see later positions.
        """
        common, spec = common_attn_metadata, self.kv_cache_spec
        if common.causal is not True:
            raise UnsupportedError(f"attention: got causal={common.causal}, expected True")
        count = common.num_reqs
        return BlockBatch(
            common.query_start_loc[: count + 1].numpy(),
            common.seq_lens[:count].numpy(),
            common.block_table_tensor[:count].numpy(),
            spec.block_size,
            spec.num_kv_heads,
        )


class BlockAttention(AttentionImpl):
    """The attention of one layer.

    Parameters
    ----------
    layer : Attention
        A layer for which :func:`can_replace` is true.
    contexts : Contexts
    """

    def __init__(self, layer: Any, contexts: Contexts) -> None:
        replaced = layer.impl
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.scale: float = replaced.scale
        self.kv_cache_dtype: str = layer.kv_cache_dtype
        self.sinks: torch.Tensor | None = replaced.sinks
        self._window: int = layer.sliding_window or 0
        self._soft_cap: float = replaced.logits_soft_cap
        self._contexts = contexts

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called by vLLM after the weights are loaded."""
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float().contiguous()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BlockBatch | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the keys and values of a step's rows, and fill ``output``. Without metadata, vLLM is warming up."""
        if attn_metadata is not None:
            fork.run(
                attn_metadata.attend,
                workspace_of(self._contexts.ctx),
                query,
                key,
                value,
                kv_cache,
                output,
                self.scale,
                self._window,
                self.sinks,
                self._soft_cap,
            )
        return output


class BlockAttentionBackend(CPUAttentionBackend):
    """What vLLM asks about layers with :class:`BlockAttention`: shapes of the cache are those of vLLM's own kernels."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[BlockAttention]:
        """The class of a layer's attention."""
        return BlockAttention

    @staticmethod
    def get_builder_cls() -> type[BlockBatchBuilder]:
        """The class that prepares a step."""
        return BlockBatchBuilder


def replace_attention(layer: Any, contexts: Contexts) -> None:
    """Let a layer attend by this library's kernels from now on. It is left as it is where they lack something."""
    if can_replace(layer):
        layer.attn_backend, layer.impl = BlockAttentionBackend, BlockAttention(layer, contexts)
        # vLLM's compiled models store keys and values by an operator of their own, for which there is no need here.
        # additional_config is part of what tells compiled models on disk apart.
        get_current_vllm_config().additional_config[COMPILED_WITH] = BlockAttention.__name__


def can_replace(layer: Any) -> bool:
    """Whether a layer of vLLM is plain causal attention that this library's kernels can do."""
    config = get_current_vllm_config()
    model = config.model_config
    return bool(
        type(layer) is Attention
        and layer.attn_backend is CPUAttentionBackend
        and type(layer.impl) is CPUAttentionBackendImpl
        and layer.attn_type == AttentionType.DECODER
        and layer.impl.alibi_slopes is None
        and layer.kv_sharing_target_layer_name is None
        and layer.head_size_v == layer.head_size
        and layer.kv_cache_torch_dtype in (torch.float32, torch.float16, torch.bfloat16)
        and are_supported(layer.head_size, config.cache_config.block_size)
        # These read or fill the cache in their own ways, or let rows see later positions.
        and config.speculative_config is None
        and config.kv_transfer_config is None
        and not model.is_hybrid
        and not model.is_mm_prefix_lm
        and isinstance(config.additional_config, dict)
    )
