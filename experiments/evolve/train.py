"""``instructgym evolve train``: an agent learns which edit operations pay (TeaMs-RL, stage 1).

A run is resumed by replaying it: learner, env and normaliser start again from the seed, and the journal answers every
request that a model has answered before. That restores all of their state, whatever the algorithm, for the price of
the learner's own arithmetic.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from ...agents.sb3.callbacks import EpisodeRows, InvalidRewardGuard, StopAtDeadline
from ...agents.sb3.factory import check_algorithm, make_agent
from ...agents.sb3.policy_io import normalize_observations, save_policy
from ...llm_backends import Journal
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import RowWriter, RunFolder
from ..runs.options import input_errors
from ..runs.plots import plot_training
from ..runs.progress import ShowProgress, StepProgress
from ..runs.resumption import replayed
from ..runs.tracking import Tracker
from .common import EnvOptions, check_context, describe, identity, load_seeds, make_env, roles_of

EPISODES = {"smoke": 40, "report": 400}
CHECKPOINT_SECONDS = 60.0


@dataclass
class EvolveTrain(EnvOptions):
    """Train an agent to evolve instructions."""

    algorithm: str = "TRPO"
    """TRPO (the paper's), PPO, A2C, DQN, MaskablePPO, RecurrentPPO; baselines: random, round-robin, schedule."""
    episodes: int = 0
    """Length of training in full episodes: episodes x horizon steps, rounded up to whole rollouts. 0: by --scale."""
    n_steps: int = 6
    """Steps of each copy per update (on-policy algorithms)."""
    normalize_observation: bool = False
    """Normalise observations by running statistics, clipped to 5 (the paper's filter); saved with the policy."""
    max_invalid_share: float = 0.2
    """Stop with an error when the judge or rewriter gave nothing usable on more than this share of recent steps."""

    def check(self) -> None:
        super().check()
        self.algorithm = check_algorithm(self.algorithm)
        if self.n_steps < 1:
            raise InputError(f"--n-steps must be at least 1, got {self.n_steps}")
        if self.algorithm in ("PPO", "MaskablePPO", "RecurrentPPO", "TRPO") and self.n_steps * self.num_envs < 2:
            raise InputError(f"{self.algorithm} needs rollouts of at least 2 steps: raise --n-steps or --num-envs")
        if self.max_invalid_share > 1:
            raise InputError(f"--max-invalid-share is a share, at most 1, got {self.max_invalid_share}")

    @property
    def timesteps(self) -> int:
        """Env steps to train for, in whole rollouts."""
        rollout = self.num_envs * (1 if self.algorithm == "DQN" else self.n_steps)
        return math.ceil((self.episodes or EPISODES[self.scale]) * self.horizon / rollout) * rollout


def run(options: EvolveTrain, console: Console | None = None) -> dict[str, Any]:
    """Trains, or resumes training, and returns the results.

    Args:
        options: the options.
        console: where to print.

    Raises:
        InputError: for bad input, before anything heavy.
        InvalidRewardRateError: if too many rewards had no verdict.
    """
    console = console or Console()
    options.check()
    instructions = load_seeds(options.seeds) if options.seeds or options.preset != "published" else None
    folder = RunFolder(options.run_dir, identity(options, instructions), "evolve train")
    with input_errors():
        probe = make_env(options, roles_of(options, None), instructions)
    check_context(probe.env.unwrapped.backend, instructions or [], options.seeds)  # type: ignore[attr-defined]
    if options.dry_run:
        console.print(f"would train {options.algorithm} for {options.timesteps} steps in {folder.path}")
        console.print(describe(probe.env))
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    with replayed(folder, lambda journal: roles_of(options, journal), console) as (journal, roles):
        return _train(options, folder, make_env(options, roles, instructions), journal, console)


def _train(options: EvolveTrain, folder: RunFolder, env: VecEnv, journal: Journal, console: Console) -> dict[str, Any]:
    begun, replayed = time.monotonic(), len(journal)
    wrapped: VecEnv = VecMonitor(env)
    if options.normalize_observation:
        wrapped = normalize_observations(wrapped)
    agent = make_agent(options.algorithm, wrapped, options.seed, options.n_steps)
    with Tracker(folder, options.track) as tracker:
        agent.set_logger(tracker.logger())
        rows = RowWriter(folder.file("episodes.jsonl"))
        episodes = EpisodeRows(rows.write)
        stop = StopAtDeadline(60 * options.minutes, counts=lambda: len(journal) > replayed)
        save = _Checkpoint(options, folder)
        guard = InvalidRewardGuard(options.max_invalid_share)
        with StepProgress(f"{options.algorithm} seed {options.seed}", options.timesteps, console) as progress:
            agent.learn(
                options.timesteps,
                callback=[episodes, guard, stop, save, ShowProgress(progress)],
                log_interval=options.num_envs if options.algorithm == "DQN" else 1,
            )
        save.save(agent)
        history = read_records(folder.path / "episodes.jsonl")
        updates = read_records(folder.path / "metrics.jsonl")
        figure = plot_training(history, updates, folder.file("figures", "training.png"))
        returns = [row["return"] for row in history]
        fifth = max(len(returns) // 5, 1)
        results = folder.finish(
            metrics={
                "mean_return": _mean(returns),
                "first_fifth_return": _mean(returns[:fifth]),
                "last_fifth_return": _mean(returns[-fifth:]),
                "mean_length": _mean([row["length"] for row in history]),
            },
            counts={
                "timesteps": int(agent.num_timesteps),
                "episodes": len(history),
                "rewrite_calls": episodes.calls["rewrite_calls"],
                "judge_calls": episodes.calls["judge_calls"],
                "replayed_replies": replayed,
                "seconds": round(time.monotonic() - begun, 1),
            },
            status="stopped" if stop.out_of_time else "finished",
        )
        tracker.image("training", figure)
        tracker.summary(results["metrics"])
    word = "stopped at the time limit (the same command goes on)" if stop.out_of_time else "finished"
    console.print(
        f"{options.algorithm} {word}: {len(history)} episodes, mean return {results['metrics']['mean_return']:.2f}, "
        f"last fifth {results['metrics']['last_fifth_return']:.2f}; policy and figures in {folder.path}"
    )
    return results


class _Checkpoint(BaseCallback):
    """Saves the policy at the start of a rollout, i.e. after an update, at most once a minute."""

    def __init__(self, options: EvolveTrain, folder: RunFolder) -> None:
        super().__init__()
        self.options, self.folder = options, folder
        self._last = time.monotonic()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if time.monotonic() - self._last > CHECKPOINT_SECONDS:
            self.save(self.model)

    def save(self, agent: Any) -> None:
        """Saves now."""
        save_policy(agent, self.folder.path / "checkpoints", self.options.algorithm, self.options.n_steps)
        self._last = time.monotonic()


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
