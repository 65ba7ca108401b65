"""What the benchmarks of learning share: seeds, the goal that ends a training, agents on a tiny model, the table."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
from rich.console import Console

from ..runs.options import Count
from .frame import BenchOptions, publish
from .tiny import tiny_llama

if TYPE_CHECKING:
    from ...agents.rollouts.agent import RolloutAgent
    from ...agents.rollouts.batch import TokenBatch

WINDOW, CAP = 64, 20_000
"""Number of episodes whose mean return has to reach the target, and tokens after which a training ends without it."""


@dataclass
class LearningOptions(BenchOptions):
    """Options of a benchmark that counts the tokens of each side until a target is reached."""

    seeds: Count = 5
    """Number of seeds, with each of which both sides are trained."""
    first_seed: int = 0
    """The first seed."""

    def seed_range(self) -> range:
        """Returns the seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


class Goal:
    """A mean return over the last :data:`WINDOW` episodes.

    Args:
        target: the mean return to reach.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self._returns: deque[float] = deque(maxlen=WINDOW)

    def reached(self, returns: Iterable[float] = ()) -> bool:
        """Returns whether the mean has reached the target, after the returns of further episodes."""
        self._returns.extend(returns)
        return len(self._returns) == WINDOW and float(np.mean(self._returns)) >= self.target


def tokens_of_ppo(
    env: gym.vector.VectorEnv[Any, Any, Any],
    seed: int,
    goal: Goal,
    returns: Callable[[TokenBatch], Iterable[float]],
    reference: Literal["base", "none"],
    episodes: float = math.inf,
    **settings: Any,
) -> int:
    """Trains all weights of a tiny Llama by PPO of this library until it reaches the goal, or :data:`CAP` tokens.

    Args:
        env: vector env with a vocabulary of few words; it is closed in the end.
        seed: seed of model, policy and agent.
        goal: goal that ends the training.
        returns: function that returns the returns of the episodes of a rollout.
        reference: reference policy, as :class:`~instructgym.agents.LanguageModelPolicy` takes it.
        episodes: number of episodes that ends the training, too.
        **settings: settings of the agent.

    Returns:
        Number of tokens of the training.
    """
    from ...agents import LanguageModelPolicy, LoraSettings, TokenPPO

    lm = tiny_llama(env.unwrapped.tokenizer, seed)  # type: ignore[attr-defined]
    policy = LanguageModelPolicy(lm, LoraSettings(rank=0), reference=reference, dtype="float32", seed=seed)
    agent = TokenPPO(env, policy, seed, epochs=4, value_coefficient=0.5, value_clip=0.0, **settings)

    def unfinished(agent: RolloutAgent) -> bool:
        assert agent.last_rollout is not None
        return not goal.reached(returns(agent.last_rollout)) and agent.episodes < episodes

    agent.learn(CAP, unfinished)
    env.close()
    return agent.num_timesteps


def publish_tokens(
    options: LearningOptions,
    target: float,
    tokens: Mapping[str, Sequence[int]],
    settings: dict[str, Any],
    console: Console,
    more: Mapping[str, Any] = {},
    remark: str = "",
) -> dict[str, Any]:
    """Prints, writes and returns the results of a benchmark of learning.

    Args:
        options: options of the benchmark.
        target: the mean return that had to be reached.
        tokens: tokens that each seed needed, by the title of the side: first ours, then theirs.
        settings: settings of the sides.
        console: where to print.
        more: further results.
        remark: line after the table; empty: none.
    """
    figures: dict[str, Any] = {}
    rows = [("", "median", "each seed")]
    for side, (title, needed) in zip(("ours", "theirs"), tokens.items(), strict=True):
        median = float(np.median(needed))
        figures[side] = {"tokens": needed, "median": median}
        rows.append((title, f"{median:.0f}", " ".join(map(str, needed))))
    figures["ratio"] = {"tokens": figures["theirs"]["median"] / figures["ours"]["median"]}
    figures |= {**more, "settings": {"target": target, "cap": CAP} | settings}
    title = f"Tokens until {target} of the best return, {options.seeds} seeds (cap {CAP})"
    return publish(options, figures, title, rows, console, remark)
