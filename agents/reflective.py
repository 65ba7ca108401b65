"""Reflective search for instructions: GEPA (Agrawal et al. 2025, arXiv 2507.19457), through the ``gepa`` library.

A language model reads an instruction's failures on a few examples and writes a new instruction. A new instruction that
does better on these examples is scored on the whole validation set. Parents of new instructions are drawn from the
Pareto front over the validation examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..llm_backends import Backend, BackendError, Sampling, request_seed
from ..llm_backends.errors import InputError
from ..llm_backends.prompting import build_prompt, few_shot, fill, load_prompts, one_line
from ..rewards.prompt_scoring.scorer import TaskResult, TaskScorer
from ..rewards.prompt_scoring.task_prompt import LabelledExample, TaskPrompt, encodable

INSTRUCTION = "instruction"
"""Name of the only text of a candidate."""
MAX_FAILURES = 3
"""Maximum number of failures in a request for a new instruction."""
MAX_TOKENS = 64
"""Maximum number of tokens of a new instruction."""

logger = logging.getLogger(__name__)


class PromptAdapter:
    """Presents instructions for a task as candidates of GEPA, by the protocol of ``gepa.GEPAAdapter``.

    An example's score is the probability of its correct label among the labels, in [0, 1].

    Args:
        prompt: the prompt whose instruction is searched for; the rest of it stays as it is.
        scorer: scores prompts on examples.
        backend: the language model that reads failures and writes instructions.
        seed: seed of the backend's requests.
        on_result: called with a prompt and its result each time a prompt is scored.
    """

    def __init__(
        self,
        prompt: TaskPrompt,
        scorer: TaskScorer,
        backend: Backend,
        seed: int = 0,
        on_result: Callable[[TaskPrompt, TaskResult], None] | None = None,
    ) -> None:
        self.prompt, self.scorer, self.backend, self.seed = prompt, scorer, backend, seed
        self.on_result = on_result
        self.proposals = 0
        """Number of new instructions requested so far."""
        self._failure: Exception | None = None
        """The error that :meth:`propose_new_texts` raised, if any."""

    def evaluate(self, batch: list[LabelledExample], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Scores a candidate on examples.

        Args:
            batch: the examples.
            candidate: a dict with the instruction under ``instruction``.
            capture_traces: whether to return traces: input, predicted answer and right answer of each example.

        Returns:
            A ``gepa.EvaluationBatch`` with outputs, scores and traces.
        """
        from gepa import EvaluationBatch

        if self._failure is not None:
            raise self._failure
        prompt = replace(self.prompt, instruction=candidate[INSTRUCTION])
        [result] = self.scorer.score([prompt], batch)
        if self.on_result is not None:
            self.on_result(prompt, result)
        words = prompt.verbalizers
        outputs = [words[label] for label in result.predictions]
        scores = [float(row[example.label]) for row, example in zip(result.probabilities, batch, strict=True)]
        traces = [
            {"input": example.text, "answer": output, "right": words[example.label]}
            for example, output in zip(batch, outputs, strict=True)
        ]
        return EvaluationBatch(outputs=outputs, scores=scores, trajectories=traces if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Returns the examples to show to the language model, by component.

        These are the examples with wrong answers, the lowest probabilities of the correct label first; if all answers
        are right, the least certain ones.

        Args:
            candidate: the candidate that was scored.
            eval_batch: result of :meth:`evaluate` with traces.
            components_to_update: names of the components; each gets the same examples.
        """
        rows = sorted(zip(eval_batch.scores, eval_batch.trajectories, strict=True), key=lambda row: row[0])
        shown = [trace for _, trace in rows if trace["answer"] != trace["right"]] or [trace for _, trace in rows]
        records = [
            {
                "Inputs": {"text": trace["input"]},
                "Generated Outputs": trace["answer"],
                "Feedback": f"The right answer is {trace['right']}.",
            }
            for trace in shown[:MAX_FAILURES]
        ]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """Returns a new instruction by the language model; the old one if the request fails or the reply is unusable.

        An error that the backend raises is raised here, and again by the next :meth:`evaluate`, because the library
        ignores it here.

        Args:
            candidate: the candidate with the old instruction.
            reflective_dataset: examples from :meth:`make_reflective_dataset`.
            components_to_update: not used, as a candidate has one component only.
        """
        try:
            return {INSTRUCTION: self._new_instruction(candidate[INSTRUCTION], reflective_dataset[INSTRUCTION])}
        except Exception as error:
            self._failure = error
            raise

    def _new_instruction(self, instruction: str, records: Sequence[Mapping[str, Any]]) -> str:
        """Requests an instruction that avoids the recorded failures; returns the old one without a usable reply."""
        failures = "; ".join(
            f"{one_line(record['Inputs']['text'])} -> {record['Generated Outputs']}. {record['Feedback']}"
            for record in records
        )
        texts = load_prompts(__package__, "reflection")
        shots = [(shot["before"], shot["failures"], shot["after"]) for shot in texts["demonstrations"]]
        labels = ("Instruction", "Failures", "Better instruction")
        completion = few_shot(texts["header"], labels, shots, (instruction, failures))
        chat = fill(texts["chat"], {"instruction": instruction, "failures": failures})
        style = self.backend.prompt_style
        # The count makes every request a different one: another proposal from the same failures is a new sample.
        seed = request_seed(self.seed, "reflect", self.proposals)
        self.proposals += 1
        # A completion model would go on with further demonstrations: stop it at the end of the line.
        sampling = Sampling(MAX_TOKENS, 1.0, 0.95, stop=() if style == "chat" else ("\n",), seed=seed)
        [result] = self.backend.generate([build_prompt(style, chat, completion)], sampling)
        if isinstance(result, BackendError):
            logger.warning("no new instruction: %s", result)
            return instruction
        new_text = one_line(result[0].text)
        return new_text if new_text and encodable(new_text) else instruction


def reflective_search(
    adapter: PromptAdapter,
    train: Sequence[LabelledExample],
    validation: Sequence[LabelledExample],
    calls: int,
    minibatch: int = 8,
    seed: int = 0,
) -> TaskPrompt:
    """Searches for an instruction and returns the prompt with the highest mean score on the validation set.

    Args:
        adapter: the adapter, which holds the prompt to start from.
        train: examples that minibatches are drawn from; on its minibatch a new instruction must have a higher sum of
            scores than its parent.
        validation: examples that the Pareto front is taken over.
        calls: maximum number of calls of the task model (one per example and label).
        minibatch: number of examples of a minibatch.
        seed: seed of GEPA's random choices.

    Raises:
        InputError: if the library is missing, or ``calls`` does not suffice to score the first prompt on the validation
            set.
        CallLimitError: if the adapter's scorer reaches its own limit first.
    """
    try:
        import gepa
    except ImportError as error:
        raise InputError("reflective search needs the library gepa: pip install 'instructgym[gepa]'") from error
    labels = len(adapter.prompt.verbalizers)
    if calls < labels * len(validation):
        raise InputError(
            f"{calls} task-model calls are too few for one prompt on {len(validation)} validation examples of {labels} "
            "labels: allow more, or validate on fewer"
        )
    untyped: Any = adapter  # the library's protocol has type variables that nothing binds
    # GEPA counts evaluated examples, each of which takes one call per label.
    result: Any = gepa.optimize(
        seed_candidate={INSTRUCTION: adapter.prompt.instruction},
        trainset=list(train),
        valset=list(validation),
        adapter=untyped,
        max_metric_calls=calls // labels,
        reflection_minibatch_size=min(minibatch, len(train)),
        skip_perfect_score=False,
        logger=_Quiet(),
        seed=seed,
        raise_on_exception=True,
    )
    return replace(adapter.prompt, instruction=result.best_candidate[INSTRUCTION])


class _Quiet:
    """Forwards GEPA's log to Python's logging, at level DEBUG."""

    def log(self, message: str) -> None:
        logger.debug(message)
