"""Which experts a token goes to, and with what weights: the kinds of routing that model families use."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from marlin_cy.arguments import integer

__all__ = ["GROUP_SCORES", "SCORINGS", "Routing"]

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")
BIAS_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


@dataclass(frozen=True, eq=False)
class Routing:
    """From a token's router logits to its experts and their weights.

    For one token with logits ``l[e]``::

        s = softmax(l)              scoring "softmax"
            l                       scoring "softmax_topk"
            1 / (1 + exp(-l))       scoring "sigmoid"
        c = s + correction_bias                          what experts are chosen by
        with num_groups > 1: experts, in order, are cut into num_groups equal groups; a group's score is
            the largest c in it ("max"), or the sum of its two largest ("top2_sum"); only the experts of
            the topk_groups groups with the largest scores may be chosen
        ids = the top_k experts with the largest c       largest first; of equal ones the smaller index
        w = s[ids]                  "softmax", "sigmoid"
            softmax(l[ids])         "softmax_topk"
        with norm_topk_prob ("softmax", "sigmoid"): w = w / (sum(w) + 1e-20)
        w = w * routed_scaling_factor

    A token with a NaN or an infinity of positive sign among its logits, or with none that is finite, has ids
    0, 1, 2, ... and weights of NaN.

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
    routed_scaling_factor : float

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Source: transformers, ``models/*/modeling_*.py``. Mixtral and Qwen: softmax. gpt-oss: softmax_topk.
    DeepSeek-V2: softmax with groups by their largest. DeepSeek-V3, GLM-4.5: sigmoid with a correction bias,
    groups by the sum of their two largest.
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
        for name, known in (("scoring", SCORINGS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
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
        put("norm_topk_prob", bool(self.norm_topk_prob))
        factor = float(self.routed_scaling_factor)
        if not np.isfinite(factor):
            raise ValueError(f"routed_scaling_factor: got {factor}, expected a finite number")
        put("routed_scaling_factor", factor)
        if self.correction_bias is not None:
            put("correction_bias", self._checked_bias(self.correction_bias))

    def _checked_bias(self, bias):
        bias = np.asarray(bias)
        if bias.dtype not in BIAS_DTYPES:
            raise TypeError(f"correction_bias: got dtype {bias.dtype}, expected float32")
        if bias.shape != (self.num_experts,):
            raise ValueError(f"correction_bias: got shape {bias.shape}, expected ({self.num_experts},)")
        bias = np.array(bias, np.float32)
        if not np.isfinite(bias).all():
            raise ValueError("correction_bias: got a value that is not finite")
        bias.flags.writeable = False
        return bias
