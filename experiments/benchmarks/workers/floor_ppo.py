"""Measures the passes that no PPO update can avoid, in plain transformers calls.

An update has a sampled ``generate``, a pass of the policy (for old log-probs and values) and one of the reference
policy, both without gradients, and ``epochs`` of forward and backward passes. It has no reward, no env and no
advantages.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from .floor import Floor


class PPOFloor(Floor):
    """A model with adapters and the passes of a PPO update.

    Args:
        spec: settings of the benchmark.
    """

    micro_batches = (4, 8, 16, 32)

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec, spec["updates"])
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        self.prompts = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in spec["data"]])
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Without an end-of-sequence token every response has the full length.
        self.model.generation_config.eos_token_id = None

    def update(self, number: int, micro: int) -> int:
        batch, length = self.spec["batch"], self.spec["response_tokens"]
        prompts = self.prompts[number * batch : (number + 1) * batch]
        with torch.no_grad(), self.cast():
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
            self._epoch(sequences, micro)
        return sequences[:, prompts.shape[1] :].numel()

    def trial(self, micro: int) -> None:
        shape = (self.spec["batch"], self.prompts.shape[1] + self.spec["response_tokens"])
        self._epoch(torch.randint(0, self.model.config.vocab_size, shape), micro)

    def _epoch(self, sequences: torch.Tensor, micro: int) -> None:
        """Runs forward and backward passes over all sequences, then an optimiser step."""
        length = self.spec["response_tokens"]
        for rows in sequences.split(micro):
            with self.cast():
                logits = self.model(rows).logits[:, -length - 1 : -1]
            logprobs = torch.log_softmax(logits.float(), -1).gather(-1, rows[:, -length:, None])
            (-logprobs.sum() / (len(sequences) * length)).backward()
        self.step()


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measures the bare passes of PPO."""
    return PPOFloor(spec).measure()
