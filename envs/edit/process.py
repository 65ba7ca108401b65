"""Holds the edit MDP for n copies at once: a step calls the rewriter once and the reward once for all copies.

:class:`~instructgym.envs.edit.env.TextEditEnv`, :class:`~instructgym.envs.edit.env.TextEditVectorEnv` and the
stable-baselines3 VecEnv are thin wrappers of :class:`EditProcess`. A step plans the edits, rewrites the texts, applies
the elimination rules, scores what is left and makes a transition of it (:meth:`EditProcess.step`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Backend, BackendError, ContextLengthError, Embedder, request_seed, resolve
from ...llm_backends.errors import check_known
from ...llm_backends.parts import copy_with_parts
from ...rewards import Reward, Sample, Score, eliminated_by, score_with_retries
from ..process import (
    EpisodeSource,
    InvalidRewardError,
    RunningMean,
    Transition,
    Unicode,
    check_ids,
    check_index,
    check_options,
    copy_option,
)
from ..tasks.instruction.seeds import Instruction
from .operators import Edit, Operator

NOT_SCORED = Score(0.0)
"""The score of a step that the reward is not asked about."""
OBSERVATIONS = ("last_edit", "embedding", "text")
"""The observation modes, see :func:`make_edit_observer`."""


@dataclass(frozen=True)
class EditState:
    """The state of one copy, from which its observation is made."""

    text: str
    """The text as edited so far."""
    last_operation: int | None
    """Index of the last executed operation; None before the first."""
    step: int
    """Number of steps taken in the episode."""
    mask: np.ndarray | None = None
    """int8 mask of the possible actions, if they do not follow from the text; else None."""


class EditObserver(ABC):
    """An observer that turns a batch of states into observations."""

    space: spaces.Space[Any]
    """Space of one observation."""

    @abstractmethod
    def encode(self, states: Sequence[EditState]) -> list[Any]:
        """Returns one observation per state; no two share memory."""


class LastEdit(EditObserver):
    """An observer that returns the last executed operation, the observation of TeaMs-RL.

    An observation is a float32 one-hot vector, shape (operations,), zeros at the start.

    Args:
        operations: number of operations.
    """

    def __init__(self, operations: int) -> None:
        self.space = spaces.Box(0.0, 1.0, (operations,), np.float32)
        self._operations = operations

    def encode(self, states: Sequence[EditState]) -> list[np.ndarray]:
        rows = [np.zeros(self._operations, np.float32) for _ in states]
        for row, state in zip(rows, states, strict=True):
            if state.last_operation is not None:
                row[state.last_operation] = 1.0
        return rows


class LastEditEmbedding(EditObserver):
    """An observer that returns the last operation, the progress of the episode and the embedding of the text.

    An observation is a Dict of float32 arrays: ``last_edit``, as in :class:`LastEdit`; ``progress``, shape (1,), step /
    horizon; ``embedding``, shape (d,), the text's sentence embedding, clipped to [-1, 1]; and, if ``actions`` is
    above 0, ``action_mask``, shape (actions,), 1 where an action is possible.

    Args:
        operations: number of operations.
        horizon: number of edits per episode.
        embedder: computes the sentence embedding, of dimension d.
        actions: number of entries of the action mask; 0 for none.
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
        # The vectors have length 1 up to rounding, so an entry can be just outside the Box.
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


class TextObserver(EditObserver):
    """An observer that returns the text itself, a str."""

    def __init__(self) -> None:
        self.space = Unicode()

    def encode(self, states: Sequence[EditState]) -> list[str]:
        return [state.text for state in states]


def make_edit_observer(mode: str, operations: int, horizon: int, embedder: Any, actions: int = 0) -> EditObserver:
    """Returns the observer of a mode.

    Args:
        mode: ``last_edit``, ``embedding`` or ``text``.
        operations: number of operations, the length of the last edit's one-hot vector.
        horizon: number of edits per episode.
        embedder: id or live embedder of the mode ``embedding``; other modes ignore it.
        actions: number of entries of the action mask in the mode ``embedding``; 0 for no mask.

    Raises:
        ValueError: for an unknown mode.
    """
    check_known("observation mode", mode, OBSERVATIONS)
    if mode == "last_edit":
        return LastEdit(operations)
    if mode == "embedding":
        return LastEditEmbedding(operations, horizon, resolve("embedder", embedder), actions)
    return TextObserver()


@dataclass(frozen=True)
class EditSettings:
    """The settings of an edit MDP, apart from its instructions, operator, rewriter and reward."""

    horizon: int = 6
    """Largest number of edits of an episode."""
    carry_text: bool = False
    """True: an episode starts from the text that the copy's last one ended with (TeaMs-RL's released code); False: from
    a new seed instruction."""
    elimination: tuple[str, ...] = ()
    """String rules (see :mod:`~instructgym.rewards.elimination`) that eliminate an edit: it gets reward 0, the text
    stays as it was, and the episode ends (unless ``elimination_ends`` is False)."""
    elimination_ends: bool = True
    """False: the episode goes on after an eliminated edit."""
    on_invalid: str = "retry"
    """What to do without a usable reply or a valid score. ``retry``: ask once more, then give the running mean of the
    valid rewards and set ``info["reward_valid"]`` to False; ``raise``: raise an InvalidRewardError."""


@dataclass
class EditEpisode:
    """The episode of one copy."""

    index: int
    """Index of the instruction."""
    start: str
    """The text at the start."""
    document: Any
    """The text as edited so far, or an object whose ``str()`` is that text."""
    base_seed: int
    """Seed from which the seeds of the episode's requests are derived."""
    step: int = 0
    """Number of steps taken."""
    last_operation: int | None = None
    """Index of the last executed operation; None before the first."""
    history: list[str] = field(default_factory=list)
    """The lines that ``render`` returns: the start text and one line per edit."""

    @property
    def text(self) -> str:
        """The text as edited so far."""
        return str(self.document)


@dataclass
class EditStep:
    """One step of one copy, filled in by the phases of :meth:`EditProcess.step`."""

    copy: int
    """Index of the copy."""
    edit: Edit
    """The edit that the action means."""
    previous: Any
    """The document before the edit."""
    document: Any
    """The document after the edit."""
    masked: bool = False
    """Whether the action is impossible, so that nothing is done."""
    rewrite_calls: int = 0
    """Number of requests to the rewriter."""
    error: str = ""
    """Why the rewriter failed; empty if it did not."""
    eliminated: str = ""
    """Name of the elimination rule that the edit breaks; empty if it breaks none."""
    score: Score | None = None
    """The reward's score; None if none was due."""

    @property
    def edited(self) -> bool:
        """Whether there is an edit to score: False for a masked action, the no-op and a failed request."""
        return not (self.masked or self.error or (self.edit.prompt is None and self.document == self.previous))


class EditProcess:
    """An edit MDP that steps n copies with one call to the rewriter and one to the reward.

    Args:
        copies: number of copies.
        instructions: the texts that episodes start from.
        operator: defines the actions and how they edit a text.
        backend: the rewriter LLM.
        reward: scores edits.
        settings: horizon, elimination rules, and what to do without a valid score.

    Raises:
        InputError: for instructions that differ and have the same id.
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
        check_ids([(instruction.id, instruction.text) for instruction in self.instructions])
        self.operator, self.backend, self.reward, self.settings = operator, backend, reward, settings
        self.source = EpisodeSource(len(self.instructions))
        self.generators: list[np.random.Generator] = [np.random.default_rng() for _ in range(copies)]
        self.episodes: list[EditEpisode | None] = [None] * copies
        self._carried: list[str | None] = [None] * copies
        self._unseeded = True
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_parts(self, memo, shared=("instructions",))

    def _forget(self) -> None:
        self.reward.reset()
        self._carried = [None] * len(self._carried)
        self.mean = RunningMean()

    def restart(self, seed: int) -> None:
        """Resets everything that outlives an episode: the reward's memory, carried texts, running mean, data order.

        Args:
            seed: seed of the data order.
        """
        self._forget()
        self.source.seed(seed)
        self._unseeded = False

    def begin(self, copies: Sequence[int], options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Starts an episode in each of the copies.

        Args:
            copies: indices of the copies.
            options: ``index`` (an int, or one per copy of the env) selects the instruction, ``prefix`` (a str, or one
                per copy) is the text to start from instead.

        Returns:
            One info per copy.

        Raises:
            ValueError: for an unknown option, an index out of range or an empty prefix.
        """
        options = options or {}
        check_options(options)
        # No seed was ever set: the data order is drawn from the generator of the first copy.
        if self._unseeded:
            self.restart(int(self.generators[copies[0]].integers(2**31)))
        per_copy = [
            [copy_option(options, key, copy, len(self.episodes)) for key in ("index", "prefix")] for copy in copies
        ]
        # All options are checked before an episode is replaced.
        for index, prefix in per_copy:
            check_index(index, len(self.instructions))
            self._check_prefix(prefix)
        for copy, (index, prefix) in zip(copies, per_copy, strict=True):
            example = self.source.draw() if index is None else int(index)
            # An explicit start takes precedence over the carried text.
            if prefix is None and index is None and self.settings.carry_text:
                prefix = self._carried[copy]
            base_seed = int(self.generators[copy].integers(2**62))
            self.episodes[copy] = self._new_episode(copy, example, prefix, base_seed)
        self._after_begin(copies)
        return [self._start_info(self._episode(copy)) for copy in copies]

    def step(self, actions: Sequence[Any], copies: Sequence[int]) -> list[Transition]:
        """Applies one action per copy, with at most one call to the rewriter and one to the reward for all of them.

        Failed requests are repeated once, with ``on_invalid="retry"``.

        Args:
            actions: one action per copy.
            copies: indices of the copies.

        Returns:
            One transition per copy.

        Raises:
            ValueError: for an action outside the action space.
            InvalidRewardError: with ``on_invalid="raise"``, if the rewriter or the judge returned nothing usable.
        """
        steps = [self._plan(copy, action) for copy, action in zip(copies, actions, strict=True)]
        self._rewrite([step for step in steps if step.edit.prompt is not None and not step.masked])
        # String rules come before the reward, so that an eliminated edit costs no call to the judge.
        for step in steps:
            if step.edited:
                step.eliminated = self._eliminated(step)
        self._score([step for step in steps if step.edited and not step.eliminated])
        return [self._advance(step) for step in steps]

    def mask(self, copy: int) -> np.ndarray:
        """Returns an int8 mask, 1 for each action that is possible in the copy."""
        return self.operator.mask(self._episode(copy).document)

    def state(self, copy: int) -> EditState:
        """Returns the state from which the copy's observation is made."""
        episode = self._episode(copy)
        return EditState(episode.text, episode.last_operation, episode.step)

    def _episode(self, copy: int) -> EditEpisode:
        episode = self.episodes[copy]
        if episode is None:
            raise RuntimeError("call reset() before anything else")
        return episode

    def _check_prefix(self, prefix: Any) -> None:
        """Checks a prefix; None passes.

        Raises:
            ValueError: unless it can be the start of an episode.
        """
        if prefix is not None and not (isinstance(prefix, str) and prefix.strip()):
            raise ValueError(f"options['prefix'] must be a non-empty text, got {prefix!r}")

    def _new_episode(self, copy: int, index: int, prefix: Any, base_seed: int) -> EditEpisode:
        """Returns a new episode of a copy on an example; ``prefix``, if not None, replaces the example's text."""
        text = self.instructions[index].text if prefix is None else prefix
        return EditEpisode(index, text, text, base_seed, history=[text])

    def _after_begin(self, copies: Sequence[int]) -> None:
        """Does the work that all new episodes of ``copies`` share; a hook for subclasses that does nothing here."""

    def _plan(self, copy: int, action: Any) -> EditStep:
        """Returns the step that an action begins; a masked action gets an edit that changes nothing."""
        episode = self._episode(copy)
        if not self.operator.action_space.contains(action):
            raise ValueError(f"action {action!r} is not in {self.operator.action_space}")
        document = episode.document
        if not self.operator.possible(action, document):
            return EditStep(copy, Edit(self.operator.operation_of(action)), document, document, masked=True)
        edit = self.operator.plan(action, document, self.backend.prompt_style)
        return EditStep(copy, edit, document, document if edit.result is None else edit.result)

    def _rewrite(self, steps: list[EditStep]) -> None:
        """Sends the requests to the rewriter and fills in the new texts; failed requests are sent once more."""
        pending = steps
        for attempt in range(2 if self.settings.on_invalid == "retry" else 1):
            if not pending:
                break
            # A seed depends on episode, step and attempt alone: results do not change with the number of copies, and a
            # retry samples something else.
            seeds = [
                request_seed(self._episode(s.copy).base_seed, self._episode(s.copy).step, attempt) for s in pending
            ]
            results = self.backend.generate(
                [s.edit.prompt for s in pending],  # type: ignore[misc]
                [s.edit.sampling.with_seed(seed) for s, seed in zip(pending, seeds, strict=True)],  # type: ignore[union-attr]
            )
            failures = []
            for step, result in zip(pending, results, strict=True):
                step.rewrite_calls += 1
                if isinstance(result, BackendError):
                    step.error = str(result)
                    # A retry cannot help a prompt that is too long.
                    if not isinstance(result, ContextLengthError):
                        failures.append(step)
                else:
                    step.error, step.document = "", self.operator.finish(step.edit, step.previous, result)
            pending = failures
        failed = [step for step in steps if step.error]
        if failed and self.settings.on_invalid == "raise":
            raise InvalidRewardError(f"the rewriter failed on copy {failed[0].copy}: {failed[0].error}")

    def _eliminated(self, step: EditStep) -> str:
        """Returns the name of the rule that an edit breaks; empty if it breaks none."""
        return eliminated_by(str(step.document), str(step.previous), self.settings.elimination) or ""

    def _score(self, steps: list[EditStep]) -> None:
        """Scores the edits and adds the valid rewards to the running mean."""
        if not steps:
            return
        samples = [self._sample(step) for step in steps]
        retry = self.settings.on_invalid == "retry"
        scores = score_with_retries(self.reward, samples, retries=1 if retry else 0)
        for step, score in zip(steps, scores, strict=True):
            step.score = score
            if score.valid:
                self.mean.add(score.value)
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
        """Applies a finished step to its episode and returns reward, end and info."""
        episode = self._episode(step.copy)
        operation = self.operator.operations[step.edit.operation]
        score = NOT_SCORED if step.score is None else step.score
        valid = not step.error and score.valid
        reward = score.value if valid else self.mean.value
        if not step.masked:
            episode.last_operation = step.edit.operation
        # An eliminated edit is undone; ``info["edit"]`` still shows it.
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
            "invalid_reason": step.error or ("" if valid else score.feedback),
            "reward_terms": {name: float(value) for name, value in score.terms.items()} if score.valid else {},
            "rewrite_failed": bool(step.error),
            "rewrite_calls": step.rewrite_calls,
            "judge_calls": score.calls,
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
