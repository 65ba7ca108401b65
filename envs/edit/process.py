"""The edit MDP itself, for n copies at once: one request per role and step, however many copies there are.

The Gymnasium env, the Gymnasium vector env and the stable-baselines3 VecEnv are thin faces of this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Backend, BackendError, ContextLengthError, Embedder, request_seed, resolve
from ...rewards import Reward, Sample, Score, eliminated_by, score_with_retries
from ..process import (
    EpisodeSource,
    InvalidRewardError,
    RunningMean,
    Transition,
    Unicode,
    check_index,
    check_options,
    copy_option,
)
from ..tasks.instruction.seeds import Instruction
from .operators import Edit, Operator

OBSERVATIONS = ("last_edit", "embedding", "text")


@dataclass(frozen=True)
class EditState:
    """The state of one copy: what an observation may be made of."""

    text: str
    last_operation: int | None
    """Index of the last executed operation; None before the first."""
    step: int
    mask: np.ndarray | None = None
    """The possible actions, where the text does not tell them."""


class EditObservation(ABC):
    """Turns states into observations, a batch at a time."""

    space: spaces.Space[Any]

    @abstractmethod
    def encode(self, states: Sequence[EditState]) -> list[Any]:
        """One observation per state; no two share memory."""


class LastEdit(EditObservation):
    """float32 one-hot of the last executed operation, shape (operations,); zeros at the start (TeaMs-RL's)."""

    def __init__(self, operations: int) -> None:
        self.space = spaces.Box(0.0, 1.0, (operations,), np.float32)
        self._operations = operations

    def encode(self, states: Sequence[EditState]) -> list[np.ndarray]:
        rows = [np.zeros(self._operations, np.float32) for _ in states]
        for row, state in zip(rows, states, strict=True):
            if state.last_operation is not None:
                row[state.last_operation] = 1.0
        return rows


class LastEditEmbedding(EditObservation):
    """Dict of ``last_edit`` as above, ``progress`` (step / horizon, shape (1,)) and the text's ``embedding`` ((d,)).

    With ``actions``, the entries of a mask, also ``action_mask``: float32, shape (actions,), 1 where possible.
    """

    def __init__(self, operations: int, horizon: int, embedder: Embedder, actions: int = 0) -> None:
        self._last_edit, self._horizon, self._embedder = LastEdit(operations), horizon, embedder
        parts: dict[str, spaces.Space[Any]] = {
            "last_edit": self._last_edit.space,
            "progress": spaces.Box(0.0, 1.0, (1,), np.float32),
            "embedding": spaces.Box(-1.0, 1.0, (embedder.dimension,), np.float32),
        }
        if actions:
            parts["action_mask"] = spaces.Box(0.0, 1.0, (actions,), np.float32)
        self.space = spaces.Dict(parts)

    def encode(self, states: Sequence[EditState]) -> list[dict[str, np.ndarray]]:
        vectors = np.clip(self._embedder.embed([state.text for state in states]), -1.0, 1.0)
        return [
            {
                "last_edit": last,
                "progress": np.array([min(state.step / self._horizon, 1.0)], np.float32),
                "embedding": vector.copy(),
            }
            | ({} if state.mask is None else {"action_mask": state.mask.astype(np.float32)})
            for state, last, vector in zip(states, self._last_edit.encode(states), vectors, strict=True)
        ]


class TextObservation(EditObservation):
    """The text itself, a str."""

    def __init__(self) -> None:
        self.space = Unicode()

    def encode(self, states: Sequence[EditState]) -> list[str]:
        return [state.text for state in states]


def make_observation(mode: str, operations: int, horizon: int, embedder: Any, actions: int = 0) -> EditObservation:
    """The observation of the given mode, one of :data:`OBSERVATIONS`.

    Args:
        mode: which.
        operations: entries of the last edit's one-hot.
        horizon: edits per episode.
        embedder: of ``embedding``.
        actions: entries of the mask that ``embedding`` shows; 0 for none.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode == "last_edit":
        return LastEdit(operations)
    if mode == "embedding":
        return LastEditEmbedding(operations, horizon, resolve("embedder", embedder), actions)
    if mode == "text":
        return TextObservation()
    raise ValueError(f"unknown observation mode {mode!r}: use {', '.join(OBSERVATIONS)}")


@dataclass(frozen=True)
class EditSettings:
    """What defines an edit MDP besides its parts."""

    horizon: int = 6
    """Edits per episode at most."""
    carry_text: bool = False
    """Start an episode from the text the last one ended with (TeaMs-RL's released code), not from a new seed."""
    elimination: tuple[str, ...] = ()
    """String rules (see ``rewards.elimination``) that end an episode, with reward 0, when an edit breaks one."""
    elimination_ends: bool = True
    """False: an eliminated edit leaves the text as it was, is paid 0, and the episode goes on."""
    on_invalid: str = "retry"
    """``retry``: ask once more, then pay the running mean of valid rewards and say so; ``raise``: stop."""


@dataclass
class EditEpisode:
    """One copy's episode."""

    index: int
    """Which instruction."""
    start: str
    """The text at the start."""
    document: Any
    """What is edited: a text, or an object whose ``str()`` is its text."""
    base_seed: int
    """From which the seeds of the episode's requests are derived."""
    step: int = 0
    last_operation: int | None = None
    history: list[str] = field(default_factory=list)
    """Lines for ``render``."""

    @property
    def text(self) -> str:
        """The text as it stands."""
        return str(self.document)

    @property
    def state(self) -> EditState:
        """What observations are made of."""
        return EditState(self.text, self.last_operation, self.step)


@dataclass
class EditStep:
    """One copy's step in the making."""

    copy: int
    edit: Edit
    previous: Any
    """The document before the edit."""
    document: Any
    """The document after it."""
    masked: bool = False
    rewrite_calls: int = 0
    error: str = ""
    eliminated: str = ""
    score: Score | None = None

    @property
    def edited(self) -> bool:
        """Whether there is a new text to judge: not so for a masked action, the no-op and a failed request."""
        return not (self.masked or self.error or (self.edit.prompt is None and self.document == self.previous))


class EditProcess:
    """Steps n copies of an edit MDP.

    Args:
        copies: number of copies.
        instructions: the examples.
        operator: what actions mean.
        backend: the rewriter.
        reward: scores edits.
        settings: horizon and rules.
    """

    def __init__(
        self,
        copies: int,
        instructions: Sequence[Instruction],
        operator: Operator,
        backend: Backend,
        reward: Reward,
        settings: EditSettings,
    ) -> None:
        self.instructions = list(instructions)
        self.operator, self.backend, self.reward, self.settings = operator, backend, reward, settings
        self.source = EpisodeSource(len(self.instructions))
        self.generators: list[np.random.Generator] = [np.random.default_rng() for _ in range(copies)]
        self.episodes: list[EditEpisode | None] = [None] * copies
        self._carried: list[str | None] = [None] * copies
        self._unseeded = True
        self._forget()

    def _forget(self) -> None:
        self.reward.reset()
        self._carried = [None] * len(self._carried)
        self._mean = RunningMean()

    def restart(self, seed: int) -> None:
        """Restores everything that outlives an episode: data order, diversity pool, carried texts, running mean."""
        self._forget()
        self.source.seed(seed)
        self._unseeded = False

    def begin(self, copies: Sequence[int], options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Starts an episode in each of the copies.

        Args:
            copies: which.
            options: ``index`` (an int, or one per copy of the env) chooses the example, ``prefix`` (a str, or one per
                copy) the text to start from.

        Returns:
            One info per copy.

        Raises:
            ValueError: for an unknown option, an index out of range or an empty prefix.
        """
        options = options or {}
        check_options(options)
        if self._unseeded:
            self.restart(int(self.generators[copies[0]].integers(2**31)))
        wanted = [
            [copy_option(options, key, copy, len(self.episodes)) for key in ("index", "prefix")] for copy in copies
        ]
        for index, prefix in wanted:  # all of them, before an episode is replaced
            check_index(index, len(self.instructions))
            self._check_prefix(prefix)
        for copy, (index, prefix) in zip(copies, wanted, strict=True):
            chosen = self.source.draw() if index is None else int(index)
            if prefix is None and index is None and self.settings.carry_text:
                prefix = self._carried[copy]
            base_seed = int(self.generators[copy].integers(2**62))
            self.episodes[copy] = self._open(copy, chosen, prefix, base_seed)
        self._opened(copies)
        return [self._start_info(self._episode(copy)) for copy in copies]

    def step(self, actions: Sequence[Any], copies: Sequence[int]) -> list[Transition]:
        """Applies one action per copy: at most one call to the rewriter and one to the reward for all of them.

        Raises:
            InvalidRewardError: with ``on_invalid="raise"``, where the rewriter or the judge gave nothing usable.
        """
        steps = [self._plan(copy, action) for copy, action in zip(copies, actions, strict=True)]
        self._rewrite([step for step in steps if step.edit.prompt is not None and not step.masked])
        for step in steps:
            if step.edited:
                step.eliminated = self._eliminated(step)
        self._score([step for step in steps if step.edited and not step.eliminated])
        return [self._advance(step) for step in steps]

    def mask(self, copy: int) -> np.ndarray:
        """int8 mask of the actions that are possible in a copy."""
        return self.operator.mask(self._episode(copy).document)

    def state(self, copy: int) -> EditState:
        """What an observation of the copy is made of."""
        return self._episode(copy).state

    def _episode(self, copy: int) -> EditEpisode:
        episode = self.episodes[copy]
        if episode is None:
            raise RuntimeError("call reset() before anything else")
        return episode

    def _check_prefix(self, prefix: Any) -> None:
        """Refuses what an episode cannot start from with a ValueError; None is no choice."""
        if prefix is not None and not (isinstance(prefix, str) and prefix.strip()):
            raise ValueError(f"options['prefix'] must be a non-empty text, got {prefix!r}")

    def _open(self, copy: int, index: int, prefix: Any, base_seed: int) -> EditEpisode:
        """A copy's new episode on an example; ``prefix`` is what to start from in the place of the example's text."""
        text = self.instructions[index].text if prefix is None else prefix
        return EditEpisode(index, text, text, base_seed, history=[text])

    def _opened(self, copies: Sequence[int]) -> None:
        """Called once the episodes of ``copies`` are open, for work that is done for all of them together."""

    def _plan(self, copy: int, action: Any) -> EditStep:
        episode = self._episode(copy)
        if not self.operator.action_space.contains(action):
            raise ValueError(f"action {action!r} is not in {self.operator.action_space}")
        document = episode.document
        if not self.operator.possible(action, document):
            return EditStep(copy, Edit(self.operator.operation_of(action)), document, document, masked=True)
        edit = self.operator.plan(action, document, self.backend.prompt_style)
        return EditStep(copy, edit, document, document if edit.result is None else edit.result)

    def _rewrite(self, steps: list[EditStep]) -> None:
        """Fills in the rewritten texts; a failed request is sent once more under another seed."""
        pending = steps
        for attempt in range(2 if self.settings.on_invalid == "retry" else 1):
            if not pending:
                break
            seeds = [
                request_seed(self._episode(s.copy).base_seed, self._episode(s.copy).step, attempt) for s in pending
            ]
            results = self.backend.generate(
                [s.edit.prompt for s in pending],  # type: ignore[misc]
                [s.edit.sampling.with_seed(seed) for s, seed in zip(pending, seeds, strict=True)],  # type: ignore[union-attr]
            )
            again = []
            for step, result in zip(pending, results, strict=True):
                step.rewrite_calls += 1
                if isinstance(result, BackendError):
                    step.error = str(result)
                    if not isinstance(result, ContextLengthError):  # too long today is too long tomorrow
                        again.append(step)
                else:
                    step.error, step.document = "", self.operator.finish(step.edit, step.previous, result)
            pending = again
        failed = [step for step in steps if step.error]
        if failed and self.settings.on_invalid == "raise":
            raise InvalidRewardError(f"the rewriter failed on copy {failed[0].copy}: {failed[0].error}")

    def _eliminated(self, step: EditStep) -> str:
        """The rule that an edit breaks; empty if it breaks none."""
        return eliminated_by(str(step.document), str(step.previous), self.settings.elimination) or ""

    def _score(self, steps: list[EditStep]) -> None:
        if not steps:
            return
        samples = [self._sample(step) for step in steps]
        retry = self.settings.on_invalid == "retry"
        scores = score_with_retries(self.reward, samples, retries=1 if retry else 0)
        for step, score in zip(steps, scores, strict=True):
            step.score = score
            if score.valid:
                self._mean.add(score.value)
            elif not retry:
                raise InvalidRewardError(f"no verdict on copy {step.copy}: {score.feedback}")

    def _sample(self, step: EditStep) -> Sample:
        episode = self._episode(step.copy)
        instruction = self.instructions[episode.index]
        return Sample(
            response=str(step.document),
            prompt=episode.start,
            episode_id=instruction.id,
            group=instruction.id,
            previous=str(step.previous),
            operation=self.operator.operations[step.edit.operation],
            seed=request_seed(episode.base_seed, episode.step, "reward"),
        )

    def _advance(self, step: EditStep) -> Transition:
        episode = self._episode(step.copy)
        operation = self.operator.operations[step.edit.operation]
        valid = not step.error and (step.score is None or step.score.valid)
        reward = 0.0
        if not valid:
            reward = self._mean.value
        elif step.score is not None:
            reward = step.score.value
        if not step.masked:
            episode.last_operation = step.edit.operation
        # An eliminated edit fails: the text stays what it was.
        episode.document = step.previous if step.eliminated else step.document
        episode.step += 1
        finish = (self.settings.elimination_ends and step.eliminated) or (
            "horizon" if episode.step >= self.settings.horizon else ""
        )
        if finish:
            self._carried[step.copy] = episode.text
        remarks = [f"{reward:.3g}", *filter(None, dict.fromkeys([step.eliminated, finish]))]
        episode.history.append(f"{operation}: {step.document} [{', '.join(remarks)}]")
        info = {
            "text": episode.text,
            "previous_text": str(step.previous),
            "edit": str(step.document),
            "operation": operation,
            "step": episode.step,
            "episode_id": self.instructions[episode.index].id,
            "eliminated_by": step.eliminated,
            "finish_reason": finish,
            "masked": step.masked,
            "reward_valid": valid,
            "invalid_reason": step.error or ("" if valid or step.score is None else step.score.feedback),
            "reward_terms": {k: float(v) for k, v in step.score.terms.items()}
            if step.score is not None and step.score.valid
            else {},
            "rewrite_failed": bool(step.error),
            "rewrite_calls": step.rewrite_calls,
            "judge_calls": step.score.calls if step.score is not None else 0,
            "action_mask": self.operator.mask(episode.document),
        }
        return Transition(float(reward), bool(finish), info)

    def _start_info(self, episode: EditEpisode) -> dict[str, Any]:
        instruction = self.instructions[episode.index]
        return {
            "text": episode.text,
            "episode_id": instruction.id,
            "index": episode.index,
            "action_mask": self.operator.mask(episode.document),
        }
