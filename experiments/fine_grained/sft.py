"""``instructgym fine-grained sft``: trains the supervised policy, from which all arms start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.supervised.sft import SFT, TokenizedDemonstration
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.training.adapters import LoraSettings
from ..runs.options import Count
from ..runs.training import Run, tokenizer_of
from .common import COSINE, StageOptions


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

    def demonstrations_found(self) -> list[PromptExample]:
        """Returns the prompts with a response on which the policy is trained.

        Raises:
            InputError: if there are none, or the model has no token to end a response.
        """
        examples = [example for example in self.prompts("sft", self.model) if example.reference]
        if not examples:
            raise InputError(f"{self.data} has no responses to imitate")
        if not tokenizer_of(self.model).eos_ids:
            raise InputError(f"the tokenizer of {self.model} has no EOS token, by which responses could end")
        return examples[: self.demonstrations or None]


def run(options: FineGrainedSFT, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy and returns the results.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    examples = options.demonstrations_found()

    def work(opened: Run) -> dict[str, Any]:
        policy = LanguageModelPolicy(
            options.model, LoraSettings(rank=options.lora_rank), value="shared", dtype=options.dtype, seed=options.seed
        )
        if policy.lm.context_length < options.context_length:
            raise InputError(
                f"{options.model} reads {policy.lm.context_length} tokens: set --context-length to that or less"
            )
        trainer = SFT(
            policy,
            options.seed,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            epochs=options.epochs,
            token_budget=options.token_budget,
            **COSINE,
        )
        tokenizer, end = policy.tokenizer, min(policy.tokenizer.eos_ids)
        # A chat template ends where the response begins; a plain prompt needs a blank before it.
        blank = "" if options.layout == "chat" else " "
        # Every response ends with an end-of-sequence token, by which the policy learns to stop.
        demonstrations = [
            TokenizedDemonstration(
                tokenizer.encode(example.prompt), [*tokenizer.encode_continuation(f"{blank}{example.reference}"), end]
            )
            for example in examples
        ]
        fitting = [demo for demo in demonstrations if len(demo.prompt) + len(demo.response) <= options.context_length]
        if not fitting:
            raise InputError(f"no demonstration fits --context-length {options.context_length}")
        opened.supervised(trainer, fitting, f"sft on {options.data}")
        policy.save(opened.folder.file("policy", "policy.json").parent)
        return opened.folder.finish(
            {"loss": trainer.loss},
            {
                "demonstrations": len(fitting),
                "dropped": {"too long": len(demonstrations) - len(fitting)},
                "steps": trainer.steps,
                "seconds": opened.seconds,
            },
        )

    plan = f"train on {len(examples)} demonstrations of {options.data}"
    return options.run("fine-grained sft", console, plan, work)
