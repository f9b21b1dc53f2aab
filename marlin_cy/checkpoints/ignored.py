"""Tensors of a checkpoint that the model's computation does not need."""

from __future__ import annotations

import re

__all__ = ["is_ignored"]

IGNORED = re.compile(
    r"(?:^|\.)(?:"
    r"(?:[qkv]|kv|[qkv]_proj|[kv]_cache|kv_cache|prob_output)_(?:scale|zero_point)"  # see is_ignored
    r"|(?:input|output|activation)_(?:scale|zero_point)"
    r"|rotary_emb\.(?:inv_freq|cos_cached|sin_cached)"
    r")$"
)


def is_ignored(tensor: str) -> bool:
    """Whether a tensor may be passed over: its name says that the model's results do not depend on it.

    These are the scales of quantised caches and of quantised activations, which this library does not have, and tables
    of RoPE, which follow from ``config.json``. Sources: compressed-tensors, ``kv_cache_scheme``; vLLM,
    ``quantization/kv_cache.py``; transformers before 4.32, for the tables.
    """
    return IGNORED.search(tensor) is not None
