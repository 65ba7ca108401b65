"""One measurement of TRL's DPO, in a process of its own and in TRL's environment: prints a line of JSON.

``python trl_dpo.py JSON``. Nothing of this library is imported, for it is not installed there.

TRL computes the reference log-probs of every pair on the way, as it does by default.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last: its neighbours must not hide installed modules

from trl_ppo import adapters, peak_mb, set_surroundings  # type: ignore[import-not-found]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one step to warm up and then for the measured ones."""
    set_surroundings(spec["dtype"])
    import torch

    torch.set_num_threads(spec["threads"])
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    marks: list[tuple[float, float]] = []
    casts: list[bool] = []

    class Clock(TrainerCallback):
        """Notes when each optimiser step ends."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

    class Tokenized(DPOTrainer):
        """Takes token ids, so that both sides have the same, and counts those that it is given."""

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
    handle = policy.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
    before = peak_mb()
    trainer.train()
    handle.remove()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
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
