"""What training and generation of ``instructgym refine-af`` share: options, prompts, and the reward of instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym

from ...envs.tasks.instruction.instance_prompts import OWN, instance_prompts, read_response
from ...envs.tasks.instruction.pool import DEMONSTRATIONS, evaluation_split, load_tasks
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards import Sample
from ..runs.options import check_counts, input_errors, parse_reward
from ..runs.training import TrainingOptions, digest

ENV_ID = "instructgym/GenerateInstance-v0"
QUALITY, PRESET = "quality", "instruction_mining"
REMEMBERING = "earlier"
"""The preset that compares an output with those before it."""


@dataclass
class InstanceOptions(TrainingOptions):
    """Options of the stages in which a policy writes instances."""

    instructions: str = ""
    """File of instructions: the instructions.jsonl of 'refine-af bootstrap', Self-Instruct's seed_tasks.jsonl, or
    JSONL, JSON or plain text; rows with is_classification true ask for the label first. By default the package's
    own."""
    held_out: int = 40
    """Of tasks that come with instances, keep so many for evaluation, as 'refine-af bootstrap' does; at most a
    quarter."""
    layout: Literal["plain", "chat"] = "plain"
    """plain: behind a few solved tasks; chat: a request in the model's chat template."""
    max_tokens: int = 96
    """Tokens of an instance at most."""
    context_length: int = 512
    """Tokens of prompt and instance at most."""
    temperature: float = 0.7
    """At which instances are sampled, and the policy is trained."""
    reward: str = QUALITY
    """What an instance is worth: quality, or other rewards as of 'evolve train'."""
    reward_preset: str = PRESET
    """Weights of the quality reward, by name."""
    format_penalty: float = 0.0
    """What a response costs that is no instance, by the quality reward. 0: by the preset, 1 for most."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens", "context_length")
        if self.reward not in ("", QUALITY) and (self.format_penalty or self.reward_preset != PRESET):
            raise InputError(f"--reward-preset and --format-penalty are those of 'quality', not of {self.reward!r}")
        if not self.temperature:
            raise InputError("--temperature must be above 0")

    def prompts(self, split: str | None, tokenizer: Tokenizer) -> list[PromptExample]:
        """The prompts of a split, or all.

        Raises:
            InputError: for a file that cannot be used, and prompts that do not fit the context beside a response.
        """
        examples = instance_prompts(self.instructions or OWN, split, layout=self.layout, tokenizer=tokenizer)
        tasks = load_tasks(self.instructions or None)
        if any(task.instances for task in tasks):
            with input_errors():
                kept = min(self.held_out, max(len(tasks) - DEMONSTRATIONS, 0))
                hidden = {task.instruction for task in evaluation_split(tasks, kept)[1]}
            examples = [example for example in examples if example.metadata["instruction"] not in hidden]
        if not examples:
            raise InputError(f"{self.instructions or 'the package'} has no instruction for this stage: add some")
        gym.make_vec(
            ENV_ID, num_envs=1, examples=examples, tokenizer=tokenizer, reward=well_formed, **self.env_options()
        ).close()
        return examples

    def env_options(self) -> dict[str, Any]:
        """Arguments of the environment, examples, reward and tokenizer aside."""
        return {"max_tokens": self.max_tokens, "context_length": self.context_length}

    def reward_part(self) -> Any:
        """The reward in the form that ``resolve`` takes."""
        if self.reward != QUALITY:
            return parse_reward(self.reward)
        backend = {"id": "embedded", "kwargs": {"dtype": self.dtype}}
        kwargs: dict[str, Any] = {"preset": self.reward_preset, "backend": backend}
        if self.format_penalty:
            kwargs["format_reward"] = -self.format_penalty
        return {"id": QUALITY, "kwargs": kwargs}


def prompts_digest(examples: Sequence[PromptExample]) -> str:
    """A short hash of prompts: a run that is resumed must find the same."""
    return digest([[example.id, example.prompt] for example in examples])


def well_formed(samples: Sequence[Sample]) -> list[float]:
    """1 for a response that is an instance, else 0: the format rate is its mean."""
    return [float(not isinstance(read_response(s.response, s.metadata), str)) for s in samples]
