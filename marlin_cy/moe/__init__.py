"""Mixture-of-Experts layers: routing, grouping of tokens by expert, and the layer itself."""

from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.moe.layer import MoeLayer, SharedExpert
from marlin_cy.moe.routing import Routing

__all__ = ["MoeLayer", "Routing", "SharedExpert", "moe_align_block_size"]
