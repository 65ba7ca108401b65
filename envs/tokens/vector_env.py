"""TokenVectorEnv: n copies of the token MDP, and the fast path that plays whole responses at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...rewards import Sample, Score
from ..process.faces import ProcessVectorEnv, check_copies, check_mask, unbatch
from .env import DEFAULT_SETTINGS, TokenParts
from .examples import PromptExample
from .observations import TokenObservation
from .played import Played
from .process import TokenProcess, TokenSettings
from .scoring import Turn


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

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None and self._pending is not None:  # a seed makes the reward forget: not while it scores
            self._settle(self._pending)
        return super().reset(seed=seed, options=options)

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
        paid = self.process.scorer.pay(turns, scores)
        whole = self.reward.timing == "whole"
        return Played(
            rewards=[one.rewards.astype(np.float32) for one in paid],
            credit=[one.credit.astype(np.float32) for one in paid] if whole else None,
            n_consumed=np.array([turn.count for turn in turns], np.int64),
            n_dropped=written.n_dropped,
            terminated=np.array([turn.ended for turn in turns]),
            truncated=np.zeros(self.num_envs, dtype=bool),
            valid=np.array([one.valid for one in paid]),
            appended=[np.zeros(0, np.int32) for _ in turns],
            infos=[self.process.step_info(turn, one) for turn, one in zip(turns, paid, strict=True)],
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
