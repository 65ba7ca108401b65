"""Methods that search for a prompt for a frozen model, all with the same limit on task-model calls.

A method is a function of a :class:`PromptSearch`, in :data:`METHODS`. It scores candidate prompts on minibatches of
training examples, validates the best of each round, and stops when the calls are spent. :func:`test_incumbents` then
tests the best prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from ...agents.reflective import MAX_TOKENS, PromptAdapter, reflective_search
from ...agents.sb3.baselines import random_actions
from ...agents.sb3.factory import make_agent, make_sb3_env
from ...envs.tasks.prompt_search.tasks import PromptTask
from ...llm_backends import Backend, ContextLengthError
from ...llm_backends.errors import InputError
from ...llm_backends.records import append_lines
from ...rewards.prompt_scoring.scorer import CallLimitError, LimitedScorer, TaskResult, TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from ..runs.progress import Deadline, StepProgress

VALIDATED_PER_ROUND = 2
"""Maximum number of prompts of a round that are validated."""
FIRST_PART = 4
"""A prompt is first scored on 1 / FIRST_PART of the validation examples, on all of them only if it is good there."""
PATIENCE = 4
"""Number of successive rounds without any scored instruction after which a search stops."""
BEAM = 4
"""Number of prompts in the beam of beam search."""
EDIT_ENV, TOKEN_ENV = "instructgym/EditPrompt-v0", "instructgym/GeneratePrompt-v0"


@dataclass
class PromptSearch:
    """One search: task, models and limits, and the best prompt so far by the validation examples."""

    task: PromptTask
    scorer: LimitedScorer
    validation: Sequence[LabelledExample]
    rewriter: Backend
    """Language model that edits prompts, or reflects on their failures."""
    model: str
    """Name of the model whose policy writes prompts token by token (ppo, grpo, soft-q)."""
    settings: Mapping[str, Any]
    """Options of the run."""
    out: Path
    """JSONL file that gets a row per validated prompt."""
    progress: StepProgress | None = None
    limit: Deadline = field(default_factory=Deadline)
    """Time limit, which is checked between prompts."""
    best: TaskPrompt | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row per validated prompt: ``calls`` so far; ``accuracy`` and ``gap`` on the validation examples; whether it is
    the ``best`` so far; and its ``instruction``, ``demonstrations`` and ``verbalizers``."""
    prompts: list[TaskPrompt] = field(default_factory=list)
    """The prompts of ``history``, in the same order."""
    _result: TaskResult | None = None
    """Result of the best prompt on the validation examples."""
    _dropped: list[TaskPrompt] = field(default_factory=list)
    """Prompts that are not validated again: too long for the context, or worse on the first validation examples."""

    @property
    def seed(self) -> int:
        """Seed of all random choices of the search."""
        return int(self.settings["seed"])

    def validate(self, prompt: TaskPrompt) -> None:
        """Validates a prompt, unless it was validated before or does not fit into the context with one of the examples.

        Raises:
            CallLimitError: if too few calls are left.
        """
        if prompt not in self.prompts:
            result = self._score(prompt, self.validation)
            if result is None:
                self._dropped.append(prompt)
            else:
                self.record(prompt, result)

    def validate_best(self, scored_prompts: Sequence[tuple[float, TaskPrompt]]) -> None:
        """Validates the best new prompts of a round, except those that are worse on the first validation examples.

        A prompt is worse if it gets fewer of these examples right than the best prompt so far.

        Args:
            scored_prompts: prompts of the round with their scores on minibatches.

        Raises:
            CallLimitError: if too few calls are left.
        """
        known = {*self.prompts, *self._dropped}
        for _, prompt in best_prompts([pair for pair in scored_prompts if pair[1] not in known], VALIDATED_PER_ROUND):
            if self._worse_on_first_part(prompt):
                self._dropped.append(prompt)
            else:
                self.validate(prompt)
        self.advance()

    def _worse_on_first_part(self, prompt: TaskPrompt) -> bool:
        """Returns whether a prompt gets fewer of the first validation examples right than the best prompt so far."""
        # Batch calibration estimates the label bias over all examples: a part of them gives other predictions.
        if self._result is None or self.scorer.calibration == "batch":
            return False
        first = self.validation[: -(-len(self.validation) // FIRST_PART)]
        result = self._score(prompt, first)
        return result is None or bool(result.correct.sum() < self._result.correct[: len(first)].sum())

    def _score(self, prompt: TaskPrompt, examples: Sequence[LabelledExample]) -> TaskResult | None:
        """Returns the result of a prompt; None if it does not fit into the context with one of the examples."""
        try:
            return self.scorer.score([prompt], examples)[0]
        except InputError as error:
            if isinstance(error.__cause__, ContextLengthError):
                return None
            raise

    def record(self, prompt: TaskPrompt, result: TaskResult) -> None:
        """Stores a validation result. The best prompt has the highest accuracy, and of equal ones the largest gap."""
        key = (result.accuracy, float(result.gaps.mean()))
        better = all(key > (row["accuracy"], row["gap"]) for row in self.history)
        row = {
            "calls": self.scorer.calls,
            "accuracy": key[0],
            "gap": key[1],
            "best": better,
            "instruction": prompt.instruction,
            "demonstrations": [vars(shown) for shown in prompt.demonstrations],
            "verbalizers": list(prompt.verbalizers),
        }
        self.history.append(row)
        self.prompts.append(prompt)
        append_lines(self.out, [row])
        if better:
            self.best, self._result = prompt, result
        self.advance()

    def advance(self) -> None:
        """Updates the progress bar and checks the time limit; called between rounds and after each validated prompt.

        Raises:
            OutOfTimeError: if the time limit is reached.
        """
        if self.progress is not None:
            best = max((row["accuracy"] for row in self.history), default=0.0)
            self.progress.update(self.scorer.calls, f"{len(self.prompts)} prompts validated, best {best:.2f}")
        self.limit.check()


def manual(search: PromptSearch) -> None:
    """Validates every instruction that a person wrote for the task."""
    for instruction in search.task.instructions:
        search.validate(search.task.prompt(instruction))


class _Best(BaseCallback):
    """A callback that validates the best prompts of each rollout, by their scores on minibatches."""

    def __init__(self, search: PromptSearch) -> None:
        super().__init__()
        self.search = search
        self.scored_prompts: list[tuple[float, TaskPrompt]] = []

    def _on_step(self) -> bool:
        self.scored_prompts += [(info["score"], info["prompt"]) for info in self.locals["infos"]]
        return True

    def _on_rollout_end(self) -> None:
        pairs, self.scored_prompts = self.scored_prompts, []
        self.search.validate_best(pairs)


def edit_prompts(search: PromptSearch, algorithm: str) -> None:
    """Has an agent edit prompts: one that edits at random, or MaskablePPO of sb3-contrib."""
    horizon = search.settings["horizon"]
    env = make_sb3_env(EDIT_ENV, n_envs=search.settings["copies"], **_edit_options(search))
    agent = make_agent(algorithm, env, search.seed, horizon)
    # An episode takes at least one call, for its first prompt: this number of steps takes more calls than there are.
    agent.learn(search.scorer.limit * horizon, callback=[_Best(search)])


def _edit_options(search: PromptSearch) -> dict[str, Any]:
    """Returns the arguments of the environment that edits prompts."""
    return {
        "task": search.task,
        "operator": search.settings["operator"],
        "backend": search.rewriter,
        "scorer": search.scorer,
        "batch_size": search.settings["minibatch"],
        "horizon": search.settings["horizon"],
    }


def beam(search: PromptSearch) -> None:
    """Runs beam search over edits: edits the prompts of the beam at random and keeps those with the largest gains.

    The value of a prompt is the sum of the gains of the edits that led to it, each on a minibatch of its own.
    """
    env = gym.make_vec(EDIT_ENV, num_envs=search.settings["copies"], **_edit_options(search)).unwrapped
    rng = np.random.default_rng(search.seed)
    beam_prompts = [(0.0, search.task.prompt(search.task.instructions[0]))]
    seed: int | None = search.seed
    while True:
        parents = [beam_prompts[copy % len(beam_prompts)] for copy in range(env.num_envs)]
        env.reset(seed=seed, options={"prefix": [prompt for _, prompt in parents]})
        seed = None  # only the first reset is seeded: later rounds continue the random numbers of the env
        masks = np.stack(env.action_masks()).astype(bool)  # type: ignore[attr-defined]
        actions = random_actions(rng, masks, env.single_action_space)
        _, _, _, _, infos = env.step(actions)
        children = [
            (value + float(infos["score"][copy] - infos["start_score"][copy]), infos["prompt"][copy])
            for copy, (value, _) in enumerate(parents)
        ]
        beam_prompts = best_prompts([*beam_prompts, *children], BEAM)
        search.validate_best(beam_prompts)


def best_prompts(pairs: Sequence[tuple[float, TaskPrompt]], count: int) -> list[tuple[float, TaskPrompt]]:
    """Returns the prompts of the highest values, best first; a prompt that occurs several times counts once."""
    best: dict[TaskPrompt, float] = {}
    for value, prompt in sorted(pairs, key=lambda pair: -pair[0]):
        best.setdefault(prompt, value)
    return [(value, prompt) for prompt, value in best.items()][:count]


def write_prompts(search: PromptSearch, method: str) -> None:
    """Trains a policy that writes instructions: by token-level PPO, GRPO, or soft Q-learning as in RLPrompt.

    All instructions of a round are scored on one minibatch.
    """
    from ...agents.policy.language_model import LanguageModelPolicy
    from ...agents.policy_gradient.grpo import GRPO
    from ...agents.policy_gradient.ppo import TokenPPO
    from ...agents.soft_q.agent import SoftQ
    from ...rewards.prompt_scoring.rewards import TaskReward

    agents: dict[str, tuple[Any, dict[str, Any]]] = {
        "ppo": (TokenPPO, {"epochs": 2}),
        "grpo": (GRPO, {}),
        "soft-q": (SoftQ, {"shaped_high": 20.0}),
    }
    agent_class, options = agents[method]
    settings, task = search.settings, search.task
    value: Literal["shared", "none"] = "shared" if agent_class.needs_values else "none"
    policy = LanguageModelPolicy(search.model, value=value, dtype=settings["dtype"], seed=search.seed)
    reward = TaskReward(task.prompt(""), task.examples("train"), settings["minibatch"], search.scorer, seed=search.seed)
    env = gym.make_vec(
        TOKEN_ENV,
        num_envs=settings["episodes"],
        group_size=settings["episodes"],
        limit=len(task.examples("train")),
        data_seed=search.seed,
        reward=reward,
        tokenizer=policy.tokenizer,
        **{name: settings[name] for name in ("task", "data_dir", "max_tokens")},
    )
    agent = agent_class(env, policy, search.seed, learning_rate=settings["learning_rate"], **options)
    agent.start()
    silent = 0
    while search.scorer.remaining > 0 and silent < PATIENCE:  # a round is silent if no episode needed a task-model call
        before = search.scorer.calls
        agent.update(search.scorer.calls / search.scorer.limit)
        batch = agent.last_rollout
        returns = batch.per_episode(batch.own_rewards)
        texts = [str(info["text"]).strip() for info in batch.infos]
        search.validate_best(
            [(float(score), task.prompt(text)) for score, text in zip(returns, texts, strict=True) if text]
        )
        silent = silent + 1 if search.scorer.calls == before else 0


def gepa(search: PromptSearch) -> None:
    """Runs GEPA: a language model reads failures and rewrites the instruction, first that of the task."""
    validation = tuple(search.validation)

    def record(prompt: TaskPrompt, result: TaskResult) -> None:
        # GEPA scores on minibatches too; only full validations count for the best prompt.
        if result.examples == validation:
            search.record(prompt, result)
        search.advance()

    adapter = PromptAdapter(
        search.task.prompt(search.task.instructions[0]), search.scorer, search.rewriter, search.seed, record
    )
    train = search.task.examples("train")
    reflective_search(adapter, train, validation, search.scorer.remaining, search.settings["minibatch"], search.seed)


EDITING = ("random", "maskable-ppo")
"""Methods by which an agent edits prompts."""
WRITING = ("ppo", "grpo", "soft-q")
"""Methods that write prompts token by token."""
LEARNING = ("maskable-ppo", *WRITING, "gepa")
"""Methods that learn from the scores of earlier prompts what to try next."""
METHODS: dict[str, Callable[[PromptSearch], None]] = {
    "manual": manual,
    "random": partial(edit_prompts, algorithm="random"),
    "beam": beam,
    "maskable-ppo": partial(edit_prompts, algorithm="MaskablePPO"),
    **{name: partial(write_prompts, method=name) for name in WRITING},
    "gepa": gepa,
}
"""Search methods by name."""


def run_search(search: PromptSearch, method: str) -> None:
    """Runs a method until the calls are spent or it has nothing left to try."""
    with suppress(CallLimitError):
        METHODS[method](search)


def least_calls(method: str, settings: Mapping[str, Any], labels: int, content_free: int = 0) -> int:
    """Returns the number of task-model calls for one round of a method and the validation of one prompt.

    Args:
        method: name in :data:`METHODS`.
        settings: the counts ``validation``, ``minibatch``, ``copies``, ``horizon`` and ``episodes``.
        labels: number of labels of the task.
        content_free: number of content-free inputs that calibration scores with every prompt.
    """
    scored = settings["minibatch"] + content_free
    rounds = {
        "beam": 2 * settings["copies"] * scored,
        # The start prompts, an episode of edits, and the start prompts of the next episode.
        **dict.fromkeys(EDITING, settings["copies"] * (settings["horizon"] + 2) * scored),
        **dict.fromkeys(WRITING, settings["episodes"] * scored),
    }
    return int(labels * (rounds.get(method, 0) + settings["validation"] + content_free))


def longest_instruction(method: str, max_tokens: int) -> str:
    """Returns an instruction as long as the longest that a method writes.

    It is empty for methods that edit, because an edit that does not fit into the context is undone.

    Args:
        method: name in :data:`METHODS`.
        max_tokens: maximum number of tokens of methods that write token by token.
    """
    tokens = {"gepa": MAX_TOKENS, **dict.fromkeys(WRITING, max_tokens)}
    return " ".join(["any"] * tokens.get(method, 0))


TESTED = "test.jsonl"
"""File in the run folder with a row per test example."""
KINDS: dict[str, bool | str] = {"raw": False, "calibrated": "contextual"}
"""Kinds of test accuracy with the calibration of each."""
CURVE, CURVE_EXAMPLES = 4, 300
"""Number of equal parts of the calls after each of which the best prompt is tested, and of test examples for that."""


def incumbents(task: PromptTask, history: Sequence[Mapping[str, Any]]) -> list[tuple[int, TaskPrompt]]:
    """Returns the prompts that were the best so far when they were validated, with the number of calls until then.

    Args:
        task: task of the search.
        history: rows of ``prompts.jsonl``.
    """
    return [
        (
            row["calls"],
            replace(
                task.prompt(row["instruction"], [Demonstration(**shown) for shown in row["demonstrations"]]),
                verbalizers=tuple(row["verbalizers"]),
            ),
        )
        for row in history
        if row["best"]
    ]


def test_incumbents(
    task: PromptTask, history: Sequence[Mapping[str, Any]], calls: int, backend: Backend
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tests the best prompt on all test examples, and the best after each quarter of the calls on the first of them.

    Args:
        task: task with the test examples.
        history: rows of ``prompts.jsonl``.
        calls: limit on the task-model calls of the search.
        backend: frozen task model.

    Returns:
        The metrics of the search: ``test_raw`` and ``test_calibrated`` accuracy, ``validation`` accuracy, the text of
        the best ``prompt``, and ``curve``, a row with ``calls``, ``raw`` and ``calibrated`` accuracy per quarter after
        which there is a prompt. And a row per test example with its ``id``, its ``label``, and the ``raw`` and
        ``calibrated`` predictions of the best prompt.
    """
    scorer = TaskScorer(backend, content_free=task.content_free)
    bests = incumbents(task, history)

    def results(prompt: TaskPrompt, examples: Sequence[LabelledExample]) -> dict[str, TaskResult]:
        return {kind: scorer.score([prompt], examples, calibrate)[0] for kind, calibrate in KINDS.items()}

    curve = []
    for part in range(1, CURVE + 1):
        end = calls * part // CURVE
        current = [prompt for calls_so_far, prompt in bests if calls_so_far <= end]
        if current:  # an incumbent that has not changed is not scored again: the scorer stores its results
            tested = results(current[-1], task.test[:CURVE_EXAMPLES])
            curve.append({"calls": end} | {kind: result.accuracy for kind, result in tested.items()})
    best = bests[-1][1]
    tested = results(best, task.test)
    rows = [
        {"id": example.id, "label": example.label}
        | {kind: int(result.predictions[number]) for kind, result in tested.items()}
        for number, example in enumerate(task.test)
    ]
    metrics: dict[str, Any] = {f"test_{kind}": result.accuracy for kind, result in tested.items()}
    metrics |= {"validation": max(row["accuracy"] for row in history), "curve": curve, "prompt": best.text}
    return metrics, rows
