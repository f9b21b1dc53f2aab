"""A layer of a decoder on the device: its mixer, its feed-forward network, and their norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin_cy.decoder.plan import AttentionPlan, LatentAttentionPlan, LayerPlan, MlpPlan
from marlin_cy.opencl.decoder.attention import GroupedAttention
from marlin_cy.opencl.decoder.cache import KvPool, StatePool
from marlin_cy.opencl.decoder.delta import DeltaNet
from marlin_cy.opencl.decoder.ffn import Mlp, MoeFfn
from marlin_cy.opencl.decoder.latent import LatentAttention

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["Layer"]


class Layer:
    """A layer of a decoder on the device.

    Attributes
    ----------
    mixer_norm, ffn_norm : pyopencl.Buffer
    mixer : GroupedAttention, LatentAttention or DeltaNet
    attention : GroupedAttention, LatentAttention or None
        The mixer, if it is attention.
    ffn : MoeFfn or Mlp
    """

    def __init__(
        self,
        recorder: RecordingContext,
        uploads: Uploads,
        merger: Merger,
        plan: LayerPlan,
        pool: KvPool | StatePool,
        norm_eps: float,
    ) -> None:
        self.mixer_norm, self.ffn_norm = (uploads(norm, "norm") for norm in (plan.mixer_norm, plan.ffn_norm))
        self.attention: GroupedAttention | LatentAttention | None = None
        self.mixer: GroupedAttention | LatentAttention | DeltaNet
        if isinstance(pool, StatePool):
            assert not isinstance(plan.mixer, AttentionPlan | LatentAttentionPlan)
            self.mixer = DeltaNet(uploads, merger, plan.mixer, pool)
        else:
            if isinstance(plan.mixer, AttentionPlan):
                self.attention = GroupedAttention(uploads, merger, plan.mixer, pool, norm_eps)
            else:
                assert isinstance(plan.mixer, LatentAttentionPlan)
                self.attention = LatentAttention(uploads, merger, plan.mixer, pool)
            self.mixer = self.attention
        self.ffn = Mlp(uploads, plan.ffn) if isinstance(plan.ffn, MlpPlan) else MoeFfn(recorder, uploads, plan.ffn)
