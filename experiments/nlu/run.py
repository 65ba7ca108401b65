"""``instructgym nlu run``: language understanding by reinforcement learning (RL4GLUE), and the methods to compare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.policy_gradient.grpo import GRPO, RLOO
from ...agents.policy_gradient.ppo import TokenPPO
from ...agents.rollouts.agent import RolloutAgent
from ...agents.rollouts.engine import VLLMEngine
from ...agents.supervised.sft import SFT, TokenizedDemonstration
from ...envs.tasks.nlu.data import load_examples
from ...envs.tasks.nlu.metrics import evaluate
from ...envs.tasks.nlu.tasks import get_task, response_text
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards.ground_truth import parse_answer
from ..runs.options import Count, Scale, named
from ..runs.report import plot_token_training
from ..runs.responses import check_prompts, respond
from ..runs.training import Run, TrainingOptions, new_policy, run_stage, tokenizer_of

ENV_ID = "instructgym/GenerateLabel-v0"


def scores(examples: Sequence[PromptExample], predictions: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Returns the official metrics by task and name.

    Args:
        examples: labelled examples of one or more tasks.
        predictions: one answer per example; None is malformed.
    """
    tasks = dict.fromkeys(str(example.metadata["task"]) for example in examples)
    rows_of = {task: [i for i, e in enumerate(examples) if e.metadata["task"] == task] for task in tasks}
    return {
        task: evaluate(task, [predictions[i] for i in rows], [examples[i] for i in rows])
        for task, rows in rows_of.items()
    }


def majority(train: Sequence[PromptExample], examples: Sequence[PromptExample]) -> list[str]:
    """Predicts for each example the most frequent training answer of its task, or the mean if answers are numbers.

    Args:
        train: training examples with a reference.
        examples: examples to predict.
    """
    best: dict[str, str] = {}
    for task in dict.fromkeys(str(example.metadata["task"]) for example in [*train, *examples]):
        labelled = [e for e in train if e.metadata["task"] == task]
        if labelled and labelled[0].metadata["kind"] == "regression":
            best[task] = f"{np.mean([float(e.reference or 0) for e in labelled]):.1f}"
        else:
            frequencies = Counter(str(e.reference) for e in labelled)
            best[task] = max(frequencies, key=frequencies.__getitem__, default="")
    return [best[str(example.metadata["task"])] for example in examples]


Method = Literal["majority", "zero-shot", "few-shot", "sft", "ppo", "grpo", "rloo"]

AGENTS: dict[str, type[RolloutAgent]] = {"ppo": TokenPPO, "grpo": GRPO, "rloo": RLOO}
"""Methods that train by reinforcement learning."""
TRAINED = ("sft", *AGENTS)
"""All methods that train."""

SMOKE = {"labels": 64, "eval_limit": 32}
"""Upper limits of these options with ``--scale smoke``."""


@dataclass
class NLU(TrainingOptions):
    """Train or evaluate one method on language-understanding tasks."""

    task: str = "rotten-tomatoes"
    """GLUE or SuperGLUE task, or several separated by commas (one policy for all). rotten-tomatoes is included in the
    package and needs no download."""
    method: Method = "ppo"
    """Without training: majority (the most frequent label), zero-shot or few-shot; with training: sft (supervised),
    ppo, grpo or rloo (reinforcement learning)."""
    start: str = "constrained"
    """How the policy starts and answers. constrained: decoding allows only the task's answers; free: any text, as
    published; few-shot-header: any text, after solved examples in the prompt; sft:N: any text, after supervised
    training on N labels, which also gives the reference policy of the KL penalty."""
    model: str = "embedded"
    """Model of the policy: embedded, or a local path or hub id of a causal language model."""
    data_dir: str = ""
    """Folder of GLUE's TSV or SuperGLUE's JSONL files. By default the datasets library downloads them."""
    run_dir: str = "runs/nlu"
    """Folder of the run. A folder with an unfinished run of the same options is resumed."""
    labels: int = 3000
    """Maximum number of training labels per task. 0: all."""
    passes: Count = 1
    """Passes over the training prompts."""
    layout: Literal["tagged", "plain"] = "tagged"
    """Where the response holds the answer. tagged: between judgement tags; plain: after a cue, up to the end of the
    line."""
    shots: Count = 4
    """Number of solved examples before each prompt, with --method few-shot or --start few-shot-header."""
    preset: Literal["paper", "code"] = "paper"
    """Rewards of right, wrong and malformed answers: paper (1, 0, -1) or code (1, -1, -3)."""
    eval_task: str = ""
    """Tasks to evaluate on, separated by commas, to measure transfer. By default those of --task."""
    eval_data_dir: str = ""
    """Folder of the data files of --eval-task. By default --data-dir."""
    eval_split: Literal["validation", "test"] = "test"
    """Rows to evaluate on. validation: rows held out of the training set, for tuning; test: the published development
    set."""
    eval_limit: int = 0
    """Maximum number of rows to evaluate on, per task. 0: all."""
    batch_size: Count = 64
    """Prompts per update of ppo, grpo and rloo."""
    group_size: Count = 4
    """Responses sampled per prompt by grpo and rloo."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after a warm-up of 10%; linear and cosine end at a tenth of the peak."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Optimiser of the training: adamw or adafactor."""
    epochs: int = 1
    """Passes of ppo, grpo and rloo over the episodes of an update."""
    kl_coefficient: float = 0.02
    """Weight of the KL penalty to the policy before training. 0: no penalty, which saves the forward pass of the
    reference policy."""
    lora_rank: Count = 16
    """Rank of the LoRA adapters."""
    rollouts: Literal["process", "vllm"] = "process"
    """Where ppo, grpo and rloo generate their episodes. process: in this process; vllm: on the vLLM servers of
    --servers."""
    servers: str = ""
    """Base URLs of vLLM servers of the same model, http://host:port/v1, separated by commas."""
    adapter_dir: str = ""
    """Folder through which adapters are passed to the vLLM servers, which must see it under the same path. By default a
    temporary folder."""
    max_tokens: Count = 12
    """Maximum tokens of an answer."""
    context_length: int = 512
    """Maximum tokens of prompt and answer together."""
    save_every: Count = 5
    """Updates between checkpoints."""
    scale: Scale = "report"
    """Size of the run. smoke: a few minutes on two cores, with at most 64 labels and 32 evaluated rows per task;
    report: as the other options set it."""

    def check(self) -> None:
        """Checks the options, and reduces them to those of ``--scale smoke`` if it is set.

        Raises:
            InputError: for options that exclude each other or have an unknown value, naming them.
        """
        super().check()
        if self.scale == "smoke":
            for name, most in SMOKE.items():
                setattr(self, name, min(getattr(self, name) or most, most))
        if not re.fullmatch(r"constrained|free|few-shot-header|sft:0*[1-9]\d*", self.start):
            raise InputError(f"--start must be constrained, free, few-shot-header or sft:N, got {self.start!r}")
        if self.labels and self.warm_labels >= self.labels:
            raise InputError(f"--start {self.start} leaves no labels of --labels {self.labels} for training")
        if (self.rollouts == "vllm") != bool(self.urls):
            raise InputError("--rollouts vllm needs --servers, and --servers is for --rollouts vllm")
        if self.method not in AGENTS and (self.warm_labels or self.urls):
            raise InputError(f"--start sft:N and --rollouts vllm are for {', '.join(AGENTS)}, not for {self.method}")
        for task in filter(None, map(str.strip, f"{self.task},{self.eval_task}".split(","))):
            if get_task(task).kind == "regression" and self.constrained and self.method != "majority":
                raise InputError(f"{task} asks for a number, which --start constrained cannot write: use free or sft:N")

    @property
    def constrained(self) -> bool:
        """Whether decoding allows only the task's answers."""
        return self.start == "constrained"

    @property
    def urls(self) -> list[str]:
        """Base URLs of the vLLM servers."""
        return [url.strip() for url in self.servers.split(",") if url.strip()]

    @property
    def num_shots(self) -> int:
        """Number of solved examples before each prompt."""
        return self.shots if self.method == "few-shot" or self.start == "few-shot-header" else 0

    @property
    def warm_labels(self) -> int:
        """Number of labels of the supervised warm start."""
        return int(self.start.partition(":")[2] or 0)

    def env_options(self) -> dict[str, Any]:
        """Returns the arguments of the environment, except examples and tokenizer."""
        return named(self, "layout", "preset", "constrained", "max_tokens", "context_length")

    def optimization(self) -> dict[str, Any]:
        """Returns the settings that agents and supervised training share."""
        return named(self, "learning_rate", "schedule", "optimizer") | {"warmup": 0.1}


@dataclass
class _Data:
    """The examples of a run."""

    train: list[PromptExample]
    """Training examples, without those of the warm start."""
    warm: list[PromptExample]
    """Examples of the supervised warm start."""
    evaluation: list[PromptExample]

    @property
    def labels(self) -> int:
        """Number of labels that the run sees."""
        return len(self.warm) + len(self.train)


def run(options: NLU, console: Console | None = None) -> dict[str, Any]:
    """Trains the policy, or resumes its training, evaluates it, and returns the results.

    Raises:
        InputError: for bad input; before a model is loaded, if it can be detected without one.
    """
    console = console or Console()
    options.check()
    data = _load(options)
    plan = f"run {options.method} on {options.task}: {data.labels} labels, {len(data.evaluation)} rows to evaluate"
    return run_stage(options, "nlu", console, partial(_work, options, data), save_every=options.save_every, plan=plan)


def _load(options: NLU) -> _Data:
    """Loads and shuffles the training examples and loads those of the evaluation.

    Raises:
        InputError: for data that cannot be used, evaluation rows without a label, and too few labels to train on.
    """
    load = partial(load_examples, shots=options.num_shots, layout=options.layout, seed=options.seed)
    train = load(options.task, "train", options.data_dir, options.labels or None)
    train = [example for example in train if example.reference is not None]
    # Shuffle: the examples of several tasks are loaded one task after the other.
    train = [train[i] for i in np.random.default_rng(options.seed).permutation(len(train))]
    folder = (options.eval_task and options.eval_data_dir) or options.data_dir
    evaluation = load(options.eval_task or options.task, options.eval_split, folder, options.eval_limit or None)
    hidden = next((example for example in evaluation if example.reference is None), None)
    if hidden is not None:
        raise InputError(
            f"{hidden.id} of the {options.eval_split} split has no label: choose another --eval-task or split"
        )
    scores(evaluation, [None] * len(evaluation))  # raises an error before training for rows that a metric cannot use
    if len(train) <= options.warm_labels:
        raise InputError(f"--start {options.start} leaves none of the {len(train)} labels for training")
    return _Data(train[options.warm_labels :], train[: options.warm_labels], evaluation)


def _work(options: NLU, data: _Data, run: Run) -> dict[str, Any]:
    """Trains if the method needs it, evaluates with greedy decoding and with sampling, and returns the results."""
    counts: dict[str, Any] = {}
    if options.method == "majority":
        metrics = {"greedy": scores(data.evaluation, majority(data.train, data.evaluation))}
    else:
        tokenizer = tokenizer_of(options.model, options.context_length)
        for examples in filter(
            None, [data.evaluation, *([data.warm, data.train] if options.method in TRAINED else [])]
        ):
            check_prompts(ENV_ID, examples, tokenizer, **options.env_options())
        policy = new_policy(options, value="shared" if options.method == "ppo" else "none")
        if options.method in TRAINED:
            counts = _train(options, data, run, policy) | {"train_seconds": run.seconds}
            run.save_policy(policy)
        metrics = _evaluate(options, data, run, policy)
    results = run.finish(metrics, {"labels": data.labels, "evaluated": len(data.evaluation)} | counts)
    for decoding, by_task in metrics.items():
        for task, values in by_task.items():
            line = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            run.console.print(f"{task} {options.method} ({decoding}): {line}", highlight=False)
    return results


def _evaluate(
    options: NLU, data: _Data, run: Run, policy: LanguageModelPolicy
) -> dict[str, dict[str, dict[str, float]]]:
    """Answers with greedy decoding and by sampling, records some answers, and returns the metrics.

    Rows of answers have ``episode_id``, ``text``, ``finish_reason``, ``prediction`` (the parsed answer, None if it is
    malformed) and ``reference``.

    Returns:
        The metrics by decoding, task and name.
    """
    metrics = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        responses = respond(policy, ENV_ID, data.evaluation, temperature, options.seed, **options.env_options())
        rows = [
            {
                "episode_id": example.id,
                "text": response.text,
                "finish_reason": response.finish_reason,
                "prediction": parse_answer(response.text, response.finish_reason, example.choices),
                "reference": example.reference,
            }
            for example, response in zip(data.evaluation, responses, strict=True)
        ]
        metrics[name] = scores(data.evaluation, [row["prediction"] for row in rows])
        for row in rows[:20]:
            run.generations.write({"when": f"evaluation, {name}"} | row)
    run.tracker.table("generations", [{"when": name, **row} for row in rows[:50]])
    return metrics


def _train(options: NLU, data: _Data, run: Run, policy: LanguageModelPolicy) -> dict[str, int]:
    """Trains the policy and returns counts of the training.

    Raises:
        OutOfTimeError: if the time limit stopped the training, after a checkpoint.
    """
    if options.method == "sft":
        return {"sft_steps": _imitate(options, run, policy, data.train, options.passes)}
    counts = {}
    # A checkpoint includes the warm start and the frozen reference policy.
    if run.saved is None and data.warm:
        counts["sft_steps"] = _imitate(options, run, policy, data.warm, 4, tracked=False)
        policy.freeze_reference("sft")
    agent = _agent(options, policy, data.train)
    total = -(-len(data.train) // options.batch_size) * options.passes

    def labels(agent: RolloutAgent) -> None:
        agent.logger.record("rollout/labels", options.warm_labels + agent.updates * options.batch_size)

    try:
        run.learn(agent, total, f"{options.method} on {options.task}", labels)
    finally:
        # Unload the run's adapters from the servers even if training fails; one process does it for all.
        if agent.engine is not None and run.processes.is_main:
            agent.engine.close()
    run.tracker.image("training", plot_token_training(run.folder.path, run.folder.file("figures", "training.png")))
    return counts | {"updates": agent.updates, "tokens": agent.num_timesteps, "episodes": agent.episodes}


def _agent(options: NLU, policy: LanguageModelPolicy, examples: Sequence[PromptExample]) -> RolloutAgent:
    """Builds the agent of the method on a training env."""
    group = 1 if options.method == "ppo" else options.group_size
    env = gym.make_vec(
        ENV_ID,
        num_envs=min(options.batch_size, len(examples)) * group,
        examples=examples,
        tokenizer=policy.tokenizer,
        group_size=group,
        **options.env_options(),
    )
    return AGENTS[options.method](
        env,
        policy,
        options.seed,
        engine=VLLMEngine(options.urls, options.adapter_dir) if options.rollouts == "vllm" else None,
        token_budget=options.token_budget * group,
        **named(options, "epochs", "kl_coefficient"),
        **options.optimization(),
    )


def _imitate(
    options: NLU,
    run: Run,
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    passes: int,
    tracked: bool = True,
) -> int:
    """Trains the policy on references and returns the number of optimiser steps.

    Args:
        options: options of the run.
        run: the run.
        policy: policy to train.
        examples: examples whose references are imitated.
        passes: passes over the examples.
        tracked: False for a warm start, which leaves no metrics or checkpoints and is not cut short.

    Raises:
        OutOfTimeError: if the time limit stopped a tracked training, after a checkpoint.
    """
    trainer = SFT(
        policy,
        options.seed,
        batch_size=32 if tracked else 16,
        epochs=passes,
        token_budget=options.token_budget,
        **options.optimization(),
    )
    demonstrations = [_demonstration(options, policy.tokenizer, example) for example in examples]
    run.supervised(trainer, demonstrations, f"sft on {options.task}", tracked)
    return trainer.steps


def _demonstration(options: NLU, tokenizer: Tokenizer, example: PromptExample) -> TokenizedDemonstration:
    """Returns the prompt of an example and its reference answer as token ids."""
    prompt, answer = tokenizer.encode(example.prompt, example.markup), str(example.reference)
    if not options.constrained:
        return TokenizedDemonstration(prompt, tokenizer.encode_continuation(response_text(answer, options.layout)))
    response = tokenizer.encode_continuation(f" {answer}")
    # Under constrained decoding, the loss is among the allowed tokens of each position.
    choices = Choices([tokenizer.encode_continuation(f" {word}") for word in example.choices])
    allowed = [choices.allowed(response[:t]) for t in range(len(response))]
    return TokenizedDemonstration(prompt, response, [tokens for tokens in allowed if tokens is not None])
