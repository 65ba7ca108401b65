"""The target network of soft Q-learning: a slowly following copy of the policy's weights on the same trunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import CausalLM
from ...llm_backends.local.loading import quiet_loading
from ...llm_backends.training.adapters import autocast, load_whole
from ...llm_backends.training.output_layer import ChosenLogits, OutputLayer, chosen_logits
from ...llm_backends.training.teacher_forcing import response_hidden
from ..policy.language_model import POLICY, LanguageModelPolicy, frozen_copy

TARGET = "target"
"""Name of the frozen adapter."""


class TargetPolicy:
    """A frozen adapter beside the policy's own, or a frozen model where all weights are trained.

    Args:
        policy: whose weights it follows. It has one target, whoever asks.

    Raises:
        InputError: for a policy with a frozen adapter of the target's name.
    """

    def __init__(self, policy: LanguageModelPolicy) -> None:
        self.policy = policy
        self._whole: CausalLM | None = None
        if not policy.lora.rank:
            self._whole = frozen_copy(policy.lm)
            mine = list(self._whole.model.parameters())
            self._pairs = list(zip(mine, policy.lm.model.parameters(), strict=True))
            return
        if TARGET in policy.frozen_adapters():
            raise InputError(f"a frozen adapter of this policy is called {TARGET!r} already: give it another name")
        if TARGET not in policy.trunk.names:
            with quiet_loading():
                policy.trunk.add(TARGET, policy.lora)
        followed = policy.trunk.parameters(POLICY)
        named = policy.trunk.parameters(TARGET)
        self._pairs = [(named[name.replace(f".{POLICY}.", f".{TARGET}.")], one) for name, one in followed.items()]
        policy.trunk.freeze(TARGET)
        self.follow(1.0)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Polyak averaging: each weight moves to the policy's by ``rate`` of the way; 1 copies them."""
        for mine, theirs in self._pairs:
            mine.lerp_(theirs.detach(), rate)

    @torch.no_grad()
    def logits(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> ChosenLogits:
        """As of :func:`policy_logits`, of the target network; without a gradient."""
        with self._active() as lm:
            return _logits(self.policy, lm, prompts, responses)

    @contextmanager
    def _active(self) -> Iterator[CausalLM]:
        with self.policy.adapter(TARGET if self._whole is None else None) as lm:
            yield lm if self._whole is None else self._whole

    def save(self, folder: str | Path) -> None:
        """Writes the weights into ``FOLDER/target``."""
        if self._whole is None:
            self.policy.trunk.save(folder, [TARGET])
        else:
            self._whole.model.save_pretrained(Path(folder) / TARGET)

    def load(self, folder: str | Path) -> None:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if the weights are of other layers.
            OSError: if there are none.
            safetensors.SafetensorError: if they are broken.
        """
        if self._whole is None:
            self.policy.trunk.load(folder, TARGET)
        else:
            load_whole(self._whole.model, Path(folder) / TARGET)


def policy_logits(
    policy: LanguageModelPolicy, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    """Log-probs of response tokens and the logsumexp of the policy's logits where they are chosen.

    Args:
        policy: at its own temperature; over the whole vocabulary.
        prompts: n int arrays.
        responses: n int arrays, none empty.

    Returns:
        float32, each of shape (tokens,); with a graph where gradients are on.
    """
    with policy.adapter(POLICY, torch.is_grad_enabled()) as lm:
        return _logits(policy, lm, prompts, responses)


@torch.no_grad()
def reference_logits(
    policy: LanguageModelPolicy, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    """Likewise of the policy's reference; without a gradient."""
    with policy.reference_model() as lm:
        return _logits(policy, lm, prompts, responses)


def _logits(
    policy: LanguageModelPolicy, lm: CausalLM, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    with autocast(policy.lm, policy.dtype):
        hidden = response_hidden(lm, prompts, responses)
        ids = torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(hidden.device)
        return chosen_logits(hidden, OutputLayer.of(lm), ids, lm.logit_scale / policy.temperature)
