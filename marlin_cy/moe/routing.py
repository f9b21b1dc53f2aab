"""Which experts a token goes to, and with what weights: the kinds of routing that model families use."""

from dataclasses import dataclass

import numpy as np

from marlin_cy.arguments import flag, float_vector, integer, number, one_of

__all__ = ["GROUP_SCORES", "SCORINGS", "Routing"]

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")


@dataclass(frozen=True, eq=False)
class Routing:
    """From a token's router logits to its experts and their weights.

    For one token with logits ``l[e]``, in float32::

        s = softmax(l)              scoring "softmax"
            l                       scoring "softmax_topk"
            1 / (1 + exp(-l))       scoring "sigmoid"
        c = s + correction_bias                          what experts are chosen by
        with num_groups > 1: experts, in order, are cut into num_groups equal groups; a group's score is
            the largest c in it ("max"), or the sum of its two largest ("top2_sum"); only the experts of
            the topk_groups groups with the largest scores may be chosen; of equal ones the smaller index
        ids = the top_k experts with the largest c       largest first; of equal ones the smaller index
        w = s[ids]                  "softmax", "sigmoid"
            softmax(l[ids])         "softmax_topk"
        with norm_topk_prob ("softmax", "sigmoid"): w = w / (sum(w) + 1e-20)
        w = w * routed_scaling_factor

    Scores are equal where float32 cannot tell them apart: all sigmoids of logits above 17 are 1.

    A token with a NaN or an infinity of positive sign among its logits, or with none that is finite, has ids
    0, 1, 2, ... and weights of NaN, whatever the scoring: a sigmoid could make a score of 1 of an infinity, but
    no router that works gives one. Among finite logits, one of minus infinity has a softmax and a sigmoid of 0,
    and a weight of 0 if it is chosen.

    Parameters
    ----------
    num_experts, top_k : int
    scoring : {"softmax", "softmax_topk", "sigmoid"}
    norm_topk_prob : bool
    correction_bias : float array ``[num_experts]``, optional
        Finite; kept as float32.
    num_groups, topk_groups : int
        Of which all, when both are 1, are one group.
    group_score : {"max", "top2_sum"}
        Of two experts or more a group for "top2_sum".
    routed_scaling_factor : float
        Finite in float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Source: transformers, ``models/*/modeling_*.py``, with which ``tests/test_routing.py`` compares this.

    ====================================  ===============================================================
    Mixtral, Qwen2-MoE, Qwen3-MoE         softmax, normalised as the configuration says (Mixtral: always)
    gpt-oss                               softmax_topk
    DeepSeek-V2                           softmax, never normalised, groups by their largest, scaled
    DeepSeek-V3, Kimi-K2, GLM-4.5, dots1  sigmoid with a correction bias, groups by the sum of their two
                                          largest, normalised as the configuration says, scaled
    Llama 4                               sigmoid, not normalised; one expert, its weight on the input
    ====================================  ===============================================================

    Models differ from this where it makes no difference: those with softmax do not add 1e-20 to a sum that is
    far larger, and DeepSeek-V2 takes the scores of groups that were not chosen for 0, not for less, which are
    then chosen with a weight of 0 only where others with a weight of 0 could be.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    correction_bias: np.ndarray | None = None
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0

    def __post_init__(self):
        def put(name, value):
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
            raise ValueError(f"topk_groups: got {self.topk_groups}, expected 1 to {self.num_groups}, the groups")
        group = self.num_experts // self.num_groups
        if self.top_k > self.topk_groups * group:
            raise ValueError(
                f"top_k: got {self.top_k}, expected at most {self.topk_groups * group}, the experts of "
                f"{self.topk_groups} groups"
            )
        if self.group_score == "top2_sum" and self.num_groups > 1 and group < 2:
            raise ValueError(f"num_groups: got {self.num_groups}, expected groups of two experts or more for top2_sum")
        put("norm_topk_prob", flag("norm_topk_prob", self.norm_topk_prob))
        put("routed_scaling_factor", number("routed_scaling_factor", self.routed_scaling_factor))
        if self.correction_bias is not None:
            put("correction_bias", float_vector("correction_bias", self.correction_bias, self.num_experts))
