"""Holds the edit MDP of prompts: the reward of an edit is the change of the prompt's task score on a minibatch.

:class:`PromptProcess` adds to :class:`~instructgym.envs.edit.process.EditProcess` a minibatch and a pool of
demonstrations per episode, the score of the start prompt, and the check that a prompt fits into the task model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...llm_backends import Backend, request_seed
from ...llm_backends.errors import InputError, check_at_least
from ...llm_backends.parts import copy_with_parts
from ...rewards.base import Sample, Score
from ...rewards.prompt_scoring.rewards import TaskGain
from ...rewards.prompt_scoring.scorer import check_batch
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt, longest_examples
from ..edit.process import EditEpisode, EditProcess, EditSettings, EditState, EditStep
from ..process import InvalidRewardError, Transition
from ..tasks.instruction.seeds import Instruction
from .drafts import DraftContext, PromptDraft
from .operators import PromptOperator

OVER_CONTEXT = "context"
"""Value of ``info["eliminated_by"]`` for an edit whose prompt does not fit into the task model's context."""


@dataclass
class PromptEpisode(EditEpisode):
    """The episode of one copy on a prompt."""

    document: PromptDraft
    """The draft as edited so far."""
    examples: tuple[LabelledExample, ...] = ()
    """The minibatch that all of the episode's prompts are scored on."""
    start_score: float = 0.0
    """Task score of the start prompt on the minibatch."""
    score: float = 0.0
    """Task score of the prompt as edited so far."""
    feedback: str = ""
    """Wrong answers of the prompt as edited so far, as text."""
    task_calls: int = 0
    """Number of task-model calls of the last reset or step."""


@dataclass(frozen=True)
class PromptData:
    """The start prompts and examples of episodes, and how many examples an episode uses.

    Raises:
        InputError: on construction, without a start prompt, for a number out of range, and if a start prompt leaves too
            few examples for a minibatch.
    """

    starts: tuple[TaskPrompt, ...]
    """Prompts that episodes start from."""
    examples: tuple[LabelledExample, ...] = field(repr=False)
    """The training split, from which minibatches and demonstrations are drawn; those of an episode share no input."""
    verbalizer_sets: tuple[tuple[str, ...], ...] = ()
    """Sets of verbalizers, one word per label each, in the order in which they are cycled through."""
    batch_size: int = 16
    """Number of examples of a minibatch."""
    pool_size: int = 64
    """Largest number of examples of an episode that may be added as demonstrations."""
    max_demonstrations: int = 4
    """Largest number of demonstrations of a prompt."""
    held_out: tuple[LabelledExample, ...] = field(default=(), repr=False)
    """Examples on which prompts are scored outside the env, e.g. those of other splits: a prompt must fit them too."""

    def __post_init__(self) -> None:
        if not self.starts:
            raise InputError("there is no prompt to start from: give at least one instruction")
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, pool_size=self.pool_size, max_demonstrations=self.max_demonstrations)
        for prompt in self.starts:
            self.unseen(prompt)

    def unseen(self, prompt: TaskPrompt) -> list[LabelledExample]:
        """Returns the training examples whose input is no demonstration of a prompt.

        Raises:
            InputError: if there are too few for a minibatch.
        """
        shown = {example.text for example in prompt.demonstrations}
        unseen = [example for example in self.examples if example.text not in shown]
        if self.batch_size > len(unseen):
            raise InputError(
                f"a batch_size of {self.batch_size} is more than the {len(unseen)} training examples that the prompt "
                "does not show: lower it, or raise the limit"
            )
        return unseen

    @cached_property
    def hardest(self) -> tuple[LabelledExample, ...]:
        """The longest examples and one with the last label: a prompt that can be scored on these can be on all."""
        everything = (*self.examples, *self.held_out)
        return (*longest_examples(everything), max(everything, key=lambda example: example.label))


class PromptProcess(EditProcess):
    """The edit MDP of prompts, which steps n copies with one call to the rewriter and one to the task model.

    Args:
        copies: number of copies.
        data: start prompts and examples.
        operator: defines the actions and how they edit a prompt.
        backend: the rewriter LLM.
        reward: scores prompts with the task model.
        settings: horizon, elimination rules, and what to do without a valid score.

    Raises:
        InputError: for prompts, verbalizers and examples that cannot be scored, and batch calibration of one example.
    """

    reward: TaskGain
    """The reward, with the scorer of the task model."""

    def __init__(
        self,
        copies: int,
        data: PromptData,
        operator: PromptOperator,
        backend: Backend,
        reward: TaskGain,
        settings: EditSettings,
    ) -> None:
        self.data = data
        check_batch(reward.scorer.calibration, data.batch_size)
        variants = [replace(data.starts[0], verbalizers=verbalizers) for verbalizers in data.verbalizer_sets]
        reward.scorer.check([*data.starts, *variants], [*data.examples, *data.held_out])
        instructions = [Instruction(prompt.instruction) for prompt in data.starts]
        super().__init__(copies, instructions, operator, backend, reward, settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_parts(self, memo, shared=("instructions", "data"))

    def _check_prefix(self, prefix: Any) -> None:
        if isinstance(prefix, TaskPrompt):
            self.reward.scorer.check([prefix], self.data.hardest)
            self.data.unseen(prefix)
        else:
            super()._check_prefix(prefix)
            if prefix is not None:
                # The example is not drawn yet, so the instruction must be possible in every start prompt.
                prompts = [replace(start, instruction=prefix) for start in self.data.starts]
                self.reward.scorer.check(prompts, self.data.hardest)

    def _new_episode(self, copy: int, index: int, prefix: Any, base_seed: int) -> PromptEpisode:
        data, prompt = self.data, self.data.starts[index]
        if isinstance(prefix, TaskPrompt):
            prompt = prefix
        elif prefix is not None:
            prompt = replace(prompt, instruction=prefix)
        unseen = data.unseen(prompt)
        # One permutation gives first the minibatch, then the pool; they share no text even if texts repeat in the data.
        order = self.generators[copy].permutation(len(unseen))
        examples = tuple(unseen[i] for i in sorted(order[: data.batch_size]))
        minibatch_texts = {example.text for example in examples}
        pool: dict[str, Demonstration] = {}
        for i in order[data.batch_size :]:
            if len(pool) == data.pool_size:
                break
            if unseen[i].text not in minibatch_texts:
                pool[unseen[i].text] = Demonstration(unseen[i].text, unseen[i].label)
        context = DraftContext(tuple(pool.values()), data.verbalizer_sets, data.max_demonstrations, self._fits)
        draft = PromptDraft(prompt, context)
        return PromptEpisode(index, str(draft), draft, base_seed, history=[str(draft)], examples=examples)

    def _fits(self, prompt: TaskPrompt) -> bool:
        try:
            self.reward.scorer.check([prompt], self.data.hardest)
        except InputError:
            return False
        return True

    def _after_begin(self, copies: Sequence[int]) -> None:
        try:
            self._score_starts(copies)
        # An episode without a start score must not be stepped, not even after a keyboard interrupt.
        except BaseException:
            for copy in copies:
                self.episodes[copy] = None
            raise

    def _score_starts(self, copies: Sequence[int]) -> None:
        """Scores the start prompts in one batch and, with ``on_invalid="retry"``, the failed ones once more.

        Raises:
            InvalidRewardError: if a start prompt has no valid score.
        """
        pending = [self._prompt_episode(copy) for copy in copies]
        for _ in range(2 if self.settings.on_invalid == "retry" else 1):
            scores = self.reward.evaluate([e.document.prompt for e in pending], [e.examples for e in pending])
            failed: list[tuple[PromptEpisode, Score]] = []
            for episode, score in zip(pending, scores, strict=True):
                episode.task_calls += score.calls
                if score.valid:
                    episode.start_score = episode.score = score.value
                    episode.feedback = score.feedback
                else:
                    failed.append((episode, score))
            pending = [episode for episode, _ in failed]
            if not pending:
                return
        raise InvalidRewardError(f"the start prompt could not be scored: {failed[0][1].feedback}")

    def _prompt_episode(self, copy: int) -> PromptEpisode:
        episode = self._episode(copy)
        assert isinstance(episode, PromptEpisode)
        return episode

    def _plan(self, copy: int, action: Any) -> EditStep:
        episode = self._prompt_episode(copy)
        # The random choices of an edit depend on the episode and the step alone, not on earlier draws.
        episode.document = replace(episode.document, seed=request_seed(episode.base_seed, episode.step, "edit"))
        return super()._plan(copy, action)

    def _eliminated(self, step: EditStep) -> str:
        if step.document != step.previous and not step.document.context.fits(step.document.prompt):
            return OVER_CONTEXT
        return super()._eliminated(step)

    def _score(self, steps: list[EditStep]) -> None:
        # A prompt that the rewriter left unchanged has a score already.
        super()._score([step for step in steps if step.document != step.previous])

    def _sample(self, step: EditStep) -> Sample:
        episode = self._prompt_episode(step.copy)
        prompt = step.document.prompt
        metadata = {"prompt": prompt, "examples": episode.examples, "previous_score": episode.score}
        return replace(super()._sample(step), metadata=metadata)

    def _advance(self, step: EditStep) -> Transition:
        episode, score = self._prompt_episode(step.copy), step.score
        transition = super()._advance(step)
        episode.task_calls = score.calls if score is not None else 0
        if score is not None and score.valid:
            episode.score, episode.feedback = score.terms["score"], score.feedback
        elif score is not None:
            # An edit without a valid score is undone, so that ``episode.score`` is always the score of its prompt.
            episode.document = step.previous
            mask = self.operator.mask(episode.document)
            transition.info.update({"text": episode.text, "action_mask": mask})
        return replace(transition, info=transition.info | self._prompt_info(episode))

    def state(self, copy: int) -> EditState:
        """Returns the copy's state with its action mask, which does not follow from the text."""
        return replace(super().state(copy), mask=self.mask(copy))

    def _start_info(self, episode: EditEpisode) -> dict[str, Any]:
        assert isinstance(episode, PromptEpisode)
        return super()._start_info(episode) | self._prompt_info(episode)

    @staticmethod
    def _prompt_info(episode: PromptEpisode) -> dict[str, Any]:
        return {
            "prompt": episode.document.prompt,
            "score": episode.score,
            "start_score": episode.start_score,
            "feedback": episode.feedback,
            "task_calls": episode.task_calls,
        }
