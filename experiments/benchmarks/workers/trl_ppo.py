"""Measures PPO of TRL once, in the environment of TRL, and prints a line of JSON.

Usage: ``python trl_ppo.py JSON``. This library is not installed in that environment, so nothing of it is imported.

TRL requires models for values and rewards: both are sequence classifiers on the same weights.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Returns the peak memory of this process, in MB; ``ru_maxrss`` would start at the memory of the parent process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def set_surroundings(dtype: str) -> None:
    """Sets warnings and environment variables, which must happen before torch and TRL are imported."""
    warnings.filterwarnings("ignore")
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    if dtype == "bfloat16":  # what `accelerate launch --mixed_precision bf16` sets; `bf16=True` sets nothing
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def adapters(spec: dict[str, Any]) -> Any:
    """Returns the settings of the adapters for peft."""
    from peft import LoraConfig

    targets = spec["targets"] if spec["targets"] == "all-linear" else spec["targets"].split(",")
    return LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules=targets, task_type="CAUSAL_LM")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up update, then for the measured updates, and returns the measurement."""
    set_surroundings(spec["dtype"])
    import torch

    torch.set_num_threads(spec["threads"])
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

    marks: list[tuple[float, float]] = []
    lengths: list[int] = []
    casts: list[bool] = []

    class Clock(TrainerCallback):
        """A callback that records CPU and wall time at the end of each update."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

    # TRL does not report the number of sampled tokens: wrap its sampling and count them.
    plain_generation = ppo_trainer.batch_generation

    def counted_generation(model: Any, queries: Any, *args: Any) -> Any:
        responses, logits = plain_generation(model, queries, *args)
        lengths.append((responses.shape[1] - queries.shape[1]) * responses.shape[0])
        return responses, logits

    ppo_trainer.batch_generation = counted_generation

    folder, batch = spec["model"], spec["batch"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in spec["prompts"]]})
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scorers = []
    for _ in range(2):
        torch.manual_seed(0)
        scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorers.append(scorer)
    precision = {} if spec["dtype"] == "default" else {"bf16": spec["dtype"] == "bfloat16"}
    micro = min(8, batch)
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-ppo-"),
        use_cpu=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        per_device_eval_batch_size=micro,
        num_mini_batches=1,
        num_ppo_epochs=spec["epochs"],
        response_length=spec["response_tokens"],
        total_episodes=batch * (spec["updates"] + 1),
        local_rollout_forward_batch_size=batch,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        stop_token=None,
        kl_coef=0.05,
        learning_rate=1e-5,
        **precision,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=adapters(spec),
        callbacks=[Clock()],
    )
    # Records whether the forward passes run under autocast, which depends on TRL's defaults.
    handle = policy.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
    before = peak_mb()
    trainer.train()
    handle.remove()
    return {
        "tokens": sum(lengths[1:]),
        "cpu_seconds": marks[-1][0] - marks[0][0],
        "wall_seconds": marks[-1][1] - marks[0][1],
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": "bfloat16" if any(casts) else "float32",
        "micro_batch": micro,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
