"""What the tokens of a response are paid, by the timing of the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...llm_backends import Tokenizer, request_seed
from ...llm_backends.errors import InputError
from ...rewards import Reward, Sample, Score, score_with_retries
from ..process.core import InvalidRewardError, RunningMean
from .episode import TokenEpisode


@dataclass(eq=False)
class Turn:
    """The tokens that one copy wrote in one call."""

    episode: TokenEpisode
    start: int
    """Response tokens before."""
    count: int = 0
    """Tokens written."""

    @property
    def ended(self) -> bool:
        """Whether they ended the episode."""
        return bool(self.count and self.episode.finish_reason)


@dataclass
class Paid:
    """What a turn earned."""

    rewards: np.ndarray
    """float64, shape (count,)."""
    credit: np.ndarray
    """float64, shape (count,): the split of a *whole* reward over the turn's tokens; else the rewards."""
    score: Score | None = None
    """None where nothing was due."""

    @property
    def valid(self) -> bool:
        """False where the rewards are imputed."""
        return self.score is None or self.score.valid


class TokenScorer:
    """Asks the reward about turns and splits what it says over their tokens.

    Asking and paying are apart, so that the former may run in another thread.

    Args:
        reward: scores responses.
        tokenizer: decodes unfinished ones.
        on_invalid: ``retry`` or ``raise``.
    """

    def __init__(self, reward: Reward, tokenizer: Tokenizer, on_invalid: str) -> None:
        self.reward, self.tokenizer, self.on_invalid = reward, tokenizer, on_invalid
        self.mean = RunningMean()

    def forget(self) -> None:
        """Forgets the valid rewards, and makes the reward forget what it has seen."""
        self.reward.reset()
        self.mean = RunningMean()

    def samples(self, turns: Sequence[Turn]) -> dict[int, Sample]:
        """The samples on which a verdict is due now, by position in ``turns``."""
        causal = self.reward.timing == "causal"
        return {i: self._sample(turn.episode) for i, turn in enumerate(turns) if turn.ended or (causal and turn.count)}

    def ask(self, samples: Mapping[int, Sample]) -> dict[int, Score]:
        """Scores all samples in one call, and those without a verdict once more."""
        if not samples:
            return {}
        retries = 1 if self.on_invalid == "retry" else 0
        scores = score_with_retries(self.reward, list(samples.values()), retries)
        return dict(zip(samples, scores, strict=True))

    def pay(self, turns: Sequence[Turn], scores: Mapping[int, Score]) -> list[Paid]:
        """Splits the scores over the tokens and imputes where there is none, as if the turns had been stepped together.

        Raises:
            InputError: if a causal or whole reward's split is missing, not finite, or of another length or sum.
            InvalidRewardError: with ``on_invalid="raise"``, where there is no verdict.
        """
        paid = []
        for i, turn in enumerate(turns):
            score = scores.get(i)
            if score is not None and not score.valid and self.on_invalid == "raise":
                raise InvalidRewardError(f"no verdict on a response to {turn.episode.example.id}: {score.feedback}")
            paid.append(self._split(turn, score))
        self._impute(turns, paid)
        return paid

    def _split(self, turn: Turn, score: Score | None) -> Paid:
        rewards = np.zeros(turn.count)
        if score is None or not score.valid:
            return Paid(rewards, rewards.copy(), score)
        if self.reward.timing == "terminal":
            rewards[-1] = score.value
            return Paid(rewards, rewards.copy(), score)
        split = self._checked_split(turn, score)[turn.start :].astype(np.float64)
        if self.reward.timing == "causal":
            return Paid(split, split.copy(), score)
        rewards[-1] = score.value
        return Paid(rewards, split, score)

    def _checked_split(self, turn: Turn, score: Score) -> np.ndarray:
        name, length = self.reward.name, turn.start + turn.count
        if score.per_token is None:
            raise InputError(f"reward {name!r} is {self.reward.timing}, but its score has no per_token")
        split = np.asarray(score.per_token, np.float32)
        if split.shape != (length,):
            raise InputError(f"per_token of reward {name!r} has shape {split.shape}, the response {length} tokens")
        if not np.isfinite(split).all():
            raise InputError(f"per_token of reward {name!r} is not finite")
        if self.reward.timing == "whole":
            total, size = float(split.sum(dtype=np.float64)), float(np.abs(split).sum(dtype=np.float64))
            if abs(total - score.value) > 1e-4 * max(1.0, size, abs(score.value)):
                raise InputError(f"per_token of reward {name!r} sums to {total:.6g}, its value is {score.value:.6g}")
        return split

    def _impute(self, turns: Sequence[Turn], paid: Sequence[Paid]) -> None:
        """Pays the running mean where there is no verdict; the mean takes rewards in by step, then by copy."""
        causal = self.reward.timing == "causal"
        due: dict[int, list[Paid]] = {}
        for turn, one in zip(turns, paid, strict=True):
            if one.score is not None:
                for step in range(turn.count) if causal else (turn.count - 1,):
                    due.setdefault(step, []).append(one)
        for step in sorted(due):
            for one in due[step]:
                if one.valid:
                    self.mean.add(float(one.rewards[step]))
            for one in due[step]:
                if not one.valid:
                    one.rewards[step] = one.credit[step] = self.mean.value

    def _sample(self, episode: TokenEpisode) -> Sample:
        example, count = episode.example, len(episode.tokens)
        mask = np.ones(count, dtype=bool)
        mask[: episode.given] = False
        return Sample(
            response=episode.response(self.tokenizer),
            prompt=example.prompt,
            reference=example.reference,
            token_ids=np.array(episode.tokens, np.int32),
            loss_mask=mask,
            episode_id=example.id,
            group=example.id,
            seed=request_seed(episode.base_seed, "reward"),
            metadata=dict(example.metadata) | {"choices": example.choices, "finish_reason": episode.finish_reason},
        )
