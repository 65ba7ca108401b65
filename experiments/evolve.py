"""What the ``instructgym evolve`` commands share: options, the env they describe, and checks before anything heavy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym

from ..envs.operators import LLMOperator
from ..envs.sb3 import VectorToVecEnv, make_sb3_env
from ..envs.tasks.instructions import Instruction, load_instructions
from ..llm_backends import Backend, Journal
from ..llm_backends.errors import InputError
from .resumption import journaled_roles
from .tracking import check_tracker

ENV_ID = "instructgym/EvolveInstruction-v0"
SCALES = ("smoke", "report")


@dataclass
class RunOptions:
    """Options of every experiment."""

    run_dir: str = ""
    """Folder of the run. A folder with an unfinished run of the same options is resumed."""
    seed: int = 0
    """Seed of the run; with it and the same options a run gives the same rows."""
    backend: str = "embedded"
    """Who rewrites (and judges and answers, if no one else is named): embedded, transformers, scripted,
    'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    model: str = ""
    """Model path or hub id for the backend; by default the backend's own."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    scale: str = "smoke"
    """Size of the run where a count is left at 0: smoke (minutes) or report (up to two hours)."""
    track: str = "none"
    """wandb: log to Weights & Biases too (offline without a key). none: files only."""
    dry_run: bool = False
    """Check everything, say what would be done, and stop before a model is loaded."""

    def check(self) -> None:
        """Refuses what can be refused without looking at files.

        Raises:
            InputError: naming the option.
        """
        if not self.run_dir:
            raise InputError("--run-dir is missing: name the folder of the run")
        check_output(Path(self.run_dir) / "config.json")
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        check_tracker(self.track)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
                raise InputError(f"--{field.name.replace('_', '-')} must not be negative, got {value}")
        if self.seed >= 2**32:
            raise InputError(f"--seed must be below 2**32, got {self.seed}")


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
        for name in ("horizon", "candidates", "num_envs"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        parse_reward(self.reward)


def parse_reward(text: str) -> Any:
    """A reward from its command-line form: one id, or a sum like ``judge + 0.5*diversity``.

    Raises:
        InputError: if it cannot be read.
    """
    if text.lstrip().startswith("{"):
        return parse_part(text)
    terms: dict[str, str] = {}
    weights: dict[str, float] = {}
    for piece in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*\*)?\s*([\w.:-]+)\s*", piece)
        if match is None or match[2] in terms:
            raise InputError(f"--reward must be like 'judge + 0.5*diversity' with distinct terms, got {text!r}")
        terms[match[2]], weights[match[2]] = match[2], float(match[1] or 1)
    if len(terms) == 1 and set(weights.values()) == {1.0}:
        return text.strip()
    return {"id": "weighted-sum", "kwargs": {"terms": terms, "weights": weights}}


def parse_part(text: str, model: str = "") -> Any:
    """A part from its command-line form: an id, ``module:factory`` or a JSON object; with a model, for that model."""
    if text.lstrip().startswith("{"):
        try:
            part = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"broken JSON in {text!r}: {error.msg}") from error
        if not isinstance(part.get("id"), str) or not isinstance(part.get("kwargs", {}), dict):
            raise InputError(f'a part as JSON needs {{"id": "...", "kwargs": {{...}}}}, got {text!r}')
    else:
        part = {"id": text}
    if model:
        if part["id"] == "embedded":  # the embedded backend is one model: another one needs the general backend
            part = part | {"id": "transformers"}
        part = part | {"kwargs": dict(part.get("kwargs") or {}) | {"model": model}}
    return part


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns a ValueError about an option into an InputError: for code that only looks at what the user passed."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


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


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written; makes nothing.

    Raises:
        InputError: naming the file or the folder that is in the way.
    """
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if path.is_dir() or (place != path and not place.is_dir()):
        raise InputError(f"cannot write {path}: {place} is {'a' if place.is_dir() else 'not a'} folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"cannot write {path}: no permission on {place}")
