"""Ways to find a prompt for a frozen model, all held to the same number of task-model calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from ...agents.reflective import MAX_TOKENS, PromptAdapter, reflective_search
from ...agents.sb3.baselines import random_actions
from ...agents.sb3.factory import make_agent, make_sb3_env
from ...envs.tasks.prompt_search.tasks import PromptTask, minibatch
from ...llm_backends import Backend, ContextLengthError
from ...llm_backends.errors import InputError
from ...llm_backends.records import append_lines
from ...rewards.prompt_scoring.scorer import CallLimitError, LimitedScorer, TaskResult, TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from ..runs.progress import StepProgress

PROPOSED = 2
"""Prompts of a round that are validated, at most."""
RACE = 4
"""One part in so many of the validation examples decides whether a prompt is scored on all of them."""
PATIENCE = 4
"""Rounds in which every instruction is empty, at most."""
BEAM = 4
"""Prompts that beam search goes on from."""
EDIT_ENV, TOKEN_ENV = "instructgym/EditPrompt-v0", "instructgym/GeneratePrompt-v0"


@dataclass
class PromptSearch:
    """One search: what it may ask, and the best prompt so far by the validation examples."""

    task: PromptTask
    scorer: LimitedScorer
    validation: Sequence[LabelledExample]
    rewriter: Backend
    """Edits prompts, or reflects on their failures."""
    model: str
    """The policy of the methods that write tokens."""
    settings: Mapping[str, Any]
    """Options of the run."""
    out: Path
    """Where the prompts that were validated go, row by row."""
    progress: StepProgress | None = None
    best: TaskPrompt | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row per validated prompt: ``calls`` so far, ``prompt``, ``accuracy`` and ``gap`` on the validation examples,
    and whether it is ``best`` so far."""
    prompts: list[TaskPrompt] = field(default_factory=list)
    """Those of the history."""
    _result: TaskResult | None = None
    """Of the best prompt, on the validation examples."""
    _dropped: list[TaskPrompt] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return int(self.settings["seed"])

    def validate(self, prompt: TaskPrompt) -> None:
        """Validates a prompt, unless that was done before, or it does not fit with the longest of the examples.

        Raises:
            CallLimitError: if the calls that are left do not do.
        """
        if prompt not in self.prompts:
            result = self._scored(prompt, self.validation)
            if result is None:
                self._dropped.append(prompt)
            else:
                self.record(prompt, result)

    def validate_best(self, found: Sequence[tuple[float, TaskPrompt]]) -> None:
        """Validates the best new prompts of a round, those that stand a chance.

        They do if they get as many of the first validation examples right as the best prompt so far.

        Args:
            found: the round's prompts with their scores on minibatches.

        Raises:
            CallLimitError: if the calls that are left do not do.
        """
        known = set(map(repr, [*self.prompts, *self._dropped]))
        for _, prompt in best_prompts([pair for pair in found if repr(pair[1]) not in known], PROPOSED):
            if self._loses(prompt):
                self._dropped.append(prompt)
            else:
                self.validate(prompt)
        self.show()

    def _loses(self, prompt: TaskPrompt) -> bool:
        """Whether a prompt gets fewer of the first validation examples right than the best one so far."""
        if self._result is None or self.scorer.calibration == "batch":  # the bias is that of all examples
            return False
        first = self.validation[: -(-len(self.validation) // RACE)]
        result = self._scored(prompt, first)
        return result is None or bool(result.correct.sum() < self._result.correct[: len(first)].sum())

    def _scored(self, prompt: TaskPrompt, examples: Sequence[LabelledExample]) -> TaskResult | None:
        """A prompt's result; None where it does not fit into the context with one of the examples."""
        try:
            return self.scorer.score([prompt], examples)[0]
        except InputError as error:
            if isinstance(error.__cause__, ContextLengthError):
                return None
            raise

    def record(self, prompt: TaskPrompt, result: TaskResult) -> None:
        """Keeps a validation result. The best prompt has the highest accuracy, of equals the larger gap."""
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
        self.show()

    def show(self) -> None:
        """Moves the progress bar."""
        if self.progress is not None:
            best = max((row["accuracy"] for row in self.history), default=0.0)
            self.progress.update(self.scorer.calls, f"{len(self.prompts)} prompts validated, best {best:.2f}")


def manual(search: PromptSearch) -> None:
    """Every instruction that a person wrote for the task."""
    for instruction in search.task.instructions:
        search.validate(search.task.prompt(instruction))


def random_edits(search: PromptSearch) -> None:
    """Edits drawn at random among the possible ones."""
    _edit(search, "random")


def beam(search: PromptSearch) -> None:
    """Beam search over edits: the prompts of the beam are edited at random, those that gained most are kept.

    A prompt's worth is the sum of the gains on the way to it, each on a minibatch of its own.
    """
    env = gym.make_vec(EDIT_ENV, num_envs=search.settings["copies"], **_edit_options(search)).unwrapped
    rng = np.random.default_rng(search.seed)
    kept = [(0.0, search.task.prompt(search.task.instructions[0]))]
    seed: int | None = search.seed
    while True:
        parents = [kept[copy % len(kept)] for copy in range(env.num_envs)]
        env.reset(seed=seed, options={"prefix": [prompt for _, prompt in parents]})
        seed = None
        masks = np.stack(env.action_masks()).astype(bool)  # type: ignore[attr-defined]
        actions = random_actions(rng, masks, env.single_action_space)
        _, _, _, _, infos = env.step(actions)
        children = [
            (worth + float(infos["score"][copy] - infos["start_score"][copy]), infos["prompt"][copy])
            for copy, (worth, _) in enumerate(parents)
        ]
        kept = best_prompts([*kept, *children], BEAM)
        search.validate_best(kept)


def best_prompts(pairs: Sequence[tuple[float, TaskPrompt]], count: int) -> list[tuple[float, TaskPrompt]]:
    """The different prompts of the highest worth, the best first; one that was reached on several ways counts once."""
    found: dict[str, tuple[float, TaskPrompt]] = {}
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        found.setdefault(repr(pair[1]), pair)
    return list(found.values())[:count]


def maskable_ppo(search: PromptSearch) -> None:
    """MaskablePPO of sb3-contrib picks the edits."""
    _edit(search, "MaskablePPO")


def token_ppo(search: PromptSearch) -> None:
    """Token-level PPO writes instructions."""
    from ...agents.policy_gradient.ppo import TokenPPO

    _write(search, TokenPPO, "shared", {"epochs": 2})


def grpo(search: PromptSearch) -> None:
    """GRPO writes instructions."""
    from ...agents.policy_gradient.grpo import GRPO

    _write(search, GRPO, "none", {})


def soft_q(search: PromptSearch) -> None:
    """Soft Q-learning writes instructions, as in RLPrompt."""
    from ...agents.soft_q.agent import SoftQ

    _write(search, SoftQ, "none", {"shaped_high": 20.0})


def gepa(search: PromptSearch) -> None:
    """GEPA: a language model reads failures and writes instructions. Starts from the task's description."""
    validation = tuple(search.validation)

    def record(prompt: TaskPrompt, result: TaskResult) -> None:
        if result.examples == validation:
            search.record(prompt, result)
        search.show()

    adapter = PromptAdapter(
        search.task.prompt(search.task.instructions[0]), search.scorer, search.rewriter, search.seed, record
    )
    train = search.task.examples("train")
    reflective_search(adapter, train, validation, search.scorer.left, search.settings["minibatch"], search.seed)


METHODS: dict[str, Callable[[PromptSearch], None]] = {
    "manual": manual,
    "random": random_edits,
    "beam": beam,
    "maskable-ppo": maskable_ppo,
    "ppo": token_ppo,
    "grpo": grpo,
    "soft-q": soft_q,
    "gepa": gepa,
}
"""By name."""


LEARNING = ("maskable-ppo", "ppo", "grpo", "soft-q", "gepa")
"""Methods that learn from the scores of earlier prompts what to try next."""


def least_calls(method: str, settings: Mapping[str, Any], labels: int, content_free: int = 0) -> int:
    """Task-model calls of one round of a method and the validation of one prompt.

    Args:
        method: of :data:`METHODS`.
        settings: the sizes: validation, minibatch, copies, horizon, episodes.
        labels: labels of the task.
        content_free: inputs that calibration reads beside the examples of every prompt.
    """
    scored = settings["minibatch"] + content_free
    rounds = {
        "manual": 0,
        "gepa": 0,
        "beam": 2 * settings["copies"] * scored,
        # The start prompts, an episode of edits, and the start prompts of the next one.
        **dict.fromkeys(("random", "maskable-ppo"), settings["copies"] * (settings["horizon"] + 2) * scored),
        **dict.fromkeys(("ppo", "grpo", "soft-q"), settings["episodes"] * scored),
    }
    return int(labels * (rounds[method] + settings["validation"] + content_free))


def longest_instruction(method: str, max_tokens: int) -> str:
    """An instruction as long as those that a method writes; empty for edits, which are undone where they do not fit.

    Args:
        method: of :data:`METHODS`.
        max_tokens: of the methods that write token by token.
    """
    tokens = {"gepa": MAX_TOKENS, **dict.fromkeys(("ppo", "grpo", "soft-q"), max_tokens)}
    return " ".join(["any"] * tokens.get(method, 0))


def run_search(search: PromptSearch, method: str) -> None:
    """Searches until the calls are spent, or the method has nothing left to try."""
    with suppress(CallLimitError):
        METHODS[method](search)


class _Best(BaseCallback):
    """Validates the best prompt of each rollout, by its task score on the episode's minibatch."""

    def __init__(self, search: PromptSearch) -> None:
        super().__init__()
        self.search = search
        self.found: list[tuple[float, TaskPrompt]] = []

    def _on_step(self) -> bool:
        self.found += [(info["score"], info["prompt"]) for info in self.locals["infos"]]
        return True

    def _on_rollout_end(self) -> None:
        found, self.found = self.found, []
        self.search.validate_best(found)


def _edit(search: PromptSearch, algorithm: str) -> None:
    env = make_sb3_env(EDIT_ENV, n_envs=search.settings["copies"], **_edit_options(search))
    agent = make_agent(algorithm, env, search.seed, search.settings["horizon"])
    agent.learn(10**9, callback=[_Best(search)])


def _edit_options(search: PromptSearch) -> dict[str, Any]:
    return {
        "task": search.task,
        "operator": search.settings["operator"],
        "backend": search.rewriter,
        "scorer": search.scorer,
        "batch_size": search.settings["minibatch"],
        "horizon": search.settings["horizon"],
    }


def _write(search: PromptSearch, agent_class: Any, value: str, options: Mapping[str, Any]) -> None:
    """Rounds of an agent that writes instructions; those of a round are scored on one minibatch."""
    from ...agents.policy.language_model import LanguageModelPolicy
    from ...rewards.prompt_scoring.rewards import TaskReward

    settings, task = search.settings, search.task
    policy = LanguageModelPolicy(search.model, value=value, dtype=settings["dtype"], seed=search.seed)  # type: ignore[arg-type]
    reward = TaskReward(task.prompt(""), task.examples("train"), settings["minibatch"], search.scorer, seed=search.seed)
    env = gym.make_vec(
        TOKEN_ENV,
        num_envs=settings["episodes"],
        group_size=settings["episodes"],
        task=settings["task"],
        data_dir=settings["data_dir"],
        limit=len(task.examples("train")),
        data_seed=search.seed,
        reward=reward,
        tokenizer=policy.tokenizer,
        max_tokens=settings["max_tokens"],
    )
    agent = agent_class(env, policy, search.seed, learning_rate=settings["learning_rate"], **options)
    agent.start()
    silent = 0
    while search.scorer.left > 0 and silent < PATIENCE:  # silent: every episode was empty, nothing was asked
        before = search.scorer.calls
        agent.update(search.scorer.calls / search.scorer.limit)
        batch = agent.last_rollout
        returns = batch.per_episode(batch.own_rewards)
        texts = [str(info["text"]).strip() for info in batch.infos]
        search.validate_best(
            [(float(one), task.prompt(text)) for one, text in zip(returns, texts, strict=True) if text]
        )
        silent = silent + 1 if search.scorer.calls == before else 0


def validation_set(task: PromptTask, size: int, seed: int) -> tuple[LabelledExample, ...]:
    """The examples that choose among prompts, drawn by the seed."""
    return minibatch(task, "validation", min(size, len(task.examples("validation"))), seed)


TESTED = "test.jsonl"
"""In the run folder: a row per test example."""
KINDS = ("raw", "calibrated")
CURVE, CURVE_EXAMPLES = 4, 300
"""Shares of the calls at which the best prompt so far is tested for the curve, and the test examples that do for it."""


def incumbents(task: PromptTask, history: Sequence[Mapping[str, Any]]) -> list[tuple[int, TaskPrompt]]:
    """The prompts that were the best when they were found, with the calls made until then.

    Args:
        task: that was searched.
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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tests the best prompt on all test examples, and the best at each quarter of the calls on the first of them.

    Args:
        task: with the test examples.
        history: rows of ``prompts.jsonl``.
        calls: that the search had.
        backend: the frozen model.

    Returns:
        A row per quarter with ``calls``, ``raw`` and ``calibrated`` accuracy, and a row per test example with its
        ``id``, its ``label``, and what the best prompt predicts, ``raw`` and ``calibrated``.
    """
    scorer = TaskScorer(backend, content_free=task.content_free)
    found = incumbents(task, history)

    def results(prompt: TaskPrompt, examples: Sequence[LabelledExample]) -> list[TaskResult]:
        return [scorer.score([prompt], examples, calibrate)[0] for calibrate in (False, "contextual")]

    few, curve = task.test[:CURVE_EXAMPLES], []
    for number in range(1, CURVE + 1):
        standing = [prompt for made, prompt in found if made <= calls * number // CURVE]
        if standing:  # what was tested at the last quarter is remembered
            raw, calibrated = results(standing[-1], few)
            curve.append({"calls": calls * number // CURVE, "raw": raw.accuracy, "calibrated": calibrated.accuracy})
    raw, calibrated = results(found[-1][1], task.test)
    rows = [
        {"id": example.id, "label": example.label, "raw": int(one), "calibrated": int(other)}
        for example, one, other in zip(task.test, raw.predictions, calibrated.predictions, strict=True)
    ]
    return curve, rows


def accuracy(rows: Sequence[Mapping[str, Any]], kind: str) -> float:
    """Share of right predictions among rows of ``test.jsonl``."""
    return sum(row[kind] == row["label"] for row in rows) / len(rows)
