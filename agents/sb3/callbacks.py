"""Callbacks for training on text environments: rows per episode, a guard against invalid rewards, progress, time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback


class InvalidRewardRateError(RuntimeError):
    """Too many rewards were imputed for want of a verdict; the agent would learn from made-up numbers."""


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


class StepProgress:
    """Progress of a command: a rich bar on a terminal, a line per tenth of the way elsewhere. A context manager.

    Args:
        label: what is going on.
        total: steps in all.
        console: where to show it.
    """

    def __init__(self, label: str, total: int, console: Console | None = None) -> None:
        self.label, self.total = label, total
        self.console = console or Console()
        self._tenth = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, note="")

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, completed: int, note: str = "") -> None:
        """Shows how far it has got, with a remark."""
        completed = min(completed, self.total)
        self._bar.update(self._task, completed=completed, note=note)
        tenth = 10 * completed // max(self.total, 1)
        if not self.console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self.console.print(f"{self.label}: {completed}/{self.total}  {note}".rstrip(), highlight=False)


class ShowProgress(BaseCallback):
    """Shows env steps and the mean return of the last 100 episodes.

    Args:
        progress: an open :class:`StepProgress`.
    """

    def __init__(self, progress: StepProgress) -> None:
        super().__init__()
        self.progress = progress

    def _on_step(self) -> bool:
        episodes = list(self.model.ep_info_buffer or [])
        mean = f"return {sum(e['r'] for e in episodes) / len(episodes):.2f}" if episodes else ""
        self.progress.update(self.num_timesteps, mean)
        return True
