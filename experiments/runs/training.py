"""Training of language-model policies in a run folder: progress, checkpoints, resumption and a time limit.

:func:`run_stage` runs a command in its run folder; its work gets a :class:`Run`, which has the training loops.
:class:`Deadline` shares one time limit among several stages. Run folders are in
:mod:`instructgym.experiments.runs.folder`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from rich.console import Console

from ...agents.policy.checkpoints import latest_checkpoint, replace_checkpoint
from ...agents.policy.language_model import SETTINGS
from ...agents.policy.optimization import Processes
from ...agents.rollouts.agent import RolloutAgent
from ...agents.supervised.trainer import SupervisedTrainer
from ...llm_backends import Backend, Journal
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import EmbeddedTokenizer, Tokenizer
from .folder import RowWriter, RunFolder, Tracker, accounted, chunked_rows, journaled_roles, read_json, write_json
from .options import Count, DType, RunOptions
from .progress import StepProgress

CLOCK = "clock.json"
"""File in a checkpoint that holds the seconds spent on its run."""


class OutOfTimeError(Exception):
    """Raised when the time limit of a run is reached; finished work is kept."""


class HelperDoneError(Exception):
    """Raised in the helper processes of a distributed training when it is complete."""


def _update_of(row: Mapping[str, Any]) -> float:
    """Returns the update of a row of ``generations.jsonl``; infinity for a row of the evaluation."""
    kind, _, number = str(row.get("when")).partition(" ")
    return int(number) if kind == "update" else float("inf")


class Run:
    """One run of a command: its folder, metrics, progress, checkpoints and time limit, and the training loops.

    Args:
        folder: the run folder, opened.
        tracker: writer of the metrics.
        console: console that shows progress.
        processes: the processes of a distributed training.
        checkpoints: folder of the checkpoints, which the processes share.
        minutes: number of minutes after which training stops cleanly; 0: no limit.
        save_every: number of updates between checkpoints.
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
        # Seconds of earlier starts, up to the checkpoint that this one continues.
        saved = self.saved
        clock = read_json(saved / CLOCK) if saved is not None else None
        self._seconds_before = float(clock["seconds"]) if clock is not None else 0.0
        self.generations = RowWriter(folder.file("generations.jsonl"), compare=False)
        """Writer of sample texts of training and evaluation, for people to read."""

    @property
    def saved(self) -> Path | None:
        """Path of the checkpoint to continue from; None if there is none."""
        return latest_checkpoint(self.checkpoints)

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, including those before the checkpoint that it continues."""
        return round(time.monotonic() - self._begun + self._seconds_before, 1)

    def learn(
        self,
        agent: RolloutAgent,
        total: int,
        label: str,
        on_update: Callable[[RolloutAgent], None] | None = None,
    ) -> None:
        """Makes the remaining updates of an agent, or as many as the time limit allows; the last training of a run.

        Args:
            agent: the agent to train; it is restored from the run's checkpoint if there is one.
            total: number of updates of the whole training.
            label: label of the progress bar.
            on_update: called with the agent after every update, before its metrics are written; it may record more.

        Raises:
            OutOfTimeError: if the time limit stopped the training, after a checkpoint.
            HelperDoneError: in all processes but the main one, when all updates are made.
        """
        if (saved := self.saved) is not None:
            agent.restore(saved)
            self.tracker.skip(agent.updates)
            self.console.print(f"resuming {self.folder.path} after {agent.updates} of {total} updates")
            # Rows of updates after the checkpoint are kept: these updates are repeated and do not write them again.
            self.generations.skip_those(lambda row: _update_of(row) <= agent.updates)
        agent.set_logger(self.tracker.logger())
        agent.start()
        with StepProgress(label, total, self.console) as progress:
            while agent.updates < total:
                if self._out_of_time():
                    self._save(agent.save)
                    raise OutOfTimeError
                agent.update(agent.updates / total)
                if on_update is not None:
                    on_update(agent)
                values = agent.logger.name_to_value
                progress.update(agent.updates, f"reward {values.get('rollout/reward', float('nan')):.2f}")
                agent.logger.dump(agent.num_timesteps)
                self._record_samples(agent)
                if agent.updates % self.save_every == 0 or agent.updates == total:
                    self._save(agent.save)
        self._leave_helpers()

    def supervised(self, trainer: SupervisedTrainer, examples: Sequence[Any], label: str, tracked: bool = True) -> None:
        """Trains on examples, as far as the time limit allows.

        Args:
            trainer: the trainer; it is restored from the run's checkpoint if there is one and ``tracked`` is True.
            examples: what the trainer's ``fit`` takes: demonstrations, pairs or ranked lists.
            label: label of the progress bar.
            tracked: False: a warm start that writes no metrics or checkpoints and ignores the time limit; True: the
                last training of a run.

        Raises:
            OutOfTimeError: if the time limit stopped the training, after a checkpoint.
            HelperDoneError: in all processes but the main one, when a tracked training is complete.
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
        if tracked and stopped:
            raise OutOfTimeError
        if tracked:
            self._leave_helpers()

    def _leave_helpers(self) -> None:
        """Ends the helper processes of a distributed training: only the main one evaluates and writes results."""
        if not self.processes.is_main:
            raise HelperDoneError

    def rows(
        self, name: str, total: int, size: int, make: Callable[[int], Sequence[Mapping[str, Any]]], label: str
    ) -> list[dict[str, Any]]:
        """Makes a file of rows in the run folder in chunks, as far as the time limit allows; see :func:`chunked_rows`.

        Raises:
            OutOfTimeError: if the time limit is reached before a chunk; complete chunks are kept.
        """

        def chunk(start: int) -> Sequence[Mapping[str, Any]]:
            self.check_time()
            return make(start)

        return chunked_rows(self.folder.file(name), total, size, chunk, label, self.console)

    @contextmanager
    def roles(self, parts: Mapping[str, Any]) -> Iterator[dict[str, Backend]]:
        """Builds backends by role; their replies are kept in the run's journal, and what they spend is recorded."""
        roles = journaled_roles(parts, Journal(self.folder.file("journal.jsonl")))
        with accounted(roles, self.folder.path):
            yield roles

    def finish(self, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the results of the finished run, with its time, sends them to the tracker, and returns them."""
        results = self.folder.finish(metrics, dict(counts) | {"seconds": self.seconds})
        self.tracker.summary(results)
        return results

    def check_time(self) -> None:
        """Checks the time limit; to be called before every piece of work that is saved as a whole.

        Raises:
            OutOfTimeError: if the time limit is reached.
        """
        if self._out_of_time():
            raise OutOfTimeError

    def _out_of_time(self) -> bool:
        """Returns whether any process has reached the time limit."""
        expired = time.monotonic() - self._begun > 60 * self.minutes
        # All processes stop together: one that went on would wait for the others' gradients.
        return bool(self.minutes) and any(self.processes.gather(expired))

    def _save(self, write: Callable[[Path], None]) -> None:
        """Replaces the run's checkpoint by one that ``write`` writes, with the time spent so far."""

        def write_with_clock(folder: Path) -> None:
            if self.processes.is_main:
                write_json(folder / CLOCK, {"seconds": self.seconds})
            write(folder)

        replace_checkpoint(self.checkpoints, write_with_clock, self.processes.is_main)
        self.processes.wait()

    def _record_samples(self, agent: RolloutAgent) -> None:
        """Writes up to two episodes of the last update to ``generations.jsonl``, for people to read."""
        batch = agent.last_rollout
        if batch is None:
            return
        # Not all agents compute log-probs a second time, by the training kernels.
        logprobs = batch.logprobs if len(batch.logprobs) else batch.sampler_logprobs
        for i in range(min(2, len(batch))):
            rows = batch.rows([i])
            self.generations.write(
                {
                    "when": f"update {agent.updates}",
                    "episode_id": batch.infos[i]["episode_id"],
                    "text": batch.infos[i]["text"],
                    "finish_reason": batch.infos[i]["finish_reason"],
                    "reward": round(float(batch.rewards[rows].sum()), 6),
                    "logprobs": [round(float(v), 4) for v in logprobs[rows]],
                }
            )


class Deadline:
    """The time limit of an experiment with several stages; its clock starts on construction.

    Args:
        minutes: the limit in minutes; 0: no limit.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.minutes, self.begun = minutes, time.monotonic()

    @property
    def left(self) -> float:
        """Remaining minutes; 0: no limit.

        Raises:
            OutOfTimeError: if the time limit is reached.
        """
        left = self.minutes - (time.monotonic() - self.begun) / 60 if self.minutes else 0.0
        if self.minutes and left <= 0:
            raise OutOfTimeError
        return left

    def check(self) -> None:
        """Checks the time limit.

        Raises:
            OutOfTimeError: if the time limit is reached.
        """
        _ = self.left

    def run(self, run: Callable[[Any, Console], dict[str, Any]], options: Any, console: Console) -> dict[str, Any]:
        """Runs a stage within the remaining time and returns its results.

        Args:
            run: function of the stage.
            options: options of the stage; their ``minutes`` are replaced.
            console: console that shows progress.

        Raises:
            OutOfTimeError: if no time is left, or the stage stopped before its end.
        """
        results = run(replace(options, minutes=self.left), console)
        if results.get("status") == "stopped":
            raise OutOfTimeError
        return results


def in_time(work: Callable[[Any, Console], Any]) -> Callable[[Any, Console], Any]:
    """Decorates a command: if its time limit is reached, it prints so and returns ``{"status": "stopped"}``."""

    @wraps(work)
    def run(options: Any, console: Console) -> Any:
        try:
            return work(options, console)
        except OutOfTimeError:
            console.print(f"out of time: the same command goes on in {options.root}")
            return {"status": "stopped"}

    return run


@dataclass
class TrainingOptions(RunOptions):
    """Options of all stages that train a model or evaluate a trained one."""

    token_budget: Count = 1024
    """Largest number of tokens of a micro-batch in training; it limits memory and does not change results."""
    dtype: DType = "auto"
    """Floating-point type of the computation. auto: bfloat16 if the hardware supports it, otherwise float32."""


def run_stage(
    options: RunOptions,
    command: str,
    console: Console,
    work: Callable[[Run], dict[str, Any]],
    distributed: bool = True,
    save_every: int = 5,
    **identity: Any,
) -> dict[str, Any]:
    """Runs the work of a command in its run folder, or returns the stored results of a finished run.

    Args:
        options: options of the command.
        command: name of the command, as a user types it.
        console: console that shows progress.
        work: does the work and returns the results, which it has written with ``folder.finish``.
        distributed: whether several processes can share the work.
        save_every: number of updates between checkpoints.
        **identity: further values that a run must have in common with the run it resumes: digests of data and weights
            that the options only name.

    Returns:
        The results; their status is ``stopped`` if the time limit was reached, ``helper`` in a helper process.

    Raises:
        InputError: if the folder holds another run or is in use, or there are several processes and the command runs in
            one.
    """
    processes = Processes()
    if processes.count > 1 and not distributed:
        raise InputError(f"'{command}' runs in one process: start it without torchrun or accelerate")
    path, config = Path(options.run_dir), asdict(options) | identity
    if (results := RunFolder(path, config, command).finished(console)) is not None:
        return results
    # The main process writes the run; the others have a scratch folder within it.
    if not processes.is_main:
        path, console = path / "ranks" / str(processes.index), Console(quiet=True)
    folder = RunFolder(path, config, command)
    with folder.opened(), Tracker(folder, options.track if processes.is_main else "none") as tracker:
        checkpoints = Path(options.run_dir) / "checkpoints"
        try:
            return work(Run(folder, tracker, console, processes, checkpoints, options.minutes, save_every))
        except OutOfTimeError:
            console.print(f"out of time: repeat the command to go on with {path}")
            return folder.finish({}, {}, status="stopped")
        except HelperDoneError:
            return folder.finish({}, {}, status="helper")


def tokenizer_of(model: str) -> Tokenizer:
    """Returns the tokenizer of a model by the model's name, without loading the model."""
    return EmbeddedTokenizer() if model == "embedded" else Tokenizer(model)


def digest(value: Any) -> str:
    """Returns a short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def weights_digest(folder: Path) -> str:
    """Returns a short hash of a policy's weights, by which a resumed run detects that they have changed."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()[:12]


def policy_folder(folder: str, option: str) -> Path:
    """Returns the folder of the policy that a stage trained.

    Args:
        folder: run folder of the stage, or the folder of a policy itself.
        option: option that holds the folder, for error messages.

    Raises:
        InputError: if there is no policy; the message names the option.
    """
    if not folder:
        raise InputError(f"{option} is missing: name the run folder of a stage that trained a policy")
    for path in (Path(folder) / "policy", Path(folder)):
        if (path / SETTINGS).exists():
            return path
    raise InputError(f"{option} {folder} holds no policy: has that stage finished?")
