"""``instructgym tuna run``: trains with both stages of Tuna in either order, and with DPO and PPO.

The idea (Li et al. 2023, arXiv 2310.13385): a model is fine-tuned on requests with reference responses (in the paper,
Alpaca). The probabilistic stage then ranks responses of a teacher to the same requests by the teacher's likelihood. In
the contextual stage a judge ranks responses of the model itself. DPO and PPO learn from the same contextual rankings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample
from ...envs.tasks.instruction.evaluation import HELD_OUT, EvaluationTask, load_evaluation_tasks
from ...envs.tasks.instruction.pool import evaluation_split, load_tasks
from ...llm_backends.errors import InputError
from ...rewards import RougeGate
from ..runs.folder import journaled_roles, write_once
from ..runs.options import DType, Seed, input_errors, named, parse_part
from ..runs.study import StudyOptions, StudyStage, needed, run_study
from ..runs.training import digest, tokenizer_of
from ..teaching.evaluate import BASE
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

PROBABILISTIC_RANKING, CONTEXTUAL_RANKING = "probabilistic", "contextual"
"""Names of the rankings: of the teacher's candidates, and of those of the fine-tuned model."""

ORDERS = ("probabilistic,contextual", "contextual,probabilistic")

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "requests": 10,
        "held_out": 6,
        "candidates": {"max_tokens": 16},
        "train": {"epochs": 1},
        "ppo": {"updates": 1, "batch_size": 8, "max_tokens": 16},
        "evaluate": {"max_tokens": 16},
    },
    "report": {
        "requests": 0,
        "held_out": HELD_OUT,
        "candidates": {"max_tokens": 64},
        "train": {"epochs": 2},
        "ppo": {"updates": 12, "batch_size": 32, "max_tokens": 64},
        "evaluate": {"max_tokens": 96},
    },
}
"""By scale, the number of requests (0: all), the default number of held-out tasks, and options of stages."""
LEARNING_RATES = {"first": 2e-4, "second": 1e-4, DPO: 1e-4}
"""Learning rates of the first Tuna stage, of the second and of DPO. Adapters need larger ones than those of the
paper."""


@dataclass
class TunaRun(StudyOptions):
    """Run all stages: supervised start, candidates, rankings, training, evaluation, report."""

    command: ClassVar[str] = "tuna run"

    run_dir: str = "runs/tuna"
    """Folder for the run folders of all stages. Finished stages are not run again."""
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
    loss: Literal["tuna", "tuna_released"] = "tuna"
    """Loss of the Tuna arms: tuna (as in the paper) or tuna_released (as in the released code)."""
    dtype: DType = "auto"
    """Floating-point type in which models are trained. auto: bfloat16 if the hardware supports it, else float32."""
    seed: Seed = 0
    """Seed of data order, sampled tokens and initial weights."""

    def check(self) -> None:
        super().check()
        _ = self.arm_names
        _ = self.requests
        # A teacher, judge or backend that cannot be built fails here, before the first stage.
        backends = {name: parse_part(getattr(self, name)) for name in ("teacher", "judge_backend")}
        with input_errors():
            live = journaled_roles(backends, None)
            TunaRank(ranker=self.judge).build(live["judge_backend"])
            TunaRank(ranker="probabilistic").build(live["teacher"])
            TunaEvaluate(judge=self.evaluation_judge).build(live["judge_backend"])
        # So does a model without a chat template, which all stages need.
        tokenizer_of(self.model).chat_text([{"role": "user", "content": "?"}])

    @property
    def arm_names(self) -> list[str]:
        """Names of the arms, in the order of ``ARMS``.

        Raises:
            InputError: if an arm is unknown, or none is named.
        """
        names = [name.strip() for name in self.arms.split(",") if name.strip()]
        if unknown := [name for name in names if name not in ARMS]:
            raise InputError(f"--arms has an unknown {unknown[0]!r}: use {', '.join(ARMS)}")
        if not names:
            raise InputError(f"--arms names none: use {', '.join(ARMS)}")
        return [name for name in ARMS if name in names]

    @property
    def num_held_out(self) -> int:
        """Number of seed tasks to hold out."""
        return self.held_out or int(SIZES[self.scale]["held_out"])

    @cached_property
    def evaluation_tasks(self) -> list[EvaluationTask]:
        """The held-out tasks on which the arms are evaluated, read once.

        Raises:
            InputError: if the seed tasks cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.seeds or None, self.num_held_out)

    @cached_property
    def requests(self) -> list[InstructionExample]:
        """The training requests, read once: those of seed tasks that are not held out and resemble no held-out task.

        Raises:
            InputError: if the seed tasks cannot be used, or no request is left.
        """
        with input_errors():
            shown, _ = evaluation_split(load_tasks(self.seeds or None), self.num_held_out)
        # Requests that resemble an evaluation task are left out: the arms would be trained on the test data.
        gate = RougeGate(0.7, [task.instruction for task in self.evaluation_tasks])
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
        return examples[: SIZES[self.scale]["requests"] or None]

    def identity(self) -> Mapping[str, Any]:
        tasks = digest([[task.name, task.instruction] for task in self.evaluation_tasks])
        fixed = named(self, "model", "order", "scale", "judge_backend", "evaluation_judge")
        return fixed | {"evaluation_tasks": tasks, "arms": ",".join(self.arm_names)}

    def stages(self) -> list[StudyStage]:
        arms, sizes, root = self.arm_names, SIZES[self.scale], self.root
        data, context = str(root / "requests.jsonl"), tokenizer_of(self.model).context_length

        def stage(name: str, command: Any, options: Any, *needs: str, **own: Any) -> StudyStage:
            """Returns a stage with the seed of the study and, if it has such options, its type and context length."""
            own["seed"] = self.seed
            if hasattr(options, "dtype"):
                own["dtype"] = self.dtype
            if hasattr(options, "context_length"):
                own["context_length"] = min(options.context_length, context)
            return StudyStage(name, command, options(**own), needs)

        def ranking(name: str, writer: str, ranker: str, backend: str) -> list[StudyStage]:
            """Returns the stages that draw candidates, from the teacher or the policy of an arm, and rank them."""
            drawn, needs = f"candidates/{writer}", () if writer == "teacher" else (f"{POLICIES}/{writer}",)
            own = sizes["candidates"] | ({"policy": str(root / needs[0])} if needs else {"backend": self.teacher})
            how = {"ranker": ranker, "backend": backend}
            return [
                stage(drawn, candidates, TunaCandidates, *needs, data=data, **own),
                stage(f"{RANKINGS}/{name}", rank, TunaRank, drawn, candidates=str(root / drawn), **how),
            ]

        def training(
            arm: str, start: str, ranked: str, own: dict[str, Any], command: Any = train, options: Any = TunaTrain
        ) -> StudyStage:
            """Returns the stage that trains an arm, from the policy of another, on a ranking."""
            needs = f"{POLICIES}/{start}", f"{RANKINGS}/{ranked}"
            own = {"policy": str(root / needs[0]), "ranked": str(root / needs[1])} | own
            return stage(f"{POLICIES}/{arm}", command, options, *needs, **own)

        # The arm of both stages starts from the policy of its first one. The contextual stage ranks responses of the
        # policy from which it starts; the teacher's ranking does not depend on the policy.
        middle, last = (PROBABILISTIC, f"{CONTEXTUAL_RANKING}-{PROBABILISTIC}"), (CONTEXTUAL, PROBABILISTIC_RANKING)
        both = middle if self.order == ORDERS[0] else last
        first, second = (
            sizes["train"] | {"loss": self.loss, "learning_rate": LEARNING_RATES[name]} for name in ("first", "second")
        )
        dpo = sizes["train"] | {"loss": "dpo", "learning_rate": LEARNING_RATES[DPO]}
        policies = {arm: str(root / POLICIES / arm / ("ppo" if arm == PPO else "")) for arm in arms}
        evaluation = sizes["evaluate"] | {
            "policy": ",".join(f"{arm}={folder}" for arm, folder in policies.items()),
            "tasks": self.seeds,
            "held_out": self.num_held_out,
            "model": self.model,
            "layout": "chat",
            "judge": self.evaluation_judge,
            "backend": self.judge_backend,
            "against": SFT if SFT in arms else BASE,
        }
        stages = [
            stage(f"{POLICIES}/{SFT}", finetune, Finetune, data=data, model=self.model, epochs=2),
            *ranking(PROBABILISTIC_RANKING, "teacher", "probabilistic", self.teacher),
            training(PROBABILISTIC, SFT, PROBABILISTIC_RANKING, first),
            *ranking(CONTEXTUAL_RANKING, SFT, self.judge, self.judge_backend),
            training(CONTEXTUAL, SFT, CONTEXTUAL_RANKING, first),
            *ranking(middle[1], PROBABILISTIC, self.judge, self.judge_backend),
            training(TUNA, *both, second),
            training(DPO, SFT, CONTEXTUAL_RANKING, dpo),
            training(PPO, SFT, CONTEXTUAL_RANKING, sizes["ppo"], ppo, TunaPPO),
            stage(EVALUATION, evaluate, TunaEvaluate, *(f"{POLICIES}/{arm}" for arm in arms), **evaluation),
        ]
        return needed(stages, [EVALUATION])

    def prepare(self) -> None:
        write_once(self.root / "requests.jsonl", [example.row() for example in self.requests])

    def report(self, console: Console) -> dict[str, Any]:
        return report(TunaReport(str(self.root)), console)


def run(options: TunaRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the results of the report.

    Raises:
        InputError: if the input is invalid.
    """
    return run_study(options, console or Console())
