"""Measures DPO of TRL once, in the environment of TRL.

TRL computes the reference log-probs of every pair during training, which is its default.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

from .common import Meter, adapters
from .trl_setup import arguments, load, train


class TokenizedDPO(DPOTrainer):
    """A trainer on token ids, which are the same on both sides, that counts response tokens.

    Args:
        meter: where they are counted.
        **settings: settings of the trainer.
    """

    def __init__(self, meter: Meter, **settings: Any) -> None:
        self.meter = meter
        super().__init__(**settings)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.meter.tokens += int(inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up step, then for the measured steps, and returns the measurement."""
    meter, micro = Meter(), min(spec["trl_pairs"], spec["batch"])
    tokenizer, policy = load(spec)
    settings = DPOConfig(
        gradient_checkpointing=spec["checkpointing"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        beta=0.1,
        lr_scheduler_type="constant",
        **arguments(spec, micro),
    )
    trainer = TokenizedDPO(
        meter,
        model=policy,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{f"{name}_ids": ids for name, ids in pair.items()} for pair in spec["data"]]),
        peft_config=adapters(spec),
    )
    measured = train(trainer, policy, meter, micro)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return measured | {
        "steps": len(logged) - 1,
        "loss": float(logged[-1]["loss"]),
        "chosen_logprob": float(logged[0]["logps/chosen"]),
    }
