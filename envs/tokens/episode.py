"""Holds one episode of the token MDP: its state, which tokens end it, its observations and its rewards.

Read :class:`TokenEpisode` first (tokens in, end and text out), then :class:`TokenScorer` (a response in, one reward per
token out). :mod:`~instructgym.envs.tokens.process` runs n episodes at once.
"""

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
    """An example: a prompt that an episode continues, with what is known about the right response."""

    id: str
    """Id of the example, the same in every run; examples with different prompts have different ids."""
    prompt: str
    """The text that the response continues, without a trailing blank. A control token that it spells is data."""
    reference: str | None = None
    """The right answer in the form that a response should have, without surrounding blanks; None if there is none."""
    choices: tuple[str, ...] = ()
    """The allowed answers (verbalizers), without surrounding blanks; empty if the answer is free."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able values that are passed to rewards and metrics."""
    markup: bool = False
    """Whether ``prompt`` is a chat as ``Tokenizer.chat_text`` writes it: its control tokens are the template's."""


@dataclass(frozen=True)
class GenerationSpec:
    """The rules of the env that a generator needs so that its responses end where the env ends them."""

    tokenizer: str
    """Name of the tokenizer; models whose tokenizer has this name use the same token ids."""
    vocabulary: int
    """Number of token ids, the size of the action space."""
    eos_ids: frozenset[int]
    """Ids of the tokens that end a response, control tokens among the stop strings included."""
    stop: tuple[str, ...]
    """Stop strings: texts that end a response."""
    max_tokens: int
    """Largest number of tokens of a response."""
    context_length: int
    """Largest number of tokens of prompt and response together."""


@dataclass(eq=False)
class TokenEpisode:
    """The episode of one copy."""

    index: int
    """Index of the example."""
    example: PromptExample
    """The example whose prompt the episode continues."""
    prompt: np.ndarray
    """int32, shape (prompt tokens,): token ids of the prompt; shared by episodes, never written to."""
    ids: np.ndarray
    """int32, shape (prompt tokens + max_tokens,): prompt and response, zeros where nothing is written yet."""
    base_seed: int
    """Seed from which the seed of the reward's sample is derived."""
    group: str
    """Number of the reset and of the group: episodes of one group answer one prompt, and rewards may compare them."""
    choices: Choices | None = None
    """The allowed responses if decoding is constrained, else None."""
    tokens: list[int] = field(default_factory=list)
    """Token ids of the response so far."""
    prefix_length: int = 0
    """Number of these tokens that come from ``options["prefix"]``."""
    finish_reason: str = ""
    """Why the episode ended: ``illegal``, ``choice``, ``eos``, ``stop`` or ``length``; empty while it is running."""
    text: str = ""
    """Text of the response without the end-of-sequence token or stop string that ended it; empty before the end."""

    def state(self, written: int | None = None) -> np.ndarray:
        """Returns the prompt and the first ``written`` response tokens (None for all), int32.

        The result is a view whose values never change: tokens are only appended.
        """
        return self.ids[: len(self.prompt) + (len(self.tokens) if written is None else written)]

    def response(self, tokenizer: Tokenizer) -> str:
        """Returns the text of the response so far."""
        return self.text if self.finish_reason else tokenizer.decode(self.tokens)

    def write(self, tokens: Sequence[int], tokenizer: Tokenizer, spec: GenerationSpec) -> int:
        """Appends tokens until the episode ends.

        Args:
            tokens: token ids in [0, vocabulary).
            tokenizer: decodes the response.
            spec: where responses end.

        Returns:
            Number of tokens that were appended, including the one that ended the episode.
        """
        written, prompt = self.tokens, len(self.prompt)
        stop = spec.stop
        if stop and len(tokens) > 1 and not any("\N{REPLACEMENT CHARACTER}" in text for text in stop):
            # If the whole text has no stop string, none of its beginnings has one: one check replaces one per token.
            # U+FFFD is the exception: it is decoded for a character of which later tokens add the missing bytes.
            whole = tokenizer.decode([*written, *tokens[: spec.max_tokens]])
            stop = stop if any(text in whole for text in stop) else ()
        for count, token in enumerate(tokens):
            if self.finish_reason:
                return count
            # Only prefixes of choices are looked up, as the first illegal token ends the episode: the cache of the trie
            # stays as small as the choices.
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
"""The observation modes, see :func:`make_token_observer`."""

ONEHOT_LIMIT = 65_536
"""Largest number of inputs of a learner's first layer: one-hot observations are for small vocabularies."""


class TokenObserver(ABC):
    """An observer that turns states (int32 arrays of token ids, prompt first) into observations."""

    space: spaces.Space[Any]
    """Space of one observation."""

    @abstractmethod
    def encode(self, states: Sequence[np.ndarray]) -> list[Any]:
        """Returns one observation per state; no two share memory."""


class TokenIds(TokenObserver):
    """An observer that returns token ids and a mask of the positions that hold a token.

    An observation is a Dict of ``ids`` (int32, shape (length,), right-padded with 0) and ``mask`` (int8, shape
    (length,), 1 where there is a token).

    Args:
        vocabulary: number of token ids.
        length: length of the arrays, in tokens.
    """

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


class OneHotTokens(TokenObserver):
    """An observer that returns token ids in a MultiDiscrete space, which learners one-hot encode.

    An observation is int64, shape (length,), right-padded with the id ``vocabulary``.

    Args:
        vocabulary: number of token ids.
        length: length of the array, in tokens.

    Raises:
        InputError: if the one-hot encoding would have more than :data:`ONEHOT_LIMIT` entries.
    """

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


def make_token_observer(mode: str, vocabulary: int, length: int) -> TokenObserver:
    """Returns the observer of a mode.

    Args:
        mode: ``tokens`` or ``onehot``.
        vocabulary: number of token ids.
        length: length of an observation, in tokens.

    Raises:
        ValueError: for an unknown mode, and for ``onehot`` if it would be too wide.
    """
    if mode == "tokens":
        return TokenIds(vocabulary, length)
    if mode == "onehot":
        return OneHotTokens(vocabulary, length)
    raise InputError(f"unknown observation mode {mode!r}: use {', '.join(TOKEN_OBSERVATIONS)}")


@dataclass(eq=False)
class Turn:
    """The tokens that were appended to one copy's episode in one call."""

    episode: TokenEpisode
    """The copy's episode."""
    start: int
    """Number of response tokens before the turn."""
    count: int = 0
    """Number of tokens that the turn appended."""

    @property
    def ended(self) -> bool:
        """Whether the turn ended the episode."""
        return bool(self.count and self.episode.finish_reason)


@dataclass
class TurnReward:
    """The rewards of a turn's tokens."""

    rewards: np.ndarray
    """float64, shape (count,): reward of each token."""
    credit: np.ndarray
    """float64, shape (count,): the split of a *whole* reward over the turn's tokens; for other timings the rewards."""
    score: Score | None = None
    """The score behind the rewards; None if no score was due."""

    @property
    def valid(self) -> bool:
        """False if there is no valid score and the rewards are imputed."""
        return self.score is None or self.score.valid


class TokenScorer:
    """A scorer of turns: calls the reward and splits each score over the tokens of its turn.

    The two are separate methods, :meth:`score` and :meth:`assign_rewards`, so that the call may run in another thread.

    Args:
        reward: scores responses.
        tokenizer: decodes unfinished responses.
        on_invalid: what to do without a valid score: ``retry`` or ``raise``.
    """

    def __init__(self, reward: Reward, tokenizer: Tokenizer, on_invalid: str) -> None:
        self.reward, self.tokenizer, self.on_invalid = reward, tokenizer, on_invalid
        self.mean = RunningMean()

    def reset(self) -> None:
        """Resets the running mean and clears the reward's memory."""
        self.reward.reset()
        self.mean = RunningMean()

    def samples(self, turns: Sequence[Turn]) -> dict[int, Sample]:
        """Returns the samples whose scores are due now, by position in ``turns``.

        A *causal* reward is due for every turn with tokens, any other for the turns that ended their episode.
        """
        causal = self.reward.timing == "causal"
        return {i: self._sample(turn.episode) for i, turn in enumerate(turns) if turn.ended or (causal and turn.count)}

    def score(self, samples: Mapping[int, Sample]) -> dict[int, Score]:
        """Scores all samples in one call and, with ``on_invalid="retry"``, those without a valid score once more."""
        if not samples:
            return {}
        retries = 1 if self.on_invalid == "retry" else 0
        scores = score_with_retries(self.reward, list(samples.values()), retries)
        return dict(zip(samples, scores, strict=True))

    def assign_rewards(self, turns: Sequence[Turn], scores: Mapping[int, Score]) -> list[TurnReward]:
        """Splits the scores over the tokens and imputes missing ones, as if the turns had been stepped together.

        Args:
            turns: the turns.
            scores: scores by position in ``turns``.

        Returns:
            The rewards of each turn.

        Raises:
            InputError: if ``per_token`` of a causal or whole reward is missing, not finite, or of the wrong length, or
                if that of a whole one does not sum to its value.
            InvalidRewardError: with ``on_invalid="raise"``, if there is no valid score.
        """
        rewards = []
        for i, turn in enumerate(turns):
            score = scores.get(i)
            if score is not None and not score.valid and self.on_invalid == "raise":
                raise InvalidRewardError(f"no verdict on a response to {turn.episode.example.id}: {score.feedback}")
            rewards.append(self._split(turn, score))
        self._impute(turns, rewards)
        return rewards

    def _split(self, turn: Turn, score: Score | None) -> TurnReward:
        rewards = np.zeros(turn.count)
        if score is None or not score.valid:
            return TurnReward(rewards, rewards.copy(), score)
        if self.reward.timing == "terminal":
            rewards[-1] = score.value
            return TurnReward(rewards, rewards.copy(), score)
        # per_token covers the whole response; the tokens before the turn have had their share.
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
            # The float32 parts may cancel, so the tolerance scales with the sum of their sizes.
            if abs(total - score.value) > 1e-4 * max(1.0, size, abs(score.value)):
                raise InputError(f"per_token of reward {name!r} sums to {total:.6g}, its value is {score.value:.6g}")
        return split

    def _impute(self, turns: Sequence[Turn], turn_rewards: Sequence[TurnReward]) -> None:
        """Sets the rewards without a valid score to the running mean, and adds the valid ones to it."""
        causal = self.reward.timing == "causal"
        due: dict[int, list[TurnReward]] = {}
        for turn, turn_reward in zip(turns, turn_rewards, strict=True):
            if turn_reward.score is not None:
                for step in range(turn.count) if causal else (turn.count - 1,):
                    due.setdefault(step, []).append(turn_reward)
        # As in stepping side by side, the valid rewards of a step are added before its missing ones are set.
        for step in sorted(due):
            for turn_reward in due[step]:
                if turn_reward.valid:
                    self.mean.add(float(turn_reward.rewards[step]))
            for turn_reward in due[step]:
                if not turn_reward.valid:
                    turn_reward.rewards[step] = turn_reward.credit[step] = self.mean.value

    def _sample(self, episode: TokenEpisode) -> Sample:
        example, count = episode.example, len(episode.tokens)
        # The policy did not write the prefix.
        mask = np.ones(count, dtype=bool)
        mask[: episode.prefix_length] = False
        return Sample(
            response=episode.response(self.tokenizer),
            prompt=example.prompt,
            reference=example.reference,
            prompt_ids=episode.prompt,
            token_ids=np.array(episode.tokens, np.int32),
            loss_mask=mask,
            episode_id=example.id,
            group=episode.group,
            seed=request_seed(episode.base_seed, "reward"),
            metadata=dict(example.metadata) | {"choices": example.choices, "finish_reason": episode.finish_reason},
        )
