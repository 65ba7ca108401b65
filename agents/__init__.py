"""Who acts: stable-baselines3 algorithms by name, baselines, and token-level agents on language models."""

from typing import TYPE_CHECKING, Any

from .sb3.baselines import BaselineAgent, RandomAgent, RoundRobinAgent, ScheduleAgent
from .sb3.factory import UnknownAlgorithmError, algorithm_names, make_agent
from .sb3.policy_io import load_policy, normalize_observations, save_policy

if TYPE_CHECKING:
    from .policy.backend import PolicyBackend
    from .policy.language_model import LanguageModelPolicy, LoraSettings
    from .policy_gradient.grpo import GRPO, RLOO
    from .policy_gradient.ppo import TokenPPO
    from .preferences.agent import RankingAgent
    from .preferences.lists import rank_agreement, tokenize_lists
    from .preferences.trainer import RankedCandidates, RankingTrainer
    from .reward_modelling.trainer import RewardTrainer, TokenizedPair, evaluate_reward_model, tokenize_pairs
    from .soft_q.agent import SoftQ
    from .supervised.figa import FIGA
    from .supervised.sft import SFT, Demonstration

_LAZY = {
    "FIGA": "figa",
    "GRPO": "grpo",
    "RLOO": "grpo",
    "SFT": "sft",
    "Demonstration": "sft",
    "LanguageModelPolicy": "language_model",
    "LoraSettings": "language_model",
    "PolicyBackend": "policy_backend",
    "RankedCandidates": "ranking",
    "RankingAgent": "ranking_agent",
    "RankingTrainer": "ranking",
    "RewardTrainer": "reward_modelling",
    "SoftQ": "soft_q",
    "TokenPPO": "ppo",
    "TokenizedPair": "reward_modelling",
    "evaluate_reward_model": "reward_modelling",
    "rank_agreement": "ranked_lists",
    "tokenize_lists": "ranked_lists",
    "tokenize_pairs": "reward_modelling",
}
"""Imported when asked for: they need transformers and peft, which the agents of edit environments do not."""

__all__ = [
    "FIGA",
    "GRPO",
    "RLOO",
    "SFT",
    "BaselineAgent",
    "Demonstration",
    "LanguageModelPolicy",
    "LoraSettings",
    "PolicyBackend",
    "RandomAgent",
    "RankedCandidates",
    "RankingAgent",
    "RankingTrainer",
    "RewardTrainer",
    "RoundRobinAgent",
    "ScheduleAgent",
    "SoftQ",
    "TokenPPO",
    "TokenizedPair",
    "UnknownAlgorithmError",
    "algorithm_names",
    "evaluate_reward_model",
    "load_policy",
    "make_agent",
    "normalize_observations",
    "rank_agreement",
    "save_policy",
    "tokenize_lists",
    "tokenize_pairs",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
