"""What the ``instructgym evolve`` commands share: options, the env they describe, and checks before anything heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym

from ...agents.sb3.factory import VectorToVecEnv, make_sb3_env
from ...envs.edit.operators import LLMOperator
from ...envs.tasks.instruction.seeds import Instruction, load_instructions
from ...llm_backends import Backend, Journal
from ...llm_backends.errors import InputError
from ..runs.options import RunOptions, check_counts, input_errors, parse_part, parse_reward
from ..runs.resumption import journaled_roles

ENV_ID = "instructgym/EvolveInstruction-v0"


@dataclass
class EnvOptions(RunOptions):
    """Options that describe the environment."""

    seeds: str = ""
    """Seed instructions: JSONL or JSON with 'instruction', Alpaca JSON, Self-Instruct's seed_tasks.jsonl, or plain
    text. By default the package's own."""
    preset: str = "corrected"
    """corrected: a seed per episode, text reset, elimination rules active. published: as TeaMs-RL's code, one seed."""
    observation: str = "last_edit"
    """last_edit: one-hot of the last operation (the paper's). embedding: that, progress and a sentence embedding."""
    reward: str = "judge"
    """A sum of rewards, e.g. 'judge' or 'judge + 0.5*diversity'; a weight of 0 logs a term without paying it."""
    judge_backend: str = ""
    """Who judges, written like --backend; by default the rewriter itself, as in the paper."""
    horizon: int = 6
    """Edits per episode."""
    candidates: int = 1
    """Rewrites drawn per edit, of which the most likely is taken. Each edit still counts as one call."""
    operations: str = ""
    """Edit operations in action order, separated by commas; by default the paper's six."""
    no_op: bool = False
    """Add a seventh action that leaves the text alone and calls nobody."""
    num_envs: int = 8
    """Copies stepped together; their requests share one batch."""

    def check(self) -> None:
        super().check()
        check_counts(self, "horizon", "candidates", "num_envs")
        parse_reward(self.reward)


@dataclass
class Roles:
    """The language models of a run, their replies kept in its journal."""

    rewriter: Backend
    judge: Backend
    responder: Backend


def roles_of(options: EnvOptions, journal: Journal | None, responder: str = "") -> Roles:
    """The roles that the options describe; equal parts are built once, each role counts its own usage in a journal."""
    backend = parse_part(options.backend, options.model)
    judge = parse_part(options.judge_backend) if options.judge_backend else backend
    parts = {"rewriter": backend, "judge": judge, "responder": parse_part(responder) if responder else backend}
    return Roles(**journaled_roles(parts, journal))


def make_env(
    options: EnvOptions, roles: Roles, instructions: Sequence[Instruction] | None, **kwargs: Any
) -> VectorToVecEnv:
    """The vector env that the options describe; ``kwargs`` replace its arguments."""
    arguments: dict[str, Any] = {
        "preset": options.preset,
        "seeds": instructions,
        "observation": options.observation,
        "reward": parse_reward(options.reward),
        "horizon": options.horizon,
        "candidates": options.candidates,
        "operations": [name.strip() for name in options.operations.split(",")] if options.operations else None,
        "no_op": options.no_op,
        "backend": roles.rewriter,
        "judge_backend": roles.judge,
    }
    with input_errors():
        return make_sb3_env(ENV_ID, **({"n_envs": options.num_envs} | arguments | kwargs))


def load_seeds(path: str) -> list[Instruction]:
    """Seed instructions from a file, or the package's own for an empty path."""
    return load_instructions(path or None)


def check_context(backend: Backend, instructions: Sequence[Instruction], where: str) -> None:
    """Refuses seeds whose requests would not fit the rewriter's context.

    Raises:
        InputError: naming the seed.
    """
    operator = LLMOperator()
    for number, instruction in enumerate(instructions, start=1):
        for action in range(len(operator.operations)):
            edit = operator.plan(action, instruction.text, backend.prompt_style)
            assert edit.prompt is not None and edit.sampling is not None
            error = backend.context_error(edit.prompt, edit.sampling.max_tokens)
            if error is not None:
                raise InputError(
                    f"seed {number} of {where or 'the list'} ({instruction.text[:40]!r}...) is too long: {error}; "
                    "shorten or remove it"
                )


def identity(options: RunOptions, instructions: Sequence[Instruction] | None) -> dict[str, Any]:
    """What makes a run the same run: its options and its seed instructions, whatever the file around them."""
    texts = [[i.text, i.input, i.id] for i in instructions or []]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    return asdict(options) | {"seed_instructions": digest}


def describe(env: gym.vector.VectorEnv[Any, Any, Any]) -> str:
    """One line on the env of a dry run."""
    return (
        f"{env.num_envs} copies, {env.single_action_space}, observation {env.single_observation_space}, "
        f"{len(env.unwrapped.process.instructions)} seeds"  # type: ignore[attr-defined]
    )
