"""What PPO and DPO of TRL share: tokenizer and model, settings, and the measurement of a training."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from .common import Meter


class Clock(TrainerCallback):
    """A callback that reads the clocks at the end of each optimiser step (in PPO: of each update).

    Args:
        meter: clocks to read.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.mark()


def load(spec: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """Returns the tokenizer, which has a padding token, and the model.

    Args:
        spec: settings of the benchmark.
        **settings: settings of the tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)


def arguments(spec: dict[str, Any], micro: int) -> dict[str, Any]:
    """Returns the settings that both trainers have in common.

    Args:
        spec: settings of the benchmark.
        micro: size of the micro-batches.
    """
    precision = {} if spec["dtype"] == "default" else {"bf16": spec["dtype"] == "bfloat16"}
    if spec["dtype"] == "bfloat16":  # what `accelerate launch --mixed_precision bf16` sets; `bf16=True` sets nothing
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "use_cpu": True,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec["batch"] // micro,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **precision,
    }


def train(trainer: Any, policy: Any, meter: Meter, micro: int) -> dict[str, Any]:
    """Trains and returns the measurement.

    Args:
        trainer: trainer of TRL.
        policy: model that it trains.
        meter: clocks, whose tokens the trainer counts.
        micro: size of the micro-batches.
    """
    casts: list[bool] = []
    # Records whether the forward passes run under autocast, which depends on TRL's defaults.
    policy.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
    trainer.add_callback(Clock(meter))
    meter.start()
    trainer.train()
    return meter.measurement("bfloat16" if any(casts) else "float32", micro_batch=micro)
