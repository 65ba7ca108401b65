"""The core of agents that learn from their own episodes: rollouts, logs, several processes, acting, checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from ...envs.process import InvalidRewardRateError
from ...envs.tokens.env import FastPathEnv, missing_members
from ...llm_backends import Completion, Sampling, request_seed
from ...llm_backends.errors import InputError, check_at_least_zero
from ...llm_backends.local.sampling import Choices
from ..policy.checkpoints import POLICY_FOLDER, STATE, policy_from, read_checkpoint, read_state, write_checkpoint
from ..policy.language_model import LanguageModelPolicy
from ..policy.optimization import Optimizer, OptimizerSettings, Processes, TrainingDivergedError
from .batch import RolloutStatistics, TokenBatch, collect
from .engine import RolloutEngine


@dataclass(frozen=True)
class RolloutSettings(OptimizerSettings):
    """What agents that learn from their own episodes have in common."""

    rollout_batches: int = 1
    """Episodes per env copy and update; with more than one, scoring overlaps with the next generation."""
    epochs: int = 4
    """Passes over the episodes of an update."""
    minibatches: int = 1
    """Optimiser steps per epoch."""
    token_budget: int = 1024
    """Tokens of a micro-batch, padding included: bounds memory, does not change results."""
    top_k: int = 0
    """Sampling truncated to the k most likely tokens; 0 samples from the policy itself."""
    max_invalid_share: float = 0.2
    """Training stops when more of an update's episodes have no verdict."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rollout_batches", "epochs", "minibatches", "token_budget"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_at_least_zero(self, "top_k", "max_invalid_share")


class RolloutAgent(ABC):
    """An agent that learns from its own episodes.

    Args:
        env: a vector env with the fast path (:class:`~instructgym.envs.tokens.env.FastPathEnv`), in autoreset mode
            ``DISABLED``; the env inside wrappers is used.
        policy: a :class:`LanguageModelPolicy`, or the name, path or hub id of a model.
        seed: of everything that is drawn: episodes' order, tokens, minibatches.
        engine: what writes the episodes, e.g. a :class:`~instructgym.agents.rollouts.engine.VLLMEngine`; by default the
            policy itself.
        settings: an object of the class's ``settings_class``; or
        **options: its fields by name.

    Raises:
        InputError: for settings out of range, an env without the fast path, or a policy that counts tokens otherwise.
    """

    settings_class: ClassVar[type[RolloutSettings]] = RolloutSettings
    needs_values: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False
    """Whether samples of one prompt are compared."""
    name: ClassVar[str]

    def __init__(
        self,
        env: Any,
        policy: str | LanguageModelPolicy = "embedded",
        seed: int = 0,
        settings: RolloutSettings | None = None,
        engine: RolloutEngine | None = None,
        **options: Any,
    ) -> None:
        try:
            self.settings: Any = self.settings_class(**options) if settings is None else settings
        except TypeError as error:
            raise InputError(f"{type(self).__name__}: {error}") from error
        self.env: FastPathEnv = getattr(env, "unwrapped", env)
        self.seed = seed
        self._check_env()
        if isinstance(policy, str):
            policy = LanguageModelPolicy(policy, value="shared" if self.needs_values else "none", seed=seed)
        self.policy, self.engine = policy, engine
        self._check_fit()
        self.processes = Processes()
        self.optimizer = Optimizer(policy.parameters(), self.settings)
        self.sampling = Sampling(
            max_tokens=self.env.generation.max_tokens,
            temperature=policy.temperature,
            top_k=self.settings.top_k,
            stop=self.env.generation.stop,
        )
        self.logger = Logger(folder=None, output_formats=[])
        self.num_timesteps = 0
        """Response tokens that the env has taken."""
        self.episodes = 0
        self.updates = 0
        self.predictions = 0
        """Calls of :meth:`predict`, each of which draws anew."""
        self.last_rollout: TokenBatch | None = None
        self._started = False
        self._env_seed: int | None = None
        """The seed of the next reset; None goes on."""

    def _check_env(self) -> None:
        """Refuses an env that does not fit, before a model is loaded."""
        if missing := missing_members(self.env):
            raise InputError(
                f"{type(self.env).__name__} has no {missing[0]}: token-level agents need a TokenVectorEnv, or an env "
                "with all members of instructgym.envs.tokens.env.FastPathEnv"
            )
        if self.needs_groups and self.env.group_size < 2:
            raise InputError(f"{self.name} compares samples of one prompt: make the env with group_size above 1")

    def _check_fit(self) -> None:
        generation, lm = self.env.generation, self.policy.lm
        words = self.env.tokenizer.hf.get_vocab()
        if len(lm.tokenizer) != generation.vocabulary or lm.tokenizer.get_vocab() != words:
            raise InputError(
                f"{lm.name} has {len(lm.tokenizer)} tokens, the env counts {generation.vocabulary} of "
                f"{generation.tokenizer}: give the env the model's own tokenizer"
            )
        if self.env.autoreset_mode is not AutoresetMode.DISABLED:
            mode = self.env.autoreset_mode.value
            raise InputError(f"token-level agents need autoreset_mode='Disabled', got {mode!r}")
        if lm.context_length < generation.context_length:
            raise InputError(
                f"{lm.name} reads {lm.context_length} tokens, the env's episodes take up to "
                f"{generation.context_length}: set its context_length"
            )
        if self.needs_values and self.policy.value == "none":
            raise InputError(f"{self.name} needs a value function: build the policy with value='shared'")

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: BaseCallback | Callable[[RolloutAgent], bool | None] | None = None,
    ) -> RolloutAgent:
        """Trains until ``total_timesteps`` response tokens have been played, those of before included.

        Args:
            total_timesteps: env steps, which are response tokens.
            callback: a stable-baselines3 callback (its steps are updates), or a function of this agent called after
                every update; returning False stops training.

        Raises:
            InvalidRewardRateError: when too many episodes have no verdict.
            TrainingDivergedError: when no step of an update had a finite gradient.
        """
        hook = callback if isinstance(callback, BaseCallback) else None
        if hook is not None:
            hook.init_callback(self)  # type: ignore[arg-type]
            hook.on_training_start(locals(), globals())
        self.start()
        while self.num_timesteps < total_timesteps:
            self.update(self.num_timesteps / total_timesteps)
            going = hook.on_step() if hook is not None else callback(self) if callable(callback) else True
            self.logger.dump(self.num_timesteps)
            if going is False:
                break
        if hook is not None:
            hook.on_training_end()
        return self

    def start(self) -> None:
        """Seeds the env and gives all processes the same weights, unless training is under way or restored."""
        if not self._started:
            self._env_seed = self.seed
            self.processes.broadcast(self.policy.parameters().values())
            self._started = True

    def update(self, progress: float = 0.0) -> None:
        """One update: episodes, and what is learned from them.

        Args:
            progress: share of training done, for the schedules.
        """
        begun = time.perf_counter()
        self.optimizer.schedule(progress)
        if self.engine is not None:
            self.engine.take(self.policy, self.processes)
            self.logger.record("time/push", time.perf_counter() - begun)
        batch, statistics = collect(
            self.engine or self.policy,
            self.env,
            self.settings.rollout_batches,
            self.sampling,
            request_seed(self.seed, "rollout", self.updates),
            self.processes.share(self.env.num_envs, self.env.group_size),
            self._env_seed,
        )
        self._env_seed = None
        totals = self._log_rollout(batch, statistics)
        if totals["kept"]:
            self._improve(batch)
            self.policy.clear_prefix_cache()
        self.num_timesteps += int(totals["tokens"])
        self.episodes += int(totals["episodes"])
        self.updates += 1
        self.last_rollout = batch
        seconds = time.perf_counter() - begun
        self.logger.record("time/seconds", seconds)
        self.logger.record("time/tokens_per_second", totals["tokens"] / seconds)
        self.logger.record("rollout/episodes", self.episodes)
        self.logger.record("train/updates", self.updates)

    def _log_rollout(self, batch: TokenBatch, statistics: RolloutStatistics) -> dict[str, float]:
        """Logs the rollout of all processes and returns its counts."""
        rows = self.processes.gather(asdict(statistics) | {"kept": len(batch)})
        totals = {key: float(sum(row[key] for row in rows)) for key in rows[0] if not isinstance(rows[0][key], dict)}
        kept = max(totals["kept"], 1)
        record = self.logger.record
        record("rollout/reward", totals["reward"] / kept)
        record("rollout/length", totals["tokens"] / max(totals["episodes"], 1))
        record("rollout/invalid_share", totals["invalid"] / max(totals["episodes"], 1))
        record("rollout/empty", totals["empty"])
        for name in sorted({name for row in rows for name in row["terms"]}):
            sums, counts = (sum(row[key].get(name, 0.0) for row in rows) for key in ("terms", "term_counts"))
            record(f"rollout/terms/{name}", sums / counts)
        for name in sorted({name for row in rows for name in row["finish"]}):
            record(f"rollout/finish/{name}", sum(row["finish"].get(name, 0.0) for row in rows) / kept)
        record("time/rollout", statistics.seconds)
        record("time/play", statistics.waited)
        if totals["invalid"] > self.settings.max_invalid_share * totals["episodes"]:
            raise InvalidRewardRateError(
                f"{int(totals['invalid'])} of {int(totals['episodes'])} episodes of update {self.updates} had no "
                f"verdict (limit {self.settings.max_invalid_share:.0%})"
            )
        return totals

    @abstractmethod
    def _improve(self, batch: TokenBatch) -> None:
        """Trains on the valid episodes of an update, of which this process may have none."""

    def _epochs(self, count: int, minibatches: int | None = None) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields the number of each epoch over ``count`` items and its minibatches, int64 arrays of item numbers.

        Args:
            count: items that this process trains on in an update; may be 0.
            minibatches: optimiser steps per epoch; by default those of the settings. Every process makes as many.
        """
        parts = self.settings.minibatches if minibatches is None else minibatches
        for epoch in range(self.settings.epochs):
            # The order hangs on the update and the epoch alone: training that is resumed draws the same one.
            generator = np.random.default_rng(request_seed(self.seed, "minibatches", self.updates, epoch))
            order = generator.permutation(count) if self.settings.minibatches > 1 else np.arange(count)
            yield epoch, np.array_split(order, parts)

    def _optimizer_step(self) -> float:
        """Sums the gradients over processes, takes an optimiser step and returns the gradient's norm."""
        self.processes.add_gradients(self.optimizer.parameters.values())
        return self.optimizer.step()

    def _end_training(self, steps: int, skipped: int) -> None:
        """Records the optimiser's state after the ``steps`` of an update.

        Args:
            steps: optimiser steps of the update.
            skipped: ``optimizer.skipped`` before them.

        Raises:
            TrainingDivergedError: if none of them had a finite gradient.
        """
        if self.optimizer.skipped - skipped == steps:
            raise TrainingDivergedError(
                f"no optimiser step of update {self.updates} had a finite gradient: lower the learning rate "
                f"({self.optimizer.learning_rate:g}) or train in float32"
            )
        self.logger.record("train/learning_rate", self.optimizer.learning_rate)
        self.logger.record("train/skipped_steps", self.optimizer.skipped)

    # --- acting ------------------------------------------------------------------------------------------------------

    def get_env(self) -> Any:
        """The vector env."""
        return self.env

    def set_logger(self, logger: Logger) -> None:
        """Sends metrics to another logger."""
        self.logger = logger

    def generate(self, prompts: Any, sampling: Sampling | None = None) -> list[list[Completion]]:
        """Continues prompts, given as texts or token ids, as in training unless ``sampling`` says otherwise."""
        ids = [self.policy.lm.encode(prompt) for prompt in prompts]
        return self.policy.generate(ids, sampling or self.sampling, eos=self.env.generation.eos_ids)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> Any:
        """The next token for one or more observations of mode ``tokens``: (int64 action or array of them, None).

        ``action_masks``, bool, shape (n, vocabulary) or (vocabulary,), are those of the env, as in sb3-contrib.
        """
        ids, mask = np.atleast_2d(observation["ids"]), np.atleast_2d(observation["mask"]).astype(bool)
        prompts = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        temperature = 0.0 if deterministic else self.policy.temperature
        self.predictions += 1
        seeds = [request_seed(self.seed, "predict", self.predictions, row) for row in range(len(prompts))]
        samplings = [Sampling(max_tokens=1, temperature=temperature, seed=seed) for seed in seeds]
        choices = None
        if action_masks is not None:
            masks = np.broadcast_to(action_masks, (len(prompts), np.shape(action_masks)[-1]))
            choices = [None if row.all() else Choices(np.flatnonzero(row)[:, None].tolist()) for row in masks]
        written = self.policy.generate(prompts, samplings, choices)
        actions = np.array([completion.token_ids[0] for [completion] in written], dtype=np.int64)
        return (actions if np.ndim(observation["ids"]) > 1 else int(actions[0])), None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint: policy, optimiser, counters, and where the env stands.

        Weights are safetensors, the rest JSON. To be called between updates.
        """
        if self.processes.is_main:
            write_checkpoint(folder, self.policy, self.optimizer, self._state())
        self.processes.wait()

    def restore(self, folder: str | Path) -> None:
        """Continues from :meth:`save`: the following updates are those of an undisturbed run.

        Bit for bit on a CPU in float32, with the same number of threads.

        Raises:
            InputError: if the checkpoint is missing, broken, or of another agent.
        """
        self._take_state(read_checkpoint(folder, self.policy.load, self.optimizer, self.name))

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says besides weights, JSON-able."""
        return {
            "agent": self.name,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "num_timesteps": self.num_timesteps,
            "episodes": self.episodes,
            "updates": self.updates,
            "env": self.env.state_dict(),
        }

    def _take_state(self, state: Mapping[str, Any]) -> None:
        self.num_timesteps, self.updates = state["num_timesteps"], state["updates"]
        self.episodes, self.seed = state["episodes"], state["seed"]
        self.env.load_state_dict(state["env"])
        self._started = self.updates > 0  # before the first update the env was not seeded yet

    @classmethod
    def load(cls, folder: str | Path, env: Any, policy: LanguageModelPolicy | None = None) -> Self:
        """The agent of a checkpoint, on an env, ready to act or to go on learning.

        Args:
            folder: what :meth:`save` wrote.
            env: built as in training.
            policy: built as in training; by default built from what the checkpoint says.
        """
        state = read_state(Path(folder) / STATE)
        agent = cls(env, policy or policy_from(Path(folder) / POLICY_FOLDER), **state["settings"])
        agent.restore(folder)
        return agent
