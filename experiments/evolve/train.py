"""``instructgym evolve train``: trains an agent to choose edit operations with high reward (TeaMs-RL, stage 1).

A run is resumed by replaying it: learner, env and normaliser start again from the seed, and the journal answers every
request that a model answered before. This restores their whole state, whatever the algorithm, and costs only the
learner's own computation.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Le
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from ...agents.sb3.callbacks import EpisodeRows, InvalidRewardGuard
from ...agents.sb3.factory import VectorToVecEnv, check_algorithm, make_agent, make_sb3_env
from ...agents.sb3.policy_io import normalize_observations, save_policy
from ...envs.edit.operators import LLMOperator
from ...envs.tasks.instruction.seeds import Instruction, load_instructions
from ...llm_backends import Backend, Journal
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import RowWriter, RunFolder, Tracker, journaled_roles, read_json, replayed
from ..runs.options import BackendOptions, Count, input_errors, named, parse_part, parse_reward
from ..runs.progress import Deadline, StepProgress
from .plots import plot_training

ENV_ID = "instructgym/EvolveInstruction-v0"


@dataclass
class EnvOptions(BackendOptions):
    """Options of the environment and of training in it."""

    seeds: str = ""
    """File of seed instructions: JSONL or JSON with 'instruction', Alpaca JSON, Self-Instruct's seed_tasks.jsonl, or
    plain text with one instruction a line. By default the package's own."""
    preset: str = "corrected"
    """corrected: every episode starts from the text of a seed instruction, and the elimination rules are active.
    published: as in TeaMs-RL's code, one seed instruction whose text is never reset, and no elimination."""
    observation: str = "last_edit"
    """last_edit: one-hot vector of the last operation, as in the paper. embedding: that vector, the progress of the
    episode and a sentence embedding of the text."""
    reward: str = "judge"
    """Sum of rewards, e.g. 'judge' or 'judge + 0.5*diversity'; a term with weight 0 is logged but not rewarded."""
    judge_backend: str = ""
    """Model that judges, written like --backend. By default the rewriter itself, as in the paper."""
    horizon: Count = 6
    """Edits per episode."""
    candidates: Count = 1
    """Rewrites sampled per edit, of which the most likely is used. Each edit still counts as one LLM call."""
    operations: str = ""
    """Edit operations in the order of their action indices, separated by commas. By default the paper's six."""
    no_op: bool = False
    """Add an action (the seventh, with the paper's six) that leaves the text unchanged and makes no LLM call."""
    num_envs: Count = 8
    """Environments stepped together; their requests share one batch."""
    n_steps: Count = 6
    """Steps of each environment per policy update in training, for on-policy algorithms."""

    def check(self) -> None:
        super().check()
        parse_reward(self.reward)


def roles_of(options: EnvOptions, journal: Journal | None, responder: str = "") -> dict[str, Backend]:
    """Builds the language models of a run by role; roles with equal options share one backend.

    Args:
        options: options that name the backends.
        journal: journal that stores the replies, so that each role counts its own usage; None for bare backends.
        responder: backend of the responder in its command-line form; empty for the rewriter's.

    Returns:
        ``rewriter``, which applies the edit operations, ``judge``, which answers the reward's questions, and
        ``responder``, which answers the evolved instructions.
    """
    rewriter = parse_part(options.backend, options.model)
    others = {"judge": options.judge_backend, "responder": responder}
    parts = {"rewriter": rewriter} | {role: parse_part(text) if text else rewriter for role, text in others.items()}
    with input_errors():
        return journaled_roles(parts, journal)


def make_env(
    options: EnvOptions, roles: Mapping[str, Backend], instructions: Sequence[Instruction] | None, **kwargs: Any
) -> VectorToVecEnv:
    """Returns the vector env that the options describe; ``kwargs`` replace its arguments."""
    arguments = named(options, "preset", "observation", "horizon", "candidates", "no_op") | {
        "n_envs": options.num_envs,
        "seeds": instructions,
        "reward": parse_reward(options.reward),
        "operations": [name.strip() for name in options.operations.split(",")] if options.operations else None,
        "backend": roles["rewriter"],
        "judge_backend": roles["judge"],
    }
    with input_errors():
        return make_sb3_env(ENV_ID, **arguments | kwargs)


def load_seeds(path: str) -> list[Instruction]:
    """Returns the seed instructions of a file, or the package's own for an empty path."""
    return load_instructions(path or None)


def check_context(backend: Backend, instructions: Sequence[Instruction], file: str) -> None:
    """Checks that the requests for every seed and operation fit the rewriter's context.

    Args:
        backend: the rewriter.
        instructions: the seeds.
        file: file of the seeds, for the error message.

    Raises:
        InputError: for a seed that is too long, naming it.
    """
    operator = LLMOperator()
    for number, instruction in enumerate(instructions, start=1):
        for action in range(len(operator.operations)):
            edit = operator.plan(action, instruction.text, backend.prompt_style)
            assert edit.prompt is not None and edit.sampling is not None
            error = backend.context_error(edit.prompt, edit.sampling.max_tokens)
            if error is not None:
                raise InputError(
                    f"seed {number} of {file or 'the list'} ({instruction.text[:40]!r}...) is too long: {error}; "
                    "shorten or remove it"
                )


def identity(options: BackendOptions, instructions: Sequence[Instruction] | None) -> dict[str, Any]:
    """Returns what identifies a run when it is resumed: its options and a hash of its seed instructions.

    The hash depends on the instructions alone, not on the format of their file.
    """
    texts = [[i.text, i.input, i.id] for i in instructions or []]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    return asdict(options) | {"seed_instructions": digest}


def describe(env: VectorToVecEnv) -> str:
    """Returns one line that describes the env, for a dry run."""
    seeds = len(env.get_attr("process")[0].instructions)
    return f"{env.num_envs} copies, {env.action_space}, observation {env.observation_space}, {seeds} seeds"


EPISODES = {"smoke": 40, "report": 400}
"""Episodes to train for, by ``--scale``."""
CHECKPOINT_SECONDS = 60.0
"""Least seconds between two checkpoints."""


@dataclass
class EvolveTrain(EnvOptions):
    """Train an agent to evolve instructions."""

    algorithm: str = "TRPO"
    """Learner: TRPO (the paper's), PPO, A2C, DQN, MaskablePPO or RecurrentPPO; or baseline: random, round-robin or
    schedule."""
    episodes: int = 0
    """Length of training, as a number of episodes of --horizon steps, rounded up to whole rollouts; episodes that end
    early make it more. 0: by --scale, 40 or 400."""
    normalize_observation: bool = False
    """Normalise observations by their running mean and deviation, clipped to 5, like the paper's filter. The statistics
    are saved with the policy."""
    max_invalid_share: Annotated[float, Le(1)] = 0.2
    """Stop with an error if the judge or the rewriter gave no usable reply on more than this share of recent steps."""

    def check(self) -> None:
        super().check()
        self.algorithm = check_algorithm(self.algorithm)
        if self.algorithm in ("PPO", "MaskablePPO", "RecurrentPPO", "TRPO") and self.n_steps * self.num_envs < 2:
            raise InputError(f"{self.algorithm} needs rollouts of at least 2 steps: raise --n-steps or --num-envs")
        if self.observation == "text":
            raise InputError("--observation text is for agents of your own: use last_edit or embedding")

    @property
    def timesteps(self) -> int:
        """Number of env steps to train for, in whole rollouts."""
        # DQN collects one step per environment between two updates.
        rollout = self.num_envs * (1 if self.algorithm == "DQN" else self.n_steps)
        return math.ceil((self.episodes or EPISODES[self.scale]) * self.horizon / rollout) * rollout


def run(options: EvolveTrain, console: Console | None = None) -> dict[str, Any]:
    """Trains the agent, or resumes its training, and returns the results.

    Args:
        options: options of the run.
        console: console to print to; None for a new one.

    Raises:
        InputError: for bad input, before any expensive work.
        InvalidRewardRateError: if too many steps got no verdict.
    """
    console = console or Console()
    options.check()
    # None: the preset 'published' brings its one seed.
    instructions = load_seeds(options.seeds) if options.seeds or options.preset != "published" else None
    folder = RunFolder(options.run_dir, identity(options, instructions), "evolve train")
    # Roles without a journal: they check the options before the run folder is opened.
    roles = roles_of(options, None)
    probe = make_env(options, roles, instructions)
    check_context(roles["rewriter"], instructions or [], options.seeds)
    if options.dry_run:
        console.print(f"would train {options.algorithm} for {options.timesteps} steps in {folder.path}")
        console.print(describe(probe))
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    with replayed(folder, lambda journal: roles_of(options, journal), console) as (journal, roles):
        return _train(options, folder, make_env(options, roles, instructions), journal, console)


def _train(options: EvolveTrain, folder: RunFolder, env: VecEnv, journal: Journal, console: Console) -> dict[str, Any]:
    """Trains the agent, saves its policy, draws the figure and returns the results."""
    begun, stored_replies = time.monotonic(), len(journal)
    env = VecMonitor(env)
    if options.normalize_observation:
        env = normalize_observations(env)
    agent = make_agent(options.algorithm, env, options.seed, options.n_steps)
    with Tracker(folder, options.track) as tracker:
        agent.set_logger(tracker.logger())
        episodes = EpisodeRows(RowWriter(folder.file("episodes.jsonl")).write)
        with StepProgress(f"{options.algorithm} seed {options.seed}", options.timesteps, console) as progress:
            upkeep = _Upkeep(options, folder, Deadline(options.minutes, journal), progress)
            # stable-baselines3 counts the interval of the log in episodes for DQN, in updates for the others.
            agent.learn(
                options.timesteps,
                [episodes, InvalidRewardGuard(options.max_invalid_share), upkeep],
                log_interval=options.num_envs if options.algorithm == "DQN" else 1,
            )
        upkeep.save(agent)
        history = read_records(folder.path / "episodes.jsonl")
        updates = read_records(folder.path / "metrics.jsonl")
        figure = plot_training(history, updates, folder.file("figures", "training.png"))
        returns = [row["return"] for row in history]
        fifth = max(len(returns) // 5, 1)
        values = {
            "mean_return": returns,
            "first_fifth_return": returns[:fifth],
            "last_fifth_return": returns[-fifth:],
            "mean_length": [row["length"] for row in history],
        }
        results = folder.finish(
            metrics={name: float(np.mean(numbers)) if numbers else 0.0 for name, numbers in values.items()},
            counts={
                "timesteps": int(agent.num_timesteps),
                "episodes": len(history),
                **{name: episodes.calls[name] for name in ("rewrite_calls", "judge_calls")},
                "replayed_replies": stored_replies,
                "seconds": round(time.monotonic() - begun, 1),
            },
            status="stopped" if upkeep.out_of_time else "finished",
        )
        tracker.image("training", figure)
        tracker.summary(results["metrics"])
    word = "stopped at the time limit (the same command goes on)" if upkeep.out_of_time else "finished"
    console.print(
        f"{options.algorithm} {word}: {len(history)} episodes, mean return {results['metrics']['mean_return']:.2f}, "
        f"last fifth {results['metrics']['last_fifth_return']:.2f}; policy and figures in {folder.path}"
    )
    return results


def ended_training(run_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options and the results of the ``evolve train`` in a run folder.

    Raises:
        InputError: if the folder holds no run of ``evolve train``, or one that has not ended.
    """
    stored, results = read_json(Path(run_dir) / "config.json"), read_json(Path(run_dir) / "results.json")
    if stored is None or stored.get("command") != "evolve train":
        raise InputError(f"{run_dir} holds no run of 'evolve train': train first, or name its --run-dir")
    if results is None:
        raise InputError(f"the training in {run_dir} has not ended: repeat its 'evolve train' command first")
    return stored["options"], results


class _Upkeep(BaseCallback):
    """A callback that shows progress, saves the policy at most once a minute, and stops training at the time limit.

    Args:
        options: options of the run.
        folder: its run folder.
        limit: its time limit.
        progress: the open display of env steps, with the mean return of the last 100 episodes.
    """

    def __init__(self, options: EvolveTrain, folder: RunFolder, limit: Deadline, progress: StepProgress) -> None:
        super().__init__()
        self.options, self.folder, self.limit, self.progress = options, folder, limit, progress
        self.out_of_time = False
        """Whether the time limit stopped the training."""
        self._last = time.monotonic()

    def _on_step(self) -> bool:
        episodes = list(self.model.ep_info_buffer or [])
        mean = f"return {sum(e['r'] for e in episodes) / len(episodes):.2f}" if episodes else ""
        self.progress.update(self.num_timesteps, mean)
        self.out_of_time = self.limit.reached()
        return not self.out_of_time

    def _on_rollout_start(self) -> None:
        # At the start of a rollout the policy is the one that an update has left.
        if time.monotonic() - self._last > CHECKPOINT_SECONDS:
            self.save(self.model)

    def save(self, agent: Any) -> None:
        """Saves the policy now."""
        save_policy(agent, self.folder.path / "checkpoints", self.options.algorithm, self.options.n_steps)
        self._last = time.monotonic()
