"""``instructgym refine-af train``: token-level PPO on the quality of instances, with a KL penalty to the base model.

Stage 2 of REFINE-AF (Roy et al., arXiv 2505.06548). The paper does not give optimiser, KL weight and sizes; the values
here are this library's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...llm_backends import resolve
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...rewards import FunctionReward, WeightedSum
from ..runs.options import Count, Scale, input_errors, parse_reward
from ..runs.report import plot_instance_training
from ..runs.statistics import known_mean
from ..runs.training import Run, new_policy, ppo_agent, run_stage, tokenizer_of
from .common import ENV_ID, QUALITY, InstanceOptions, prompts_digest, well_formed

SIZES = {"smoke": (4, 16), "report": (80, 48)}
"""Updates, and instances per update, by ``--scale``."""
ENDS = 3
"""Updates that the results average over at the beginning and the end of training, at most half of all updates."""
FORMAT = "well_formed"
"""Name of the logged reward that is 1 for a response that is an instance."""


@dataclass
class RefineAFTrain(InstanceOptions):
    """Train a model by token-level PPO to write instances of instructions."""

    model: str = "embedded"
    """Model to train: embedded, or a local path or hub id of a causal language model. The untrained model is the
    reference policy of the KL penalty."""
    metrics: str = ""
    """Rewards that are logged but not trained on, separated by commas: ids or 'module:factory'."""
    scale: Scale = "smoke"
    """Size of the run where a count is left at 0: smoke (minutes) or report (up to two hours)."""
    updates: int = 0
    """Number of updates. 0: by --scale, 4 or 80."""
    batch_size: int = 0
    """Instances per update. 0: by --scale, 16 or 48."""
    epochs: Count = 2
    """Passes over the instances of an update."""
    learning_rate: float = 3e-4
    """Peak learning rate (cosine schedule, 10% warm-up)."""
    kl_coefficient: float = 0.01
    """Weight of the KL penalty to the base model. With the default, a KL of a few nats costs about as much as the
    quality reward gives, which is of the order of 0.1."""
    lora_rank: Count = 16
    """Rank of the LoRA adapters."""

    def check(self) -> None:
        super().check()
        # The quality reward and the format rate are terms of the reward already.
        for name in self.logged:
            if name in (QUALITY, FORMAT) or not re.fullmatch(r"[\w.:-]+", name):
                raise InputError(f"--metrics are ids of other rewards, separated by commas, got {name!r}")

    @property
    def logged(self) -> list[str]:
        """Names of the rewards that are logged but not trained on, without duplicates."""
        return list(dict.fromkeys(name.strip() for name in self.metrics.split(",") if name.strip()))

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of updates, and instances per update."""
        updates, batch = SIZES[self.scale]
        return self.updates or updates, self.batch_size or batch

    def rewards(self) -> WeightedSum:
        """Returns the reward to train on; format rate and metrics are terms of weight 0, which are only logged."""
        metrics: dict[str, Any] = {FORMAT: FunctionReward(well_formed)}
        metrics |= {name: resolve("reward", parse_reward(name)) for name in self.logged}
        return WeightedSum({QUALITY: self.reward_part()} | metrics, dict.fromkeys(metrics, 0.0))


def run(options: RefineAFTrain, console: Console | None = None) -> dict[str, Any]:
    """Trains the policy, or resumes its training, saves it, and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    updates, batch = options.sizes
    examples = options.prompts("train", tokenizer_of(options.model))
    with input_errors():
        reward = options.rewards()

    def work(opened: Run) -> dict[str, Any]:
        policy = new_policy(options, temperature=options.temperature)
        agent = ppo_agent(options, policy, ENV_ID, batch, examples, reward)
        opened.learn(agent, updates, "ppo on instances")
        opened.save_policy(policy)
        rows = read_records(opened.folder.path / "metrics.jsonl")
        opened.tracker.image("training", plot_instance_training(rows, opened.folder.file("figures", "training.png")))
        metrics = learned(rows)
        opened.show(metrics)
        counts = {"updates": agent.updates, "tokens": agent.num_timesteps, "episodes": agent.episodes}
        return opened.finish(metrics, counts)

    plan = f"train {updates} updates of {batch} on {len(examples)} instructions"
    return run_stage(options, "refine-af train", console, work, plan=plan, prompts=prompts_digest(examples))


def learned(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Averages reward, format rate and KL over the first and over the last updates.

    Args:
        rows: rows of ``metrics.jsonl``, one per update.

    Returns:
        Means by ``reward``, ``format_rate`` or ``kl`` with ``_first`` or ``_last``; None where no row has a value.
    """
    keys = {"reward": "rollout/reward", "format_rate": f"rollout/terms/{FORMAT}", "kl": "train/kl"}
    # At most half of the updates, so that first and last updates do not overlap.
    count = min(ENDS, len(rows) // 2)
    ends = {"first": rows[:count], "last": rows[len(rows) - count :]}
    return {
        f"{name}_{end}": known_mean(row.get(key) for row in part)
        for name, key in keys.items()
        for end, part in ends.items()
    }
