"""Measures PPO of TRL once, in the environment of TRL.

TRL requires models for values and rewards: both are sequence classifiers on the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

from .common import Meter, adapters
from .trl_setup import arguments, load, train


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up update, then for the measured updates, and returns the measurement."""
    meter, batch = Meter(), spec["batch"]
    micro = min(8, batch)
    # TRL does not report the number of sampled tokens: wrap its sampling and count them.
    plain_generation = ppo_trainer.batch_generation

    def counted_generation(model: Any, queries: Any, *args: Any) -> Any:
        responses, logits = plain_generation(model, queries, *args)
        meter.tokens += (responses.shape[1] - queries.shape[1]) * responses.shape[0]
        return responses, logits

    ppo_trainer.batch_generation = counted_generation

    tokenizer, policy = load(spec, padding_side="left")
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in spec["data"]]})
    scorers = []
    for _ in range(2):
        torch.manual_seed(0)
        scorer = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=torch.float32)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorers.append(scorer)
    settings = PPOConfig(
        per_device_eval_batch_size=micro,
        num_mini_batches=1,
        num_ppo_epochs=spec["epochs"],
        response_length=spec["response_tokens"],
        total_episodes=batch * (spec["updates"] + 1),
        local_rollout_forward_batch_size=batch,
        num_sample_generations=0,
        stop_token=None,
        kl_coef=0.05,
        **arguments(spec, micro),
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=adapters(spec),
    )
    return train(trainer, policy, meter, micro)
