"""What a hint is worth: how close a frozen model's answer comes to the reference once it has read the hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...llm_backends import Backend, BackendError, Prompt, Sampling, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ..base import Reward, Sample, Score
from ..texts.rouge import rouge_l


class HintedResponse(Reward):
    """ROUGE-L between the sample's reference and the answer of a frozen model that reads the response as a hint.

    The reward of Directional Stimulus prompting for free text (Li et al. 2023, arXiv 2302.11520): the response is a
    hint, such as keywords, for one input. The model answers greedily, so a hint has one value, in [0, 1]; an empty hint
    is worth the answer without any.

    ``sample.reference`` is the reference; ``sample.metadata`` has the input, as ``plain`` (the text that an answer
    continues) and as ``request`` (what a user asks). The feedback of a score is the answer.

    Args:
        backend: the frozen model.
        max_tokens: of an answer.
        stop: texts that end an answer.

    Raises:
        InputError: when scoring, for a sample without reference or input.
    """

    name = "rouge"
    calls_per_sample = 1

    def __init__(self, backend: Any = "embedded", max_tokens: int = 48, stop: Sequence[str] = ()) -> None:
        self.backend: Backend = resolve("backend", backend)
        ends = (stop,) if isinstance(stop, str) else tuple(stop)
        self.sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=ends)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        results = self.backend.generate([self.prompt_of(sample) for sample in samples], self.sampling)
        return [
            Score.invalid(str(result), calls=1)
            if isinstance(result, BackendError)
            else self._score(str(sample.reference), result[0].text)
            for sample, result in zip(samples, results, strict=True)
        ]

    def prompt_of(self, sample: Sample) -> Prompt:
        """What the frozen model reads."""
        plain, request = sample.metadata.get("plain"), sample.metadata.get("request")
        if sample.reference is None or not plain or not request:
            raise InputError(
                f"sample {sample.episode_id!r} needs a reference and metadata['plain'] and ['request'] to score a hint"
            )
        hint = one_line(sample.response)
        if not hint:
            return build_prompt(self.backend.prompt_style, request, plain)
        forms = load_prompts(__package__, "hinted_response")
        values = {"hint": hint, "prompt": plain, "request": request}
        return build_prompt(self.backend.prompt_style, fill(forms["chat"], values), fill(forms["completion"], values))

    def _score(self, reference: str, answer: str) -> Score:
        value = rouge_l(answer, reference)
        return Score(value, terms={self.name: value}, feedback=f"The answer was: {one_line(answer)}", calls=1)
