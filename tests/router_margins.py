"""Where a router's choice of experts does not depend on errors of its logits."""

import numpy as np

from marlin_cy.reference import group_scores, largest, sigmoid


def decided(routing, logits, relative):
    """Whether each token's experts stay the same if every router logit changes by ``relative`` of their RMS.

    The change of each logit is independent of the others, so the condition is sufficient, not necessary. Softmax keeps
    the order of logits, which therefore stand for scores.

    Parameters
    ----------
    routing : Routing
    logits : float64 ``[tokens, num_experts]``
    relative : float

    Returns
    -------
    bool ``[tokens]``
    """
    assert routing.scoring == "sigmoid" or routing.correction_bias is None
    change = relative * np.sqrt((logits**2).mean(axis=1, keepdims=True))
    ends = [scores_of(routing, logits + sign * change) for sign in (-1, 0, 1)]
    return np.array([token_is_decided(routing, *rows) for rows in zip(*ends, strict=True)])


def scores_of(routing, logits):
    """Selection scores, or values of the same order."""
    scores = sigmoid(logits) if routing.scoring == "sigmoid" else logits
    return scores if routing.correction_bias is None else scores + routing.correction_bias


def token_is_decided(routing, low, exact, high):
    """``low`` and ``high`` bound the selection scores of one token, ``[num_experts]``."""
    experts = np.arange(routing.num_experts)
    if routing.num_groups > 1:
        of_groups = [group_scores(scores, routing) for scores in (low, exact, high)]
        if not choice_is_decided(*of_groups, routing.topk_groups):
            return False
        groups = largest(of_groups[1], routing.topk_groups)
        experts = experts[np.isin(experts // (routing.num_experts // routing.num_groups), groups)]
    return choice_is_decided(low[experts], exact[experts], high[experts], routing.top_k)


def choice_is_decided(low, exact, high, count):
    """Whether the ``count`` largest values are the same wherever each lies between its bounds."""
    chosen = np.isin(np.arange(len(exact)), largest(exact, count))
    return chosen.all() or low[chosen].min() > high[~chosen].max()
