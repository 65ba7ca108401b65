"""One episode of the token MDP: which tokens end it, and the text it has come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Tokenizer, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...llm_backends.local.tokenization import stopped_text
from ...rewards import Reward, Sample, Score, score_with_retries
from ..process import InvalidRewardError, RunningMean


@dataclass(frozen=True)
class PromptExample:
    """One example: the prompt that an episode continues."""

    id: str
    """Stable over runs; episodes of one id form a group."""
    prompt: str
    """The text that the response continues, without a trailing blank."""
    reference: str | None = None
    """The right answer, as the response should say it, without surrounding blanks."""
    choices: tuple[str, ...] = ()
    """The allowed answers (verbalizers), without surrounding blanks; none where the answer is free."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able; handed to rewards and metrics."""


@dataclass(frozen=True)
class GenerationSpec:
    """What a generator has to know so that its responses end where the env ends them."""

    tokenizer: str
    """The tokenizer's name: models whose tokenizer has this name count alike."""
    vocabulary: int
    """Number of token ids, the size of the action space."""
    eos_ids: frozenset[int]
    """Tokens that end a response."""
    stop: tuple[str, ...]
    """Texts that end a response."""
    max_tokens: int
    """Tokens of a response at most."""
    context_length: int
    """Tokens of prompt and response at most."""


@dataclass(eq=False)
class TokenEpisode:
    """One copy's episode."""

    index: int
    """Which example."""
    example: PromptExample
    prompt: np.ndarray
    """int32, shape (prompt tokens,); shared by episodes, never written to."""
    ids: np.ndarray
    """int32, shape (prompt tokens + max_tokens,): prompt and response, zeros where nothing is written yet."""
    base_seed: int
    """From which the seed of the episode's score is derived."""
    choices: Choices | None = None
    """The allowed responses, where decoding is constrained."""
    tokens: list[int] = field(default_factory=list)
    """The response so far."""
    given: int = 0
    """How many of them ``options["prefix"]`` gave."""
    finish_reason: str = ""
    """Why the episode ended: ``illegal``, ``choice``, ``eos``, ``stop`` or ``length``."""
    text: str = ""
    """The response's text, without what ended it; empty before the end."""

    def state(self, written: int | None = None) -> np.ndarray:
        """int32: prompt and the first ``written`` response tokens (all by default); a view that is never rewritten."""
        return self.ids[: len(self.prompt) + (len(self.tokens) if written is None else written)]

    def response(self, tokenizer: Tokenizer) -> str:
        """The response's text so far."""
        return self.text if self.finish_reason else tokenizer.decode(self.tokens)

    def write(self, tokens: Sequence[int], tokenizer: Tokenizer, spec: GenerationSpec) -> int:
        """Appends tokens until the episode ends.

        Args:
            tokens: ids in [0, vocabulary).
            tokenizer: decodes them.
            spec: where responses end.

        Returns:
            How many were appended, the last one included.
        """
        written, prompt = self.tokens, len(self.prompt)
        stop = spec.stop
        if stop and len(tokens) > 1 and not any("\N{REPLACEMENT CHARACTER}" in text for text in stop):
            # A text without a stop string has none at any of its tokens: one look spares one per token.
            whole = tokenizer.decode([*written, *tokens[: spec.max_tokens]])
            stop = stop if any(text in whole for text in stop) else ()
        for count, token in enumerate(tokens):
            if self.finish_reason:
                return count
            # Tokens that left the trie are never looked up: its memory stays as small as the choices.
            legal = self.choices is None or token in self.choices.allowed(written)  # type: ignore[operator]
            self.ids[prompt + len(written)] = token
            written.append(token)
            if not legal:
                self._finish("illegal", tokenizer.decode(written))
            elif self.choices is not None and self.choices.complete(written):
                self._finish("choice", tokenizer.decode(written[:-1] if token in spec.eos_ids else written))
            elif token in spec.eos_ids:
                self._finish("eos", tokenizer.decode(written[:-1]))
            elif stop and (text := stopped_text(tokenizer.hf, written, stop)) is not None:
                self._finish("stop", text)
            elif len(written) == spec.max_tokens:
                self._finish("length", tokenizer.decode(written))
        return len(tokens)

    def _finish(self, reason: str, text: str) -> None:
        self.finish_reason, self.text = reason, text


TOKEN_OBSERVATIONS = ("tokens", "onehot")

ONEHOT_LIMIT = 65_536
"""Inputs of a learner's first layer at most: one-hot observations are for small vocabularies."""


class TokenObservation(ABC):
    """Turns states (int32 arrays of token ids, prompt first) into observations."""

    space: spaces.Space[Any]

    @abstractmethod
    def encode(self, states: Sequence[np.ndarray]) -> list[Any]:
        """One observation per state; no two share memory."""


class TokenIds(TokenObservation):
    """Dict of ``ids`` (int32, shape (length,), right-padded with 0) and ``mask`` (int8, shape (length,))."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._length = length
        self.space = spaces.Dict(
            {
                "ids": spaces.Box(0, vocabulary - 1, (length,), np.int32),
                "mask": spaces.Box(0, 1, (length,), np.int8),
            }
        )

    def encode(self, states: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        observations: list[dict[str, np.ndarray]] = []
        for state in states:
            ids, mask = np.zeros(self._length, np.int32), np.zeros(self._length, np.int8)
            ids[: len(state)] = state
            mask[: len(state)] = 1
            observations.append({"ids": ids, "mask": mask})
        return observations


class OneHotTokens(TokenObservation):
    """int64, shape (length,): token ids, ``vocabulary`` where there is none; learners one-hot a MultiDiscrete."""

    def __init__(self, vocabulary: int, length: int) -> None:
        if length * (vocabulary + 1) > ONEHOT_LIMIT:
            raise InputError(
                f"observation 'onehot' would have {length} x {vocabulary + 1} inputs, more than {ONEHOT_LIMIT}: lower "
                "context_length, take a smaller vocabulary or observation 'tokens'"
            )
        self._length, self._padding = length, vocabulary
        self.space = spaces.MultiDiscrete([vocabulary + 1] * length)

    def encode(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = [np.full(self._length, self._padding, np.int64) for _ in states]
        for row, state in zip(rows, states, strict=True):
            row[: len(state)] = state
        return rows


def make_token_observation(mode: str, vocabulary: int, length: int) -> TokenObservation:
    """The observation of the given mode, one of :data:`TOKEN_OBSERVATIONS`.

    Raises:
        ValueError: for an unknown mode, and for ``onehot`` where it would be too wide.
    """
    if mode == "tokens":
        return TokenIds(vocabulary, length)
    if mode == "onehot":
        return OneHotTokens(vocabulary, length)
    raise InputError(f"unknown observation mode {mode!r}: use {', '.join(TOKEN_OBSERVATIONS)}")


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
class TurnReward:
    """The rewards of a turn's tokens."""

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

    Asking and splitting are apart, so that the former may run in another thread.

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

    def assign_rewards(self, turns: Sequence[Turn], scores: Mapping[int, Score]) -> list[TurnReward]:
        """Splits the scores over the tokens and imputes where there is none, as if the turns had been stepped together.

        Raises:
            InputError: if a causal or whole reward's split is missing, not finite, or of another length or sum.
            InvalidRewardError: with ``on_invalid="raise"``, where there is no verdict.
        """
        rewarded = []
        for i, turn in enumerate(turns):
            score = scores.get(i)
            if score is not None and not score.valid and self.on_invalid == "raise":
                raise InvalidRewardError(f"no verdict on a response to {turn.episode.example.id}: {score.feedback}")
            rewarded.append(self._split(turn, score))
        self._impute(turns, rewarded)
        return rewarded

    def _split(self, turn: Turn, score: Score | None) -> TurnReward:
        rewards = np.zeros(turn.count)
        if score is None or not score.valid:
            return TurnReward(rewards, rewards.copy(), score)
        if self.reward.timing == "terminal":
            rewards[-1] = score.value
            return TurnReward(rewards, rewards.copy(), score)
        split = self._checked_split(turn, score)[turn.start :].astype(np.float64)
        if self.reward.timing == "causal":
            return TurnReward(split, split.copy(), score)
        rewards[-1] = score.value
        return TurnReward(rewards, split, score)

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

    def _impute(self, turns: Sequence[Turn], rewarded: Sequence[TurnReward]) -> None:
        """Pays the running mean where there is no verdict; the mean takes rewards in by step, then by copy."""
        causal = self.reward.timing == "causal"
        due: dict[int, list[TurnReward]] = {}
        for turn, one in zip(turns, rewarded, strict=True):
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
