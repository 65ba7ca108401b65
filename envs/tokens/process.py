"""Holds the token MDP for n copies at once: the state is prompt and response, an action appends a token.

:class:`~instructgym.envs.tokens.env.TokenEnv` and :class:`~instructgym.envs.tokens.env.TokenVectorEnv`, with the
latter's fast path ``play``, are thin wrappers of :class:`TokenProcess`. What ends an episode and how a score becomes
rewards is in :mod:`~instructgym.envs.tokens.episode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete

from ...llm_backends import Tokenizer
from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...llm_backends.parts import copy_with_parts
from ...rewards import Reward
from ..process import EpisodeSource, Transition, check_ids, check_index, check_on_invalid, check_options, copy_option
from .episode import GenerationSpec, PromptExample, TokenEpisode, TokenScorer, Turn, TurnReward


@dataclass(frozen=True)
class TokenSettings:
    """The settings of a token MDP, apart from its examples, tokenizer and reward."""

    max_tokens: int = 16
    """Largest number of tokens of a response."""
    stop: tuple[str, ...] = ()
    """Stop strings: each ends a response and is no part of its text."""
    constrained: bool = False
    """True: a response must be one of its example's choices; any other token ends the episode as ``illegal``."""
    on_invalid: str = "retry"
    """What to do without a valid score. ``retry``: ask the reward once more, then give the running mean of the valid
    rewards and set ``info["reward_valid"]`` to False; ``raise``: raise an InvalidRewardError."""
    context_length: int = 1024
    """Largest number of tokens of prompt and response together; the tokenizer's own limit holds too."""
    group_size: int = 1
    """Number of consecutive copies of a vector env that answer the same prompt."""


def take_settings(arguments: dict[str, Any], fixed: Sequence[str] = (), **defaults: Any) -> TokenSettings:
    """Takes the settings out of the keyword arguments of an environment.

    Args:
        arguments: keyword arguments of a user; the fields of :class:`TokenSettings` are removed from them.
        fixed: names of fields that the environment sets itself: they stay in ``arguments``, where they are refused as
            unknown.
        **defaults: values of the environment for fields that a user did not pass.
    """
    names = {field.name for field in fields(TokenSettings)} - set(fixed)
    values = defaults | {name: arguments.pop(name) for name in names & arguments.keys()}
    stop = values.get("stop", ())
    return TokenSettings(**values | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)})


class TokenProcess:
    """A token MDP that steps n copies with one call to the reward.

    Args:
        copies: number of copies.
        examples: the prompts that episodes continue.
        tokenizer: encodes prompts and decodes responses; its token ids are the actions.
        reward: scores responses.
        settings: where responses end, what to do without a valid score, and the size of groups.

    Raises:
        ValueError: for settings out of range, no example, prompts that differ and have the same id, a prompt that is
            empty or leaves no room for a response, and under ``constrained`` for an example without choices or with
            choices that cannot be written (longer than ``max_tokens``, equal in tokens); for choices with blanks around
            them; for a reward that reads token ids of another tokenizer.
    """

    def __init__(
        self,
        copies: int,
        examples: Sequence[PromptExample],
        tokenizer: Tokenizer,
        reward: Reward,
        settings: TokenSettings,
    ) -> None:
        _check_settings(settings, copies)
        reward.check_tokenizer(tokenizer)
        self.examples = list(examples)
        self.tokenizer, self.settings = tokenizer, settings
        self.generation = GenerationSpec(
            tokenizer=tokenizer.name,
            vocabulary=tokenizer.vocabulary,
            # Decoded texts do not show control tokens: one that is a stop string ends a response by its id.
            eos_ids=tokenizer.eos_ids | tokenizer.stop_ids(settings.stop),
            stop=tuple(settings.stop),
            max_tokens=settings.max_tokens,
            context_length=min(settings.context_length, tokenizer.context_length),
        )
        self.action_space = Discrete(self.generation.vocabulary)
        self.scorer = TokenScorer(reward, tokenizer, settings.on_invalid)
        self.source = EpisodeSource(len(self.examples))
        self.generators: list[np.random.Generator] = [np.random.default_rng() for _ in range(copies)]
        self.episodes: list[TokenEpisode | None] = [None] * copies
        self._prompts: dict[int, np.ndarray] = {}
        self._choices: dict[tuple[str, ...], Choices] = {}
        self._unseeded = True
        self._resets = 0
        self._has_tasks = any("task" in example.metadata for example in self.examples)
        self._has_references = any(example.reference is not None for example in self.examples)
        check_ids([(example.id, example.prompt) for example in self.examples])
        self._check_prompts()
        # Encodes all choices now, so that bad ones are reported before the first episode.
        if settings.constrained:
            for example in self.examples:
                self._choices_of(example)
        for example in self.examples:
            if padded := [choice for choice in example.choices if choice != choice.strip()]:
                raise InputError(
                    f"the choice {padded[0]!r} of example {example.id!r} has blanks around it, without which answers "
                    "are read: leave them out (an answer is written with a blank before it)"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenProcess:
        return copy_with_parts(self, memo, shared=("examples",))

    @property
    def reward(self) -> Reward:
        """The reward that scores responses."""
        return self.scorer.reward

    def restart(self, seed: int) -> None:
        """Resets everything that outlives an episode: data order (by ``seed``), the reward's memory, running mean."""
        self.scorer.reset()
        self.source.seed(seed)
        self._unseeded, self._resets = False, 0

    def begin(self, copies: Sequence[int], options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Starts an episode in each of the copies; the copies of a group continue the same example.

        Args:
            copies: indices of the copies, in whole groups.
            options: ``index`` (an int, or one per copy of the env) selects the example, ``prefix`` (token ids or text,
                or one of them per copy) is the response that is written already.

        Returns:
            One info per copy.

        Raises:
            ValueError: for an unknown option, an index that is out of range or differs within a group, and a prefix
                that leaves no room or ends the episode.
        """
        options = options or {}
        check_options(options)
        # All options are checked before an episode is replaced or an example drawn.
        indices = {copy: copy_option(options, "index", copy, len(self.episodes)) for copy in copies}
        for index in indices.values():
            check_index(index, len(self.examples))
        prefixes = {copy: self._prefix(options.get("prefix"), copy) for copy in copies}
        # No seed was ever set: the data order is drawn from the generator of the first copy.
        if self._unseeded:
            self.restart(int(self.generators[copies[0]].integers(2**31)))
        size = self.settings.group_size
        drawn: dict[int, int] = {}
        for copy in copies:
            group, index = copy // size, indices[copy]
            if group not in drawn:
                drawn[group] = self.source.draw() if index is None else int(index)
            elif index is not None and int(index) != drawn[group]:
                raise ValueError(f"options['index'] must be the same for the {size} copies of a group, got {index}")
            self.episodes[copy] = self._new_episode(drawn[group], copy, prefixes[copy])
        self._resets += 1
        return [self._start_info(self.episode(copy)) for copy in copies]

    def step(self, actions: Sequence[Any], copies: Sequence[int]) -> list[Transition]:
        """Appends one token per copy, with at most one call to the reward (and one retry) for all of them.

        Args:
            actions: one token id per copy.
            copies: indices of the copies; their episodes must be running.

        Returns:
            One transition per copy.

        Raises:
            ValueError: for an action outside the vocabulary; nothing is written then.
            RuntimeError: if an episode has ended or none was started.
            InvalidRewardError: with ``on_invalid="raise"``, if there is no valid score.
        """
        tokens = [self._token(action) for action in actions]
        turns = []
        for copy, token in zip(copies, tokens, strict=True):
            turns.append(turn := Turn(self.running(copy), len(self.running(copy).tokens)))
            turn.count = self.advance(copy, (token,))
        return [
            Transition(
                float(turn_reward.rewards[-1]), bool(turn.episode.finish_reason), self.step_info(turn, turn_reward)
            )
            for turn, turn_reward in zip(turns, self.score(turns), strict=True)
        ]

    def advance(self, copy: int, tokens: Sequence[int]) -> int:
        """Appends tokens, ids in [0, vocabulary), until the episode ends, and returns how many; scores nothing."""
        return self.episode(copy).write(tokens, self.tokenizer, self.generation)

    def score(self, turns: Sequence[Turn]) -> list[TurnReward]:
        """Returns the rewards of the turns, with one call to the reward for all scores that are due."""
        return self.scorer.assign_rewards(turns, self.scorer.score(self.scorer.samples(turns)))

    def mask(self, copy: int) -> np.ndarray:
        """Returns the tokens that are allowed next: int8, shape (vocabulary,); all 1 once the episode has ended."""
        return self._mask(self.episode(copy))

    def state(self, copy: int) -> np.ndarray:
        """Returns the state from which the copy's observation is made: token ids of prompt and response, int32."""
        return self.episode(copy).state()

    def episode(self, copy: int) -> TokenEpisode:
        """Returns the copy's episode.

        Raises:
            RuntimeError: before the first reset.
        """
        episode = self.episodes[copy]
        if episode is None:
            raise RuntimeError("call reset() before anything else")
        return episode

    def running(self, copy: int) -> TokenEpisode:
        """Returns the copy's episode, which must be running.

        Raises:
            RuntimeError: before the first reset, and if the episode has ended.
        """
        episode = self.episode(copy)
        if episode.finish_reason:
            raise RuntimeError(f"the episode has ended ({episode.finish_reason}): call reset()")
        return episode

    def render(self, copy: int) -> str:
        """Returns the text of prompt and response so far; empty before the first reset."""
        episode = self.episodes[copy]
        return "" if episode is None else episode.example.prompt + self.tokenizer.decode(episode.tokens)

    def state_dict(self) -> dict[str, Any]:
        """Returns data order, running mean and random generators, JSON-able.

        Running episodes and the reward's memory are not in it.
        """
        return {
            "source": self.source.state_dict(),
            "mean": [self.scorer.mean.total, self.scorer.mean.count],
            "generators": [generator.bit_generator.state for generator in self.generators],
            "unseeded": self._unseeded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned: the next reset does what it would have done then.

        Running episodes are dropped and the reward's memory is cleared.

        Raises:
            ValueError: if the state is that of another number of copies.
        """
        if len(state["generators"]) != len(self.generators):
            raise InputError(f"the state is of {len(state['generators'])} copies, this env has {len(self.generators)}")
        self.scorer.reset()
        self.scorer.mean.total, self.scorer.mean.count = float(state["mean"][0]), int(state["mean"][1])
        self.source.load_state_dict(state["source"])
        self.generators = [np.random.default_rng() for _ in self.generators]
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = saved
        self.episodes = [None] * len(self.episodes)
        self._unseeded = bool(state["unseeded"])

    def check_tokens(self, tokens: Any) -> list[int]:
        """Returns a sequence of token ids as a list.

        Raises:
            ValueError: unless it is one-dimensional and all ids are integers in [0, vocabulary).
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"token ids must be a one-dimensional sequence of integers, got {tokens!r}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.generation.vocabulary):
            raise ValueError(f"token ids must be in [0, {self.generation.vocabulary}), got {ids.min()} to {ids.max()}")
        return ids.tolist()

    def step_info(self, turn: Turn, turn_reward: TurnReward) -> dict[str, Any]:
        """Returns the info of a turn's last step."""
        episode, written = turn.episode, turn.start + turn.count
        score = turn_reward.score
        info = self._start_info(episode)
        # The same keys at every step, whatever the example, for buffers that have an array per key.
        if self._has_tasks:
            info.setdefault("task", "")
        if self._has_references:
            info["reference"] = episode.example.reference if episode.finish_reason else None
        return info | {
            "step": written,
            "text": episode.text,
            "finish_reason": episode.finish_reason,
            "reward_valid": turn_reward.valid,
            "invalid_reason": "" if turn_reward.valid or score is None else score.feedback,
            "reward_terms": {k: float(v) for k, v in score.terms.items()} if score is not None and score.valid else {},
            "judge_calls": 0 if score is None else score.calls,
        }

    def _start_info(self, episode: TokenEpisode) -> dict[str, Any]:
        info: dict[str, Any] = {
            "episode_id": episode.example.id,
            "index": episode.index,
            "prompt_tokens": len(episode.prompt),
        }
        if "task" in episode.example.metadata:
            info["task"] = episode.example.metadata["task"]
        if episode.choices is not None:
            info["action_mask"] = self._mask(episode)
        return info

    def _mask(self, episode: TokenEpisode) -> np.ndarray:
        if episode.choices is None or episode.finish_reason:
            return np.ones(self.generation.vocabulary, np.int8)
        mask = np.zeros(self.generation.vocabulary, np.int8)
        mask[episode.choices.allowed(episode.tokens)] = 1
        return mask

    def _token(self, action: Any) -> int:
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} is not in {self.action_space}")
        return int(action)

    def _new_episode(self, index: int, copy: int, prefix: Sequence[int]) -> TokenEpisode:
        example, prompt, room = self.examples[index], self._prompt(index), self.settings.max_tokens
        ids = np.zeros(len(prompt) + room, np.int32)
        ids[: len(prompt)] = prompt
        choices = self._choices_of(example) if self.settings.constrained else None
        base_seed = int(self.generators[copy].integers(2**62))
        # The prefix is written like the tokens of a policy, which shows whether it ends the episode.
        group = f"{self._resets}/{copy // self.settings.group_size}"
        episode = TokenEpisode(index, example, prompt, ids, base_seed, group, choices, prefix_length=len(prefix))
        episode.write(prefix, self.tokenizer, self.generation)
        if episode.finish_reason:
            raise ValueError(
                f"options['prefix'] of {len(prefix)} tokens already ends the episode ({episode.finish_reason}): "
                f"give a shorter one (max_tokens is {room})"
            )
        return episode

    def _prefix(self, value: Any, copy: int) -> list[int]:
        # A flat sequence of integers is one prefix for all copies, any other sequence has one entry per copy.
        if isinstance(value, list | tuple | np.ndarray) and not _is_ids(value):
            value = copy_option({"prefix": value}, "prefix", copy, len(self.episodes))
        if value is None:
            return []
        if isinstance(value, str):
            return list(self.tokenizer.encode_continuation(value))
        try:
            return self.check_tokens(value)
        except ValueError as error:
            raise ValueError(f"options['prefix'] must be a text or token ids: {error}") from None

    def _prompt(self, index: int) -> np.ndarray:
        if index not in self._prompts:
            example = self.examples[index]
            self._remember_prompt(index, self.tokenizer.encode(example.prompt, example.markup))
        return self._prompts[index]

    def _remember_prompt(self, index: int, ids: Sequence[int]) -> None:
        example, limit, room = self.examples[index], self.generation.context_length, self.settings.max_tokens
        if not len(ids):
            raise InputError(f"the prompt of example {example.id!r} is empty: give it at least one token")
        if len(ids) + room > limit:
            raise InputError(
                f"the prompt of example {example.id!r} has {len(ids)} tokens, with max_tokens={room} for the response "
                f"that exceeds the context of {limit}: shorten the prompt, lower max_tokens or raise context_length "
                f"(this tokenizer's model reads {self.tokenizer.context_length})"
            )
        self._prompts[index] = np.array(ids, np.int32)

    def _check_prompts(self) -> None:
        # A token is at least one byte, so a prompt with few enough bytes fits; only the others are encoded here.
        room = self.generation.context_length - self.settings.max_tokens - self.tokenizer.hf.num_special_tokens_to_add()
        doubtful = [
            i
            for i, example in enumerate(self.examples)
            if not example.prompt.strip() or len(example.prompt.encode("utf-8", "replace")) > room
        ]
        for markup in (False, True):
            indices = [i for i in doubtful if self.examples[i].markup == markup]
            encoded = self.tokenizer.encode_batch([self.examples[i].prompt for i in indices], markup)
            for index, ids in zip(indices, encoded, strict=True):
                self._remember_prompt(index, ids)

    def _choices_of(self, example: PromptExample) -> Choices:
        words = tuple(example.choices)
        if words not in self._choices:
            if not words:
                raise InputError(f"constrained responses need choices, example {example.id!r} has none")
            # The prompt ends without a blank, so a choice is written with one before it.
            ids = [self.tokenizer.encode_continuation(" " + word) for word in words]
            longest = max(map(len, ids))
            if longest > self.settings.max_tokens:
                raise InputError(
                    f"a choice of example {example.id!r} has {longest} tokens, more than "
                    f"max_tokens={self.settings.max_tokens}: raise that"
                )
            if len({tuple(tokens) for tokens in ids}) < len(ids):
                raise InputError(f"choices of example {example.id!r} are the same in tokens: {', '.join(words)}")
            try:
                self._choices[words] = Choices(ids, next(iter(self.tokenizer.closing()), None))
            except ValueError as error:
                raise InputError(f"choices of example {example.id!r}: {error}") from error
        return self._choices[words]


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return all(isinstance(item, int | np.integer) for item in value)


def _check_settings(settings: TokenSettings, copies: int) -> None:
    if settings.max_tokens < 1 or settings.context_length < 2:
        raise InputError(
            f"max_tokens must be at least 1 and context_length at least 2, got {settings.max_tokens} and "
            f"{settings.context_length}"
        )
    check_on_invalid(settings.on_invalid)
    if isinstance(settings.stop, str) or not all(isinstance(text, str) and text for text in settings.stop):
        raise InputError(f"stop must be a tuple of non-empty texts, got {settings.stop!r}")
    if settings.group_size < 1 or copies % settings.group_size:
        raise InputError(f"group_size must divide the number of copies ({copies}), got {settings.group_size}")
