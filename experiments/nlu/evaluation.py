"""Evaluation on a language-understanding task: the policy answers every example, malformed answers are wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tasks.nlu.metrics import evaluate
from ...envs.tokens.episode import PromptExample
from ...rewards.ground_truth import parse_answer
from ..runs.responses import respond

ENV_ID = "instructgym/GenerateLabel-v0"


def answers(
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    temperature: float,
    seed: int = 0,
    **env_options: Any,
) -> list[dict[str, Any]]:
    """What the policy answers, one row per example: ``episode_id``, ``text``, ``finish_reason``, ``prediction``.

    Args:
        policy: who answers.
        examples: what it is asked.
        temperature: 0 for greedy decoding.
        seed: of sampled answers; an answer depends on it and the example alone.
        env_options: arguments of ``GenerateLabel``, as in training.
    """
    rows = []
    for example, response in zip(
        examples, respond(policy, ENV_ID, examples, temperature, seed, **env_options), strict=True
    ):
        rows.append(
            {
                "episode_id": example.id,
                "text": response.text,
                "finish_reason": response.finish_reason,
                "prediction": parse_answer(response.text, response.finish_reason, example.choices),
                "reference": example.reference,
            }
        )
    return rows


def scores(examples: Sequence[PromptExample], predictions: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """The official metrics by task."""
    tasks = dict.fromkeys(str(example.metadata["task"]) for example in examples)
    chosen = {task: [i for i, e in enumerate(examples) if e.metadata["task"] == task] for task in tasks}
    return {
        task: evaluate(task, [predictions[i] for i in rows], [examples[i] for i in rows])
        for task, rows in chosen.items()
    }


def majority(train: Sequence[PromptExample], examples: Sequence[PromptExample]) -> list[str]:
    """For each example the most frequent answer of its task in training (the mean, where answers are numbers)."""
    best: dict[str, str] = {}
    for task in dict.fromkeys(str(example.metadata["task"]) for example in [*train, *examples]):
        known = [e for e in train if e.metadata["task"] == task and e.reference is not None]
        if known and known[0].metadata["kind"] == "regression":
            best[task] = f"{np.mean([float(e.reference or 0) for e in known]):.1f}"
        else:
            counted = Counter(str(e.reference) for e in known)
            best[task] = counted.most_common(1)[0][0] if counted else ""
    return [best[str(example.metadata["task"])] for example in examples]
