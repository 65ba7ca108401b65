"""Callbacks for training on text environments: one row per episode, a guard against invalid rewards, a deadline."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from ...envs.process import InvalidRewardRateError


class EpisodeRows(BaseCallback):
    """Passes on one JSON-able row per finished episode, ordered by step and, within a step, by sub-environment.

    Args:
        write: called with ``{"episode", "timesteps", "episode_id", "return", "length", "operations", "text", ...}``.
    """

    def __init__(self, write: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self.write = write
        self.episodes = 0
        self.calls: Counter[str] = Counter()
        """Number of language-model calls so far, by role."""
        self._operations: deque[str] = deque(maxlen=96)
        self._open_rows: dict[int, dict[str, Any]] = {}

    def _on_step(self) -> bool:
        for index, (info, reward) in enumerate(zip(self.locals["infos"], self.locals["rewards"], strict=True)):
            row = self._open_rows.setdefault(
                index, {"return": 0.0, "operations": [], "invalid": 0, "rewrite_calls": 0, "judge_calls": 0}
            )
            row["return"] += float(reward)
            row["operations"].append(info["operation"])
            row["invalid"] += not info["reward_valid"]
            self._operations.append(info["operation"])
            for role in ("rewrite_calls", "judge_calls"):
                row[role] += info[role]
                self.calls[role] += info[role]
            if self.locals["dones"][index]:
                self.write(self._finished(index, info))
        return True

    def _finished(self, index: int, info: dict[str, Any]) -> dict[str, Any]:
        """Returns the row of a sub-environment's finished episode, given the info of its last step."""
        row = self._open_rows.pop(index)
        self.episodes += 1
        return {
            "episode": self.episodes,
            "timesteps": self.num_timesteps,
            "episode_id": info["episode_id"],
            "return": round(row["return"], 6),
            "length": len(row["operations"]),
            "finish_reason": info["finish_reason"],
            "operations": row["operations"],
            "text": info["text"],
            **{name: row[name] for name in ("invalid", "rewrite_calls", "judge_calls")},
        }

    def _on_rollout_end(self) -> None:
        for name, count in sorted(Counter(self._operations).items()):
            self.logger.record(f"operations/{name}", count / len(self._operations))
        self.logger.record("calls/rewrite", self.calls["rewrite_calls"])
        self.logger.record("calls/judge", self.calls["judge_calls"])
        self.logger.record("rollout/episodes", self.episodes)


class InvalidRewardGuard(BaseCallback):
    """Logs the share of imputed rewards and stops training if it is too high.

    Args:
        max_share: largest permitted share of steps without a verdict among the last ``window`` steps.
        window: number of steps that the share is taken over; it is not checked before half of them have passed.

    Raises:
        ValueError: if an argument is out of range.
        InvalidRewardRateError: from ``learn``, if the share is exceeded.
    """

    def __init__(self, max_share: float = 0.2, window: int = 96) -> None:
        super().__init__()
        if not 0 <= max_share <= 1 or window < 2:
            raise ValueError(f"max_share must be in [0, 1] and window at least 2, got {max_share} and {window}")
        self.max_share = max_share
        self._valid: deque[bool] = deque(maxlen=window)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            self._valid.append(info["reward_valid"])
        share = 1 - sum(self._valid) / len(self._valid)
        # A few invalid rewards at the start are a large share of few steps: wait for half a window.
        if len(self._valid) * 2 >= (self._valid.maxlen or 2) and share > self.max_share:
            reasons = [info["invalid_reason"] for info in self.locals["infos"] if info["invalid_reason"]]
            raise InvalidRewardRateError(
                f"{share:.0%} of the last {len(self._valid)} rewards had no verdict (limit {self.max_share:.0%}); "
                f"last reason: {reasons[-1] if reasons else 'unknown'}"
            )
        return True

    def _on_rollout_end(self) -> None:
        if self._valid:
            self.logger.record("rollout/invalid_reward_share", 1 - sum(self._valid) / len(self._valid))


class StopAtDeadline(BaseCallback):
    """Stops training when a time budget is used up.

    Args:
        seconds: the time budget, in seconds; 0: no limit.
        clock_started: called at every step until it returns True, which starts the clock; a resumed run, for example,
            starts it after its stored replies have been replayed.
    """

    def __init__(self, seconds: float, clock_started: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.seconds, self.clock_started = seconds, clock_started
        self._begun: float | None = None
        """Monotonic time at which the clock was started; None before."""
        self.out_of_time = False
        """Whether training was stopped by the deadline."""

    def _on_step(self) -> bool:
        if self._begun is None and self.clock_started():
            self._begun = time.monotonic()
        self.out_of_time = bool(self.seconds and self._begun is not None) and (
            time.monotonic() - (self._begun or 0.0) >= self.seconds
        )
        return not self.out_of_time
