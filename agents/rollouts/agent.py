"""Holds RolloutAgent, the base class of agents that learn from their own episodes.

It has the training loop, rollouts, logs, several processes, acting and checkpoints. A subclass has ``_improve``, which
trains on the episodes of an update: see :mod:`~instructgym.agents.policy_gradient.on_policy`. How episodes are
generated is in :mod:`~instructgym.agents.rollouts.batch`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Settings that all agents that learn from their own episodes have."""

    rollout_batches: int = 1
    """Number of episodes per env copy and update; if above 1, the episodes of one batch are scored while those of the
    next are generated."""
    epochs: int = 4
    """Number of passes over the episodes of an update."""
    minibatches: int = 1
    """Number of optimiser steps per epoch; their minibatches are the same under any number of processes."""
    token_budget: int = 1024
    """Largest number of tokens in a micro-batch, padding included; bounds memory and does not change results."""
    top_k: int = 0
    """Episodes are sampled from the k most likely tokens; 0: from the policy's whole distribution."""
    max_invalid_share: float = 0.2
    """Largest share of an update's episodes that may have no valid score; training stops if there are more."""

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
            ``DISABLED``; wrappers around it are left out.
        policy: a :class:`~instructgym.agents.policy.language_model.LanguageModelPolicy`, or the name, path or hub id of
            a model.
        seed: seed of the order of the data, of sampled tokens and of minibatches, and of initial weights if the policy
            is built here.
        engine: generator of the episodes, e.g. a :class:`~instructgym.agents.rollouts.engine.VLLMEngine`; None: the
            policy generates them in this process.
        settings: an object of the class's ``settings_class``; None: it is built from ``options``.
        **options: fields of ``settings_class`` by name.

    Raises:
        InputError: for settings out of range, an env without the fast path, or a policy that does not fit the env, for
            example with another tokenizer.
    """

    settings_class: ClassVar[type[RolloutSettings]] = RolloutSettings
    """Class of the agent's settings."""
    needs_values: ClassVar[bool] = False
    """Whether the policy must have a value function."""
    needs_groups: ClassVar[bool] = False
    """Whether samples of one prompt are compared, so that the env must have a ``group_size`` above 1."""
    name: ClassVar[str]
    """Name of the agent in checkpoints and error messages."""

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
        """Number of response tokens that the env has consumed."""
        self.episodes = 0
        """Number of episodes, invalid and empty ones included."""
        self.updates = 0
        self.predictions = 0
        """Number of calls of :meth:`predict`, by which the seed of each call differs."""
        self.last_rollout: TokenBatch | None = None
        """The valid episodes of the last update that this process generated."""
        self._started = False
        self._env_seed: int | None = None
        """Seed of the env's next start; None: it continues in its data."""

    def _check_env(self) -> None:
        """Refuses an env that does not fit the agent, before a model is loaded."""
        if missing := missing_members(self.env):
            raise InputError(
                f"{type(self.env).__name__} has no {missing[0]}: token-level agents need a TokenVectorEnv, or an env "
                "with all members of instructgym.envs.tokens.env.FastPathEnv"
            )
        if self.needs_groups and self.env.group_size < 2:
            raise InputError(f"{self.name} compares samples of one prompt: make the env with group_size above 1")

    def _check_fit(self) -> None:
        """Refuses a policy that does not fit the env, and an env in another autoreset mode."""
        generation, lm = self.env.generation, self.policy.lm
        # Token ids pass between env and policy as they are, so each id must be the same token for both.
        vocabulary = self.env.tokenizer.hf.get_vocab()
        if len(lm.tokenizer) != generation.vocabulary or lm.tokenizer.get_vocab() != vocabulary:
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
        """Trains until the env has consumed ``total_timesteps`` response tokens, those of earlier calls included.

        Args:
            total_timesteps: number of env steps, which are response tokens.
            callback: a stable-baselines3 callback, whose steps are updates, or a function that is called with this
                agent after every update; training stops if it returns False.

        Returns:
            This agent.

        Raises:
            InvalidRewardRateError: if too many episodes of an update have no valid score.
            TrainingDivergedError: if no optimiser step of an update had a finite gradient.
        """
        hook = callback if isinstance(callback, BaseCallback) else None
        if hook is not None:
            hook.init_callback(self)  # type: ignore[arg-type]
            hook.on_training_start(locals(), globals())
        self.start()
        while self.num_timesteps < total_timesteps:
            self.update(self.num_timesteps / total_timesteps)
            proceed = hook.on_step() if hook is not None else callback(self) if callable(callback) else True
            # After the callback, which may record metrics of the same update.
            self.logger.dump(self.num_timesteps)
            # A function without a return value continues.
            if proceed is False:
                break
        if hook is not None:
            hook.on_training_end()
        return self

    def start(self) -> None:
        """Seeds the env and copies the first process's weights to all, unless training has begun or was restored."""
        if not self._started:
            self._env_seed = self.seed
            self.processes.broadcast(self.policy.parameters().values())
            self._started = True

    def update(self, progress: float = 0.0) -> None:
        """Makes one update: generates episodes, trains on them and records metrics.

        Args:
            progress: share of training that is done, in [0, 1], for the learning-rate schedule.
        """
        started = time.perf_counter()
        self.optimizer.schedule(progress)
        # 1. An engine elsewhere has the weights of the last update: push the new ones, so that episodes are on-policy.
        if self.engine is not None:
            self.engine.push_weights(self.policy, self.processes)
            self.logger.record("time/push", time.perf_counter() - started)
        # 2. Rollout. The seed depends on the number of the update alone, so a resumed run draws what an undisturbed one
        # would; each process steps its share of the env copies.
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
        # 3. Training. The count is that of all processes: a process without episodes must still take part in the sums.
        if totals["kept"]:
            self._improve(batch)
            self.policy.clear_prefix_cache()
        self.num_timesteps += int(totals["tokens"])
        self.episodes += int(totals["episodes"])
        self.updates += 1
        self.last_rollout = batch
        seconds = time.perf_counter() - started
        self.logger.record("time/seconds", seconds)
        self.logger.record("time/tokens_per_second", totals["tokens"] / seconds)
        self.logger.record("rollout/episodes", self.episodes)
        self.logger.record("train/updates", self.updates)

    def _log_rollout(self, batch: TokenBatch, statistics: RolloutStatistics) -> dict[str, float]:
        """Records the metrics of a rollout over all processes and returns its counts.

        Raises:
            InvalidRewardRateError: if too many episodes have no valid score.
        """
        rows = self.processes.gather(asdict(statistics) | {"kept": len(batch)})
        totals = {key: float(sum(row[key] for row in rows)) for key in rows[0] if not isinstance(rows[0][key], dict)}
        valid_episodes = max(totals["kept"], 1)
        record = self.logger.record
        record("rollout/reward", totals["reward"] / valid_episodes)
        record("rollout/length", totals["tokens"] / max(totals["episodes"], 1))
        record("rollout/invalid_share", totals["invalid"] / max(totals["episodes"], 1))
        record("rollout/empty", totals["empty"])
        # A term's mean is over the episodes that have it, which may be fewer than all.
        for name in sorted({name for row in rows for name in row["terms"]}):
            sums, counts = (sum(row[key].get(name, 0.0) for row in rows) for key in ("terms", "term_counts"))
            record(f"rollout/terms/{name}", sums / counts)
        for name in sorted({name for row in rows for name in row["finish"]}):
            record(f"rollout/finish/{name}", sum(row["finish"].get(name, 0.0) for row in rows) / valid_episodes)
        record("time/rollout", statistics.seconds)
        record("time/play", statistics.waited)
        # The limit is on the totals of all processes, so that all of them stop.
        if totals["invalid"] > self.settings.max_invalid_share * totals["episodes"]:
            raise InvalidRewardRateError(
                f"{int(totals['invalid'])} of {int(totals['episodes'])} episodes of update {self.updates} had no "
                f"verdict (limit {self.settings.max_invalid_share:.0%})"
            )
        return totals

    @abstractmethod
    def _improve(self, batch: TokenBatch) -> None:
        """Trains on the valid episodes of an update; this process may have none, and must still make every step."""

    def _epochs(
        self, count: int, minibatches: int | None = None, places: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields for each epoch over ``count`` items its number and its minibatches, int64 arrays of item indices.

        Args:
            count: number of items that this process trains on in an update; may be 0.
            minibatches: number of minibatches, which is the same in every process; None: that of the settings.
            places: for each item its place among those of all processes, in the order in which a single process would
                hold them; the minibatches are then this process's shares of those of a single process. None: every
                process has all items.
        """
        parts = self.settings.minibatches if minibatches is None else minibatches
        items = np.arange(count)
        if places is not None and parts > 1:
            every = sorted(place for share in self.processes.gather(list(places)) for place in share)
            numbers = {place: number for number, place in enumerate(every)}
            items = np.full(len(every), -1)  # those of other processes
            items[[numbers[place] for place in places]] = np.arange(count)
        for epoch in range(self.settings.epochs):
            # The order depends on the update and the epoch alone, so a resumed run draws the same one.
            generator = np.random.default_rng(request_seed(self.seed, "minibatches", self.updates, epoch))
            order = generator.permutation(items) if self.settings.minibatches > 1 else items
            # Always as many parts, even empty ones: every process must take every optimiser step.
            yield epoch, [part[part >= 0] for part in np.array_split(order, parts)]

    def _optimizer_step(self) -> float:
        """Sums the gradients over processes, makes an optimiser step and returns the gradient norm before clipping."""
        self.processes.add_gradients(self.optimizer.parameters.values())
        return self.optimizer.step()

    def _end_training(self, steps: int, skipped: int) -> None:
        """Records learning rate and skipped steps at the end of an update.

        Args:
            steps: number of optimiser steps in the update.
            skipped: value of ``optimizer.skipped`` before the update.

        Raises:
            TrainingDivergedError: if all steps of the update were skipped.
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
        """Returns the vector env."""
        return self.env

    def set_logger(self, logger: Logger) -> None:
        """Sends metrics to another logger."""
        self.logger = logger

    def generate(self, prompts: Any, sampling: Sampling | None = None) -> list[list[Completion]]:
        """Samples completions of prompts, which are texts or token ids.

        Args:
            prompts: n prompts.
            sampling: sampling parameters; None: those of training.

        Returns:
            n lists of completions.
        """
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
        """Returns the next token for one or more observations of mode ``tokens``, as stable-baselines3 does.

        Args:
            observation: one observation, or a batch of n.
            state: ignored, as the policy has no state besides the observation.
            episode_start: ignored.
            deterministic: True: the most likely token; False: a token sampled at the policy's temperature.
            action_masks: tokens that the env allows, as in sb3-contrib: bool, shape (n, vocabulary) or (vocabulary,);
                None: all.

        Returns:
            The action, an int or an int64 array of shape (n,), and None in place of a state.
        """
        ids, mask = np.atleast_2d(observation["ids"]), np.atleast_2d(observation["mask"]).astype(bool)
        prompts = [row[is_token] for row, is_token in zip(ids, mask, strict=True)]
        temperature = 0.0 if deterministic else self.policy.temperature
        # The number of the call is part of the seed: equal observations get new draws in every call.
        self.predictions += 1
        seeds = [request_seed(self.seed, "predict", self.predictions, row) for row in range(len(prompts))]
        samplings = [Sampling(max_tokens=1, temperature=temperature, seed=seed) for seed in seeds]
        choices = None
        if action_masks is not None:
            masks = np.broadcast_to(action_masks, (len(prompts), np.shape(action_masks)[-1]))
            # Each allowed token is a whole response of one token.
            choices = [None if row.all() else Choices(np.flatnonzero(row)[:, None].tolist()) for row in masks]
        completions = self.policy.generate(prompts, samplings, choices)
        actions = np.array([completion.token_ids[0] for [completion] in completions], dtype=np.int64)
        return (actions if np.ndim(observation["ids"]) > 1 else int(actions[0])), None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint: policy, optimiser, counters, and the env's position in its data.

        Weights are safetensors, the rest is JSON. Must be called between updates, by all processes.
        """
        if self.processes.is_main:
            write_checkpoint(folder, self.policy, self.optimizer, self._state())
        # No process returns before the checkpoint is complete.
        self.processes.wait()

    def restore(self, folder: str | Path) -> None:
        """Restores a checkpoint of :meth:`save`: the following updates are those of an undisturbed run.

        They are equal bit for bit on a CPU in float32, with the same number of threads.

        Raises:
            InputError: if the checkpoint is missing, broken, or of another agent.
        """
        self._take_state(read_checkpoint(folder, self.policy.load, self.optimizer, self.name))

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides weights and optimiser state, JSON-able."""
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
        """Restores what :meth:`_state` returned, except for settings."""
        self.num_timesteps, self.updates = state["num_timesteps"], state["updates"]
        self.episodes, self.seed = state["episodes"], state["seed"]
        self.env.load_state_dict(state["env"])
        # Before the first update the env was not seeded, so start() still has to do it.
        self._started = self.updates > 0

    @classmethod
    def load(cls, folder: str | Path, env: Any, policy: LanguageModelPolicy | None = None) -> Self:
        """Returns the agent of a checkpoint, ready to act or to continue training.

        Args:
            folder: folder that :meth:`save` wrote.
            env: the env, built as in training.
            policy: a policy, built as in training; None: it is built from the settings in the checkpoint.

        Raises:
            InputError: if the checkpoint is missing, broken, or of another agent.
        """
        state = read_state(Path(folder) / STATE)
        agent = cls(env, policy or policy_from(Path(folder) / POLICY_FOLDER), **state["settings"])
        agent.restore(folder)
        return agent
