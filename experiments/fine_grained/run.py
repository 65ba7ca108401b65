"""``instructgym fine-grained run``: runs all stages of the experiment, one after the other.

By default the experiment has four arms: the supervised policy and three arms of PPO. Each stage can be resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from ...agents.policy.optimization import Processes
from ...llm_backends.errors import InputError
from ..runs.options import Count, DType
from ..runs.study import Results, StudyOptions, StudyStage, run_study
from .common import PromptOptions
from .edit import EditOptions, EditParts, FineGrainedEdit
from .edit import run as edit
from .evaluate import FineGrainedEvaluate
from .evaluate import run as evaluate
from .figa import FineGrainedFIGA
from .figa import run as figa
from .ppo import FineGrainedPPO, Form
from .ppo import run as ppo
from .report import FineGrainedReport
from .report import run as report
from .reward import FineGrainedRewardModel
from .reward import run as reward_model
from .sft import FineGrainedSFT
from .sft import run as sft


@dataclass(frozen=True)
class PPOArm:
    """The reward model of an arm of PPO, and the form of its reward."""

    pairs: str
    level: Literal["token", "sequence"]
    loss: str
    form: Form = "auto"
    unchanged_penalty: float = 0.1

    @property
    def model(self) -> str:
        """Name of the reward model, which several arms may share."""
        published = self.level == "token" and not self.unchanged_penalty
        return f"{self.pairs}-{self.level}-{self.loss}" + ("-published" if published else "")


ARMS = {
    "sequence-preferences": PPOArm("preferences", "sequence", "sequence_bt"),
    "sequence-edits": PPOArm("edits", "sequence", "sequence_bt"),
    "token-edits": PPOArm("edits", "token", "mean_bt"),
    "token-whole": PPOArm("edits", "token", "mean_bt", "whole"),
    "token-published": PPOArm("edits", "token", "mean_bt", unchanged_penalty=0.0),
    "token-terminal": PPOArm("edits", "token", "mean_bt", "terminal"),
    "token-edited-only": PPOArm("edits", "token", "edited_only_bt"),
    "token-tlcr": PPOArm("edits", "token", "tlcr_ce"),
}
"""Arms of PPO by name: the ablation of the paper, then variants. All are compared with the supervised policy."""

FIGA = "figa"
"""Name of the arm that learns from the edits without a reward model."""

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "smoke": {
        "sft": {"demonstrations": 48, "batch_size": 16},
        "edit": {"limit": 48},
        "reward-model": {"epochs": 1, "batch_size": 8},
        "ppo": {"updates": 2, "batch_size": 8, "calibration": 16},
        "figa": {"epochs": 1, "batch_size": 8},
        "evaluate": {"limit": 16},
    },
    "report": {
        "sft": {"demonstrations": 2000},
        "edit": {"limit": 1500},
        "reward-model": {},
        "ppo": {"updates": 24},
        "figa": {"epochs": 3},
        "evaluate": {"limit": 400},
    },
}


@dataclass
class FineGrainedRun(EditOptions, PromptOptions, StudyOptions):
    """Run all stages: supervised start, edits, reward models, PPO, evaluation, report."""

    command: ClassVar[str] = "fine-grained run"

    run_dir: str = "runs/fine-grained"
    """Folder for the run folders of all stages. Finished stages are not run again."""
    arms: str = "sequence-preferences,sequence-edits,token-edits"
    """Arms to train and to compare with the supervised policy, separated by commas: those of the default, or figa,
    token-whole, token-published, token-terminal, token-edited-only, token-tlcr."""
    seeds: Count = 1
    """Number of seeds of PPO, FIGA and their evaluation: 0, 1, ... The scale smoke always uses one."""
    dtype: DType = "auto"
    """Floating-point type of the computation. auto: bfloat16 if the hardware supports it, else float32."""

    def check(self) -> None:
        super().check()
        if Processes().count > 1:
            raise InputError(f"'{self.command}' runs in one process: only its stages that train can share work")
        # Wrong arms, parts and data are found here, before the supervised training.
        EditParts.of(self)
        start, *_ = self.stages()
        start.options.check()
        if self.dry_run:  # otherwise the first stage, which reads the data, finds what is wrong with them
            start.options.demonstrations_found()

    @property
    def arm_names(self) -> list[str]:
        """Names of the arms.

        Raises:
            InputError: if an arm is unknown, or none is named.
        """
        names = [name.strip() for name in self.arms.split(",") if name.strip()]
        if not names or not {*names} <= {*ARMS, FIGA}:
            raise InputError(f"--arms must be some of {', '.join([*ARMS, FIGA])}, got {self.arms!r}")
        return names

    def stages(self) -> list[StudyStage]:
        # As typed, not absolute: a resumed stage must have the options that it started with.
        root, names = Path(self.run_dir), self.arm_names
        start, reference = str(root / "sft"), str(root / "evaluate" / "sft")
        reward_models = {ARMS[name].model: ARMS[name] for name in names if name != FIGA}

        def evaluation(name: str, **options: Any) -> StudyStage:
            return StudyStage(f"evaluate/{name}", evaluate, self._options(FineGrainedEvaluate, "evaluate", **options))

        stages = [
            StudyStage("sft", sft, self._options(FineGrainedSFT, "sft", run_dir=start)),
            StudyStage("edit", edit, self._options(FineGrainedEdit, "edit", policy=start)),
            # One reward model per name: arms that differ in the form of the reward share it.
            *(self._reward_model(arm) for arm in reward_models.values()),
            evaluation("sft", policy=start, arm="sft"),
        ]
        for seed in range(1 if self.scale == "smoke" else self.seeds):
            for name in names:
                folder = f"figa/{name}-{seed}" if name == FIGA else f"ppo/{name}-{seed}"
                if name == FIGA:
                    pairs = str(root / "edit" / "edits.jsonl")
                    figa_options = self._options(FineGrainedFIGA, "figa", policy=start, pairs=pairs, seed=seed)
                    stages.append(StudyStage(folder, figa, figa_options))
                else:
                    arm = ARMS[name]
                    model = str(root / "reward-model" / arm.model)
                    ppo_options = self._options(
                        FineGrainedPPO, "ppo", policy=start, reward_model=model, arm=name, form=arm.form, seed=seed
                    )
                    stages.append(StudyStage(folder, ppo, ppo_options))
                # The reference was sampled with seed 0: responses must not have its random numbers.
                stages.append(
                    evaluation(f"{name}-{seed}", policy=str(root / folder), against=reference, arm=name, seed=1 + seed)
                )
        return stages

    def _reward_model(self, arm: PPOArm) -> StudyStage:
        """Returns the stage that trains the reward model of an arm."""

        def options(results: Results) -> FineGrainedRewardModel:
            # All reward models get the same number of pairs, so that they differ in the kind of pairs only.
            counts = results["edit"]["counts"]
            return self._options(
                FineGrainedRewardModel,
                "reward-model",
                pairs=str(Path(self.run_dir) / "edit" / f"{arm.pairs}.jsonl"),
                level=arm.level,
                loss=arm.loss,
                unchanged_penalty=arm.unchanged_penalty,
                limit=min(counts["edits"], counts["preferences"]),
            )

        return StudyStage(f"reward-model/{arm.model}", reward_model, options)

    def _options(self, stage: Any, kind: str, **own: Any) -> Any:
        """Returns the options of a stage: those of the study by the same names, those that the scale sets, its own."""
        shared = {field.name for field in fields(stage)} & {field.name for field in fields(self)}
        return stage(**{name: getattr(self, name) for name in shared} | SIZES[self.scale][kind] | own)

    def report(self, console: Console) -> Results:
        return report(FineGrainedReport(self.run_dir), console)


def run(options: FineGrainedRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the results of the report.

    Raises:
        InputError: if the input is invalid.
    """
    return run_study(options, console or Console())
