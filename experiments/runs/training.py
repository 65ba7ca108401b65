"""Training of language-model policies in a run folder: progress, checkpoints, resumption and a time limit.

:func:`run_stage` runs a command in its run folder; its work gets a :class:`Run`, which has the training loops. Run
folders are in :mod:`instructgym.experiments.runs.folder`, time limits in :mod:`instructgym.experiments.runs.progress`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console

from ...agents.policy.checkpoints import latest_checkpoint, replace_checkpoint
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...agents.policy.optimization import Processes
from ...agents.policy_gradient.ppo import TokenPPO
from ...agents.rollouts.agent import RolloutAgent
from ...agents.supervised.sft import TokenizedDemonstration
from ...agents.supervised.trainer import SupervisedTrainer
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Backend, Journal
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import EmbeddedTokenizer, Tokenizer
from ...llm_backends.training.adapters import LoraSettings
from ...rewards import Reward
from .folder import RowWriter, RunFolder, Tracker, accounted, chunked_rows, journaled_roles, read_json, write_json
from .options import Count, DType, RunOptions, named
from .progress import Deadline, OutOfTimeError, StepProgress

CLOCK = "clock.json"
"""File in a checkpoint that holds the seconds spent on its run."""


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
        self.checkpoints, self.limit, self.save_every = checkpoints, Deadline(minutes), save_every
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
        return round(time.monotonic() - self.limit.begun + self._seconds_before, 1)

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
        journal = Journal(self.folder.file("journal.jsonl"))
        if len(journal):
            self.console.print(
                f"resuming {self.folder.path}: {len(journal)} stored replies are replayed, none is paid for again"
            )
        roles = journaled_roles(parts, journal)
        with accounted(roles, self.folder.path):
            yield roles

    def save_policy(self, policy: LanguageModelPolicy) -> None:
        """Saves the policy into the run folder, where :func:`policy_folder` finds it."""
        policy.save(self.folder.file("policy", SETTINGS).parent)

    def show(self, metrics: Mapping[str, float | None], digits: int = 3) -> None:
        """Prints the metrics that have a value in one line, with so many decimals."""
        shown = (f"{name} {value:.{digits}f}" for name, value in metrics.items() if value is not None)
        self.console.print("  ".join(shown), highlight=False)

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
        # All processes stop together: one that went on would wait for the others' gradients.
        return bool(self.limit.minutes) and any(self.processes.gather(self.limit.reached()))

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
    plan: str = "",
    **identity: Any,
) -> dict[str, Any]:
    """Runs the work of a command in its run folder, or returns the stored results of a finished run.

    In a dry run it prints the plan and returns nothing.

    Args:
        options: options of the command.
        command: name of the command, as a user types it.
        console: console that shows progress.
        work: does the work and returns the results, which it has written with :meth:`Run.finish`.
        distributed: whether several processes can share the work.
        save_every: number of updates between checkpoints.
        plan: what the command does, such as ``train on 10 pairs``; a command that prints its own plan returns before.
        **identity: further values that a run must have in common with the run it resumes: digests of data and weights
            that the options only name.

    Returns:
        The results; their status is ``stopped`` if the time limit was reached, ``helper`` in a helper process.

    Raises:
        InputError: if the folder holds another run or is in use, or there are several processes and the command runs in
            one.
    """
    path, config = Path(options.run_dir), asdict(options) | identity
    folder = RunFolder(path, config, command)
    if options.dry_run:
        console.print(f"would {plan}, in {options.run_dir}")
        return {}
    processes = Processes()
    if processes.count > 1 and not distributed:
        raise InputError(f"'{command}' runs in one process: start it without torchrun or accelerate")
    if (results := folder.finished(console)) is not None:
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


def tokenizer_of(model: str, context_length: int = 0) -> Tokenizer:
    """Returns the tokenizer of a model by the model's name, without loading the model.

    Raises:
        InputError: if the model reads fewer tokens than the context length, the value of ``--context-length``.
    """
    tokenizer = EmbeddedTokenizer() if model == "embedded" else Tokenizer(model)
    if context_length and tokenizer.context_length < context_length:
        raise InputError(f"{model} reads {tokenizer.context_length} tokens: set --context-length to that or less")
    return tokenizer


def tokenized_demonstrations(
    prompts: Sequence[str], responses: Sequence[str], tokenizer: Tokenizer, chat: bool
) -> list[TokenizedDemonstration]:
    """Tokenizes prompts and the responses to imitate, each of which ends with the token that closes a response.

    Args:
        prompts: the prompts.
        responses: the texts that continue them, including a blank between prompt and response.
        tokenizer: tokenizer of the model to train.
        chat: whether the prompts are texts of the chat template.

    Raises:
        InputError: if the tokenizer has no end-of-sequence token.
    """
    if not (end := tokenizer.closing(chat)):
        raise InputError(f"the tokenizer of {tokenizer.name} has no EOS token, by which responses could end")
    return [
        TokenizedDemonstration(ids, [*tokenizer.encode_continuation(response), *end])
        for ids, response in zip(tokenizer.encode_batch(prompts, chat), responses, strict=True)
    ]


def new_policy(options: Any, **settings: Any) -> LanguageModelPolicy:
    """Returns a policy of the options' ``model`` with a new adapter; ``lora_rank``, ``dtype`` and ``seed`` are read."""
    lora = LoraSettings(rank=options.lora_rank)
    return LanguageModelPolicy(options.model, lora, **named(options, "dtype", "seed"), **settings)


def trainer_settings(options: Any, *names: str) -> dict[str, Any]:
    """Returns the settings that trainers take from the options of a command: a cosine schedule with 10% warm-up.

    Args:
        options: options; ``learning_rate``, ``epochs`` and ``token_budget`` are read.
        *names: further options that are settings of the trainer by the same names, as ``batch_size``.
    """
    return {"schedule": "cosine", "warmup": 0.1} | named(options, "learning_rate", "epochs", "token_budget", *names)


def ppo_agent(
    options: Any,
    policy: LanguageModelPolicy,
    env_id: str,
    copies: int,
    examples: Sequence[PromptExample],
    reward: Reward,
    *names: str,
) -> TokenPPO:
    """Returns the agent of a command that trains by token-level PPO, with its environment.

    Args:
        options: options with ``seed``, ``kl_coefficient``, ``env_options()`` and what :func:`trainer_settings` reads.
        policy: the policy to train.
        env_id: id of the environment.
        copies: number of sub-environments, one per response of an update.
        examples: the prompts.
        reward: reward of a response.
        *names: further options that are settings of the agent.
    """
    parts: dict[str, Any] = {"examples": examples, "tokenizer": policy.tokenizer, "reward": reward}
    env: Any = gym.make_vec(env_id, num_envs=copies, **parts, **options.env_options())
    return TokenPPO(env, policy, options.seed, **trainer_settings(options, "kl_coefficient", *names))


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
