"""A trained policy as a backend: what a language model is asked for, a policy can be asked for as well."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import numpy as np

from ...llm_backends import BackendError, Prompt, Sampling
from ...llm_backends.base import Result
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.local.causal_lm import CausalLM
from ...llm_backends.local.loading import embedded_model_path
from ...llm_backends.training.adapters import autocast
from .language_model import POLICY, LanguageModelPolicy


class PolicyBackend(TransformersBackend):
    """Generates and scores with a policy's weights, as they are when it is asked.

    Prompts are texts, messages for the chat template, or token ids; log-probs are at temperature 1, whatever the
    policy's.

    Args:
        policy: the policy, whose model it uses in place.
        name: of the weights: stored replies of two policies must not be mixed up.
    """

    def __init__(self, policy: LanguageModelPolicy, name: str) -> None:
        super().__init__(policy.model_name, str(policy.dtype), prompt_style="chat")
        self.policy, self._name = policy, name

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model and weights."""
        return f"policy:{self.model}:{self._name}"

    @property
    def lm(self) -> CausalLM:
        return self.policy.lm

    def _path(self) -> str:
        return embedded_model_path() if self.model == "embedded" else self.model

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        with self._acting():
            return super()._generate(prompts, samplings)

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        with self._acting():
            return super()._logprobs(prompts, completions)

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        with self._acting():
            return super()._choice_logprobs(prompts, choices, heads)

    def _acting(self) -> AbstractContextManager[object]:
        """The policy's adapter in place, without cached prefixes of other weights before and behind it."""
        stack = ExitStack()
        stack.enter_context(self.policy.adapter(POLICY))
        stack.enter_context(autocast(self.policy.lm, self.policy.dtype))
        self.policy.changed()
        stack.callback(self.policy.changed)
        return stack
