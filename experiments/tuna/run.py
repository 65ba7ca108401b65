"""``instructgym tuna run``: both stages of Tuna, chained in either order, beside DPO and PPO on the same rankings.

A model is fine-tuned on requests with references (the paper's Alpaca). The probabilistic stage ranks a teacher's
responses to the same requests by the teacher's likelihood, the contextual one has a judge rank the model's own (Li et
al. 2023, arXiv 2310.13385).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample
from ...envs.tasks.instruction.evaluation import HELD_OUT, EvaluationTask, load_evaluation_tasks
from ...envs.tasks.instruction.pool import evaluation_split, load_tasks
from ...llm_backends.errors import InputError
from ...rewards import RougeGate
from ..runs.folder import RunFolder, check_tracker, journaled_roles, write_once
from ..runs.options import SCALES, check_output, input_errors, parse_part
from ..runs.training import Deadline, digest, in_time, tokenizer_of
from ..teaching.finetune import Finetune
from ..teaching.finetune import run as finetune
from .candidates import TunaCandidates
from .candidates import run as candidates
from .evaluate import JUDGE, TunaEvaluate
from .evaluate import run as evaluate
from .ppo import TunaPPO
from .ppo import run as ppo
from .rank import TunaRank
from .rank import run as rank
from .report import EVALUATION, POLICIES, RANKINGS, TunaReport
from .report import run as report
from .train import TunaTrain
from .train import run as train

SFT, PROBABILISTIC, CONTEXTUAL, TUNA, DPO, PPO = ARMS = ("sft", "tuna-p", "tuna-c", "tuna", "dpo", "ppo")
"""The start of all others; the probabilistic stage alone; the contextual one alone; both; and two other ways to use the
rankings of ``tuna-c``."""

ORDERS = ("probabilistic,contextual", "contextual,probabilistic")

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {
        "candidates": {"max_tokens": 16},
        "train": {"epochs": 1},
        "ppo": {"updates": 1, "batch_size": 8, "max_tokens": 16},
        "evaluate": {"max_tokens": 16},
    },
    "report": {
        "candidates": {"max_tokens": 64},
        "train": {"epochs": 2},
        "ppo": {"updates": 12, "batch_size": 32, "max_tokens": 64},
        "evaluate": {"max_tokens": 96},
    },
}
MOST = {"smoke": (10, 6), "report": (0, HELD_OUT)}
"""Requests (0: all) and held-out tasks, where nothing else is asked for."""
LEARNING_RATES = {"first": 2e-4, "second": 1e-4, DPO: 1e-4}
"""Of a Tuna stage from the start, of one behind another, of DPO; adapters take larger ones than the paper's."""


@dataclass
class TunaRun:
    """Run all stages: supervised start, candidates, rankings, training, evaluation, report."""

    run_dir: str = "runs/tuna"
    """Folder for the run folders of all stages; those that are finished are kept."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: under three minutes on two cores; report: up to two hours."""
    model: str = "embedded"
    """Who is trained: embedded, or a local path or hub id of a causal language model."""
    seeds: str = ""
    """Seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL with 'instruction' and 'instances'. By default the
    package's own."""
    held_out: int = 0
    """Seed tasks kept for evaluation, a quarter of all at most, chosen by a hash of their text. 0: by --scale, 6 or 40.
    """
    order: Literal["probabilistic,contextual", "contextual,probabilistic"] = "probabilistic,contextual"
    """Which stage of Tuna comes first; the arm tuna is trained by both."""
    arms: str = ",".join(ARMS)
    """Arms beside the base model, separated by commas: sft (the start), tuna-p, tuna-c, tuna, dpo, ppo."""
    teacher: str = "embedded"
    """Whose responses and log-probs the probabilistic stage takes: embedded, transformers, vllm, openai,
    'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    judge: str = "contextual"
    """Who ranks in the contextual stage: contextual, pairwise, ground-truth (ROUGE-L to the reference), or JSON."""
    judge_backend: str = "embedded"
    """The language model of that judge, and of the one that compares the arms."""
    evaluation_judge: str = JUDGE
    """Who compares the arms with the start, in both orders; see 'tuna evaluate'."""
    loss: str = "tuna"
    """Of the Tuna arms: tuna (the paper's) or tuna_released (its code's)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of what is trained; auto: bfloat16 where the hardware computes in it."""
    seed: int = 0
    """Of everything that is drawn."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check the options, load no model."""

    def check(self) -> list[str]:
        """The names of the arms.

        Raises:
            InputError: naming the option.
        """
        check_output(self.root / "report" / "report.md")
        check_tracker(self.track)
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        if self.order not in ORDERS:
            raise InputError(f"--order must be {' or '.join(ORDERS)}, got {self.order!r}")
        if self.loss not in ("tuna", "tuna_released"):
            raise InputError(f"--loss must be tuna or tuna_released, got {self.loss!r}: DPO is an arm of its own")
        for name in ("held_out", "seed", "minutes"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"--{name.replace('_', '-')} must be in [0, 2**32), got {getattr(self, name)}")
        names = [name.strip() for name in self.arms.split(",") if name.strip()]
        if unknown := [name for name in names if name not in ARMS]:
            raise InputError(f"--arms has an unknown {unknown[0]!r}: use {', '.join(ARMS)}")
        if not names:
            raise InputError(f"--arms names none: use {', '.join(ARMS)}")
        return [name for name in ARMS if name in names]

    @property
    def root(self) -> Path:
        """The folder of the experiment."""
        return Path(self.run_dir).resolve()

    @property
    def held(self) -> int:
        """Seed tasks to hold out."""
        return self.held_out or MOST[self.scale][1]

    @property
    def starts_probabilistic(self) -> bool:
        """Whether the probabilistic stage is the first."""
        return self.order == ORDERS[0]

    def evaluation_tasks(self) -> list[EvaluationTask]:
        """What the arms are evaluated on.

        Raises:
            InputError: for seed tasks that cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.seeds or None, self.held)

    def requests(self) -> list[InstructionExample]:
        """The requests to learn from: those of the seed tasks that are not held out and resemble none that is.

        Raises:
            InputError: for seed tasks that cannot be used, or without any request.
        """
        with input_errors():
            shown, _ = evaluation_split(load_tasks(self.seeds or None), self.held)
        gate = RougeGate(0.7, [task.instruction for task in self.evaluation_tasks()])
        examples = [
            InstructionExample(task.instruction, one.input.strip(), one.output.strip())
            for task in shown
            if not gate.rejects(gate.nearest(task.instruction)[0])
            for one in task.instances
            if one.output.strip()
        ]
        if not examples:
            raise InputError(
                f"--seeds {self.seeds} has no request to learn from that resembles no evaluation task: give seed tasks "
                "with 'instances'"
            )
        return examples[: MOST[self.scale][0] or None]


@dataclass
class _Chain:
    """The stages of one experiment, in their folders; each is run when something needs it, once."""

    options: TunaRun
    console: Console
    data: Path
    limit: Deadline
    done: set[Path] = field(default_factory=set)

    def folder(self, kind: str, name: str) -> Path:
        return self.options.root / kind / name

    def stage(self, work: Callable[[Any, Console], dict[str, Any]], options: Any) -> Path:
        """Runs a stage unless this chain has; returns its folder."""
        folder = Path(options.run_dir)
        if folder not in self.done:
            self.console.rule(f"{folder.parent.name}/{folder.name}", style="dim")
            self.limit.run(work, options, self.console)
            self.done.add(folder)
        return folder

    def shared(self, kind: str, name: str) -> dict[str, Any]:
        """Options of every stage."""
        options = self.options
        return {"run_dir": str(self.folder(kind, name)), "seed": options.seed, "track": options.track}

    # --- stages ------------------------------------------------------------------------------------------------------

    def start(self) -> Path:
        options = self.options
        mine = Finetune(
            **self.shared(POLICIES, SFT),
            dtype=options.dtype,
            data=str(self.data),
            model=options.model,
            epochs=2,
            context_length=min(Finetune.context_length, tokenizer_of(options.model).context_length),
        )
        return self.stage(finetune, mine)

    def candidates(self, name: str, **writer: Any) -> Path:
        mine = TunaCandidates(
            **self.shared("candidates", name),
            **SIZES[self.options.scale]["candidates"],
            data=str(self.data),
            dtype=self.options.dtype,
            **writer,
        )
        return self.stage(candidates, mine)

    def ranking(self, name: str, drawn: Path, ranker: str, backend: str) -> Path:
        mine = TunaRank(**self.shared(RANKINGS, name), candidates=str(drawn), ranker=ranker, backend=backend)
        return self.stage(rank, mine)

    def probabilistic(self) -> Path:
        """The teacher's responses by its likelihood."""
        teacher = self.options.teacher
        return self.ranking("probabilistic", self.candidates("teacher", backend=teacher), "probabilistic", teacher)

    def contextual(self, writer: Path) -> Path:
        """A policy's own responses by the judge."""
        name = "contextual" if writer.name == SFT else f"contextual-{writer.name}"
        drawn = self.candidates(writer.name, policy=str(writer))
        return self.ranking(name, drawn, self.options.judge, self.options.judge_backend)

    def trained(self, name: str, start: Path, ranked: Path, loss: str, learning_rate: float) -> Path:
        mine = TunaTrain(
            **self.shared(POLICIES, name),
            **SIZES[self.options.scale]["train"],
            dtype=self.options.dtype,
            policy=str(start),
            ranked=str(ranked),
            loss=loss,
            learning_rate=learning_rate,
            context_length=min(TunaTrain.context_length, tokenizer_of(self.options.model).context_length),
        )
        return self.stage(train, mine)

    def arm(self, name: str) -> Path:
        """The run folder of an arm's policy; whatever it needs is trained first."""
        start, loss = self.start(), self.options.loss
        first, second = LEARNING_RATES["first"], LEARNING_RATES["second"]
        if name == SFT:
            return start
        if name == PROBABILISTIC:
            return self.trained(name, start, self.probabilistic(), loss, first)
        if name == CONTEXTUAL:
            return self.trained(name, start, self.contextual(start), loss, first)
        if name == TUNA and self.options.starts_probabilistic:
            middle = self.arm(PROBABILISTIC)
            return self.trained(name, middle, self.contextual(middle), loss, second)
        if name == TUNA:
            return self.trained(name, self.arm(CONTEXTUAL), self.probabilistic(), loss, second)
        if name == DPO:
            return self.trained(name, start, self.contextual(start), "dpo", LEARNING_RATES[DPO])
        mine = TunaPPO(
            **self.shared(POLICIES, PPO),
            **SIZES[self.options.scale]["ppo"],
            dtype=self.options.dtype,
            policy=str(start),
            ranked=str(self.contextual(start)),
            context_length=min(TunaPPO.context_length, tokenizer_of(self.options.model).context_length),
        )
        return self.stage(ppo, mine) / "ppo"

    def evaluation(self, arms: Sequence[str]) -> None:
        policies = {name: self.arm(name) for name in arms}
        options = self.options
        mine = TunaEvaluate(
            **self.shared(EVALUATION, "")
            | {"run_dir": str(options.root / EVALUATION)}
            | SIZES[options.scale]["evaluate"],
            dtype=options.dtype,
            policy=",".join(f"{name}={folder}" for name, folder in policies.items()),
            tasks=options.seeds,
            held_out=options.held,
            model=options.model,
            layout="chat",
            context_length=min(TunaEvaluate.context_length, tokenizer_of(options.model).context_length),
            judge=options.evaluation_judge,
            backend=options.judge_backend,
            against=SFT if SFT in arms else "base",
        )
        self.stage(evaluate, mine)


def run(options: TunaRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the report's figures.

    Raises:
        InputError: for bad input.
    """
    return in_time(_run)(options, console or Console())


def _run(options: TunaRun, console: Console) -> dict[str, Any]:
    arms, requests = options.check(), options.requests()
    tasks = options.evaluation_tasks()
    _check_parts(options)
    if options.dry_run:
        console.print(
            f"would train {', '.join(arms)} on {len(requests)} requests and evaluate them on {len(tasks)} tasks, in "
            f"{options.root}"
        )
        return {}
    asked = digest([[task.name, task.instruction] for task in tasks])
    fixed = ("model", "order", "scale", "judge_backend", "evaluation_judge")
    identity = {name: getattr(options, name) for name in fixed} | {"evaluation_tasks": asked, "arms": arms}
    with RunFolder(options.root, identity, "tuna run").opened():
        data = options.root / "requests.jsonl"
        write_once(data, [example.row() for example in requests])
        _Chain(options, console, data, Deadline(options.minutes)).evaluation(arms)
        return report(TunaReport(str(options.root)), console)


def _check_parts(options: TunaRun) -> None:
    """Refuses a teacher, judge or backend that does not exist, before the first stage."""
    backends = {name: parse_part(getattr(options, name)) for name in ("teacher", "judge_backend")}
    with input_errors():
        live = journaled_roles(backends, None)
        TunaRank(ranker=options.judge).build(live["judge_backend"])
        TunaRank(ranker="probabilistic").build(live["teacher"])
        TunaEvaluate(judge=options.evaluation_judge).build(live["judge_backend"])
    tokenizer_of(options.model).chat_text([{"role": "user", "content": "?"}])
