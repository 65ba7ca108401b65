"""Measures the passes that no PPO update can avoid, in plain transformers calls, and prints a line of JSON.

Usage: ``python floor_ppo.py JSON``. An update has a sampled ``generate``, a pass of the policy (for old log-probs and
values) and one of the reference policy, both without gradients, and ``epochs`` of forward and backward passes. It has
no reward, no env and no advantages.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MICRO_BATCHES = (4, 8, 16, 32)
"""Numbers of sequences of a micro-batch to try."""


def peak_mb() -> float:
    """Returns the peak memory of this process, in MB; ``ru_maxrss`` would start at the memory of the parent process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def adapted(spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    """Returns a model with adapters and the optimiser of the adapters.

    As in training with this library, frozen weights have the dtype of the computation and adapters are float32.
    """
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    targets = spec["targets"] if spec["targets"] == "all-linear" else spec["targets"].split(",")
    lora = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules=targets, task_type="CAUSAL_LM")
    peft: Any = get_peft_model(model.eval(), lora)
    return peft, torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], 1e-5)


class Floor:
    """A model with adapters and the passes of a PPO update.

    Args:
        spec: settings of the benchmark.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        self.prompts = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in spec["prompts"]])
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.model, self.optimizer = adapted(spec)
        # Without an end-of-sequence token every response has the full length.
        self.model.generation_config.eos_token_id = None

    def _cast(self) -> Any:
        """Returns the autocast context of the computation, which does nothing in float32."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.spec["dtype"] == "bfloat16")

    def update(self, number: int, micro: int) -> int:
        """Runs one update and returns the number of response tokens."""
        batch, length = self.spec["batch"], self.spec["response_tokens"]
        prompts = self.prompts[number * batch : (number + 1) * batch]
        with torch.no_grad(), self._cast():
            sequences = self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                pad_token_id=self.pad,
            )
            # The passes for old log-probs and values, then for log-probs of the reference policy.
            for rows in sequences.split(micro):
                self.model(rows)
            with self.model.disable_adapter():
                for rows in sequences.split(micro):
                    self.model(rows)
        for _ in range(self.spec["epochs"]):
            self.epoch(sequences, micro)
        return sequences[:, prompts.shape[1] :].numel()

    def epoch(self, sequences: torch.Tensor, micro: int) -> None:
        """Runs forward and backward passes over all sequences, then an optimiser step."""
        length = self.spec["response_tokens"]
        for rows in sequences.split(micro):
            with self._cast():
                logits = self.model(rows).logits[:, -length - 1 : -1]
            logprobs = torch.log_softmax(logits.float(), -1).gather(-1, rows[:, -length:, None])
            (-logprobs.sum() / (len(sequences) * length)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measures updates after a warm-up; without ``micro`` in ``spec`` returns the fastest micro-batch instead."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    floor = Floor(spec)
    if not spec.get("micro"):
        shape = (spec["batch"], floor.prompts.shape[1] + spec["response_tokens"])
        sequences = torch.randint(0, floor.model.config.vocab_size, shape)
        floor.epoch(sequences, min(MICRO_BATCHES))
        seconds = {}
        for micro in MICRO_BATCHES:
            start = time.process_time()
            floor.epoch(sequences, micro)
            seconds[micro] = time.process_time() - start
        return {"micro": min(seconds, key=lambda micro: seconds[micro])}
    before = peak_mb()
    floor.update(0, spec["micro"])
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = sum(floor.update(number, spec["micro"]) for number in range(1, spec["updates"] + 1))
    return {
        "tokens": tokens,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": spec["dtype"],
        "micro_batch": spec["micro"],
    }


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
