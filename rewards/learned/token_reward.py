"""What a reward model says as a reward: token by token, or once per response."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ..base import Reward, Sample, Score
from .reward_model import RewardModel, check_fingerprint, read_reward_settings

__all__ = ["RewardModel", "SequenceReward", "TokenReward"]


class _LearnedReward(Reward):
    """Holds a reward model, from a folder on first use; its tokenizer is that of the env.

    Step by step or all at once, rewards are the same in float32; a model in bfloat16 rounds differently by batch.
    """

    def __init__(
        self, model: str | RewardModel, scale: float, center: bool | float | None, dtype: str, device: str
    ) -> None:
        if not np.isfinite(scale):
            raise InputError(f"scale must be finite, got {scale}")
        self.folder = "" if isinstance(model, RewardModel) else str(model)
        self.scale, self.dtype, self.device = float(scale), dtype, device
        self._model = model if isinstance(model, RewardModel) else None
        self._saved = read_reward_settings(self.folder) if self._model is None else {}
        self._lock = threading.Lock()
        self.center = center
        if center is True and self._settings["mean"] is None:
            raise InputError(f"center=True needs a trained reward model, {self._name} has no mean score")

    @property
    def _settings(self) -> dict[str, Any]:
        """The file's, until the model is loaded; a live model may be trained on."""
        return self._saved if self._model is None else self._model.settings()

    @property
    def offset(self) -> float:
        """Subtracted from every reward."""
        settings = self._settings
        if self.center is not None and not isinstance(self.center, bool):
            return float(self.center)
        free = settings["free_level"] and settings["mean"] is not None
        return float(settings["mean"]) if (free if self.center is None else self.center) else 0.0

    @property
    def _name(self) -> str:
        return self.folder or f"on {self._settings['model']}"

    @property
    def model(self) -> RewardModel:
        """The reward model."""
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
        written = [i for i, sample in enumerate(samples) if len(sample.token_ids)]  # type: ignore[arg-type]
        if not written:
            return scores
        # As the env encodes them; many samples are of one prompt.
        encoded = {
            prompt: np.array(self.model.tokenizer.encode(prompt), np.int32)
            for prompt in dict.fromkeys(samples[i].prompt for i in written)
        }
        prompts = [encoded[samples[i].prompt] for i in written]
        responses = [np.asarray(samples[i].token_ids, np.int32) for i in written]
        for i, row in zip(written, self.model.score(prompts, responses), strict=True):
            scores[i] = self._score(row)
        return scores

    def _score(self, rewards: np.ndarray) -> Score:
        raise NotImplementedError


class TokenReward(_LearnedReward):
    """A token-level reward model's reward of every response token, EOS included.

    The model is trained on the mean R(x, y) of its token rewards, while an agent sums what it is paid. Hence two forms:
    ``causal`` pays r_t when token t is written, so a return grows with the length; ``whole`` pays r_t / T, whose sum is
    R(x, y) of the whole response, at its end, and hands out the split as credit.

    Losses that only compare two responses leave open a constant that could be added to all r_t, and in the causal form
    a response of T tokens would be paid T times that constant for its length alone. ``center`` subtracts the mean score
    of the less preferred training responses.

    Args:
        model: a live reward model, or the folder it was saved in.
        form: ``causal`` or ``whole``.
        scale: factor of the rewards.
        center: whether to subtract that mean, or what to subtract; None: the mean, where the model's loss leaves the
            constant open.
        dtype: of a model from a folder, as of :class:`RewardModel`.
        device: likewise.

    Raises:
        InputError: if the folder cannot be read, the model is of level sequence, the form is unknown, or ``center``
            asks for a mean that an untrained model has not.
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
        if form not in ("causal", "whole"):
            raise InputError(f"form must be causal or whole, got {form!r}")
        super().__init__(model, scale, center, dtype, device)
        if self._settings["level"] != "token":
            raise InputError(
                f"the reward model {self._name} is of level {self._settings['level']}: use the reward sequence-reward"
            )
        self.form = form
        self.timing = form  # type: ignore[misc]

    def _score(self, rewards: np.ndarray) -> Score:
        paid = (rewards - np.float32(self.offset)) * np.float32(self.scale)
        if self.form == "whole":
            paid = paid / np.float32(len(paid))
        terms = {"mean": float(rewards.mean()), "min": float(rewards.min())}
        return Score(float(paid.sum(dtype=np.float64)), per_token=paid, terms=terms)


class SequenceReward(_LearnedReward):
    """A reward model's score R(x, y) of the whole response, paid at its end.

    Args:
        model: a live reward model, or the folder it was saved in; one of level token scores the mean of its rewards.
        scale: as of :class:`TokenReward`.
        center: likewise.
        dtype: likewise.
        device: likewise.

    Raises:
        InputError: if the folder cannot be read, or ``center`` asks for a mean that an untrained model has not.
    """

    name = "sequence-reward"

    def __init__(
        self,
        model: str | RewardModel,
        scale: float = 1.0,
        center: bool | float | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        super().__init__(model, scale, center, dtype, device)

    def _score(self, rewards: np.ndarray) -> Score:
        raw = float(rewards.mean())
        return Score((raw - self.offset) * self.scale, terms={self.name: raw})
