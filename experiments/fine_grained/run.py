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
from ..runs.options import Count, DType, named
from ..runs.study import Results, StudyOptions, StudyStage, run_study
from . import edit, evaluate, figa, ppo, reward, sft
from .common import PromptOptions
from .report import FineGrainedReport
from .report import run as report


@dataclass(frozen=True)
class PPOArm:
    """The reward model of an arm of PPO, and the form of its reward."""

    pairs: str
    level: Literal["token", "sequence"]
    loss: str
    form: ppo.Form = "auto"
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

KINDS: dict[str, tuple[Any, Any]] = {
    "sft": (sft.run, sft.FineGrainedSFT),
    "edit": (edit.run, edit.FineGrainedEdit),
    "reward-model": (reward.run, reward.FineGrainedRewardModel),
    "ppo": (ppo.run, ppo.FineGrainedPPO),
    "figa": (figa.run, figa.FineGrainedFIGA),
    "evaluate": (evaluate.run, evaluate.FineGrainedEvaluate),
}
"""Function and options of the stages, by the first part of their names."""

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
class FineGrainedRun(edit.EditOptions, PromptOptions, StudyOptions):
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
        edit.EditParts.of(self)
        start, *_ = self.stages()
        start.options.check()
        if self.dry_run:  # otherwise the first stage, which reads the data, finds what is wrong with them
            start.options.tokenized()

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
        root = Path(self.run_dir)
        start, edits = str(root / "sft"), str(root / "edit" / "edits.jsonl")
        stages = [self._stage("sft", run_dir=start), self._stage("edit", policy=start)]
        # One reward model per name: arms that differ in the form of the reward share it.
        models = {ARMS[name].model: ARMS[name] for name in self.arm_names if name != FIGA}
        stages += [self._reward_model(arm) for arm in models.values()]
        stages += [self._stage("evaluate/sft", policy=start, arm="sft")]
        for seed in range(1 if self.scale == "smoke" else self.seeds):
            for name in self.arm_names:
                if name == FIGA:
                    trained = self._stage(f"figa/{name}-{seed}", policy=start, pairs=edits, seed=seed)
                else:
                    model, form = str(root / "reward-model" / ARMS[name].model), ARMS[name].form
                    own = {"policy": start, "reward_model": model, "arm": name, "form": form, "seed": seed}
                    trained = self._stage(f"ppo/{name}-{seed}", **own)
                # The reference was sampled with seed 0: responses must not have its random numbers.
                own = {"policy": str(root / trained.name), "against": str(root / "evaluate" / "sft"), "arm": name}
                stages += [trained, self._stage(f"evaluate/{name}-{seed}", **own, seed=1 + seed)]
        return stages

    def _reward_model(self, arm: PPOArm) -> StudyStage:
        """Returns the stage that trains the reward model of an arm."""

        def options(results: Results) -> Any:
            # All reward models get the same number of pairs, so that they differ in the kind of pairs only.
            counts = results["edit"]["counts"]
            pairs = str(Path(self.run_dir) / "edit" / f"{arm.pairs}.jsonl")
            own = {"pairs": pairs, "limit": min(counts["edits"], counts["preferences"])}
            return self._options("reward-model", **own, **named(arm, "level", "loss", "unchanged_penalty"))

        return StudyStage(f"reward-model/{arm.model}", reward.run, options)

    def _stage(self, name: str, **own: Any) -> StudyStage:
        """Returns a stage by its name, the first part of which is its kind, and options of its own."""
        kind = name.partition("/")[0]
        return StudyStage(name, KINDS[kind][0], self._options(kind, **own))

    def _options(self, kind: str, **own: Any) -> Any:
        """Returns the options of a stage: those of the study by the same names, those that the scale sets, its own."""
        options = KINDS[kind][1]
        shared = {field.name for field in fields(options)} & {field.name for field in fields(self)}
        return options(**named(self, *shared) | SIZES[self.scale][kind] | own)

    def report(self, console: Console) -> Results:
        return report(FineGrainedReport(self.run_dir), console)


def run(options: FineGrainedRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the results of the report.

    Raises:
        InputError: if the input is invalid.
    """
    return run_study(options, console or Console())
