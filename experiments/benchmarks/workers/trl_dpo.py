"""Measures DPO of TRL once, in the environment of TRL, and prints a line of JSON.

Usage: ``python trl_dpo.py JSON``. This library is not installed in that environment, so nothing of it is imported.

TRL computes the reference log-probs of every pair during training, which is its default.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Last, so that files of this folder do not hide installed modules.
sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from trl_ppo import adapters, peak_mb, set_surroundings  # type: ignore[import-not-found]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up step, then for the measured steps, and returns the measurement."""
    set_surroundings(spec["dtype"])
    import torch

    torch.set_num_threads(spec["threads"])
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    marks: list[tuple[float, float]] = []
    casts: list[bool] = []

    class Clock(TrainerCallback):
        """A callback that records CPU and wall time at the end of each optimiser step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

    class Tokenized(DPOTrainer):
        """A trainer on token ids, which are the same on both sides, that counts response tokens per micro-batch."""

        lengths: list[int] = []

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.lengths.append(int(inputs["completion_mask"].sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    folder, batch, micro = spec["model"], spec["batch"], spec["micro"]
    pairs = json.loads(Path(spec["pairs"]).read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    precision = {} if spec["dtype"] == "default" else {"bf16": spec["dtype"] == "bfloat16"}
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-dpo-"),
        use_cpu=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        gradient_checkpointing=spec["checkpointing"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        beta=0.1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **precision,
    )
    trainer = Tokenized(
        model=policy,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{f"{name}_ids": ids for name, ids in pair.items()} for pair in pairs]),
        peft_config=adapters(spec),
        callbacks=[Clock()],
    )
    # Records whether the forward passes run under autocast, which depends on TRL's defaults.
    handle = policy.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
    before = peak_mb()
    trainer.train()
    handle.remove()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        # Without the micro-batches of the warm-up step.
        "tokens": sum(Tokenized.lengths[batch // micro :]),
        "cpu_seconds": marks[-1][0] - marks[0][0],
        "wall_seconds": marks[-1][1] - marks[0][1],
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": "bfloat16" if any(casts) else "float32",
        "micro_batch": micro,
        "steps": len(marks) - 1,
        "loss": float(logged[-1]["loss"]),
        "chosen_logprob": float(logged[0]["logps/chosen"]),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
