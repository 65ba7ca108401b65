"""Callbacks for training on text environments: rows per episode, a guard against invalid rewards, progress, time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from ...envs.process import InvalidRewardRateError


class EpisodeRows(BaseCallback):
    """Hands over one JSON-able row per finished episode, in the order of steps and, within a step, of copies.

    Args:
        write: gets ``{"episode", "timesteps", "episode_id", "return", "length", "operations", "text", ...}``.
    """

    def __init__(self, write: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self.write = write
        self.episodes = 0
        self.calls: Counter[str] = Counter()
        """LLM calls so far, by role."""
        self._operations: deque[str] = deque(maxlen=96)
        self._open: dict[int, dict[str, Any]] = {}

    def _on_step(self) -> bool:
        for copy, (info, reward) in enumerate(zip(self.locals["infos"], self.locals["rewards"], strict=True)):
            row = self._open.setdefault(
                copy, {"return": 0.0, "operations": [], "invalid": 0, "rewrite_calls": 0, "judge_calls": 0}
            )
            row["return"] += float(reward)
            row["operations"].append(info["operation"])
            row["invalid"] += not info["reward_valid"]
            self._operations.append(info["operation"])
            for role in ("rewrite_calls", "judge_calls"):
                row[role] += info[role]
                self.calls[role] += info[role]
            if self.locals["dones"][copy]:
                self.write(self._finished(copy, info))
        return True

    def _finished(self, copy: int, info: dict[str, Any]) -> dict[str, Any]:
        row = self._open.pop(copy)
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
            "invalid": row["invalid"],
            "rewrite_calls": row["rewrite_calls"],
            "judge_calls": row["judge_calls"],
        }

    def _on_rollout_end(self) -> None:
        for name, count in sorted(Counter(self._operations).items()):
            self.logger.record(f"operations/{name}", count / len(self._operations))
        self.logger.record("calls/rewrite", self.calls["rewrite_calls"])
        self.logger.record("calls/judge", self.calls["judge_calls"])
        self.logger.record("rollout/episodes", self.episodes)


class InvalidRewardGuard(BaseCallback):
    """Logs the share of imputed rewards and stops training where it is too high.

    Args:
        max_share: largest share of the last ``window`` steps without a verdict.
        window: steps looked back at; nothing is judged before half a window has passed.

    Raises:
        InvalidRewardRateError: from ``learn``, when the share is exceeded.
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
    """Stops training when a time budget is spent.

    Args:
        seconds: the budget; 0 for none.
        counts: whether time counts yet, asked at every step: replaying what is stored should not.
    """

    def __init__(self, seconds: float, counts: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.seconds, self.counts = seconds, counts
        self._begun: float | None = None
        self.out_of_time = False

    def _on_step(self) -> bool:
        if self._begun is None and self.counts():
            self._begun = time.monotonic()
        self.out_of_time = bool(self.seconds and self._begun is not None) and (
            time.monotonic() - (self._begun or 0.0) >= self.seconds
        )
        return not self.out_of_time
