"""``instructgym bench edit-env``: compares the vector env with serial envs on the same actions and texts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

from ...llm_backends import resolve
from ...llm_backends.errors import InputError
from ..evolve.train import ENV_ID, load_seeds
from ..runs.folder import write_json
from ..runs.options import check_output, input_errors, parse_part, parse_reward


@dataclass
class BenchEditEnv:
    """Steps per second of n batched copies against n copies stepped one after the other."""

    num_envs: int = 8
    """Number of envs on each side."""
    rounds: int = 6
    """Number of measured vector steps, after one warm-up. Each is followed by the same step of the serial envs."""
    backend: str = "embedded"
    """Backend of rewriter and judge: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ...,
    "kwargs": {...}}."""
    model: str = ""
    """Model path or hub id for the backend. Empty: the default of the backend."""
    reward: str = "judge"
    """Reward of the environment: an id, or a weighted sum such as 'judge + 0.5*diversity'."""
    seeds: str = ""
    """File of seed instructions. Empty: those of the package."""
    seed: int = 0
    """Seed of texts and actions."""
    json: str = ""
    """JSON file for the results. Empty: do not write one."""


def run(options: BenchEditEnv, console: Console | None = None) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range or a part cannot be built.
    """
    console = console or Console()
    if options.num_envs < 1 or options.rounds < 1:
        raise InputError("--num-envs and --rounds must be at least 1")
    if options.json:
        check_output(Path(options.json))
    part = parse_part(options.backend, options.model)
    seeds = load_seeds(options.seeds)

    def arguments() -> dict[str, Any]:
        """Returns the arguments of an env, with backends of its own."""
        return {
            "seeds": seeds,
            "carry_text": False,
            "elimination": (),
            "horizon": 10_000,
            "reward": parse_reward(options.reward),
            "backend": resolve("backend", part),
            "judge_backend": resolve("backend", part),
        }

    with input_errors():
        vector = gym.make_vec(ENV_ID, num_envs=options.num_envs, **arguments())
        serial_envs = [gym.make(ENV_ID, **arguments()) for _ in range(options.num_envs)]
    rng = np.random.default_rng(options.seed)
    indices = np.arange(options.num_envs) % len(seeds)
    vector.reset(seed=options.seed, options={"index": indices})
    # Copy i of the vector env behaves as a single env with the seed `seed + i`.
    for i, env in enumerate(serial_envs):
        env.reset(seed=options.seed + i, options={"index": int(indices[i])})

    vector_rates: list[float] = []
    serial_rates: list[float] = []
    same = 0
    rewriter = vector.unwrapped.backend  # type: ignore[attr-defined]
    judge = getattr(vector.unwrapped.reward, "backend", None)  # type: ignore[attr-defined]
    calls: list[tuple[int, int]] = []
    for round_number in range(options.rounds + 1):
        actions = rng.integers(vector.single_action_space.n, size=options.num_envs)  # type: ignore[attr-defined]
        before = (rewriter.usage.calls, judge.usage.calls if judge else 0)
        start = time.perf_counter()
        infos = vector.step(actions)[-1]
        middle = time.perf_counter()
        serial_texts = [env.step(action)[-1]["text"] for env, action in zip(serial_envs, actions, strict=True)]
        end = time.perf_counter()
        after = (rewriter.usage.calls, judge.usage.calls if judge else 0)
        # Backend calls of the vector step only: the serial envs have their own backends.
        calls.append((after[0] - before[0], after[1] - before[1]))
        same += sum(a == b for a, b in zip(infos["text"], serial_texts, strict=True))
        if round_number:  # the first round loads models and fills prefix caches
            vector_rates.append(options.num_envs / (middle - start))
            serial_rates.append(options.num_envs / (end - middle))
    ratios = np.array(vector_rates) / np.array(serial_rates)
    figures: dict[str, Any] = {
        "ours": {
            "steps_per_second": float(np.median(vector_rates)),
            "backend_calls_per_vector_step": {
                "rewriter": max(c[0] for c in calls),
                "judge": max(c[1] for c in calls),
            },
        },
        "theirs": {"steps_per_second": float(np.median(serial_rates))},
        "ratio": {
            "steps_per_second": float(np.median(ratios)),
            "steps_per_second_min": float(ratios.min()),
            "steps_per_second_max": float(ratios.max()),
        },
        "settings": {
            "num_envs": options.num_envs,
            "rounds": options.rounds,
            "backend": rewriter.name,
            "equal_texts": f"{same}/{(options.rounds + 1) * options.num_envs}",
        },
    }
    table = Table(title=f"{options.num_envs} copies of {ENV_ID} on {rewriter.name}")
    for title in ("", "batched (ours)", "serial", "ratio (median, min to max)"):
        table.add_column(title, overflow="fold")
    table.add_row(
        "env steps per second",
        f"{figures['ours']['steps_per_second']:.2f}",
        f"{figures['theirs']['steps_per_second']:.2f}",
        f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
    )
    table.add_row("backend calls per vector step", json.dumps(figures["ours"]["backend_calls_per_vector_step"]), "", "")
    table.add_row("equal texts", figures["settings"]["equal_texts"], "", "")
    console.print(table)
    if options.json:
        write_json(Path(options.json), figures)
    return figures
