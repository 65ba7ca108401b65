"""Training of a language-model policy in a run folder: progress, checkpoints, resumption and a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...agents.policy.checkpoints import (latest_checkpoint, replace_checkpoint)
from ...agents.policy.optimization import Processes
from ...agents.rollouts.agent import RolloutAgent
from .progress import StepProgress
from ...agents.supervised.trainer import SupervisedTrainer
from .folder import (RowWriter, RunFolder, read_json, write_json)
from .tracking import Tracker

CLOCK = "clock.json"


class OutOfTimeError(Exception):
    """The time budget of a run is spent; what it has finished is kept."""


def _update_of(row: Mapping[str, Any]) -> float:
    """The update that a row of ``generations.jsonl`` is of; infinite for one of the evaluation."""
    kind, _, number = str(row.get("when")).partition(" ")
    return int(number) if kind == "update" else float("inf")


class TokenTraining:
    """What the training stages of one run share.

    Args:
        folder: the run, opened.
        tracker: where its metrics go.
        console: for progress.
        processes: of a distributed training, this one among others.
        checkpoints: their folder, which the processes share.
        minutes: stop cleanly after this time; 0: no limit.
        save_every: updates between checkpoints.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        console: Console,
        processes: Processes,
        checkpoints: Path,
        minutes: float = 0.0,
        save_every: int = 5,
    ) -> None:
        self.folder, self.tracker, self.console, self.processes = folder, tracker, console, processes
        self.checkpoints, self.minutes, self.save_every = checkpoints, minutes, save_every
        self._begun = time.monotonic()
        saved = self.saved
        clock = read_json(saved / CLOCK) if saved is not None else None
        self._before = float(clock["seconds"]) if clock is not None else 0.0
        self.generations = RowWriter(folder.file("generations.jsonl"), compare=False)
        """Texts to read, of training and evaluation."""

    @property
    def saved(self) -> Path | None:
        """The checkpoint to go on from, if there is one."""
        return latest_checkpoint(self.checkpoints)

    @property
    def seconds(self) -> float:
        """Seconds that went into this run, those before the checkpoint it goes on from included."""
        return round(time.monotonic() - self._begun + self._before, 1)

    def learn(
        self,
        agent: RolloutAgent,
        total: int,
        label: str,
        on_update: Callable[[RolloutAgent], None] | None = None,
    ) -> bool:
        """All updates that are left, or as many as the time allows; says whether it came to the end.

        Args:
            agent: goes on from the run's checkpoint, if there is one.
            total: updates in all.
            label: for the progress bar.
            on_update: called after every update, before its metrics are written; may record some.
        """
        if (saved := self.saved) is not None:
            agent.restore(saved)
            self.tracker.skip(agent.updates)
            self.console.print(f"resuming {self.folder.path} after {agent.updates} of {total} updates")
            self.generations.skip_those(lambda row: _update_of(row) <= agent.updates)
        agent.set_logger(self.tracker.logger())
        agent.start()
        with StepProgress(label, total, self.console) as progress:
            while agent.updates < total:
                if self._out_of_time():
                    self._save(agent.save)
                    return False
                agent.update(agent.updates / total)
                if on_update is not None:
                    on_update(agent)
                values = agent.logger.name_to_value
                progress.update(agent.updates, f"reward {values.get('rollout/reward', float('nan')):.2f}")
                agent.logger.dump(agent.num_timesteps)
                self._keep_some(agent)
                if agent.updates % self.save_every == 0 or agent.updates == total:
                    self._save(agent.save)
        return True

    def supervised(self, trainer: SupervisedTrainer, examples: Sequence[Any], label: str, tracked: bool = True) -> bool:
        """Supervised training, or as much of it as the time allows; says whether it came to the end.

        Args:
            trainer: goes on from the run's checkpoint, if there is one and it is tracked.
            examples: demonstrations to imitate, or pairs to learn a reward from.
            label: for the progress bar.
            tracked: False for a warm start that leaves no metrics or checkpoints and is not cut short.
        """
        total = trainer.settings.epochs * -(-len(examples) // trainer.settings.batch_size)
        if tracked and (saved := self.saved) is not None:
            trainer.restore(saved)
            self.tracker.skip(trainer.steps)
        if tracked:
            trainer.set_logger(self.tracker.logger())
        stopped = False
        with StepProgress(label, total, self.console) as progress:

            def step(trainer: SupervisedTrainer) -> bool:
                nonlocal stopped
                progress.update(trainer.steps, f"loss {trainer.loss:.3f}")
                stopped = self._out_of_time()
                if tracked and (stopped or trainer.steps % (4 * self.save_every) == 0):
                    self._save(trainer.save)
                return not (tracked and stopped)

            trainer.fit(examples, step)  # type: ignore[attr-defined]
        return not (tracked and stopped)

    def stopped(self, counts: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Says that the time is over, and leaves the run open for resumption."""
        self.console.print(f"out of time: repeat the command to go on with {self.folder.path}")
        return self.folder.finish({}, counts, status="stopped")

    def unfinished(self, done: bool, counts: Mapping[str, Any] = {}) -> dict[str, Any] | None:
        """What a stage returns behind a training that was cut short, or in a process that only helped.

        Args:
            done: whether the training came to its end.
            counts: what the results are to keep.

        Returns:
            The results; None where the stage goes on.
        """
        if not done:
            return self.stopped(counts)
        return None if self.processes.is_main else self.folder.finish({}, counts, status="helper")

    def check_time(self) -> None:
        """Called before every piece of work that is kept whole.

        Raises:
            OutOfTimeError: if the time budget is spent.
        """
        if self._out_of_time():
            raise OutOfTimeError

    def _out_of_time(self) -> bool:
        """Whether the time budget of any process is spent."""
        spent = time.monotonic() - self._begun > 60 * self.minutes
        return bool(self.minutes) and any(self.processes.gather(spent))

    def _save(self, write: Callable[[Path], None]) -> None:
        def all_of_it(folder: Path) -> None:
            if self.processes.is_main:
                write_json(folder / CLOCK, {"seconds": self.seconds})
            write(folder)

        replace_checkpoint(self.checkpoints, all_of_it, self.processes.is_main)
        self.processes.wait()

    def _keep_some(self, agent: RolloutAgent) -> None:
        """Two episodes of each update, for reading."""
        batch = agent.last_rollout
        if batch is None:
            return
        logprobs = batch.logprobs if len(batch.logprobs) else batch.sampler_logprobs  # not all agents score again
        for i in range(min(2, len(batch))):
            rows = batch.rows([i])
            self.generations.write(
                {
                    "when": f"update {agent.updates}",
                    "episode_id": batch.groups[i],
                    "text": batch.infos[i]["text"],
                    "finish_reason": batch.infos[i]["finish_reason"],
                    "reward": round(float(batch.rewards[rows].sum()), 6),
                    "logprobs": [round(float(v), 4) for v in logprobs[rows]],
                }
            )
