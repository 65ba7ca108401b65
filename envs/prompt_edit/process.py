"""The edit MDP of prompts: an episode edits a task prompt and is paid for the change of its score on a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...llm_backends import Backend, request_seed
from ...llm_backends.errors import InputError
from ...rewards.base import Sample, Score
from ...rewards.prompt_scoring.rewards import TaskGain
from ...rewards.prompt_scoring.scorer import check_batch
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt, longest
from ..edit.process import EditEpisode, EditProcess, EditSettings, EditState, EditStep
from ..process import InvalidRewardError, Transition
from ..tasks.instruction.seeds import Instruction
from .drafts import DraftContext, PromptDraft
from .operators import PromptOperator

OVER_CONTEXT = "context"
"""What eliminates an edit whose prompt does not fit into the task model's context."""


@dataclass
class PromptEpisode(EditEpisode):
    """One copy's episode on a prompt."""

    document: PromptDraft
    examples: tuple[LabelledExample, ...] = ()
    """The minibatch that all of the episode's prompts are scored on."""
    start_score: float = 0.0
    score: float = 0.0
    """Task score of the prompt as it stands."""
    feedback: str = ""
    """Its failures."""
    task_calls: int = 0
    """Task-model calls of the last reset or step."""


@dataclass(frozen=True)
class PromptData:
    """What episodes are made of."""

    starts: tuple[TaskPrompt, ...]
    """Prompts that episodes start from."""
    examples: tuple[LabelledExample, ...] = field(repr=False)
    """The training split: minibatches and demonstrations are drawn from it, and never share an input."""
    verbalizer_sets: tuple[tuple[str, ...], ...] = ()
    batch_size: int = 16
    """Examples of a minibatch."""
    pool_size: int = 64
    """Examples set aside as an episode's demonstrations to add, at most."""
    max_demonstrations: int = 4
    held_out: tuple[LabelledExample, ...] = field(default=(), repr=False)
    """Examples that prompts are scored on elsewhere, e.g. those of other splits: a prompt must fit them as well."""

    def __post_init__(self) -> None:
        if not self.starts:
            raise InputError("there is no prompt to start from: give at least one instruction")
        for name, least in (("batch_size", 1), ("pool_size", 0), ("max_demonstrations", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for prompt in self.starts:
            self.unseen(prompt)

    def unseen(self, prompt: TaskPrompt) -> list[LabelledExample]:
        """The training examples that are no demonstrations of a prompt.

        Raises:
            InputError: if there are too few for a minibatch.
        """
        shown = {one.text for one in prompt.demonstrations}
        found = [one for one in self.examples if one.text not in shown]
        if self.batch_size > len(found):
            raise InputError(
                f"a batch_size of {self.batch_size} is more than the {len(found)} training examples that the prompt "
                "does not show: lower it, or raise the limit"
            )
        return found

    @cached_property
    def hardest(self) -> tuple[LabelledExample, ...]:
        """The longest examples, and one of the last label: what a scorer checks a prompt by."""
        everything = (*self.examples, *self.held_out)
        return (*longest(everything), max(everything, key=lambda one: one.label))


class PromptProcess(EditProcess):
    """Steps n copies of the prompt edit MDP.

    Args:
        copies: number of copies.
        data: start prompts and examples.
        operator: what actions mean.
        backend: the rewriter.
        reward: scores prompts.
        settings: horizon and rules.

    Raises:
        InputError: for prompts, verbalizers and examples that cannot be scored, and batch calibration of one example.
    """

    reward: TaskGain

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
        words = [replace(data.starts[0], verbalizers=verbalizers) for verbalizers in data.verbalizer_sets]
        reward.scorer.check([*data.starts, *words], [*data.examples, *data.held_out])
        instructions = [Instruction(prompt.instruction) for prompt in data.starts]
        super().__init__(copies, instructions, operator, backend, reward, settings)

    def _check_prefix(self, prefix: Any) -> None:
        if isinstance(prefix, TaskPrompt):
            self.reward.scorer.check([prefix], self.data.hardest)
            self.data.unseen(prefix)
        else:
            super()._check_prefix(prefix)
            if prefix is not None:
                written = [replace(start, instruction=prefix) for start in self.data.starts]
                self.reward.scorer.check(written, self.data.hardest)

    def _open(self, copy: int, index: int, prefix: Any, base_seed: int) -> PromptEpisode:
        data, prompt = self.data, self.data.starts[index]
        if isinstance(prefix, TaskPrompt):
            prompt = prefix
        elif prefix is not None:
            prompt = replace(prompt, instruction=prefix)
        unseen = data.unseen(prompt)
        order = self.generators[copy].permutation(len(unseen))
        examples = tuple(unseen[i] for i in sorted(order[: data.batch_size]))
        seen = {example.text for example in examples}
        pool: dict[str, Demonstration] = {}
        for i in order[data.batch_size :]:
            if len(pool) == data.pool_size:
                break
            if unseen[i].text not in seen:
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

    def _opened(self, copies: Sequence[int]) -> None:
        try:
            self._score_starts(copies)
        except BaseException:  # an episode without a score must not be stepped
            for copy in copies:
                self.episodes[copy] = None
            raise

    def _score_starts(self, copies: Sequence[int]) -> None:
        """Scores the start prompts, all in one batch."""
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
        # What an edit draws depends on the episode and the step, not on what was drawn before.
        episode.document = replace(episode.document, seed=request_seed(episode.base_seed, episode.step, "edit"))
        return super()._plan(copy, action)

    def _eliminated(self, step: EditStep) -> str:
        if step.document != step.previous and not step.document.context.fits(step.document.prompt):
            return OVER_CONTEXT
        return super()._eliminated(step)

    def _score(self, steps: list[EditStep]) -> None:
        # What an LLM left as it was has its score already.
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
            # A prompt without a score is not taken over: the score so far is always that of the prompt as it stands.
            episode.document = step.previous
            mask = self.operator.mask(episode.document)
            transition.info.update({"text": episode.text, "action_mask": mask})
        return replace(transition, info=transition.info | self._prompt_info(episode))

    def state(self, copy: int) -> EditState:
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
