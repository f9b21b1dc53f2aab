"""Routing: the experts of each token and their weights, in all variants that model families use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy.typing as npt

from marlin_cy.arguments import flag, float_vector, integer, number, one_of

__all__ = ["GROUP_SCORES", "SCORINGS", "Routing", "RoutingOptions"]

SCORINGS = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus", "sparsemixer")
GROUP_SCORES = ("max", "top2_sum")


class RoutingOptions(TypedDict, total=False):
    """The parameters of :class:`Routing` that :class:`~marlin_cy.moe.MoeLayer` passes on."""

    scoring: str
    norm_topk_prob: bool
    correction_bias: npt.NDArray[Any] | None
    num_groups: int
    topk_groups: int
    group_score: str
    routed_scaling_factor: float
    expert_scale: npt.NDArray[Any] | None
    mixer_jitter: float


@dataclass(frozen=True, eq=False)
class Routing:
    """How the router logits of a token give its experts and their weights.

    For one token with logits ``l[e]``, in float32::

        s = softmax(l)              scoring "softmax"
            l                       scoring "softmax_topk", "sparsemixer"
            1 / (1 + exp(-l))       scoring "sigmoid"
            sqrt(log(1 + exp(l)))   scoring "sqrt_softplus"
        c = s + correction_bias                          the selection scores
        with num_groups > 1: the experts, in order, are divided into num_groups equal groups. The score of a
            group is the largest c in it ("max"), or the sum of its two largest ("top2_sum"). Only experts of
            the topk_groups groups with the largest scores are eligible; ties go to the smaller index
        ids = the top_k eligible experts with the largest c     largest first; ties go to the smaller index
        w = s[ids]                  "softmax", "sigmoid", "sqrt_softplus"
            softmax(l[ids])         "softmax_topk"
            w[j] = 1 / sum of exp(l[e] - m) with m = l[ids[j]], over all e except ids[0] .. ids[j-1] for which
                m - l[e] <= 2 * mixer_jitter * max(abs(l[e]), m)                    "sparsemixer"
        with norm_topk_prob, except with "softmax_topk" and "sparsemixer": w = w / (sum(w) + 1e-20)
        w = w * routed_scaling_factor
        with expert_scale: w = w * expert_scale[ids]

    Scores are compared after rounding to float32, so different logits can tie: the sigmoid of every logit above
    17 is 1.

    Invalid logits are those with a NaN, with a positive infinity, or without any finite value. They give ids
    0, 1, 2, ... and weights of NaN with every scoring, because no working router produces them. A logit of minus
    infinity among finite ones has a softmax and a sigmoid of 0, and a weight of 0 if its expert is selected.

    Parameters
    ----------
    num_experts, top_k : int
    scoring : {"softmax", "softmax_topk", "sigmoid", "sqrt_softplus", "sparsemixer"}
        "sparsemixer" has no correction bias and no groups.
    norm_topk_prob : bool
    correction_bias : float array ``[num_experts]``, optional
        Finite; stored as float32.
    num_groups, topk_groups : int
        Number of expert groups, and how many may be selected; 1 and 1 turns group-limited routing off.
    group_score : {"max", "top2_sum"}
        Score of a group. "top2_sum" requires groups of at least two experts.
    routed_scaling_factor : float
        Finite in float32.
    expert_scale : float array ``[num_experts]``, optional
        Finite; stored as float32.
    mixer_jitter : float
        At least 0.

    Raises
    ------
    TypeError, ValueError
        An invalid argument. The message names the argument.

    Notes
    -----
    Source: transformers, ``models/*/modeling_*.py``. ``tests/test_routing.py`` compares against its modules.

    ====================================  ===============================================================
    Mixtral, Qwen2-MoE, Qwen3-MoE         softmax, normalised as the configuration says (Mixtral: always)
    gpt-oss                               softmax_topk
    DeepSeek-V2                           softmax, never normalised, group score "max", scaled
    DeepSeek-V3, Kimi-K2, GLM-4.5, dots1  sigmoid with a correction bias, group score "top2_sum",
                                          normalised as the configuration says, scaled
    Llama 4                               sigmoid, not normalised; one expert, its weight on the input
    DeepSeek-V4                           sqrt_softplus with a correction bias, normalised, scaled
    Gemma-4                               softmax, normalised, a scale for each expert
    Phi-3.5-MoE                           sparsemixer
    ====================================  ===============================================================

    The models' own code differs in two points, which do not change results. Softmax models do not add 1e-20 to
    the sum, which is far larger. DeepSeek-V2 sets the scores of experts in unselected groups to 0 instead of
    excluding these experts, so one of them can be selected only if all remaining scores are 0, and its weight is
    then 0 too.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    correction_bias: npt.NDArray[Any] | None = None
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0
    expert_scale: npt.NDArray[Any] | None = None
    mixer_jitter: float = 0.0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("num_experts", "top_k", "num_groups", "topk_groups"):
            put(name, integer(name, getattr(self, name)))
        put("scoring", one_of("scoring", self.scoring, SCORINGS))
        put("group_score", one_of("group_score", self.group_score, GROUP_SCORES))
        if self.num_experts < 1:
            raise ValueError(f"num_experts: got {self.num_experts}, expected at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}, expected 1 to {self.num_experts}, the number of experts")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"num_groups: got {self.num_groups}, expected a divisor of {self.num_experts} experts")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"topk_groups: got {self.topk_groups}, expected 1 to {self.num_groups}, the number of groups"
            )
        group = self.num_experts // self.num_groups
        if self.top_k > self.topk_groups * group:
            raise ValueError(
                f"top_k: got {self.top_k}, expected at most {self.topk_groups * group}, the number of experts in "
                f"{self.topk_groups} groups"
            )
        if self.group_score == "top2_sum" and self.num_groups > 1 and group < 2:
            raise ValueError(f"num_groups: got {self.num_groups}, expected groups of at least two experts for top2_sum")
        put("norm_topk_prob", flag("norm_topk_prob", self.norm_topk_prob))
        put("routed_scaling_factor", number("routed_scaling_factor", self.routed_scaling_factor))
        for name in ("correction_bias", "expert_scale"):
            if (vector := getattr(self, name)) is not None:
                put(name, float_vector(name, vector, self.num_experts))
        put("mixer_jitter", number("mixer_jitter", self.mixer_jitter))
        if self.mixer_jitter < 0:
            raise ValueError(f"mixer_jitter: got {self.mixer_jitter}, expected at least 0")
        if self.scoring == "sparsemixer" and (self.correction_bias is not None or self.num_groups > 1):
            raise ValueError("scoring: got 'sparsemixer' with a correction bias or groups, which it does not have")
