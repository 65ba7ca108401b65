"""``instructgym nlu``: language understanding by reinforcement learning (RL4GLUE) and what it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.policy.optimization import Processes
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
from ...llm_backends.training.adapters import LoraSettings
from ...rewards.ground_truth import parse_answer
from ..runs.folder import RunFolder, Tracker, check_tracker
from ..runs.options import check_counts
from ..runs.report import plot_token_training
from ..runs.responses import respond
from ..runs.training import TokenTraining

ENV_ID = "instructgym/GenerateLabel-v0"


def answers(
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    temperature: float,
    seed: int = 0,
    **env_options: Any,
) -> list[dict[str, Any]]:
    """What the policy answers, one row per example: ``episode_id``, ``text``, ``finish_reason``, ``prediction``.

    Args:
        policy: who answers.
        examples: what it is asked.
        temperature: 0 for greedy decoding.
        seed: of sampled answers; an answer depends on it and the example alone.
        env_options: arguments of ``GenerateLabel``, as in training.
    """
    rows = []
    for example, response in zip(
        examples, respond(policy, ENV_ID, examples, temperature, seed, **env_options), strict=True
    ):
        rows.append(
            {
                "episode_id": example.id,
                "text": response.text,
                "finish_reason": response.finish_reason,
                "prediction": parse_answer(response.text, response.finish_reason, example.choices),
                "reference": example.reference,
            }
        )
    return rows


def scores(examples: Sequence[PromptExample], predictions: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """The official metrics by task."""
    tasks = dict.fromkeys(str(example.metadata["task"]) for example in examples)
    chosen = {task: [i for i, e in enumerate(examples) if e.metadata["task"] == task] for task in tasks}
    return {
        task: evaluate(task, [predictions[i] for i in rows], [examples[i] for i in rows])
        for task, rows in chosen.items()
    }


def majority(train: Sequence[PromptExample], examples: Sequence[PromptExample]) -> list[str]:
    """For each example the most frequent answer of its task in training (the mean, where answers are numbers)."""
    best: dict[str, str] = {}
    for task in dict.fromkeys(str(example.metadata["task"]) for example in [*train, *examples]):
        known = [e for e in train if e.metadata["task"] == task and e.reference is not None]
        if known and known[0].metadata["kind"] == "regression":
            best[task] = f"{np.mean([float(e.reference or 0) for e in known]):.1f}"
        else:
            counted = Counter(str(e.reference) for e in known)
            best[task] = counted.most_common(1)[0][0] if counted else ""
    return [best[str(example.metadata["task"])] for example in examples]


Method = Literal["majority", "zero-shot", "few-shot", "sft", "ppo", "grpo", "rloo"]

AGENTS: dict[str, type[RolloutAgent]] = {"ppo": TokenPPO, "grpo": GRPO, "rloo": RLOO}

SMOKE = {"labels": 64, "eval_limit": 32}
"""What ``--scale smoke`` cuts a run to."""


@dataclass
class NLU:
    """Train or evaluate one method on language-understanding tasks."""

    task: str = "rotten-tomatoes"
    """GLUE or SuperGLUE task, or several separated by commas (one policy for all); rotten-tomatoes needs no data."""
    method: Method = "ppo"
    """majority, zero-shot, few-shot (no training); sft, ppo, grpo, rloo."""
    start: str = "constrained"
    """constrained: only the allowed answers can be written; free: anything, as published; few-shot-header: free behind
    solved examples; sft:N: free, after supervised training on N labels, which is also the KL reference."""
    model: str = "embedded"
    """embedded, or a local path or hub id of a causal language model."""
    data_dir: str = ""
    """Folder of GLUE's TSV or SuperGLUE's JSONL files; without it the datasets library fetches them."""
    run_dir: str = "runs/nlu"
    """Run folder."""
    labels: int = 3000
    """Training labels per task at most; 0 for all."""
    passes: int = 1
    """Passes over the training prompts."""
    layout: Literal["tagged", "plain"] = "tagged"
    """tagged: answers between judgement tags; plain: behind a cue, to the end of the line."""
    shots: int = 4
    """Solved examples of few-shot and few-shot-header."""
    preset: Literal["paper", "code"] = "paper"
    """Points for right, wrong and malformed answers: paper (1, 0, -1) or code (1, -1, -3)."""
    eval_task: str = ""
    """Evaluate on these tasks instead, for transfer."""
    eval_data_dir: str = ""
    """Folder of their files; by default --data-dir."""
    eval_split: Literal["validation", "test"] = "test"
    """validation: rows held out of train, for tuning; test: the published dev set."""
    eval_limit: int = 0
    """Rows to evaluate on per task at most; 0 for all."""
    batch_size: int = 64
    """Prompts per update."""
    group_size: int = 4
    """Samples per prompt (grpo, rloo)."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule, with 10% warm-up and down to a tenth."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw or adafactor."""
    epochs: int = 1
    """Passes over the episodes of an update (ppo, grpo, rloo)."""
    kl_coefficient: float = 0.02
    """Weight of the KL penalty against the start; 0 saves the reference pass."""
    lora_rank: int = 16
    """Rank of the adapters."""
    token_budget: int = 1024
    """Tokens of a micro-batch."""
    rollouts: Literal["process", "vllm"] = "process"
    """Who writes the episodes (ppo, grpo, rloo): this process, or the vLLM servers of --servers."""
    servers: str = ""
    """Base URLs of vLLM servers of the same model, http://host:port/v1, separated by commas."""
    adapter_dir: str = ""
    """Folder that the servers see under the same path, for handing over adapters; by default a temporary one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""
    max_tokens: int = 12
    """Tokens of an answer at most."""
    context_length: int = 512
    """Tokens of prompt and answer at most."""
    save_every: int = 5
    """Updates between checkpoints."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: a few minutes on two cores; report: as the options say."""
    seed: int = 0
    """Of labels, order, tokens and weights."""
    minutes: float = 0.0
    """Stop cleanly after this time; repeating the command goes on. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    def check(self) -> None:
        """Refuses options that contradict each other or name nothing."""
        check_tracker(self.track)
        if self.scale == "smoke":
            self.labels = min(self.labels or SMOKE["labels"], SMOKE["labels"])
            self.eval_limit = min(self.eval_limit or SMOKE["eval_limit"], SMOKE["eval_limit"])
        start, _, count = self.start.partition(":")
        if start not in ("constrained", "free", "few-shot-header", "sft") or (start == "sft") != bool(count):
            raise InputError(f"--start must be constrained, free, few-shot-header or sft:N, got {self.start!r}")
        if count and not (count.isdigit() and int(count) > 0):
            raise InputError(f"--start sft:N needs a number of labels, got {self.start!r}")
        if count and self.labels and int(count) >= self.labels:
            raise InputError(f"--start {self.start} leaves no labels of --labels {self.labels} for training")
        if start == "sft" and self.method not in AGENTS:
            raise InputError(f"--start {self.start} is for {', '.join(AGENTS)}, not for {self.method}")
        check_counts(self, "batch_size", "group_size", "passes", "shots", "save_every", "max_tokens", "lora_rank")
        for name in ("labels", "eval_limit", "minutes"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if (self.rollouts == "vllm") != bool(self.urls):
            raise InputError("--rollouts vllm needs --servers, and --servers is for --rollouts vllm")
        if self.rollouts == "vllm" and self.method not in AGENTS:
            raise InputError(f"--rollouts vllm is for {', '.join(AGENTS)}, not for {self.method}")
        for task in f"{self.task},{self.eval_task}".split(","):
            if task.strip() or not self.eval_task:
                kind = get_task(task.strip()).kind if task.strip() else ""
                if kind == "regression" and self.constrained and self.method != "majority":
                    raise InputError(
                        f"{task} asks for a number, which --start constrained cannot write: use free or sft:N"
                    )

    @property
    def constrained(self) -> bool:
        """Whether only the allowed answers can be written."""
        return self.start == "constrained"

    @property
    def urls(self) -> list[str]:
        """The servers' base URLs."""
        return [url.strip() for url in self.servers.split(",") if url.strip()]

    @property
    def shown(self) -> int:
        """Solved examples before each prompt."""
        return self.shots if self.method == "few-shot" or self.start == "few-shot-header" else 0

    @property
    def warm_labels(self) -> int:
        """Labels of the supervised start."""
        return int(self.start.partition(":")[2] or 0)

    def env_options(self) -> dict[str, Any]:
        """Arguments of the environment, examples and tokenizer aside."""
        return {
            "layout": self.layout,
            "preset": self.preset,
            "constrained": self.constrained,
            "max_tokens": self.max_tokens,
            "context_length": self.context_length,
        }


@dataclass
class _Data:
    """The examples of a run."""

    train: list[PromptExample]
    warm: list[PromptExample]
    evaluation: list[PromptExample]


def run(options: NLU, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), evaluates, and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded where that can be seen.
    """
    console = console or Console()
    options.check()
    data = _load(options)
    processes = Processes()
    path = Path(options.run_dir)
    if not processes.is_main:  # of several, one writes the run; the others keep a scratch folder within it
        path, console = path / "ranks" / str(processes.index), Console(quiet=True)
    folder = RunFolder(path, asdict(options), "nlu")
    if options.dry_run:
        console.print(
            f"would run {options.method} on {options.task}: {len(data.warm) + len(data.train)} labels, "
            f"{len(data.evaluation)} rows to evaluate, in {folder.path}"
        )
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    with folder.opened(), Tracker(folder, options.track if processes.is_main else "none") as tracker:
        return _Run(options, folder, tracker, console, processes).go(data)


def _load(options: NLU) -> _Data:
    limit = options.labels or None
    train = load_examples(options.task, "train", options.data_dir, limit, options.shown, options.layout, options.seed)
    train = [example for example in train if example.reference is not None]
    # The tasks of a mixture come one after the other.
    train = [train[i] for i in np.random.default_rng(options.seed).permutation(len(train))]
    evaluation = load_examples(
        options.eval_task or options.task,
        options.eval_split,
        (options.eval_data_dir or options.data_dir) if options.eval_task else options.data_dir,
        options.eval_limit or None,
        options.shown,
        options.layout,
        options.seed,
    )
    hidden = next((example for example in evaluation if example.reference is None), None)
    if hidden is not None:
        raise InputError(
            f"{hidden.id} of the {options.eval_split} split has no label: choose another --eval-task or split"
        )
    scores(evaluation, [None] * len(evaluation))  # rows that a metric cannot use are refused before training
    if len(train) <= options.warm_labels:
        raise InputError(f"--start {options.start} leaves none of the {len(train)} labels for training")
    return _Data(train[options.warm_labels :], train[: options.warm_labels], evaluation)


class _Run:
    """One run: what its steps share."""

    def __init__(
        self, options: NLU, folder: RunFolder, tracker: Tracker, console: Console, processes: Processes
    ) -> None:
        self.options, self.folder, self.tracker, self.console = options, folder, tracker, console
        self.processes = processes
        checkpoints = Path(options.run_dir) / "checkpoints"
        self.training = TokenTraining(
            folder, tracker, console, processes, checkpoints, options.minutes, options.save_every
        )

    def go(self, data: _Data) -> dict[str, Any]:
        options = self.options
        if options.method == "majority":
            guesses = majority(data.train, data.evaluation)
            return self._finish(data, {"greedy": scores(data.evaluation, guesses)}, {})
        policy = LanguageModelPolicy(
            options.model,
            LoraSettings(rank=options.lora_rank),
            value="shared" if options.method == "ppo" else "none",
            dtype=options.dtype,
            seed=options.seed,
        )
        self._check_lengths(policy, data)
        counts: dict[str, Any] = {}
        if options.method in ("sft", *AGENTS):
            done = self._train(policy, data, counts)
            counts["train_seconds"] = self.training.seconds
            if (results := self.training.unfinished(done, counts)) is not None:
                return results
            policy.save(self.folder.file("policy", "policy.json").parent)
        metrics = {}
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            rows = answers(policy, data.evaluation, temperature, options.seed, **options.env_options())
            metrics[name] = scores(data.evaluation, [row["prediction"] for row in rows])
            for row in rows[:20]:
                self.training.generations.write({"when": f"evaluation, {name}"} | row)
        self.tracker.table("generations", [{"when": name, **row} for row in rows[:50]])
        return self._finish(data, metrics, counts)

    def _check_lengths(self, policy: LanguageModelPolicy, data: _Data) -> None:
        """Refuses prompts over the context, of training and evaluation alike."""
        if policy.lm.context_length < self.options.context_length:
            raise InputError(
                f"{self.options.model} reads {policy.lm.context_length} tokens: set --context-length to that or less"
            )
        trains = [data.warm, data.train] if self.options.method in ("sft", *AGENTS) else []
        for examples in filter(None, [data.evaluation, *trains]):
            gym.make_vec(
                ENV_ID, num_envs=1, examples=examples, tokenizer=policy.tokenizer, **self.options.env_options()
            ).close()

    def _finish(self, data: _Data, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
        results = self.folder.finish(
            metrics,
            {
                "labels": len(data.warm) + len(data.train),
                "evaluated": len(data.evaluation),
                "seconds": self.training.seconds,
                **counts,
            },
        )
        self.tracker.summary(results)
        for how, by_task in metrics.items():
            for task, values in by_task.items():
                line = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                self.console.print(f"{task} {self.options.method} ({how}): {line}", highlight=False)
        return results

    # --- training ------------------------------------------------------------------------------------------------

    def _train(self, policy: LanguageModelPolicy, data: _Data, counts: dict[str, Any]) -> bool:
        """Trains to the end, or as far as the time goes; says whether it came to the end."""
        options, training = self.options, self.training
        if options.method == "sft":
            return self._supervised(policy, data.train, options.passes, counts, tracked=True)
        if training.saved is None and data.warm:
            self._supervised(policy, data.warm, 4, counts, tracked=False)
            policy.freeze_reference("sft")
        agent = self._agent(policy, data)
        total = -(-len(data.train) // options.batch_size) * options.passes

        def labels(agent: RolloutAgent) -> None:
            agent.logger.record("rollout/labels", options.warm_labels + agent.updates * options.batch_size)

        try:
            if not training.learn(agent, total, f"{options.method} on {options.task}", labels):
                return False
        finally:
            if agent.engine is not None and self.processes.is_main:
                agent.engine.close()
        counts |= {"updates": agent.updates, "tokens": agent.num_timesteps, "episodes": agent.episodes}
        self.tracker.image(
            "training", plot_token_training(self.folder.path, self.folder.file("figures", "training.png"))
        )
        return True

    def _agent(self, policy: LanguageModelPolicy, data: _Data) -> RolloutAgent:
        options = self.options
        group = 1 if options.method == "ppo" else options.group_size
        env = gym.make_vec(
            ENV_ID,
            num_envs=min(options.batch_size, len(data.train)) * group,
            examples=data.train,
            tokenizer=policy.tokenizer,
            group_size=group,
            **options.env_options(),
        )
        engine = VLLMEngine(options.urls, options.adapter_dir) if options.rollouts == "vllm" else None
        return AGENTS[options.method](
            env,
            policy,
            options.seed,
            engine=engine,
            learning_rate=options.learning_rate,
            schedule=options.schedule,
            warmup=0.1,
            optimizer=options.optimizer,
            epochs=options.epochs,
            kl_coefficient=options.kl_coefficient,
            token_budget=options.token_budget * group,
        )

    def _supervised(
        self,
        policy: LanguageModelPolicy,
        examples: Sequence[PromptExample],
        passes: int,
        counts: dict[str, Any],
        tracked: bool,
    ) -> bool:
        options = self.options
        trainer = SFT(
            policy,
            options.seed,
            learning_rate=options.learning_rate,
            schedule=options.schedule,
            warmup=0.1,
            optimizer=options.optimizer,
            batch_size=32 if tracked else 16,
            epochs=passes,
            token_budget=options.token_budget,
        )
        demonstrations = [self._demonstration(policy, example) for example in examples]
        done = self.training.supervised(trainer, demonstrations, f"sft on {options.task}", tracked)
        counts["sft_steps"] = trainer.steps
        return done

    def _demonstration(self, policy: LanguageModelPolicy, example: PromptExample) -> TokenizedDemonstration:
        tokenizer, answer = policy.tokenizer, str(example.reference)
        prompt = tokenizer.encode(example.prompt)
        if not self.options.constrained:
            return TokenizedDemonstration(
                prompt, tokenizer.encode_continuation(response_text(answer, self.options.layout))
            )
        response = tokenizer.encode_continuation(f" {answer}")
        choices = Choices([tokenizer.encode_continuation(f" {word}") for word in example.choices])
        allowed = [choices.allowed(response[:t]) for t in range(len(response))]
        return TokenizedDemonstration(prompt, response, [tokens for tokens in allowed if tokens is not None])
