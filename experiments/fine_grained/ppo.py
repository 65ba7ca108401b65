"""``instructgym fine-grained ppo``: trains the supervised policy by token-level PPO on the rewards of a reward model.

The agent is :class:`~instructgym.agents.policy_gradient.ppo.TokenPPO`, the rewards are in
:mod:`~instructgym.rewards.learned.token_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Le
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tokens.episode import PromptExample
from ...llm_backends import resolve
from ...llm_backends.errors import InputError
from ...rewards import Reward, WeightedSum
from ...rewards.learned.reward_model import RewardModel, read_reward_settings
from ...rewards.learned.token_reward import SequenceReward, TokenReward
from ..runs.folder import RunFolder, read_json, write_json
from ..runs.options import Count, Required, input_errors, parse_reward
from ..runs.responses import check_prompts
from ..runs.training import Run, ppo_agent, run_stage, tokenizer_of
from .common import ENV_ID, PolicyOptions

Form = Literal["auto", "causal", "whole", "terminal"]


@dataclass
class FineGrainedPPO(PolicyOptions):
    """Train a policy by token-level PPO on the rewards of a reward model."""

    policy: str = ""
    """Run folder of the policy to start from. It is also the reference policy of the KL penalty."""
    reward_model: Annotated[str, Required("the run folder of 'fine-grained reward-model'")] = ""
    """Run folder of the reward model: that of 'fine-grained reward-model'."""
    arm: str = ""
    """Name of this arm in reports; runs of one name are its seeds. Empty: the name of the run folder."""
    form: Form = "auto"
    """How the reward of a token-level model is given. causal (the same as auto): each token gets its own reward; whole:
    each token gets its share of the mean, once the response is complete; terminal: the last token gets the mean. A
    sequence-level model always gives its reward at the last token (auto or terminal)."""
    judge: str = "reviews"
    """Held-out reward that is logged and not trained on: an id, or a weighted sum such as 'reviews + 0.5*vader'. Empty:
    none."""
    updates: Count = 32
    """Number of PPO updates."""
    batch_size: Count = 48
    """Responses per PPO update."""
    epochs: Count = 1
    """Epochs over the responses of an update."""
    learning_rate: float = 5e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    kl_coefficient: float = 0.05
    """Weight of the KL penalty against the policy to start from, on a scale on which the returns of that policy have
    standard deviation 1."""
    lam: Annotated[float, Le(1)] = 0.95
    """Lambda of generalised advantage estimation (GAE), in [0, 1]."""
    calibration: Count = 128
    """Number of responses of the policy to start from by which the reward is shifted and scaled."""


def run(options: FineGrainedPPO, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy, and returns the results.

    Raises:
        InputError: if the input is invalid, before a model is loaded where possible.
    """
    console = console or Console()
    options.check()
    start, base = options.start()
    model_folder = Path(options.reward_model) / "model"
    if not model_folder.is_dir():
        raise InputError(f"--reward-model {options.reward_model} holds no reward model: has that stage finished?")
    settings = read_reward_settings(model_folder)
    level = settings["level"]
    if level == "sequence" and options.form not in ("auto", "terminal"):
        raise InputError(
            f"--form {options.form} needs a token-level model, {options.reward_model} is of level sequence"
        )
    examples = options.prompts("unlabelled", base)
    check_prompts(ENV_ID, examples, tokenizer_of(base), **options.env_options())
    with input_errors():
        judges = {"judge": resolve("reward", parse_reward(options.judge))} if options.judge else {}

    def work(opened: Run) -> dict[str, Any]:
        policy = options.load(start)
        if opened.saved is None:
            policy.freeze_reference("sft")  # a resumed run restores it from the checkpoint
        # Policy and reward model share one trunk, unless they have different base models.
        shared = policy.trunk if settings["model"] == base else None
        model = RewardModel.load(model_folder, shared, dtype=options.dtype)
        proxy = _calibrated(options, opened.folder, model, policy, examples)
        # With weight 0 the judge is logged, but does not change the reward.
        reward = WeightedSum({"proxy": proxy} | judges, dict.fromkeys(judges, 0.0))
        copies = min(options.batch_size, len(examples))
        agent = ppo_agent(options, policy, ENV_ID, copies, examples, reward, "lam")
        opened.learn(agent, options.updates, options.arm or f"ppo, {level}")
        opened.save_policy(policy)
        counts = {"updates": agent.updates, "tokens": agent.num_timesteps, "episodes": agent.episodes}
        return opened.finish({}, counts)

    plan = f"train {options.updates} updates on {len(examples)} prompts"
    return run_stage(options, "fine-grained ppo", console, work, plan=plan)


def _calibrated(
    options: FineGrainedPPO,
    folder: RunFolder,
    model: RewardModel,
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
) -> Reward:
    """Returns the reward, scaled so that the returns of the initial policy's responses have mean 0 and deviation 1.

    Bradley-Terry determines only differences of rewards, and the sum of token rewards grows with the length. Therefore
    the mean per token is subtracted from each token's reward, or the mean per response from a reward for the response.
    """
    # A resumed run keeps the scale that it started with, and samples no responses for it.
    stored = read_json(folder.path / "scale.json")
    if stored is None:
        raw = scaled_reward(model, options.form)
        responses = options.sample(policy, examples[: options.calibration], options.data_seed, raw)
        returns = np.array([response.reward for response in responses])
        # The mean is subtracted per token from a reward that each token gets on its own, else per response.
        units = np.array([len(r.token_ids) if raw.timing == "causal" else 1 for r in responses])
        center = float(returns.sum() / units.sum())
        spread = float((returns - center * units).std())
        if not spread > 0:
            raise InputError(f"{options.reward_model} gives all responses of the start the same reward")
        stored = {"center": center, "scale": 1.0 / spread}
        write_json(folder.file("scale.json"), stored)
    return scaled_reward(model, options.form, **stored)


def scaled_reward(model: RewardModel, form: Form, scale: float = 1.0, center: float = 0.0) -> Reward:
    """Returns the reward of a model in the given form, shifted by ``center`` and multiplied by ``scale``."""
    if model.level == "sequence" or form == "terminal":
        return SequenceReward(model, scale=scale, center=center)
    return TokenReward(model, form="causal" if form == "auto" else form, scale=scale, center=center)
