"""``instructgym bench edit-env``: compares the vector env with serial envs on the same actions and texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console

from ...llm_backends import resolve
from ..evolve.train import ENV_ID, load_seeds
from ..runs.options import Count, input_errors, parse_part, parse_reward
from .frame import RATIO, BenchOptions, alternate, compare, publish, ratio_row, timed


@dataclass
class BenchEditEnv(BenchOptions):
    """Steps per second of n batched copies against n copies stepped one after the other."""

    num_envs: Count = 8
    """Number of envs on each side."""
    rounds: Count = 6
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


def run(options: BenchEditEnv, console: Console) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range or a part cannot be built.
    """
    options.check()
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

    count, name = options.num_envs, "steps_per_second"
    rewriter = vector.unwrapped.backend  # type: ignore[attr-defined]
    judge = getattr(vector.unwrapped.reward, "backend", None)  # type: ignore[attr-defined]
    space: Any = vector.single_action_space
    # The first round, a warm-up, loads models and fills prefix caches.
    actions = [rng.integers(space.n, size=count) for _ in range(options.rounds + 1)]
    texts: dict[str, list[str]] = {"ours": [], "theirs": []}

    def backend_calls() -> tuple[int, int]:
        """Returns the calls of rewriter and judge of the vector env: the serial envs have their own backends."""
        return rewriter.usage.calls, judge.usage.calls if judge else 0

    calls = [backend_calls()]

    def batched(number: int) -> float:
        infos, seconds = timed(lambda: vector.step(actions[number])[-1])
        calls.append(backend_calls())
        texts["ours"] += list(infos["text"])
        return count / seconds

    def serial(number: int) -> float:
        copies = list(zip(serial_envs, actions[number], strict=True))
        written, seconds = timed(lambda: [env.step(action)[-1]["text"] for env, action in copies])
        texts["theirs"] += written
        return count / seconds

    figures = compare(name, **alternate({"ours": batched, "theirs": serial}, options.rounds))
    most = dict(zip(("rewriter", "judge"), np.diff(calls, axis=0).max(axis=0).tolist(), strict=True))
    figures["ours"]["backend_calls_per_vector_step"] = most
    same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True))
    figures["settings"] = {
        "num_envs": count,
        "rounds": options.rounds,
        "backend": rewriter.name,
        "equal_texts": f"{same}/{len(texts['ours'])}",
    }
    rows = [
        ("", "batched (ours)", "serial", RATIO),
        ratio_row("env steps per second", name, figures, ".2f"),
        ("backend calls per vector step", json.dumps(most), "", ""),
        ("equal texts", figures["settings"]["equal_texts"], "", ""),
    ]
    return publish(options, figures, f"{count} copies of {ENV_ID} on {rewriter.name}", rows, console)
