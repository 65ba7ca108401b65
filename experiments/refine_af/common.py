"""Options, prompts and the reward of instances, which training and generation of ``instructgym refine-af`` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...envs.tasks.instruction.instance_prompts import OWN, instance_prompts, read_response
from ...envs.tasks.instruction.pool import DEMONSTRATIONS, evaluation_split, load_tasks
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards import Sample
from ..runs.options import Count, Positive, input_errors, named, parse_reward
from ..runs.responses import check_prompts
from ..runs.training import TrainingOptions, digest

ENV_ID = "instructgym/GenerateInstance-v0"
QUALITY, PRESET = "quality", "instruction_mining"
"""Id of the quality reward and its default preset."""
STATEFUL_PRESET = "earlier"
"""The preset of the quality reward that compares an output with earlier outputs."""


@dataclass
class InstanceOptions(TrainingOptions):
    """Options of the stages in which a policy writes instances."""

    instructions: str = ""
    """File of instructions: the instructions.jsonl of 'refine-af bootstrap', Self-Instruct's seed_tasks.jsonl, or
    JSONL, JSON or plain text. For rows with is_classification true, the prompt asks for the label before the input. By
    default the package's own instructions."""
    held_out: int = 40
    """If the tasks come with instances, number of tasks held out for evaluation, the same as in 'refine-af bootstrap';
    at most a quarter of all."""
    layout: Literal["plain", "chat"] = "plain"
    """How prompts are written. plain: after a few solved tasks; chat: as a request in the model's chat template."""
    max_tokens: Count = 96
    """Maximum tokens of an instance."""
    context_length: Count = 512
    """Maximum tokens of prompt and instance together."""
    temperature: Positive = 0.7
    """Temperature at which instances are sampled, in training and in generation."""
    reward: str = QUALITY
    """Reward of an instance: quality, or other rewards written as for 'evolve train'."""
    reward_preset: str = PRESET
    """Name of the weights of the quality reward."""
    format_penalty: float = 0.0
    """Penalty that the quality reward gives to a response that is not an instance. 0: that of the preset, 1 for
    most."""

    def check(self) -> None:
        super().check()
        if self.reward not in ("", QUALITY) and (self.format_penalty or self.reward_preset != PRESET):
            raise InputError(f"--reward-preset and --format-penalty are those of 'quality', not of {self.reward!r}")

    def prompts(self, split: str | None, tokenizer: Tokenizer) -> list[PromptExample]:
        """Returns the prompts of a split, without those of held-out tasks.

        Args:
            split: name of the split; None for all instructions.
            tokenizer: tokenizer of the policy's model.

        Raises:
            InputError: for a file that cannot be used, and for prompts that leave no room for a response in the
                context.
        """
        examples = instance_prompts(self.instructions or OWN, split, layout=self.layout, tokenizer=tokenizer)
        tasks = load_tasks(self.instructions or None)
        if any(task.instances for task in tasks):
            with input_errors():
                # evaluation_split refuses to leave fewer tasks than a bootstrapping prompt shows.
                count = min(self.held_out, max(len(tasks) - DEMONSTRATIONS, 0))
                hidden = {task.instruction for task in evaluation_split(tasks, count)[1]}
            examples = [example for example in examples if example.metadata["instruction"] not in hidden]
        if not examples:
            raise InputError(f"{self.instructions or 'the package'} has no instruction for this stage: add some")
        check_prompts(ENV_ID, examples, tokenizer, reward=well_formed, **self.env_options())
        return examples

    def env_options(self) -> dict[str, Any]:
        """Returns the arguments of the environment, except examples, reward and tokenizer."""
        return named(self, "max_tokens", "context_length")

    def reward_part(self) -> Any:
        """Returns the reward in the form that ``resolve`` takes."""
        if self.reward != QUALITY:
            return parse_reward(self.reward)
        backend = {"id": "embedded", "kwargs": {"dtype": self.dtype}}
        penalty = {"format_reward": -self.format_penalty} if self.format_penalty else {}
        return {"id": QUALITY, "kwargs": {"preset": self.reward_preset, "backend": backend} | penalty}


def prompts_digest(examples: Sequence[PromptExample]) -> str:
    """Returns a short hash of the prompts, by which a resumed run checks that they are the same."""
    return digest([[example.id, example.prompt] for example in examples])


def well_formed(samples: Sequence[Sample]) -> list[float]:
    """Returns 1 for each response that is an instance, else 0; the mean is the format rate."""
    return [float(not isinstance(read_response(s.response, s.metadata), str)) for s in samples]
