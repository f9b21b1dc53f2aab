"""Mixture-of-Experts layers: routing, grouping of tokens by expert, and the layer itself."""

from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.moe.layer import MoeLayer

__all__ = ["MoeLayer", "moe_align_block_size"]
