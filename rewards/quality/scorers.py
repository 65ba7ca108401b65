"""Quality scorers without a trained scoring model: a judge's yes-or-no answer, length, and novelty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from ...llm_backends import Tokenizer, resolve
from ...llm_backends.errors import check_known
from ...llm_backends.prompting import load_prompts
from ..base import Reward, Sample, Score, retried_values
from ..judges.verdict import (
    Question,
    VerdictMode,
    VerdictPrompt,
    check_mode,
    judge_temperature,
    judge_verdicts,
    verdict_score,
)

Aspect = Literal["natural", "understandable", "coherent"]


def quality_prompt(aspect: Aspect) -> VerdictPrompt:
    """Returns the yes-or-no question about one aspect of a response.

    Raises:
        ValueError: for another aspect.
    """
    check_known("aspect", aspect, get_args(Aspect))
    data = {"positive": "Yes", "negative": "No"} | load_prompts(__package__, "quality")[aspect]
    if aspect == "coherent":
        return VerdictPrompt.from_file(data, ("Request", "Response", "Answer"), ("prompt", "response"))
    return VerdictPrompt.from_file(data, ("Response", "Answer"), ("response",))


class BooleanQA(Reward):
    """P(Yes) / (P(Yes) + P(No)) of a judge LLM that is asked whether a response is natural, understandable or coherent.

    This is the form of UniEval (Zhong et al. 2022, arXiv 2210.07197) without its training. With the embedded model as
    judge it is weak: on 20 responses written for this purpose the AUC is 0.76 (natural) and 0.60 (understandable)
    against the same responses with their words shuffled, and 0.73 (coherent) against the same responses paired with
    other prompts (``tests/test_quality_scorers.py``). Use a larger judge, or
    :class:`~instructgym.rewards.LikelihoodRatio`.

    Args:
        backend: the judge LLM.
        aspect: aspect that the question is about; only ``coherent`` reads the prompt.
        mode: ``"likelihood"`` compares the log-probs of the two words; ``"verdict"`` generates one of them and gives
            reward 0 or 1; ``"auto"`` uses likelihood for backends with few-shot prompts that report log-probs.
        bias: nats subtracted from the log-odds of ``Yes``; None: the bias of the packaged prompt.

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
        verdicts = judge_verdicts(self.backend, questions, self.mode, judge_temperature(samples))
        return [verdict_score(self.name, verdict, self.prompt) for verdict in verdicts]


class OutputLength(Reward):
    """Length of the response, in words separated by white space or in tokens.

    Args:
        tokenizer: tokenizer whose tokens are counted; None: words are counted.
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
    """Distance of prompt and response, as one text, to its k-th nearest neighbour among the texts scored before.

    The distance is Euclidean between sentence embeddings of length 1: 0 for equal texts, sqrt(2) for unrelated ones. If
    fewer than k texts are known, the distance is sqrt(2). All samples of a call are scored against the texts known
    before the call and then added in order; a sample that is retried is not added again.

    Args:
        k: rank of the neighbour, from 1.
        embedder: sentence embedder.
        capacity: maximum number of known texts; the oldest is removed first.

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
        self._vectors: np.ndarray | None = None
        self._latest: dict[str, float] = {}

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        texts = [f"{sample.prompt}\n{sample.response}" for sample in samples]
        retried = retried_values(texts, samples, self._latest)
        fresh = [text for text in texts if text not in retried]
        if fresh:
            vectors = self.embedder.embed(fresh)
            retried |= dict(zip(fresh, self._distances(vectors), strict=True))
            all_vectors = vectors if self._vectors is None else np.concatenate([self._vectors, vectors])
            self._vectors = all_vectors[-self.capacity :]
        self._latest = retried
        return [Score(retried[text], terms={self.name: retried[text]}) for text in texts]

    def _distances(self, vectors: np.ndarray) -> list[float]:
        if self._vectors is None or len(self._vectors) < self.k:
            return [float(np.sqrt(2))] * len(vectors)
        # For unit vectors the squared distance is 2 - 2 cosine; rounding can make it slightly negative.
        cosines = np.partition(vectors @ self._vectors.T, -self.k, axis=1)[:, -self.k]
        return [float(d) for d in np.sqrt(np.maximum(2 - 2 * cosines, 0))]
