"""Evaluation on a language-understanding task: the policy answers every example, malformed answers are wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from ..agents.language_model import LanguageModelPolicy
from ..envs.tasks.nlu_metrics import evaluate
from ..envs.tasks.prompt_examples import PromptExample
from ..llm_backends import Sampling, request_seed
from ..rewards.ground_truth import parse_answer

ENV_ID = "instructgym/GenerateLabel-v0"
COPIES = 64


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
    copies = min(COPIES, len(examples))
    env: Any = gym.make_vec(
        ENV_ID, num_envs=copies, examples=list(examples), tokenizer=policy.tokenizer, **env_options
    ).unwrapped
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # like lengths: little padding
    rows: dict[int, dict[str, Any]] = {}
    generation = env.generation
    for start in range(0, len(order), copies):
        chunk = order[start : start + copies]
        mask = np.arange(copies) < len(chunk)
        env.reset(options={"index": np.array([chunk[min(i, len(chunk) - 1)] for i in range(copies)])})
        prompts, constraints = env.prompts(), env.constraints()
        samplings = [
            Sampling(
                max_tokens=generation.max_tokens,
                temperature=temperature,
                stop=generation.stop,
                seed=request_seed(seed, "evaluate", i),
            )
            for i in chunk
        ]
        completions = policy.generate(prompts[: len(chunk)], samplings, constraints[: len(chunk)], generation.eos_ids)
        played = env.play([c[0].token_ids for c in completions] + [[]] * (copies - len(chunk)), mask)
        for i, info in zip(chunk, played.infos, strict=False):
            rows[i] = {
                "episode_id": info["episode_id"],
                "text": info["text"],
                "finish_reason": info["finish_reason"],
                "prediction": parse_answer(info["text"], info["finish_reason"], examples[i].choices),
                "reference": examples[i].reference,
            }
    env.close()
    return [rows[i] for i in range(len(examples))]


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
