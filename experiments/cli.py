"""The command ``instructgym``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ..llm_backends import BackendError, part_ids, resolve
from ..llm_backends.errors import InputError
from .benchmarks import (
    backend,
    dense_reward,
    edit_env,
    ranking,
    rollouts,
    task_score,
    token_env,
    token_learning,
    token_ppo,
)
from .benchmarks.backend import BenchBackend
from .benchmarks.dense_reward import BenchDenseReward
from .benchmarks.edit_env import BenchEditEnv
from .benchmarks.ranking import BenchRanking
from .benchmarks.rollouts import BenchRollouts
from .benchmarks.task_score import BenchTaskScore
from .benchmarks.token_env import BenchTokenEnv
from .benchmarks.token_learning import BenchTokenLearning
from .benchmarks.token_ppo import BenchTokenPPO
from .evolve import compare as evolve_compare
from .evolve import generate as evolve_generate
from .evolve import queries as query_accounting
from .evolve import run as evolve_run
from .evolve import train as evolve_train
from .evolve.compare import EvolveCompare
from .evolve.generate import EvolveGenerate
from .evolve.queries import QueryAccounting
from .evolve.run import EvolveEvaluate, EvolveFinetune, EvolveReport, EvolveRun
from .evolve.train import EvolveTrain
from .fine_grained import edit as fine_grained_edit
from .fine_grained import evaluate as fine_grained_evaluate
from .fine_grained import figa as fine_grained_figa
from .fine_grained import ppo as fine_grained_ppo
from .fine_grained import report as fine_grained_report
from .fine_grained import reward as fine_grained_reward
from .fine_grained import run as fine_grained_run
from .fine_grained import sft as fine_grained_sft
from .fine_grained.edit import FineGrainedEdit
from .fine_grained.evaluate import FineGrainedEvaluate
from .fine_grained.figa import FineGrainedFIGA
from .fine_grained.ppo import FineGrainedPPO
from .fine_grained.report import FineGrainedReport
from .fine_grained.reward import FineGrainedRewardModel
from .fine_grained.run import FineGrainedRun
from .fine_grained.sft import FineGrainedSFT
from .judging import calibrate as judge
from .judging.calibrate import JudgeCalibrate
from .nlu import report as nlu_report
from .nlu import run as nlu
from .nlu.report import NLUReport
from .nlu.run import NLU
from .prompt import compare as prompt_compare
from .prompt import report as prompt_report
from .prompt import run as prompt
from .prompt.compare import PromptCompare
from .prompt.report import PromptReport
from .prompt.run import PromptRun
from .refine_af import bootstrap as refine_af_bootstrap
from .refine_af import generate as refine_af_generate
from .refine_af import run as refine_af_run
from .refine_af import train as refine_af_train
from .refine_af.bootstrap import RefineAFBootstrap
from .refine_af.generate import RefineAFGenerate
from .refine_af.run import RefineAFEvaluate, RefineAFFinetune, RefineAFReport, RefineAFRun
from .refine_af.train import RefineAFTrain
from .runs.training import in_time
from .serving import check as serve_check
from .serving.check import ServeCheck
from .teaching import evaluate, finetune, privacy
from .teaching import run as teaching
from .teaching.evaluate import Evaluate
from .teaching.finetune import Finetune
from .teaching.privacy import Privacy
from .tuna import candidates as tuna_candidates
from .tuna import evaluate as tuna_evaluate
from .tuna import ppo as tuna_ppo
from .tuna import rank as tuna_rank
from .tuna import report as tuna_report
from .tuna import run as tuna_run
from .tuna import train as tuna_train
from .tuna.candidates import TunaCandidates
from .tuna.evaluate import TunaEvaluate
from .tuna.ppo import TunaPPO
from .tuna.rank import TunaRank
from .tuna.report import TunaReport
from .tuna.run import TunaRun
from .tuna.train import TunaTrain

if TYPE_CHECKING:
    EvolveCommand = (
        EvolveRun
        | EvolveTrain
        | EvolveGenerate
        | EvolveCompare
        | EvolveFinetune
        | EvolveEvaluate
        | EvolveReport
        | QueryAccounting
    )
else:
    EvolveCommand = (
        Annotated[EvolveRun, tyro.conf.subcommand("run")]
        | Annotated[EvolveTrain, tyro.conf.subcommand("train")]
        | Annotated[EvolveGenerate, tyro.conf.subcommand("generate")]
        | Annotated[EvolveCompare, tyro.conf.subcommand("compare")]
        | Annotated[EvolveFinetune, tyro.conf.subcommand("finetune")]
        | Annotated[EvolveEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[EvolveReport, tyro.conf.subcommand("report")]
        | Annotated[QueryAccounting, tyro.conf.subcommand("queries")]
    )


@dataclass
class Evolve:
    """TeaMs-RL: an agent picks edit operations that evolve instructions."""

    command: EvolveCommand


if TYPE_CHECKING:
    UnderstandingCommand = NLU | NLUReport
else:
    UnderstandingCommand = (
        Annotated[NLU, tyro.conf.subcommand("run")] | Annotated[NLUReport, tyro.conf.subcommand("report")]
    )


@dataclass
class Understanding:
    """RL for language understanding: 'nlu [run]' trains and evaluates one method, 'nlu report' gathers runs."""

    command: UnderstandingCommand


if TYPE_CHECKING:
    FineGrainedCommand = (
        FineGrainedRun
        | FineGrainedSFT
        | FineGrainedEdit
        | FineGrainedRewardModel
        | FineGrainedPPO
        | FineGrainedFIGA
        | FineGrainedEvaluate
        | FineGrainedReport
    )
else:
    FineGrainedCommand = (
        Annotated[FineGrainedRun, tyro.conf.subcommand("run")]
        | Annotated[FineGrainedSFT, tyro.conf.subcommand("sft")]
        | Annotated[FineGrainedEdit, tyro.conf.subcommand("edit")]
        | Annotated[FineGrainedRewardModel, tyro.conf.subcommand("reward-model")]
        | Annotated[FineGrainedPPO, tyro.conf.subcommand("ppo")]
        | Annotated[FineGrainedFIGA, tyro.conf.subcommand("figa")]
        | Annotated[FineGrainedEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[FineGrainedReport, tyro.conf.subcommand("report")]
    )


@dataclass
class FineGrained:
    """Fine-grained supervision: minimal edits give a reward per token, which drives token-level PPO."""

    command: FineGrainedCommand


@dataclass
class RefineAFFilters:
    """List the filters of new instructions."""


if TYPE_CHECKING:
    RefineAFCommand = (
        RefineAFRun
        | RefineAFBootstrap
        | RefineAFTrain
        | RefineAFGenerate
        | RefineAFFinetune
        | RefineAFEvaluate
        | RefineAFReport
        | RefineAFFilters
    )
else:
    RefineAFCommand = (
        Annotated[RefineAFRun, tyro.conf.subcommand("run")]
        | Annotated[RefineAFBootstrap, tyro.conf.subcommand("bootstrap")]
        | Annotated[RefineAFTrain, tyro.conf.subcommand("train")]
        | Annotated[RefineAFGenerate, tyro.conf.subcommand("generate")]
        | Annotated[RefineAFFinetune, tyro.conf.subcommand("finetune")]
        | Annotated[RefineAFEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[RefineAFReport, tyro.conf.subcommand("report")]
        | Annotated[RefineAFFilters, tyro.conf.subcommand("filters")]
    )


@dataclass
class RefineAF:
    """REFINE-AF: a small model bootstraps instructions and learns from automated feedback to write their instances."""

    command: RefineAFCommand


if TYPE_CHECKING:
    TunaCommand = TunaRun | TunaCandidates | TunaRank | TunaTrain | TunaPPO | TunaEvaluate | TunaReport
else:
    TunaCommand = (
        Annotated[TunaRun, tyro.conf.subcommand("run")]
        | Annotated[TunaCandidates, tyro.conf.subcommand("candidates")]
        | Annotated[TunaRank, tyro.conf.subcommand("rank")]
        | Annotated[TunaTrain, tyro.conf.subcommand("train")]
        | Annotated[TunaPPO, tyro.conf.subcommand("ppo")]
        | Annotated[TunaEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[TunaReport, tyro.conf.subcommand("report")]
    )


@dataclass
class Tuna:
    """Tuna: candidate responses are ranked by likelihood or by a judge, and a policy learns from the rankings."""

    command: TunaCommand


if TYPE_CHECKING:
    PromptCommand = PromptRun | PromptCompare | PromptReport
else:
    PromptCommand = (
        Annotated[PromptRun, tyro.conf.subcommand("run")]
        | Annotated[PromptCompare, tyro.conf.subcommand("compare")]
        | Annotated[PromptReport, tyro.conf.subcommand("report")]
    )


@dataclass
class Prompt:
    """Prompts for a frozen model: 'prompt [run]' searches by one method, 'prompt compare' by several."""

    command: PromptCommand


@dataclass
class JudgeList:
    """List the judges."""


if TYPE_CHECKING:
    JudgeCommand = JudgeCalibrate | JudgeList
else:
    JudgeCommand = (
        Annotated[JudgeCalibrate, tyro.conf.subcommand("calibrate")]
        | Annotated[JudgeList, tyro.conf.subcommand("list")]
    )


@dataclass
class Judge:
    """Judge LLMs: measure one on pairs with known answers."""

    command: JudgeCommand


@dataclass
class Envs:
    """List the environments with their spaces."""


@dataclass
class BenchList:
    """List the benchmarks."""


if TYPE_CHECKING:
    BenchCommand = (
        BenchEditEnv
        | BenchTokenEnv
        | BenchTokenPPO
        | BenchRanking
        | BenchTokenLearning
        | BenchDenseReward
        | BenchRollouts
        | BenchTaskScore
        | BenchBackend
        | BenchList
    )
else:
    BenchCommand = (
        Annotated[BenchEditEnv, tyro.conf.subcommand("edit-env")]
        | Annotated[BenchTokenEnv, tyro.conf.subcommand("token-env")]
        | Annotated[BenchTokenPPO, tyro.conf.subcommand("token-ppo")]
        | Annotated[BenchRanking, tyro.conf.subcommand("ranking")]
        | Annotated[BenchTokenLearning, tyro.conf.subcommand("token-learning")]
        | Annotated[BenchDenseReward, tyro.conf.subcommand("dense-reward")]
        | Annotated[BenchRollouts, tyro.conf.subcommand("rollouts")]
        | Annotated[BenchTaskScore, tyro.conf.subcommand("task-score")]
        | Annotated[BenchBackend, tyro.conf.subcommand("backend")]
        | Annotated[BenchList, tyro.conf.subcommand("list")]
    )


BENCHMARKS = {
    "edit-env": BenchEditEnv,
    "token-env": BenchTokenEnv,
    "token-ppo": BenchTokenPPO,
    "ranking": BenchRanking,
    "token-learning": BenchTokenLearning,
    "dense-reward": BenchDenseReward,
    "rollouts": BenchRollouts,
    "task-score": BenchTaskScore,
    "backend": BenchBackend,
}


@dataclass
class Bench:
    """Measure speed, ours and theirs alternately in one run."""

    command: BenchCommand


if TYPE_CHECKING:
    Command = (
        Evolve
        | Understanding
        | FineGrained
        | RefineAF
        | Tuna
        | Prompt
        | Finetune
        | Evaluate
        | Privacy
        | Judge
        | ServeCheck
        | Envs
        | Bench
    )
else:
    Command = (
        Annotated[Evolve, tyro.conf.subcommand("evolve")]
        | Annotated[Understanding, tyro.conf.subcommand("nlu")]
        | Annotated[FineGrained, tyro.conf.subcommand("fine-grained")]
        | Annotated[RefineAF, tyro.conf.subcommand("refine-af")]
        | Annotated[Tuna, tyro.conf.subcommand("tuna")]
        | Annotated[Prompt, tyro.conf.subcommand("prompt")]
        | Annotated[Finetune, tyro.conf.subcommand("finetune")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Privacy, tyro.conf.subcommand("privacy")]
        | Annotated[Judge, tyro.conf.subcommand("judge")]
        | Annotated[ServeCheck, tyro.conf.subcommand("serve-check")]
        | Annotated[Envs, tyro.conf.subcommand("envs")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
    )


def list_envs(console: Console) -> None:
    """Prints every id with its spaces."""
    import gymnasium as gym

    from ..envs.registration import IDS

    table = Table(title="instructgym environments")
    for title in ("id", "action space", "observation space", "episode"):
        table.add_column(title)
    for env_id in IDS:
        env = gym.make(env_id)
        settings = env.unwrapped.process.settings  # type: ignore[attr-defined]
        edits, tokens = getattr(settings, "horizon", None), getattr(settings, "max_tokens", None)
        length = f"at most {edits} edits" if edits else f"at most {tokens} tokens"
        table.add_row(env_id, str(env.action_space), str(env.observation_space), length)
    console.print(table)


def list_benchmarks(console: Console) -> None:
    """Prints every benchmark with what it measures."""
    for name, benchmark in BENCHMARKS.items():
        console.print(f"{name:15} {' '.join((benchmark.__doc__ or '').split())}")


def list_judges(console: Console) -> None:
    """Prints every reward that asks a judge, by its id, with what it pays."""
    for part_id in filter(lambda name: "judge" in name, part_ids("reward")):
        described = (type(resolve("reward", part_id)).__doc__ or "").partition("\n\n")[0]
        console.print(f"{part_id:20} {' '.join(described.split())}", highlight=False, markup=False)


def list_filters(console: Console) -> None:
    """Prints every filter of instructions, in the order in which they are asked, with its reason."""
    from ..envs.tasks.instruction.pool import FILTERS

    for rule in FILTERS:
        console.print(f"{rule.name:20} {rule.reason}", highlight=False, markup=False)


RUNS: dict[type, Callable[[Any, Console], Any]] = {
    EvolveTrain: evolve_train.run,
    EvolveGenerate: evolve_generate.run,
    EvolveCompare: evolve_compare.run,
    EvolveRun: evolve_run.run,
    EvolveFinetune: in_time(teaching.finetune_arms),
    EvolveEvaluate: in_time(teaching.evaluate_arms),
    EvolveReport: teaching.write_report,
    QueryAccounting: query_accounting.run,
    Finetune: finetune.run,
    Evaluate: evaluate.run,
    Privacy: privacy.run,
    NLU: nlu.run,
    NLUReport: nlu_report.run,
    RefineAFRun: refine_af_run.run,
    RefineAFBootstrap: refine_af_bootstrap.run,
    RefineAFTrain: refine_af_train.run,
    RefineAFGenerate: refine_af_generate.run,
    RefineAFFinetune: in_time(teaching.finetune_arms),
    RefineAFEvaluate: in_time(teaching.evaluate_arms),
    RefineAFReport: teaching.write_report,
    RefineAFFilters: lambda options, console: list_filters(console),
    TunaRun: tuna_run.run,
    TunaCandidates: tuna_candidates.run,
    TunaRank: tuna_rank.run,
    TunaTrain: tuna_train.run,
    TunaPPO: tuna_ppo.run,
    TunaEvaluate: tuna_evaluate.run,
    TunaReport: tuna_report.run,
    PromptRun: prompt.run,
    PromptCompare: prompt_compare.run,
    PromptReport: prompt_report.run,
    JudgeCalibrate: judge.run,
    FineGrainedRun: fine_grained_run.run,
    FineGrainedSFT: fine_grained_sft.run,
    FineGrainedEdit: fine_grained_edit.run,
    FineGrainedRewardModel: fine_grained_reward.run,
    FineGrainedPPO: fine_grained_ppo.run,
    FineGrainedFIGA: fine_grained_figa.run,
    FineGrainedEvaluate: fine_grained_evaluate.run,
    FineGrainedReport: fine_grained_report.run,
    JudgeList: lambda options, console: list_judges(console),
    ServeCheck: serve_check.run,
    BenchEditEnv: edit_env.run,
    BenchTokenEnv: token_env.run,
    BenchTokenPPO: token_ppo.run,
    BenchRanking: ranking.run,
    BenchTokenLearning: token_learning.run,
    BenchDenseReward: dense_reward.run,
    BenchRollouts: rollouts.run,
    BenchTaskScore: task_score.run,
    BenchBackend: backend.run,
    BenchList: lambda options, console: list_benchmarks(console),
    Envs: lambda options, console: list_envs(console),
}
"""What runs each parsed command."""


def dispatch(command: Any, console: Console) -> None:
    """Runs a parsed command."""
    command = getattr(command, "command", command)  # that of a group
    RUNS[type(command)](command, console)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] in (["nlu"], ["prompt"]) and (given[1:2] or ["--"])[0].startswith("--") and given[1:2] != ["--help"]:
        given.insert(1, "run")  # 'nlu --task ...' is short for 'nlu run --task ...'
    command = tyro.cli(
        Command,
        prog="instructgym",
        description="Gymnasium environments for instructions, prompts and responses, and agents that solve them.",
        args=given,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    sys.exit(guarded(lambda console: dispatch(command, console)))


def guarded(work: Any) -> int:
    """Runs ``work(console)`` and turns errors that a user can mend into one line on stderr and an exit code."""
    from ..agents.policy.optimization import TrainingDivergedError
    from ..envs.process import InvalidRewardError, InvalidRewardRateError
    from ..llm_backends.serving.budget import BudgetExceededError

    console = Console()
    try:
        work(console)
    except (
        InputError,
        BackendError,
        BudgetExceededError,
        InvalidRewardError,
        InvalidRewardRateError,
        TrainingDivergedError,
    ) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: a command with a run folder goes on from here when it is repeated", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    main()
