"""The target network of soft Q-learning: a copy of the policy's weights that follows them slowly, on the same trunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import CausalLM
from ...llm_backends.local.loading import quiet_loading
from ...llm_backends.training.adapters import autocast, load_all_weights
from ...llm_backends.training.output_layer import ChosenLogits, chosen_logits
from ...llm_backends.training.teacher_forcing import output_layer, response_hidden
from ..policy.language_model import POLICY, LanguageModelPolicy, frozen_copy

TARGET = "target"
"""Name of the target's frozen adapter."""


class TargetPolicy:
    """A target network: a frozen adapter on the policy's trunk, or a frozen model if all weights are trained.

    Args:
        policy: the policy whose weights the target follows. All target networks of a policy share one adapter.

    Raises:
        InputError: for a policy with a frozen adapter of the target's name.
    """

    def __init__(self, policy: LanguageModelPolicy) -> None:
        self.policy = policy
        self.whole: CausalLM | None = None
        if not policy.lora.rank:
            self.whole = frozen_copy(policy.lm)
            target_weights = list(self.whole.model.parameters())
            self.pairs = list(zip(target_weights, policy.lm.model.parameters(), strict=True))
            """Each weight of the target with the one of the policy that it follows."""
            return
        if TARGET in policy.frozen_adapters():
            raise InputError(f"a frozen adapter of this policy is called {TARGET!r} already: give it another name")
        if TARGET not in policy.trunk.names:
            with quiet_loading():
                policy.trunk.add(TARGET, policy.lora)
        policy_weights = policy.trunk.parameters(POLICY)
        adapter_weights = policy.trunk.parameters(TARGET)
        # peft's parameter names differ only in the adapter's name.
        self.pairs = [
            (adapter_weights[name.replace(f".{POLICY}.", f".{TARGET}.")], weight)
            for name, weight in policy_weights.items()
        ]
        # trunk.parameters has made the target's weights trainable.
        policy.trunk.freeze(TARGET)
        self.follow(1.0)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Moves each weight towards the policy's by Polyak averaging.

        Args:
            rate: share of the distance that each weight moves, in (0, 1]; 1 copies the policy's weights.
        """
        for target_weight, policy_weight in self.pairs:
            target_weight.lerp_(policy_weight.detach(), rate)

    @torch.no_grad()
    def logits(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> ChosenLogits:
        """Returns the log-probs and logsumexps of the target network, without a graph; see :func:`policy_logits`."""
        with self._active() as lm:
            return _logits(self.policy, lm, prompts, responses)

    @contextmanager
    def _active(self) -> Iterator[CausalLM]:
        """Yields the target network's model."""
        with self.policy.adapter(TARGET if self.whole is None else None) as lm:
            yield lm if self.whole is None else self.whole

    def save(self, folder: str | Path) -> None:
        """Writes the weights into ``FOLDER/target``."""
        if self.whole is None:
            self.policy.trunk.save(folder, [TARGET])
        else:
            self.whole.model.save_pretrained(Path(folder) / TARGET)

    def load(self, folder: str | Path) -> None:
        """Reads the weights that :meth:`save` wrote.

        Raises:
            InputError: if the weights belong to other layers.
            OSError: if there are no weights.
            safetensors.SafetensorError: if the file is broken.
        """
        if self.whole is None:
            self.policy.trunk.load(folder, TARGET)
        else:
            load_all_weights(self.whole.model, Path(folder) / TARGET)


def policy_logits(
    policy: LanguageModelPolicy, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    """Returns the log-prob of each response token, and the logsumexp of the policy's logits at its position.

    Args:
        policy: the policy, at its own temperature and over the whole vocabulary.
        prompts: token ids, n int arrays.
        responses: token ids, n int arrays, none empty.

    Returns:
        float32, each of shape (tokens,), response after response; with a graph if gradients are enabled.
    """
    with policy.adapter(POLICY, torch.is_grad_enabled()) as lm:
        return _logits(policy, lm, prompts, responses)


@torch.no_grad()
def reference_logits(
    policy: LanguageModelPolicy, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    """Returns the log-probs and logsumexps of the reference policy, without a graph; see :func:`policy_logits`."""
    with policy.reference_model() as lm:
        return _logits(policy, lm, prompts, responses)


def _logits(
    policy: LanguageModelPolicy, lm: CausalLM, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> ChosenLogits:
    """Returns the log-probs and logsumexps of one model, at the policy's temperature."""
    with autocast(policy.lm, policy.dtype):
        hidden = response_hidden(lm, prompts, responses)
        ids = torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(hidden.device)
        return chosen_logits(hidden, output_layer(lm), ids, 1 / policy.temperature)
