"""Scorers of a response's quality that need no model of their own: a judge's yes-or-no answer, length, and novelty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ...llm_backends import Tokenizer, resolve
from ...llm_backends.prompting import load_prompts
from ..base import Reward, Sample, Score
from ..judges.verdict import Question, VerdictMode, VerdictPrompt, check_mode, judge_verdicts, temperature_for

Aspect = Literal["natural", "understandable", "coherent"]


def quality_prompt(aspect: Aspect) -> VerdictPrompt:
    """The yes-or-no question about one aspect of a response.

    Raises:
        ValueError: for another aspect.
    """
    if aspect not in ("natural", "understandable", "coherent"):
        raise ValueError(f"aspect must be natural, understandable or coherent, got {aspect!r}")
    data = {"positive": "Yes", "negative": "No"} | load_prompts(__package__, "quality")[aspect]
    if aspect == "coherent":
        return VerdictPrompt.from_file(data, ("Request", "Response", "Answer"), ("prompt", "response"))
    return VerdictPrompt.from_file(data, ("Response", "Answer"), ("response",))


class BooleanQA(Reward):
    """P(Yes) / (P(Yes) + P(No)) of a judge LLM that is asked whether a response is natural, understandable or coherent.

    The form of UniEval (Zhong et al. 2022, arXiv 2210.07197) without its training. By the embedded model it is
    weak: on 20 responses written for the purpose the AUC is 0.76 (natural) and 0.60 (understandable) against the same
    with their words shuffled, and 0.73 (coherent) against those to others' prompts
    (``tests/test_quality_scorers.py``); ask a larger model, or take :class:`~instructgym.rewards.LikelihoodRatio`.

    Args:
        backend: the judge LLM.
        aspect: what is asked; ``coherent`` alone reads the prompt.
        mode: ``"likelihood"`` compares the log-probs of the two words, ``"verdict"`` generates one and pays 0 or 1,
            ``"auto"`` takes the former for backends with few-shot prompts that report log-probs.
        bias: nats taken off the log-odds of ``Yes``; by default that of the packaged prompt.

    Raises:
        ValueError: for another aspect or mode.
    """

    name = "boolean-qa"
    calls_per_sample = 1

    def __init__(
        self,
        backend: Any = "embedded",
        aspect: Aspect = "natural",
        mode: VerdictMode = "auto",
        bias: float | None = None,
    ) -> None:
        check_mode(mode)
        prompt = quality_prompt(aspect)
        self.prompt = prompt if bias is None else replace(prompt, bias=bias)
        self.backend, self.aspect, self.mode = resolve("backend", backend), aspect, mode

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        questions = [
            Question(self.prompt, {"prompt": sample.prompt, "response": sample.response}, sample.seed)
            for sample in samples
        ]
        scores = []
        for verdict in judge_verdicts(self.backend, questions, self.mode, temperature_for(samples)):
            if verdict.answer is None:
                scores.append(Score.invalid(verdict.why, calls=1))
                continue
            value = float(verdict.answer) if verdict.probability is None else verdict.probability
            feedback = self.prompt.positive if verdict.answer else self.prompt.negative
            scores.append(Score(value, terms={self.name: value}, feedback=feedback, calls=1))
        return scores


class OutputLength(Reward):
    """Length of the response: in words between white space, or in tokens.

    Args:
        tokenizer: counts tokens of this tokenizer instead of words.
    """

    name = "output-length"

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer: Tokenizer | None = None if tokenizer is None else resolve("tokenizer", tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        lengths = [float(len(self._pieces(sample.response))) for sample in samples]
        return [Score(length, terms={self.name: length}) for length in lengths]

    def _pieces(self, text: str) -> Sequence[Any]:
        return text.split() if self.tokenizer is None else self.tokenizer.encode_continuation(text)


class NeighbourDistance(Reward):
    """Distance of prompt and response, as one text, to its k-th nearest neighbour among those scored before.

    Euclidean, between sentence embeddings of length 1: 0 for the same text, sqrt(2) for unrelated ones. As long as
    fewer than k texts are known, the missing neighbours count as unrelated. All samples of a call are scored against
    what was known before the call and then added in order; a sample that comes again for a retry is not added again.

    Args:
        k: which neighbour.
        embedder: of texts.
        capacity: texts known at most; the oldest leaves first.

    Raises:
        ValueError: for a k or capacity below 1, or a capacity below k.
    """

    name = "neighbour-distance"

    def __init__(self, k: int = 6, embedder: Any = "minilm", capacity: int = 10_000) -> None:
        if k < 1 or capacity < k:
            raise ValueError(f"k must be at least 1 and at most the capacity, got k={k}, capacity={capacity}")
        self.k, self.capacity = k, capacity
        self.embedder = resolve("embedder", embedder)
        self.reset()

    def reset(self) -> None:
        self._known: np.ndarray | None = None
        self._latest: dict[str, float] = {}

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        texts = [f"{sample.prompt}\n{sample.response}" for sample in samples]
        again = {
            text: self._latest[text]
            for text, sample in zip(texts, samples, strict=True)
            if sample.metadata.get("attempt") and text in self._latest
        }
        fresh = [text for text in texts if text not in again]
        if fresh:
            vectors = self.embedder.embed(fresh)
            again |= dict(zip(fresh, self._distances(vectors), strict=True))
            known = vectors if self._known is None else np.concatenate([self._known, vectors])
            self._known = known[-self.capacity :]
        self._latest = again
        return [Score(again[text], terms={self.name: again[text]}) for text in texts]

    def _distances(self, vectors: np.ndarray) -> list[float]:
        if self._known is None or len(self._known) < self.k:
            return [float(np.sqrt(2))] * len(vectors)
        cosines = np.partition(vectors @ self._known.T, -self.k, axis=1)[:, -self.k]
        return [float(d) for d in np.sqrt(np.maximum(2 - 2 * cosines, 0))]
