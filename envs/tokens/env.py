"""TokenEnv: the token MDP as a Gymnasium environment."""

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
from .episode import GenerationSpec, PromptExample, TokenObservation, Turn, make_token_observation
from .process import TokenProcess, TokenSettings

DEFAULT_SETTINGS = TokenSettings()


class TokenParts:
    """What the single and the vector env have in common: building the process from arguments."""

    process: TokenProcess
    observer: TokenObservation

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
        defaults = {"embedder": resolve("embedder", embedder)} | ({} if backend is None else {"backend": backend})
        scorer = resolve("reward", reward, **defaults)
        self.process = TokenProcess(copies, examples, resolve("tokenizer", tokenizer), scorer, settings)
        spec = self.process.generation
        self.observer = make_token_observation(observation, spec.vocabulary, spec.context_length)

    @property
    def generation(self) -> GenerationSpec:
        """What a generator has to know to write responses that the env takes whole."""
        return self.process.generation

    @property
    def tokenizer(self) -> Tokenizer:
        """What a token is."""
        return self.process.tokenizer

    @property
    def has_references(self) -> bool:
        """Whether every example has a reference response, the ``info["reference"]`` of its episodes' last steps."""
        return all(example.reference is not None for example in self.process.examples)

    @property
    def reward(self) -> Reward:
        """The reward."""
        return self.process.reward


class TokenEnv(TokenParts, ProcessEnv[TokenProcess, TokenObservation]):
    """An episode is one response to a prompt, written token by token.

    ## Action Space
    ``Discrete(vocabulary)``: the next token. Where responses are constrained to an example's choices,
    ``info["action_mask"]`` (int8) and :meth:`action_masks` say which tokens are allowed; another one ends the episode.

    ## Observation Space
    ``tokens``: a Dict of ``ids`` (``Box``, int32, shape (context_length,), prompt and response, right-padded with 0)
    and ``mask`` (int8, 1 where there is a token). ``onehot``: ``MultiDiscrete``, the same ids with ``vocabulary`` as
    padding, for learners that one-hot it; small vocabularies only.

    ## Rewards By the timing of the reward: *terminal* and *whole* rewards are given at the last token, *causal* ones at
    every token. Where there is no verdict, the running mean of valid rewards is given and ``info["reward_valid"]`` is
    False.

    ## Starting State
    A prompt, drawn in shuffled epochs; ``options={"index": i}`` chooses one, ``{"prefix": token ids or text}`` starts
    from a response that is partly written. ``reset(seed=)`` restores everything, the data order and the reward's memory
    included.

    ## Episode End
    ``terminated``, and ``info["finish_reason"]`` says why: ``illegal`` or ``choice`` (constrained: a token that is not
    allowed, a choice complete), ``eos``, ``stop`` (a stop string; neither is part of ``info["text"]``) or ``length``
    (``max_tokens`` written). ``info["reference"]`` is then the example's reference response, if it has one.

    Args:
        examples: the prompts.
        tokenizer: what a token is.
        reward: scores responses.
        settings: where responses end, what to do without a verdict.
        observation: ``tokens`` or ``onehot``.
        backend: the judge LLM of rewards that need one and name none; the reward's own default if None.
        embedder: sentence embeddings for rewards.
        render_mode: ``ansi`` or None.

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
        """Prompt and response so far, in render mode ``ansi``."""
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
    """The outcome of one play of n copies, the same as that of stepping each through its tokens until it ended."""

    rewards: list[np.ndarray]
    """n arrays, float32, shape (tokens consumed,): the reward of each step."""
    credit: list[np.ndarray] | None
    """For a *whole* reward, likewise: its split over the tokens. The share of tokens written before is not in it."""
    n_consumed: np.ndarray
    """int64, shape (n,): tokens taken."""
    n_dropped: np.ndarray
    """int64, shape (n,): tokens that came after the end."""
    terminated: np.ndarray
    """bool, shape (n,): whose episode ended in this play."""
    truncated: np.ndarray
    """bool, shape (n,): all False."""
    valid: np.ndarray
    """bool, shape (n,): False where there was no verdict and rewards are imputed."""
    appended: list[np.ndarray]
    """n arrays, int32: tokens that the environment added; none in a single turn."""
    infos: list[dict[str, Any]]
    """The info of each copy's last step; of a copy that took none, the same keys about where it stands."""
    reset_infos: list[dict[str, Any]]
    """In autoreset mode ``SAME_STEP``, the info of the reset of each copy that ended; else empty."""
    turns: Sequence[Turn] = field(repr=False)
    observer: TokenObservation = field(repr=False)

    @cached_property
    def final_obs(self) -> Any:
        """The batched observations after the last tokens, before any autoreset; made when asked for."""
        states = [turn.episode.state(turn.start + turn.count) for turn in self.turns]
        return batch(self.observer.space, self.observer.encode(states))

    def observation(self, i: int, t: int) -> Any:
        """Copy i's observation after t of its tokens, before token t.

        Raises:
            IndexError: unless 0 <= t <= n_consumed[i].
        """
        turn = self.turns[i]
        if not 0 <= t <= turn.count:
            raise IndexError(f"copy {i} consumed {turn.count} tokens, there is no observation after {t}")
        return self.observer.encode([turn.episode.state(turn.start + t)])[0]


@dataclass(frozen=True, eq=False)
class _Written:
    """A play whose tokens are consumed."""

    turns: list[Turn]
    samples: dict[int, Sample]
    n_dropped: np.ndarray
    reset_infos: list[dict[str, Any]]


@dataclass(eq=False)
class _Pending:
    """A play whose scores are on their way."""

    written: _Written
    scores: Future[dict[int, Score]]
    outcome: Played | Exception | None = None


class TokenVectorEnv(TokenParts, ProcessVectorEnv[TokenProcess, TokenObservation]):
    """n copies of :class:`~instructgym.envs.tokens.env.TokenEnv` that share one batched call to the reward.

    Copy i seeded with s behaves as a single env seeded with s + i, but for what the copies share: the order of the
    examples (no example twice before all came once) and the reward's memory. With ``group_size=g`` copies 0 to g-1
    answer one prompt, and so on; they are reset together.

    ``reset(options={"reset_mask": bool array})`` resets some copies; a seed given with it reseeds those copies'
    requests and leaves data order and memory alone. ``index`` and ``prefix`` may be given per copy.

    :meth:`play` takes a whole response per copy and says what stepping the copies, token by token and side by side,
    would have said, but the reward is called once: a reward with memory sees all responses at the same time, and a
    *causal* reward without a verdict on a response leaves all its tokens of this play without one.

    Args:
        num_envs: n.
        autoreset_mode: ``Disabled`` (the default), ``SameStep`` or ``NextStep``; groups need ``Disabled``.
        Others: as of :class:`~instructgym.envs.tokens.env.TokenEnv`.
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
        """That many consecutive copies answer the same prompt."""
        return self.process.settings.group_size

    def start(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if seed is not None and self._pending is not None:  # a seed makes the reward forget: not while it scores
            self._settle(self._pending)
        return super().start(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Appends one token per copy; rewards are float64, shape (num_envs,)."""
        self._refuse_pending()
        return super().step(actions)

    def render(self) -> tuple[str, ...] | None:
        """Prompt and response so far, one text per copy, in render mode ``ansi``."""
        if self.render_mode != "ansi":
            return None
        return tuple(self.process.render(copy) for copy in range(self.num_envs))

    def prompts(self) -> list[np.ndarray]:
        """What to continue: one int32 array per copy, prompt and the tokens written so far, unpadded."""
        return [self.process.state(copy).copy() for copy in range(self.num_envs)]

    def constraints(self) -> list[Choices | None]:
        """What each copy may still write, behind :meth:`prompts`; None where any token is allowed or it has ended."""
        episodes = [self.process.episode(copy) for copy in range(self.num_envs)]
        return [
            None if episode.choices is None or episode.finish_reason else episode.choices.after(episode.tokens)
            for episode in episodes
        ]

    def play(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> Played:
        """Writes a sequence of tokens per copy, from where it stands to the end of its episode.

        Tokens after the end are dropped and counted. A sequence that ends before its episode leaves it running, and an
        empty one changes nothing.

        Args:
            actions: n sequences of token ids, of any lengths; those where ``mask`` is False are ignored.
            mask: bool, shape (n,): the copies to play; all by default.

        Raises:
            ValueError: in autoreset mode ``NEXT_STEP``, and for a token, dropped ones included, outside the vocabulary.
            RuntimeError: where a copy to play has ended, or an earlier play was not waited for.
            InvalidRewardError: with ``on_invalid="raise"``, where there is no verdict.
        """
        written = self._write(actions, mask)
        return self._finish(written, self.process.scorer.ask(written.samples))

    def play_async(self, actions: Sequence[Any], mask: np.ndarray | None = None) -> None:
        """Writes like :meth:`play` and scores in a thread of its own; :meth:`play_wait` has the outcome.

        Copies may be reset and :meth:`prompts` read at once.
        """
        written = self._write(actions, mask)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="play")
        self._pending = _Pending(written, self._executor.submit(self.process.scorer.ask, written.samples))

    def play_wait(self) -> Played:
        """The outcome of the last :meth:`play_async`.

        Raises:
            RuntimeError: if there is none.
            Exception: whatever the scoring raised.
        """
        if self._pending is None:
            raise RuntimeError("there is no play to wait for: call play_async() first")
        outcome = self._settle(self._pending)
        self._pending = None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Data order, running mean and random generators, JSON-able; running episodes are not in it.

        Raises:
            RuntimeError: while a play is not waited for.
        """
        self._refuse_pending()
        return self.process.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`: the next ``reset()`` does what it would have done there.

        Raises:
            ValueError: if the state is of another number of copies.
            RuntimeError: while a play is not waited for.
        """
        self._refuse_pending()
        self.process.load_state_dict(state)
        self._done[:] = False

    def close_extras(self, **kwargs: Any) -> None:
        """Waits for a score on its way and ends the thread."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _write(self, actions: Sequence[Any], mask: np.ndarray | None) -> _Written:
        self._refuse_pending()
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            raise ValueError("play needs autoreset_mode 'Disabled' or 'SameStep'")
        if mask is not None:
            check_mask(mask, self.num_envs, "mask")
        chosen = np.ones(self.num_envs, dtype=bool) if mask is None else mask
        taken = unbatch(actions, self.num_envs)
        self._refuse_ended(self._done & chosen)
        tokens = [self.process.check_tokens(taken[i]) if chosen[i] else [] for i in range(self.num_envs)]
        turns = [Turn(episode := self.process.episode(i), len(episode.tokens)) for i in range(self.num_envs)]
        for copy, turn in enumerate(turns):
            turn.count = self.process.advance(copy, tokens[copy])
        dropped = np.array([len(mine) - turn.count for mine, turn in zip(tokens, turns, strict=True)], np.int64)
        return _Written(turns, self.process.scorer.samples(turns), dropped, self._autoreset(turns))

    def _autoreset(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Notes which copies have ended, and resets them where the mode says so, in the order of their ends."""
        ended = sorted((copy for copy, turn in enumerate(turns) if turn.ended), key=lambda copy: turns[copy].count)
        infos: list[dict[str, Any]] = [{} for _ in turns]
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._done[ended] = True
        elif ended:
            for copy, info in zip(ended, self.process.begin(ended), strict=True):
                infos[copy] = info
        return infos

    def _settle(self, pending: _Pending) -> Played | Exception:
        if pending.outcome is None:
            try:
                pending.outcome = self._finish(pending.written, pending.scores.result())
            except Exception as error:
                pending.outcome = error
        return pending.outcome

    def _finish(self, written: _Written, scores: dict[int, Score]) -> Played:
        turns = written.turns
        rewarded = self.process.scorer.assign_rewards(turns, scores)
        whole = self.reward.timing == "whole"
        return Played(
            rewards=[one.rewards.astype(np.float32) for one in rewarded],
            credit=[one.credit.astype(np.float32) for one in rewarded] if whole else None,
            n_consumed=np.array([turn.count for turn in turns], np.int64),
            n_dropped=written.n_dropped,
            terminated=np.array([turn.ended for turn in turns]),
            truncated=np.zeros(self.num_envs, dtype=bool),
            valid=np.array([one.valid for one in rewarded]),
            appended=[np.zeros(0, np.int32) for _ in turns],
            infos=[self.process.step_info(turn, one) for turn, one in zip(turns, rewarded, strict=True)],
            reset_infos=written.reset_infos,
            turns=turns,
            observer=self.observer,
        )

    def _refuse_pending(self) -> None:
        if self._pending is not None:
            raise RuntimeError("a play is under way: call play_wait() first")

    def _reset_mask(self, mask: Any) -> np.ndarray:
        chosen, size = super()._reset_mask(mask), self.process.settings.group_size
        groups = chosen.reshape(-1, size)
        if (groups.any(axis=1) != groups.all(axis=1)).any():
            raise ValueError(f"options['reset_mask'] splits a group: copies are reset in groups of {size}")
        return chosen
