"""Reflective search for instructions: GEPA (Agrawal et al. 2025, arXiv 2507.19457), by the ``gepa`` library.

A language model reads an instruction's failures on a few examples and writes a new instruction; one that does better on
them is scored on the whole validation set, and parents are drawn from the Pareto front over its examples.
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
"""The one text of a candidate."""
SHOWN = 3
"""Failures that the language model is shown."""
MAX_TOKENS = 64
"""Of an instruction that it writes."""

logger = logging.getLogger(__name__)


class PromptAdapter:
    """Instructions for a task as candidates of GEPA: the protocol of ``gepa.GEPAAdapter``.

    An example's score is the probability of its right label among the labels, in [0, 1].

    Args:
        prompt: whose instruction is searched for; the rest of it stays.
        scorer: scores prompts.
        backend: reads failures and writes instructions.
        seed: of its requests.
        on_result: called with the prompt and its result, whenever one was scored.
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
        """Instructions asked for so far."""
        self._failure: Exception | None = None

    def evaluate(self, batch: list[LabelledExample], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Scores a candidate on examples; the trace of an example says what was predicted and what was right."""
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
        """The wrong answers, the most confident ones first; where there are none, the least certain right ones."""
        rows = sorted(zip(eval_batch.scores, eval_batch.trajectories, strict=True), key=lambda row: row[0])
        shown = [trace for _, trace in rows if trace["answer"] != trace["right"]] or [trace for _, trace in rows]
        records = [
            {
                "Inputs": {"text": trace["input"]},
                "Generated Outputs": trace["answer"],
                "Feedback": f"The right answer is {trace['right']}.",
            }
            for trace in shown[:SHOWN]
        ]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A new instruction by the language model; the old one where its reply cannot be used, or failed.

        What a backend raises is raised, and once more by the next :meth:`evaluate`, because the library passes over it.
        """
        try:
            return {INSTRUCTION: self._written(candidate[INSTRUCTION], reflective_dataset[INSTRUCTION])}
        except Exception as error:
            self._failure = error
            raise

    def _written(self, instruction: str, records: Sequence[Mapping[str, Any]]) -> str:
        failures = "; ".join(
            f"{one_line(record['Inputs']['text'])} -> {record['Generated Outputs']}. {record['Feedback']}"
            for record in records
        )
        texts = load_prompts(__package__, "reflection")
        shots = [(shot["before"], shot["failures"], shot["after"]) for shot in texts["demonstrations"]]
        completion = few_shot(
            texts["header"],
            ("Instruction", "Failures", "Better instruction"),
            shots,
            (instruction, failures),
        )
        chat = fill(texts["chat"], {"instruction": instruction, "failures": failures})
        style = self.backend.prompt_style
        seed = request_seed(self.seed, "reflect", self.proposals)
        self.proposals += 1
        sampling = Sampling(MAX_TOKENS, 1.0, 0.95, stop=() if style == "chat" else ("\n",), seed=seed)
        [result] = self.backend.generate([build_prompt(style, chat, completion)], sampling)
        if isinstance(result, BackendError):
            logger.warning("no new instruction: %s", result)
            return instruction
        written = one_line(result[0].text)
        return written if written and encodable(written) else instruction


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
        adapter: with the prompt to start from.
        train: examples of minibatches, on which a new instruction has to beat its parent's sum of scores.
        validation: examples of the Pareto front.
        calls: task-model calls at most (one per example and label).
        minibatch: examples of a minibatch.
        seed: of what GEPA draws.

    Raises:
        InputError: without the library, or if the calls do not do for the start on the validation set.
        CallLimitError: as the adapter's scorer does, before this number is reached.
    """
    try:
        import gepa
    except ImportError as error:
        raise InputError("reflective search needs the library gepa: pip install 'instructgym[gepa]'") from error
    labels = len(adapter.prompt.verbalizers)
    if calls < labels * len(validation):
        raise InputError(
            f"{calls} task-model calls do not do for one prompt on {len(validation)} validation examples of {labels} "
            "labels: allow more, or validate on fewer"
        )
    untyped: Any = adapter  # the library's protocol has type variables that nothing binds
    found: Any = gepa.optimize(
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
    return replace(adapter.prompt, instruction=found.best_candidate[INSTRUCTION])


class _Quiet:
    """GEPA's log in Python's."""

    def log(self, message: str) -> None:
        logger.debug(message)
