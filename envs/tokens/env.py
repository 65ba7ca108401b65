"""Holds TokenEnv and TokenVectorEnv, the token MDP as a Gymnasium environment and vector environment.

:class:`TokenVectorEnv` can also take a whole response per copy (:meth:`TokenVectorEnv.play`), which calls the reward
once instead of once per token. The MDP itself is in :mod:`~instructgym.envs.tokens.process`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.vector import AutoresetMode

from ...llm_backends import Tokenizer, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...rewards import Reward, Sample, Score
from ..process import ProcessEnv, ProcessVectorEnv, batch, check_copies, check_mask, unbatch
from .episode import GenerationSpec, PromptExample, TokenObserver, Turn, make_token_observer
from .process import TokenProcess, TokenSettings

DEFAULT_SETTINGS = TokenSettings()


class TokenParts:
    """A base of the single and the vector env, which builds the process from their arguments."""

    process: TokenProcess
    observer: TokenObserver

    def _build(
        self,
        copies: int,
        examples: Sequence[PromptExample],
        tokenizer: Any,
        reward: Any,
        settings: TokenSettings,
        observation: str,
        backend: Any,
        embedder: Any,
    ) -> None:
        if reward is None:
            raise InputError("reward is missing: pass an id, 'module:factory', a Reward or a function of the samples")
        # Without a backend the reward is built without one, so that its own default applies.
        defaults = {"embedder": resolve("embedder", embedder)} | ({} if backend is None else {"backend": backend})
        scorer = resolve("reward", reward, **defaults)
        self.process = TokenProcess(copies, examples, resolve("tokenizer", tokenizer), scorer, settings)
        spec = self.process.generation
        self.observer = make_token_observer(observation, spec.vocabulary, spec.context_length)

    @property
    def generation(self) -> GenerationSpec:
        """What a generator must know so that its responses end where the env ends them."""
        return self.process.generation

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose token ids are the actions."""
        return self.process.tokenizer

    @property
    def has_references(self) -> bool:
        """Whether every example has a reference response, which is ``info["reference"]`` at the end of an episode."""
        return all(example.reference is not None for example in self.process.examples)

    @property
    def reward(self) -> Reward:
        """The reward that scores responses."""
        return self.process.reward


class TokenEnv(TokenParts, ProcessEnv[TokenProcess, TokenObserver]):
    """A Gymnasium env whose episode is one response to a prompt, written token by token.

    ## Action Space
    ``Discrete(vocabulary)``: the id of the next token. If responses are constrained to an example's choices,
    ``info["action_mask"]`` (int8, shape (vocabulary,)) and :meth:`action_masks` mark the allowed tokens; any other
    token ends the episode.

    ## Observation Space
    Prompt and response so far. ``tokens``: a Dict of ``ids`` (``Box``, int32, shape (context_length,), right-padded
    with 0) and ``mask`` (int8, same shape, 1 where there is a token). ``onehot``: ``MultiDiscrete``, the same ids
    padded with ``vocabulary``, for learners that one-hot encode it; small vocabularies only.

    ## Rewards
    The score of the response, given according to the reward's timing: *terminal* and *whole* rewards at the last token
    (0 before), *causal* ones at every token. Without a valid score, the running mean of the valid rewards is given and
    ``info["reward_valid"]`` is False.

    ## Starting State
    A prompt, drawn in shuffled epochs. ``options={"index": i}`` selects an example, ``{"prefix": token ids or text}``
    starts from a response that is partly written. ``reset(seed=)`` restarts everything, including the data order and
    the reward's memory.

    ## Episode End
    ``terminated`` is True after the last token, and ``info["finish_reason"]`` is the reason: ``illegal`` (constrained:
    a token that is not allowed), ``choice`` (constrained: a choice is complete), ``eos`` (an end-of-sequence token),
    ``stop`` (a stop string) or ``length`` (``max_tokens`` are written). ``info["text"]`` is the response without the
    end-of-sequence token or stop string, ``info["reference"]`` the example's reference response; before the end, and
    if the example has none, it is None (envs without any reference have no such key).
    ``truncated`` is always False.

    Args:
        examples: the prompts that episodes continue.
        tokenizer: id or live tokenizer, whose token ids are the actions.
        reward: id, ``"module:factory"``, Reward or function of the samples that scores responses; required.
        settings: where responses end, and what to do without a valid score.
        observation: ``tokens`` or ``onehot``.
        backend: the judge LLM of a reward that needs one and names none; None for the reward's own default.
        embedder: id or live embedder, which computes sentence embeddings for rewards.
        render_mode: ``ansi``, to render the text so far, or None.

    Raises:
        ValueError: for bad settings, examples, parts and observations; see
            :class:`~instructgym.envs.tokens.process.TokenProcess`.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        examples: Sequence[PromptExample],
        tokenizer: Any = "embedded",
        reward: Any = None,
        settings: TokenSettings = DEFAULT_SETTINGS,
        observation: str = "tokens",
        backend: Any = None,
        embedder: Any = "minilm",
        render_mode: str | None = None,
    ) -> None:
        self._build(1, examples, tokenizer, reward, settings, observation, backend, embedder)
        self.observation_space, self.action_space = self.observer.space, self.process.action_space
        self.render_mode = render_mode

    def render(self) -> str | None:
        """Returns the text of prompt and response so far in render mode ``ansi``, else None."""
        return self.process.render(0) if self.render_mode == "ansi" else None


@runtime_checkable
class FastPathEnv(Protocol):
    """What token-level agents ask of a vector env: whole responses in, rewards per token out.

    :class:`TokenVectorEnv` is one; an env of your own that has these members is as good.
    """

    num_envs: int
    """Copies."""
    autoreset_mode: AutoresetMode
    """``DISABLED`` for training: an episode that has ended waits for :meth:`start`."""

    @property
    def group_size(self) -> int:
        """That many consecutive copies answer the same prompt; 1 without groups."""

    @property
    def generation(self) -> GenerationSpec:
        """What a generator has to know: vocabulary, end-of-sequence tokens, stop strings, most tokens, context."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose token ids are the actions."""

    @property
    def has_references(self) -> bool:
        """Whether every example has a reference response, ``info["reference"]`` at the end of its episodes."""

    def start(self, *, seed: int | None = None) -> dict[str, Any]:
        """Starts an episode in every copy without building observations, and returns the infos."""

    def prompts(self) -> list[np.ndarray]:
        """Returns one int32 array per copy: prompt and the tokens written so far, unpadded."""

    def constraints(self) -> list[Choices | None]:
        """Returns what each copy may still write; None where any token is allowed or the episode has ended."""

    def play(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> Played:
        """Writes a sequence of tokens per copy and returns their rewards."""

    def play_async(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> None:
        """Writes like :meth:`play`, and scores while the caller goes on."""

    def play_wait(self) -> Played:
        """Returns the outcome of the last :meth:`play_async`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the env is in its data, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""


def missing_members(env: Any) -> list[str]:
    """Returns the members of :class:`FastPathEnv` that an env lacks; none for one that agents can train on."""
    if isinstance(env, FastPathEnv):
        return []
    members = [*FastPathEnv.__annotations__, *(name for name in vars(FastPathEnv) if not name.startswith("_"))]
    return [name for name in members if not hasattr(env, name)]


@dataclass(eq=False)
class Played:
    """The outcome of one play of n copies: what stepping each through its tokens until it ended would have returned."""

    rewards: list[np.ndarray]
    """n arrays, float32, shape (tokens consumed,): the reward of each step."""
    credit: list[np.ndarray] | None
    """For a *whole* reward: n arrays, float32, shape (tokens consumed,), its split over the tokens, without the share
    of the tokens that were written before this play. None for other rewards."""
    n_consumed: np.ndarray
    """int64, shape (n,): number of tokens that were appended."""
    n_dropped: np.ndarray
    """int64, shape (n,): number of tokens that came after the end of the episode."""
    terminated: np.ndarray
    """bool, shape (n,): True for each copy whose episode ended in this play."""
    truncated: np.ndarray
    """bool, shape (n,): all False."""
    valid: np.ndarray
    """bool, shape (n,): False for a copy without a valid score, whose reward is imputed."""
    appended: list[np.ndarray]
    """n arrays, int32: tokens that the environment added; all empty, as an episode has a single turn."""
    infos: list[dict[str, Any]]
    """n infos: that of the copy's last step; for a copy that took no step, the same keys about its current state."""
    reset_infos: list[dict[str, Any]]
    """n infos. In autoreset mode ``SAME_STEP``: that of the reset of each copy that ended; else empty dicts."""
    turns: Sequence[Turn] = field(repr=False)
    """The turn of each copy."""
    observer: TokenObserver = field(repr=False)
    """Makes the observations."""

    @cached_property
    def final_obs(self) -> Any:
        """The batched observations after the last tokens, before any autoreset; computed on first access."""
        states = [turn.episode.state(turn.start + turn.count) for turn in self.turns]
        return batch(self.observer.space, self.observer.encode(states))

    def observation(self, i: int, t: int) -> Any:
        """Returns the observation of copy i after t of its tokens, which is the one before token t.

        Raises:
            IndexError: unless 0 <= t <= n_consumed[i].
        """
        turn = self.turns[i]
        if not 0 <= t <= turn.count:
            raise IndexError(f"copy {i} consumed {turn.count} tokens, there is no observation after {t}")
        return self.observer.encode([turn.episode.state(turn.start + t)])[0]


@dataclass(frozen=True, eq=False)
class _Written:
    """A play whose tokens are written and whose scores are due."""

    turns: list[Turn]
    """The turn of each copy."""
    samples: dict[int, Sample]
    """The samples to score, by copy."""
    n_dropped: np.ndarray
    """int64, shape (n,): number of tokens that came after the end of the episode."""
    reset_infos: list[dict[str, Any]]
    """The info of each copy's autoreset; empty for a copy without one."""


@dataclass(eq=False)
class _Pending:
    """A play whose responses are being scored in another thread."""

    written: _Written
    scores: Future[dict[int, Score]]
    outcome: Played | Exception | None = None
    """The finished play, or the error that scoring raised; None until the scores were waited for."""


class TokenVectorEnv(TokenParts, ProcessVectorEnv[TokenProcess, TokenObserver]):
    """A vector env of n copies of :class:`~instructgym.envs.tokens.env.TokenEnv` that share each call to the reward.

    Copy i seeded with s behaves as a single env seeded with s + i, except for what the copies share: the order of the
    examples (no example comes twice before all have come once) and the reward's memory. With ``group_size=g`` copies 0
    to g-1 answer one prompt, copies g to 2g-1 the next one, and so on; the copies of a group are reset together.

    ``reset(options={"reset_mask": bool array})`` resets some of the copies; a seed passed with it reseeds the requests
    of those copies and leaves data order and memory alone. ``index`` and ``prefix`` may be passed per copy.

    :meth:`play` takes a whole response per copy and returns what stepping the copies, token by token and side by side,
    would have returned, with two differences, because the reward is called once: a reward with memory sees all
    responses at the same time, and if a *causal* reward has no valid score for a response, all its tokens of this play
    get an imputed reward.

    Args:
        num_envs: number of copies, n.
        autoreset_mode: ``Disabled`` (the default), ``SameStep`` or ``NextStep``; ``group_size`` above 1 needs
            ``Disabled``.
        Others: see :class:`~instructgym.envs.tokens.env.TokenEnv`.
    """

    _pending: _Pending | None = None
    _executor: ThreadPoolExecutor | None = None

    def __init__(
        self,
        num_envs: int,
        examples: Sequence[PromptExample],
        tokenizer: Any = "embedded",
        reward: Any = None,
        settings: TokenSettings = DEFAULT_SETTINGS,
        observation: str = "tokens",
        backend: Any = None,
        embedder: Any = "minilm",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
    ) -> None:
        check_copies(num_envs)
        if settings.group_size > 1 and AutoresetMode(autoreset_mode) is not AutoresetMode.DISABLED:
            raise InputError(f"group_size={settings.group_size} needs autoreset_mode='Disabled': groups start together")
        self._build(num_envs, examples, tokenizer, reward, settings, observation, backend, embedder)
        self._setup(num_envs, self.process.action_space, render_mode, autoreset_mode)

    @property
    def group_size(self) -> int:
        """Number of consecutive copies that answer the same prompt."""
        return self.process.settings.group_size

    def start(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Starts episodes as in the base class; with a seed, waits first for the scores of a running play."""
        # A seed clears the reward's memory, which must not happen while another thread scores with it.
        if seed is not None and self._pending is not None:
            self._finish_pending(self._pending)
        return super().start(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Appends one token per copy; rewards are float64, shape (num_envs,).

        Raises:
            RuntimeError: while a play is not waited for, and in autoreset mode ``Disabled``, if an episode has ended.
        """
        self._refuse_pending()
        return super().step(actions)

    def render(self) -> tuple[str, ...] | None:
        """Returns the texts of prompt and response so far, one per copy, in render mode ``ansi``, else None."""
        if self.render_mode != "ansi":
            return None
        return tuple(self.process.render(copy) for copy in range(self.num_envs))

    def prompts(self) -> list[np.ndarray]:
        """Returns the token ids to continue: one int32 array per copy, prompt and response so far, unpadded."""
        return [self.process.state(copy).copy() for copy in range(self.num_envs)]

    def constraints(self) -> list[Choices | None]:
        """Returns what each copy may write after its :meth:`prompts`.

        An entry is None if any token is allowed or the episode has ended.
        """
        episodes = [self.process.episode(copy) for copy in range(self.num_envs)]
        return [
            None if episode.choices is None or episode.finish_reason else episode.choices.suffixes(episode.tokens)
            for episode in episodes
        ]

    def play(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> Played:
        """Appends a sequence of tokens per copy, from its current state to the end of its episode at most.

        Tokens after the end are dropped and counted. If a sequence ends before the episode does, the episode goes on;
        an empty sequence changes nothing.

        Args:
            actions: n sequences of token ids, of any lengths; those of copies that ``mask`` leaves out are ignored.
            mask: bool, shape (n,): the copies to play; None for all.

        Returns:
            The rewards and infos of all steps, see :class:`Played`.

        Raises:
            ValueError: in autoreset mode ``NEXT_STEP``, and for a token outside the vocabulary, even a dropped one.
            RuntimeError: if the episode of a copy to play has ended, or an earlier play was not waited for.
            InvalidRewardError: with ``on_invalid="raise"``, if there is no valid score.
        """
        written = self._write(actions, mask)
        return self._finish(written, self.process.scorer.score(written.samples))

    def play_async(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> None:
        """Appends tokens as :meth:`play` does and scores them in another thread; :meth:`play_wait` returns the outcome.

        Meanwhile copies may be reset and :meth:`prompts` read.
        """
        written = self._write(actions, mask)
        # One worker is enough: only one play may be pending.
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="play")
        self._pending = _Pending(written, self._executor.submit(self.process.scorer.score, written.samples))

    def play_wait(self) -> Played:
        """Waits for the scores of the last :meth:`play_async` and returns its outcome.

        Raises:
            RuntimeError: if there is no play to wait for.
            Exception: whatever the scoring raised.
        """
        if self._pending is None:
            raise RuntimeError("there is no play to wait for: call play_async() first")
        outcome = self._finish_pending(self._pending)
        self._pending = None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Returns data order, running mean and random generators, JSON-able; running episodes are not in it.

        Raises:
            RuntimeError: while a play is not waited for.
        """
        self._refuse_pending()
        return self.process.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned: the next ``reset()`` does what it would have done then.

        Raises:
            ValueError: if the state is that of another number of copies.
            RuntimeError: while a play is not waited for.
        """
        self._refuse_pending()
        self.process.load_state_dict(state)
        self._done[:] = False

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_pending()
        return vars(self) | {"_executor": None}  # threads can be neither copied nor pickled

    def close_extras(self, **kwargs: Any) -> None:
        """Waits for a running call to the reward and ends the scoring thread."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _write(self, actions: Sequence[Any], mask: np.ndarray | None) -> _Written:
        self._refuse_pending()
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            raise ValueError("play needs autoreset_mode 'Disabled' or 'SameStep'")
        if mask is not None:
            check_mask(mask, self.num_envs, "mask")
        selected = np.ones(self.num_envs, dtype=bool) if mask is None else mask
        sequences = unbatch(actions, self.num_envs)
        self._refuse_ended(self._done & selected)
        # All tokens are checked before one is written, so that an error leaves every episode as it was.
        tokens = [self.process.check_tokens(sequences[i]) if selected[i] else [] for i in range(self.num_envs)]
        turns = [Turn(episode := self.process.episode(i), len(episode.tokens)) for i in range(self.num_envs)]
        for copy, turn in enumerate(turns):
            turn.count = self.process.advance(copy, tokens[copy])
        dropped = np.array([len(sequence) - turn.count for sequence, turn in zip(tokens, turns, strict=True)], np.int64)
        return _Written(turns, self.process.scorer.samples(turns), dropped, self._autoreset(turns))

    def _autoreset(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Marks the copies whose episode ended as done or, in autoreset mode ``SAME_STEP``, resets them.

        Returns:
            The info of each copy's reset; empty for a copy without one.
        """
        # Ordered by the length of their turns: side by side, shorter ones end first and draw their examples first.
        ended = sorted((copy for copy, turn in enumerate(turns) if turn.ended), key=lambda copy: turns[copy].count)
        infos: list[dict[str, Any]] = [{} for _ in turns]
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._done[ended] = True
        elif ended:
            for copy, info in zip(ended, self.process.begin(ended), strict=True):
                infos[copy] = info
        return infos

    def _finish_pending(self, pending: _Pending) -> Played | Exception:
        # The outcome is remembered: a reset may finish a play before ``play_wait`` returns it.
        if pending.outcome is None:
            try:
                pending.outcome = self._finish(pending.written, pending.scores.result())
            except Exception as error:
                pending.outcome = error
        return pending.outcome

    def _finish(self, written: _Written, scores: dict[int, Score]) -> Played:
        turns = written.turns
        turn_rewards = self.process.scorer.assign_rewards(turns, scores)
        whole = self.reward.timing == "whole"
        return Played(
            rewards=[turn_reward.rewards.astype(np.float32) for turn_reward in turn_rewards],
            credit=[turn_reward.credit.astype(np.float32) for turn_reward in turn_rewards] if whole else None,
            n_consumed=np.array([turn.count for turn in turns], np.int64),
            n_dropped=written.n_dropped,
            terminated=np.array([turn.ended for turn in turns]),
            truncated=np.zeros(self.num_envs, dtype=bool),
            valid=np.array([turn_reward.valid for turn_reward in turn_rewards]),
            appended=[np.zeros(0, np.int32) for _ in turns],
            infos=[
                self.process.step_info(turn, turn_reward) for turn, turn_reward in zip(turns, turn_rewards, strict=True)
            ],
            reset_infos=written.reset_infos,
            turns=turns,
            observer=self.observer,
        )

    def _refuse_pending(self) -> None:
        if self._pending is not None:
            raise RuntimeError("a play is under way: call play_wait() first")

    def _reset_mask(self, mask: Any) -> np.ndarray:
        selected, size = super()._reset_mask(mask), self.process.settings.group_size
        groups = selected.reshape(-1, size)
        if (groups.any(axis=1) != groups.all(axis=1)).any():
            raise ValueError(f"options['reset_mask'] splits a group: copies are reset in groups of {size}")
        return selected
