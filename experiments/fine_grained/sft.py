"""``instructgym fine-grained sft``: trains the supervised policy, from which all arms start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...agents.supervised.sft import SFT, TokenizedDemonstration
from ...envs.tasks.instruction.data import OPENINGS
from ...llm_backends.errors import InputError
from ..runs.options import Count
from ..runs.training import Run, new_policy, run_stage, tokenized_demonstrations, tokenizer_of, trainer_settings
from .common import StageOptions


@dataclass
class FineGrainedSFT(StageOptions):
    """Train the start of all arms on given responses."""

    model: str = "embedded"
    """Model to train: embedded, or a local path or hub id of a causal language model."""
    demonstrations: int = 2000
    """Maximum number of demonstrations, prompts with a response. 0: all of this stage's share."""
    epochs: Count = 1
    """Epochs over the demonstrations."""
    batch_size: Count = 32
    """Demonstrations per optimiser step."""
    learning_rate: float = 5e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    lora_rank: Count = 8
    """Rank of the LoRA adapter of the policy, which PPO trains further."""

    def tokenized(self) -> list[TokenizedDemonstration]:
        """Returns the demonstrations, those that are too long included.

        Raises:
            InputError: if there are none, the model reads fewer tokens than the context length, or it has no token to
                end a response.
        """
        examples = [example for example in self.prompts("sft", self.model) if example.reference]
        if not examples:
            raise InputError(f"{self.data} has no responses to imitate")
        examples = examples[: self.demonstrations or None]
        responses = [f"{OPENINGS[self.layout]}{example.reference}" for example in examples]
        tokenizer = tokenizer_of(self.model, self.context_length)
        chat = self.layout == "chat"
        return tokenized_demonstrations([example.prompt for example in examples], responses, tokenizer, chat)


def run(options: FineGrainedSFT, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy and returns the results.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    tokenized = options.tokenized()
    fitting = [demo for demo in tokenized if len(demo.prompt) + len(demo.response) <= options.context_length]
    if not fitting:
        raise InputError(f"no demonstration fits --context-length {options.context_length}")

    def work(opened: Run) -> dict[str, Any]:
        policy = new_policy(options, value="shared")
        trainer = SFT(policy, options.seed, **trainer_settings(options, "batch_size"))
        opened.supervised(trainer, fitting, f"sft on {options.data}")
        opened.save_policy(policy)
        dropped = {"too long": len(tokenized) - len(fitting)}
        counts = {"demonstrations": len(fitting), "dropped": dropped, "steps": trainer.steps}
        return opened.finish({"loss": trainer.loss}, counts)

    plan = f"train on {len(fitting)} demonstrations of {options.data}"
    return run_stage(options, "fine-grained sft", console, work, plan=plan)
