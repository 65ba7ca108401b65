"""Rewards computed by a trained reward model: per token, or once per response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...llm_backends.errors import InputError, check_known
from ...llm_backends.local.tokenization import Tokenizer
from ...llm_backends.parts import Lock
from ..base import Reward, Sample, Score
from .reward_model import RewardModel, check_fingerprint, read_reward_settings

__all__ = ["RewardModel", "SequenceReward", "TokenReward"]


class _LearnedReward(Reward):
    """A reward that holds a reward model, loaded from a folder on first use; the env must use its tokenizer.

    Scoring step by step or all at once gives the same rewards in float32; in bfloat16 rounding depends on the batch.
    """

    def __init__(
        self,
        model: str | RewardModel,
        scale: float = 1.0,
        center: bool | float | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        if not np.isfinite(scale):
            raise InputError(f"scale must be finite, got {scale}")
        self.folder = "" if isinstance(model, RewardModel) else str(model)
        self.scale, self.dtype, self.device = float(scale), dtype, device
        self._model = model if isinstance(model, RewardModel) else None
        # Only the settings are read here, so that a bad folder fails now; the weights are loaded on first use.
        self._saved = read_reward_settings(self.folder) if self._model is None else {}
        self._lock = Lock()
        self.center = center
        if center is True and self._settings["mean"] is None:
            raise InputError(f"center=True needs a trained reward model, {self._name} has no mean score")

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings from the file until the model is loaded, then from the model, whose training may continue."""
        return self._saved if self._model is None else self._model.settings()

    @property
    def offset(self) -> float:
        """Constant that is subtracted from every reward."""
        settings = self._settings
        if self.center is not None and not isinstance(self.center, bool):
            return float(self.center)
        has_open_constant = settings["free_level"] and settings["mean"] is not None
        return float(settings["mean"]) if (has_open_constant if self.center is None else self.center) else 0.0

    @property
    def _name(self) -> str:
        return self.folder or f"on {self._settings['model']}"

    @property
    def model(self) -> RewardModel:
        """The reward model; loaded on first use."""
        with self._lock:
            if self._model is None:
                self._model = RewardModel.load(self.folder, dtype=self.dtype, device=self.device)
            return self._model

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        check_fingerprint(self._settings, tokenizer, self._name)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        for sample in samples:
            if sample.token_ids is None:
                raise InputError(
                    f"reward {self.name!r} reads token ids, which {sample.episode_id!r} has not: use it in a token env"
                )
        scores = [Score.invalid("no tokens") for _ in samples]
        nonempty = [i for i, sample in enumerate(samples) if len(sample.token_ids)]  # type: ignore[arg-type]
        if not nonempty:
            return scores
        # Token envs pass the ids of their prompts; other texts are encoded, each distinct one once.
        texts = list(dict.fromkeys(samples[i].prompt for i in nonempty if samples[i].prompt_ids is None))
        encoded = dict(zip(texts, self.model.tokenizer.encode_batch(texts), strict=True))
        prompts = [
            np.asarray(encoded[s.prompt] if s.prompt_ids is None else s.prompt_ids, np.int32)
            for s in (samples[i] for i in nonempty)
        ]
        responses = [np.asarray(samples[i].token_ids, np.int32) for i in nonempty]
        for i, row in zip(nonempty, self.model.score(prompts, responses), strict=True):
            scores[i] = self._score(row)
        return scores

    def _score(self, rewards: np.ndarray) -> Score:
        """Returns the score of a response with these rewards of :meth:`RewardModel.score`."""
        raise NotImplementedError


class TokenReward(_LearnedReward):
    """A reward for every response token, EOS included, from a token-level reward model.

    The model is trained on the mean R(x, y) of its token rewards, while an agent sums the rewards that it gets. Hence
    two forms. ``causal`` gives r_t when token t is written, so a return grows with the length. ``whole`` gives R(x, y)
    at the end of the response, with its split r_t / T over the T tokens as credit.

    A loss that only compares two responses does not change when a constant is added to all r_t. In the causal form a
    response of T tokens would get T times that constant for its length alone. ``center`` removes it: it subtracts the
    mean score of the less preferred training responses.

    Args:
        model: a live reward model, or the folder it was saved in.
        form: ``causal`` or ``whole``.
        scale: factor that the rewards are multiplied by, after centering.
        center: True: subtract that mean; False: subtract nothing; a number: subtract it; None: subtract the mean if the
            model's loss leaves the constant open and the model has a mean.
        dtype: ``float32``, ``bfloat16`` or ``auto``: dtype of a model loaded from a folder.
        device: device of a model loaded from a folder; ``auto`` uses a GPU if there is one.

    Raises:
        InputError: if the folder cannot be read, the model is of level sequence, the form is unknown, ``scale`` is not
            finite, or ``center`` is True for an untrained model, which has no mean.
    """

    name = "token-reward"

    def __init__(
        self,
        model: str | RewardModel,
        form: Literal["causal", "whole"] = "causal",
        scale: float = 1.0,
        center: bool | float | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        check_known("form", form, ("causal", "whole"))
        super().__init__(model, scale, center, dtype, device)
        if self._settings["level"] != "token":
            raise InputError(
                f"the reward model {self._name} is of level {self._settings['level']}: use the reward sequence-reward"
            )
        self.form = form
        # Overrides the class attribute: the env reads the timing of the instance.
        self.timing = form  # type: ignore[misc]

    def _score(self, rewards: np.ndarray) -> Score:
        token_rewards = (rewards - np.float32(self.offset)) * np.float32(self.scale)
        if self.form == "whole":
            token_rewards = token_rewards / np.float32(len(token_rewards))
        terms = {"mean": float(rewards.mean()), "min": float(rewards.min())}
        # Summed in float64, so that long responses lose no precision.
        return Score(float(token_rewards.sum(dtype=np.float64)), per_token=token_rewards, terms=terms)


class SequenceReward(_LearnedReward):
    """A reward model's score R(x, y) of the whole response, given at its end.

    Args:
        model: a live reward model, or the folder it was saved in; a model of level token scores the mean of its token
            rewards.
        scale: factor that the score is multiplied by, after centering.
        center: True: subtract the mean score of the less preferred training responses; False: subtract nothing; a
            number: subtract it; None: subtract the mean if the model's loss leaves a constant open and the model has a
            mean.
        dtype: ``float32``, ``bfloat16`` or ``auto``: dtype of a model loaded from a folder.
        device: device of a model loaded from a folder; ``auto`` uses a GPU if there is one.

    Raises:
        InputError: if the folder cannot be read, ``scale`` is not finite, or ``center`` is True for an untrained model,
            which has no mean.
    """

    name = "sequence-reward"

    def _score(self, rewards: np.ndarray) -> Score:
        raw = float(rewards.mean())
        return Score((raw - self.offset) * self.scale, terms={self.name: raw})
