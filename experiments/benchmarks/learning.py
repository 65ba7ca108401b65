"""What the benchmarks of learning share: seeds, the goal that ends a training, agents on a tiny model, the table."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
from rich.console import Console

from .frame import BenchOptions, publish
from .tiny import tiny_llama

if TYPE_CHECKING:
    from ...agents import TokenPPO

WINDOW, CAP = 64, 20_000
"""Number of episodes whose mean return has to reach the target, and tokens after which a training ends without it."""


@dataclass
class LearningOptions(BenchOptions):
    """Options of a benchmark that counts the tokens of each side until a target is reached."""

    seeds: int = 5
    """Number of seeds, with each of which both sides are trained."""
    first_seed: int = 0
    """The first seed."""

    lowest = {"first_seed": 0}

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


def tiny_ppo(
    env: gym.vector.VectorEnv[Any, Any, Any], seed: int, name: str, reference: Literal["base", "none"], **settings: Any
) -> TokenPPO:
    """Returns PPO of this library, which trains all weights of a tiny Llama.

    Args:
        env: vector env with a vocabulary of few words.
        seed: seed of model, policy and agent.
        name: name of the model.
        reference: reference policy, as :class:`~instructgym.agents.LanguageModelPolicy` takes it.
        **settings: settings of the agent.
    """
    from ...agents import LanguageModelPolicy, LoraSettings, TokenPPO

    lm = tiny_llama(env.unwrapped.tokenizer, seed, name)  # type: ignore[attr-defined]
    policy = LanguageModelPolicy(lm, LoraSettings(rank=0), reference=reference, dtype="float32", seed=seed)
    return TokenPPO(env, policy, seed, epochs=4, value_coefficient=0.5, value_clip=0.0, **settings)


def publish_tokens(
    options: LearningOptions,
    target: float,
    tokens: Mapping[str, Sequence[int]],
    more: dict[str, Any],
    console: Console | None,
    remark: str = "",
) -> dict[str, Any]:
    """Prints, writes and returns the results of a benchmark of learning.

    Args:
        options: options of the benchmark.
        target: the mean return that had to be reached.
        tokens: tokens that each seed needed, by the title of the side: first ours, then theirs.
        more: further results.
        console: where to print; None: the terminal.
        remark: line after the table; empty: none.
    """
    medians = {side: float(np.median(needed)) for side, needed in tokens.items()}
    rows = [("", "median", "each seed")]
    for side, needed in tokens.items():
        rows.append((side, f"{medians[side]:.0f}", " ".join(map(str, needed))))
    ours, theirs = tokens
    ratio = {"tokens": medians[theirs] / medians[ours]}
    title = f"Tokens until {target} of the best return, {options.seeds} seeds (cap {CAP})"
    sides = {"ours": ours, "theirs": theirs}
    figures = {key: {"tokens": tokens[side], "median": medians[side]} for key, side in sides.items()}
    figures |= {"ratio": ratio} | more
    return publish(options, figures, title, rows, console, remark)
