"""``instructgym tuna run``: trains with both stages of Tuna in either order, and with DPO and PPO.

The idea (Li et al. 2023, arXiv 2310.13385): a model is fine-tuned on requests with reference responses (in the paper,
Alpaca). The probabilistic stage then ranks responses of a teacher to the same requests by the teacher's likelihood. In
the contextual stage a judge ranks responses of the model itself. DPO and PPO learn from the same contextual rankings.
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
"""Names of the arms: the fine-tuned model from which all others start; the probabilistic stage alone; the contextual
stage alone; both stages; and DPO and PPO on the rankings of ``tuna-c``."""

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
DEFAULT_COUNTS = {"smoke": (10, 6), "report": (0, HELD_OUT)}
"""By scale, the number of requests (0: all) and the default number of held-out tasks."""
LEARNING_RATES = {"first": 2e-4, "second": 1e-4, DPO: 1e-4}
"""Learning rates of the first Tuna stage, of the second and of DPO. Adapters need larger ones than those of the
paper."""


@dataclass
class TunaRun:
    """Run all stages: supervised start, candidates, rankings, training, evaluation, report."""

    run_dir: str = "runs/tuna"
    """Folder for the run folders of all stages. Finished stages are not run again."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: under three minutes on two cores; report: up to two hours."""
    model: str = "embedded"
    """Model to train: embedded, or a local path or hub id of a causal language model."""
    seeds: str = ""
    """File of seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL with 'instruction' and 'instances'. Empty: those
    of the package."""
    held_out: int = 0
    """Number of seed tasks for evaluation, at most a quarter of all, chosen by a hash of their text. 0: set by --scale,
    6 for smoke and 40 for report."""
    order: Literal["probabilistic,contextual", "contextual,probabilistic"] = "probabilistic,contextual"
    """Order of the two stages of Tuna in the arm tuna, which is trained by both."""
    arms: str = ",".join(ARMS)
    """Arms to train and to compare with the base model, separated by commas: sft (supervised fine-tuning, the start of
    the others), tuna-p (probabilistic stage), tuna-c (contextual stage), tuna (both stages), dpo, ppo."""
    teacher: str = "embedded"
    """Backend of the teacher, which writes and ranks the responses of the probabilistic stage: embedded, transformers,
    vllm, openai, 'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    judge: str = "contextual"
    """Ranker of the contextual stage: contextual (a judge orders all candidates at once), pairwise (a judge compares
    two at a time), ground-truth (ROUGE-L to the reference response), or JSON {"id": ..., "kwargs": {...}}."""
    judge_backend: str = "embedded"
    """Language model of both judges, the one of the contextual stage and the one that compares the arms: embedded,
    transformers, vllm, openai, 'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    evaluation_judge: str = JUDGE
    """Judge that compares the responses of each arm with those of sft (of the base model without that arm), in both
    orders, as an id or JSON; see --judge of 'tuna evaluate'."""
    loss: str = "tuna"
    """Loss of the Tuna arms: tuna (as in the paper) or tuna_released (as in the released code)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floating-point type in which models are trained. auto: bfloat16 if the hardware supports it, else float32."""
    seed: int = 0
    """Seed of data order, sampled tokens and initial weights."""
    minutes: float = 0.0
    """Time limit in minutes. The run then stops cleanly, and the same command resumes it. 0: no limit."""
    track: str = "none"
    """Where metrics are logged besides files: wandb (Weights & Biases) or none."""
    dry_run: bool = False
    """Check the options and print what would be done, without loading a model."""

    def check(self) -> list[str]:
        """Checks the options and returns the names of the arms, in the order of ``ARMS``.

        Raises:
            InputError: if an option is wrong; the message names it.
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
    def num_held_out(self) -> int:
        """Number of seed tasks to hold out."""
        return self.held_out or DEFAULT_COUNTS[self.scale][1]

    @property
    def starts_probabilistic(self) -> bool:
        """Whether the probabilistic stage comes first."""
        return self.order == ORDERS[0]

    def evaluation_tasks(self) -> list[EvaluationTask]:
        """Returns the held-out tasks on which the arms are evaluated.

        Raises:
            InputError: if the seed tasks cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.seeds or None, self.num_held_out)

    def requests(self) -> list[InstructionExample]:
        """Returns the training requests: those of the seed tasks that are not held out and resemble no held-out task.

        Raises:
            InputError: if the seed tasks cannot be used, or no request is left.
        """
        with input_errors():
            shown, _ = evaluation_split(load_tasks(self.seeds or None), self.num_held_out)
        # Requests that resemble an evaluation task are left out: the arms would be trained on the test data.
        gate = RougeGate(0.7, [task.instruction for task in self.evaluation_tasks()])
        examples = [
            InstructionExample(task.instruction, instance.input.strip(), instance.output.strip())
            for task in shown
            if not gate.rejects(gate.nearest(task.instruction)[0])
            for instance in task.instances
            if instance.output.strip()
        ]
        if not examples:
            raise InputError(
                f"--seeds {self.seeds} has no request to learn from that resembles no evaluation task: give seed tasks "
                "with 'instances'"
            )
        return examples[: DEFAULT_COUNTS[self.scale][0] or None]


@dataclass
class _Stages:
    """The stages of one experiment, in their folders; each runs once, when the first other stage needs it."""

    options: TunaRun
    console: Console
    data: Path
    deadline: Deadline
    done: set[Path] = field(default_factory=set)

    def folder(self, kind: str, name: str) -> Path:
        """Returns the run folder of a stage."""
        return self.options.root / kind / name

    def stage(self, run: Callable[[Any, Console], dict[str, Any]], options: Any) -> Path:
        """Runs a stage unless this object has run it already, and returns its folder."""
        folder = Path(options.run_dir)
        if folder not in self.done:
            self.console.rule(f"{folder.parent.name}/{folder.name}", style="dim")
            self.deadline.run(run, options, self.console)
            self.done.add(folder)
        return folder

    def shared(self, kind: str, name: str) -> dict[str, Any]:
        """Returns the options that every stage has."""
        options = self.options
        return {"run_dir": str(self.folder(kind, name)), "seed": options.seed, "track": options.track}

    # --- stages ------------------------------------------------------------------------------------------------------

    def start(self) -> Path:
        """Fine-tunes the model on the requests and returns the run folder."""
        options = self.options
        stage_options = Finetune(
            **self.shared(POLICIES, SFT),
            dtype=options.dtype,
            data=str(self.data),
            model=options.model,
            epochs=2,
            context_length=min(Finetune.context_length, tokenizer_of(options.model).context_length),
        )
        return self.stage(finetune, stage_options)

    def candidates(self, name: str, **writer: Any) -> Path:
        """Draws candidates and returns the run folder; the writer is ``backend`` or ``policy``."""
        stage_options = TunaCandidates(
            **self.shared("candidates", name),
            **SIZES[self.options.scale]["candidates"],
            data=str(self.data),
            dtype=self.options.dtype,
            **writer,
        )
        return self.stage(candidates, stage_options)

    def ranking(self, name: str, candidates: Path, ranker: str, backend: str) -> Path:
        """Ranks the candidates of a run folder and returns the run folder of the ranking."""
        stage_options = TunaRank(
            **self.shared(RANKINGS, name), candidates=str(candidates), ranker=ranker, backend=backend
        )
        return self.stage(rank, stage_options)

    def probabilistic(self) -> Path:
        """Ranks the teacher's responses by its likelihood and returns the run folder."""
        teacher = self.options.teacher
        return self.ranking("probabilistic", self.candidates("teacher", backend=teacher), "probabilistic", teacher)

    def contextual(self, writer: Path) -> Path:
        """Lets the judge rank the responses of the policy in ``writer``, and returns the run folder."""
        name = "contextual" if writer.name == SFT else f"contextual-{writer.name}"
        candidates_folder = self.candidates(writer.name, policy=str(writer))
        return self.ranking(name, candidates_folder, self.options.judge, self.options.judge_backend)

    def train(self, name: str, start: Path, ranked: Path, loss: str, learning_rate: float) -> Path:
        """Trains the policy in ``start`` on ranked lists and returns the run folder."""
        stage_options = TunaTrain(
            **self.shared(POLICIES, name),
            **SIZES[self.options.scale]["train"],
            dtype=self.options.dtype,
            policy=str(start),
            ranked=str(ranked),
            loss=loss,
            learning_rate=learning_rate,
            context_length=min(TunaTrain.context_length, tokenizer_of(self.options.model).context_length),
        )
        return self.stage(train, stage_options)

    def arm(self, name: str) -> Path:
        """Returns the run folder of an arm's policy; trains the policy, and what it depends on, first."""
        start, loss = self.start(), self.options.loss
        first, second = LEARNING_RATES["first"], LEARNING_RATES["second"]
        if name == SFT:
            return start
        if name == PROBABILISTIC:
            return self.train(name, start, self.probabilistic(), loss, first)
        if name == CONTEXTUAL:
            return self.train(name, start, self.contextual(start), loss, first)
        # The second stage starts from the policy of the first. The contextual stage ranks responses of the policy from
        # which it starts; the teacher's ranking does not depend on the policy.
        if name == TUNA and self.options.starts_probabilistic:
            middle = self.arm(PROBABILISTIC)
            return self.train(name, middle, self.contextual(middle), loss, second)
        if name == TUNA:
            return self.train(name, self.arm(CONTEXTUAL), self.probabilistic(), loss, second)
        if name == DPO:
            return self.train(name, start, self.contextual(start), "dpo", LEARNING_RATES[DPO])
        ppo_options = TunaPPO(
            **self.shared(POLICIES, PPO),
            **SIZES[self.options.scale]["ppo"],
            dtype=self.options.dtype,
            policy=str(start),
            ranked=str(self.contextual(start)),
            context_length=min(TunaPPO.context_length, tokenizer_of(self.options.model).context_length),
        )
        return self.stage(ppo, ppo_options) / "ppo"

    def evaluation(self, arms: Sequence[str]) -> None:
        """Trains the arms, then evaluates them together with the base model."""
        policies = {name: self.arm(name) for name in arms}
        options = self.options
        stage_options = TunaEvaluate(
            **self.shared(EVALUATION, "")
            | {"run_dir": str(options.root / EVALUATION)}
            | SIZES[options.scale]["evaluate"],
            dtype=options.dtype,
            policy=",".join(f"{name}={folder}" for name, folder in policies.items()),
            tasks=options.seeds,
            held_out=options.num_held_out,
            model=options.model,
            layout="chat",
            context_length=min(TunaEvaluate.context_length, tokenizer_of(options.model).context_length),
            judge=options.evaluation_judge,
            backend=options.judge_backend,
            against=SFT if SFT in arms else "base",
        )
        self.stage(evaluate, stage_options)


def run(options: TunaRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the results of the report.

    Raises:
        InputError: if the input is invalid.
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
    tasks_digest = digest([[task.name, task.instruction] for task in tasks])
    # These options may not change between runs of one folder; the run folders of the stages check the others.
    fixed = ("model", "order", "scale", "judge_backend", "evaluation_judge")
    identity = {name: getattr(options, name) for name in fixed} | {"evaluation_tasks": tasks_digest, "arms": arms}
    with RunFolder(options.root, identity, "tuna run").opened():
        data = options.root / "requests.jsonl"
        write_once(data, [example.row() for example in requests])
        _Stages(options, console, data, Deadline(options.minutes)).evaluation(arms)
        return report(TunaReport(str(options.root)), console)


def _check_parts(options: TunaRun) -> None:
    """Raises an InputError for a teacher, judge or backend that cannot be built, before the first stage."""
    backends = {name: parse_part(getattr(options, name)) for name in ("teacher", "judge_backend")}
    with input_errors():
        live = journaled_roles(backends, None)
        TunaRank(ranker=options.judge).build(live["judge_backend"])
        TunaRank(ranker="probabilistic").build(live["teacher"])
        TunaEvaluate(judge=options.evaluation_judge).build(live["judge_backend"])
    # Fails for a model without a chat template, which all stages need.
    tokenizer_of(options.model).chat_text([{"role": "user", "content": "?"}])
