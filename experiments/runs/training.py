"""Training of a language-model policy in a run folder: progress, checkpoints, resumption and a time budget."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.checkpoints import latest_checkpoint, replace_checkpoint
from ...agents.policy.language_model import SETTINGS
from ...agents.policy.optimization import Processes
from ...agents.rollouts.agent import RolloutAgent
from ...agents.supervised.trainer import SupervisedTrainer
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import EmbeddedTokenizer, Tokenizer
from .folder import RowWriter, RunFolder, Tracker, read_json, write_json
from .options import check_counts, check_run
from .progress import StepProgress

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


class Deadline:
    """What is left of an experiment's time, which begins when this is made.

    Args:
        minutes: in all; 0 for no limit.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.minutes, self.begun = minutes, time.monotonic()

    @property
    def left(self) -> float:
        """Minutes; 0 for no limit.

        Raises:
            OutOfTimeError: if nothing is left.
        """
        left = self.minutes - (time.monotonic() - self.begun) / 60 if self.minutes else 0.0
        if self.minutes and left <= 0:
            raise OutOfTimeError
        return left

    def check(self) -> None:
        """Raises OutOfTimeError if nothing is left."""
        _ = self.left

    def run(self, run: Callable[[Any, Console], dict[str, Any]], options: Any, console: Console) -> dict[str, Any]:
        """Runs a stage in what is left of the time.

        Raises:
            OutOfTimeError: if nothing is left, or the stage has not come to its end.
        """
        results = run(replace(options, minutes=self.left), console)
        if results.get("status") == "stopped":
            raise OutOfTimeError
        return results


def in_time(work: Callable[[Any, Console], Any]) -> Callable[[Any, Console], Any]:
    """The same work, which says so where the time is over, and then returns ``{"status": "stopped"}``."""

    @wraps(work)
    def run(options: Any, console: Console) -> Any:
        try:
            return work(options, console)
        except OutOfTimeError:
            console.print(f"out of time: the same command goes on in {options.root}")
            return {"status": "stopped"}

    return run


@dataclass
class Stage:
    """Options of every stage."""

    run_dir: str = ""
    """Folder of this stage. A folder with an unfinished run of the same options is resumed."""
    seed: int = 0
    """Of everything that is drawn: the order of data, tokens, weights."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    def check(self) -> None:
        """Refuses what can be refused without looking at files.

        Raises:
            InputError: naming the option.
        """
        check_run(self)


@dataclass
class TrainingOptions(Stage):
    """Options of every stage that trains a model, or evaluates a trained one."""

    token_budget: int = 1024
    """Tokens of a micro-batch in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""

    def check(self) -> None:
        super().check()
        check_counts(self, "token_budget")


@contextmanager
def stage(
    options: Stage, command: str, console: Console, distributed: bool = True, **identity: str
) -> Iterator[TokenTraining | dict[str, Any]]:
    """Opens the run of a stage; gives the results instead where it is finished.

    Args:
        options: of the stage.
        command: its name, as a user types it.
        console: for progress.
        distributed: whether several processes can share its work.
        **identity: what else makes a run the same run: digests of data and weights that the options only name.

    Raises:
        InputError: if the folder holds another run or is in use, and for several processes where one has to do.
    """
    processes = Processes()
    if processes.count > 1 and not distributed:
        raise InputError(f"'{command}' runs in one process: start it without torchrun or accelerate")
    path, config = Path(options.run_dir), asdict(options) | identity
    if (results := RunFolder(path, config, command).finished(console)) is not None:
        yield results
        return
    if not processes.is_main:  # of several, one writes the run; the others keep a scratch folder within it
        path, console = path / "ranks" / str(processes.index), Console(quiet=True)
    folder = RunFolder(path, config, command)
    with folder.opened(), Tracker(folder, options.track if processes.is_main else "none") as tracker:
        checkpoints = Path(options.run_dir) / "checkpoints"
        yield TokenTraining(folder, tracker, console, processes, checkpoints, options.minutes)


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of a model by its name, without the model."""
    return EmbeddedTokenizer() if model == "embedded" else Tokenizer(model)


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def weights_digest(folder: Path) -> str:
    """A short hash of a policy's weights: what was made with them must not be resumed with others."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def policy_folder(folder: str, option: str) -> Path:
    """Where a stage left its policy; a policy's own folder is taken as it is.

    Raises:
        InputError: if there is none, naming the option.
    """
    if not folder:
        raise InputError(f"{option} is missing: name the run folder of a stage that trained a policy")
    for path in (Path(folder) / "policy", Path(folder)):
        if (path / SETTINGS).exists():
            return path
    raise InputError(f"{option} {folder} holds no policy: has that stage finished?")
