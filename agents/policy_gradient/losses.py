"""Per-token losses of policy and value function."""

from __future__ import annotations

import torch


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: by the policy in training, shape (tokens,), with a graph.
        old_logprobs: by the policy that wrote the tokens.
        advantages: shape (tokens,).
        clip: epsilon.

    Returns:
        The loss of each token, and whether clipping took its gradient (bool).
    """
    ratio = (logprobs - old_logprobs).exp()
    free, bounded = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return -torch.minimum(free, bounded), bounded < free


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the value function, the larger of plain and clipped (as in OpenAI's PPO2 code).

    Args:
        values: in training, shape (tokens,), with a graph.
        old_values: at the time of the rollout.
        returns: the targets.
        clip: largest change of a value that counts; 0 turns clipping off.

    Returns:
        The loss of each token, and whether clipping took its gradient (bool).
    """
    plain = (values - returns).square()
    if not clip:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(plain, bounded), bounded > plain


def k3_penalty(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The differentiable k3 estimate of KL(policy || reference), per token: q/p - 1 - log(q/p)."""
    difference = reference - logprobs
    return difference.expm1() - difference
