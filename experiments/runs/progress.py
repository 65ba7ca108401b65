"""Progress display of commands, and a stable-baselines3 callback that shows it during training."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback


class StepProgress:
    """A context manager that shows progress: a rich bar on a terminal, otherwise a line per tenth of the steps.

    Args:
        label: text in front of the bar or line.
        total: number of steps.
        console: console to print on; None: a new one on standard output.
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
        """Shows the number of completed steps.

        Args:
            completed: completed steps; more than the total counts as the total.
            note: text behind the bar or line.
        """
        completed = min(completed, self.total)
        self._bar.update(self._task, completed=completed, note=note)
        tenth = 10 * completed // max(self.total, 1)
        if not self.console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self.console.print(f"{self.label}: {completed}/{self.total}  {note}".rstrip(), highlight=False)


class ShowProgress(BaseCallback):
    """A callback that shows env steps and the mean return of the last 100 episodes.

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
