"""The tiers by name, from the most special to the most general."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin_cy.opencl.tiers.configuration import Tier
from marlin_cy.opencl.tiers.mma import MMA
from marlin_cy.opencl.tiers.wave_tiled import PORTABLE, SUBGROUP

if TYPE_CHECKING:
    from marlin_cy.opencl.capabilities import Capabilities

__all__ = ["TIERS", "explain", "tier_named"]

TIERS: tuple[Tier, ...] = (MMA, SUBGROUP, PORTABLE)


def tier_named(name: str) -> Tier:
    """The tier called ``name``."""
    for tier in TIERS:
        if tier.name == name:
            return tier
    raise ValueError(f"tier: got {name!r}, expected one of {', '.join(tier.name for tier in TIERS)}")


def explain(capabilities: Capabilities) -> list[tuple[str, str | None]]:
    """Which tiers a device can run.

    Returns
    -------
    list of (str, str or None)
        Best first: the name of each tier, and None or the capability that the device lacks for it.
    """
    return [(tier.name, tier.missing(capabilities)) for tier in TIERS]
