"""Path-consistency losses of soft Q-learning for text (Guo et al. 2021, arXiv 2106.07704).

Q(s, .) are the logits of the policy, V(s) = logsumexp Q(s, .), A(s, a) = Q(s, a) - V(s) = log pi(a | s). Where pi is
optimal for a reward and its own entropy, A_t = r_t + V_{t+1} - V_t holds at every token of every episode, whoever wrote
it; the losses are the squares of what is missing. Rewards are paid with the last token, behind which V is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Consistency = Literal["single", "multi", "both"]
"""``single``: between a token and the next; ``multi``: between a token and the end; ``both``: the mean of the two."""


def single_step(
    advantages: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(A_t - (V_{t+1} - V_t))^2, at the last token (A_T - (r - V_T))^2 (their single-step PCL).

    Args:
        advantages: A, shape (tokens,), episode after episode.
        values: V of the states in which the tokens were chosen, shape (tokens,), of the target network.
        rewards: of each episode, shape (episodes,).
        lengths: tokens of each episode, none 0.

    Returns:
        the loss of each token, shape (tokens,).
    """
    ends = torch.tensor(lengths, device=values.device).cumsum(0) - 1
    following = values.roll(-1).index_copy(0, ends, rewards.to(values.dtype))
    return (advantages - (following - values)) ** 2


def multi_step(
    advantages: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(sum_{l >= t} A_l - (r - V_t))^2 (their multi-step PCL); arguments and result as of :func:`single_step`."""
    rest = torch.cat([part.flip(0).cumsum(0).flip(0) for part in advantages.split(list(lengths))])
    paid = rewards.to(values.dtype).repeat_interleave(torch.tensor(lengths, device=values.device))
    return (rest - (paid - values)) ** 2


def path_consistency(
    kind: Consistency,
    advantages: torch.Tensor,
    values: torch.Tensor,
    rewards: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """The loss of each token by one of the two or by both, shape (tokens,); arguments as of :func:`single_step`."""
    given = (advantages, values, rewards, lengths)
    if kind == "single":
        return single_step(*given)
    if kind == "multi":
        return multi_step(*given)
    return (single_step(*given) + multi_step(*given)) / 2
