"""``instructgym fine-grained run``: runs all stages of the experiment, one after the other.

By default the experiment has four arms: the supervised policy and three arms of PPO. Each stage can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.optimization import Processes
from ...llm_backends.errors import InputError
from ..runs.options import check_output
from .edit import EditParts, FineGrainedEdit
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
class FineGrainedRun:
    """Run all stages: supervised start, edits, reward models, PPO, evaluation, report."""

    run_dir: str = "runs/fine-grained"
    """Folder for the run folders of all stages. Finished stages are not run again."""
    scale: Literal["smoke", "report"] = "report"
    """Size of the experiment. smoke: under three minutes on two cores; report: up to two hours."""
    arms: str = "sequence-preferences,sequence-edits,token-edits"
    """Arms to train and to compare with the supervised policy, separated by commas: those of the default, or figa,
    token-whole, token-published, token-terminal, token-edited-only, token-tlcr."""
    seeds: int = 1
    """Number of seeds of PPO, FIGA and their evaluation: 0, 1, ... The scale smoke always uses one."""
    model: str = "embedded"
    """Model to train: embedded, or a local path or hub id of a causal language model."""
    data: str = "reviews"
    """Data set of prompts: reviews (openings of film reviews, from an installed package), instructions (from this
    package), or a JSONL file with 'prompt' and 'response'."""
    layout: Literal["plain", "chat"] = "plain"
    """Prompt format. plain: the response continues the prompt; chat: the prompt is a user's message in the chat
    template of the model."""
    annotator: str = "vader"
    """Reward that decides which response is better, and whether an edit is an improvement: an id, or a weighted sum
    such as 'vader + 0.5*diversity'."""
    editor: str = "sentiment-swaps"
    """Editor of the worse responses: sentiment-swaps (a rule that swaps words), llm, 'module:factory', or JSON {"id":
    ..., "kwargs": {...}}."""
    backend: str = "embedded"
    """Language model of the editor llm: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ...,
    "kwargs": {...}}."""
    max_changed: float = 0.4
    """Largest share of words that a minimal edit may change."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floating-point type of the computation. auto: bfloat16 if the hardware supports it, else float32."""
    track: str = "none"
    """Where metrics are logged besides files: wandb (Weights & Biases) or none."""
    dry_run: bool = False
    """Check the options and print what would be done, without loading a model."""

    def check(self) -> list[str]:
        """Checks the options and returns the names of the arms.

        Raises:
            InputError: if an arm is unknown, no arm is named, there are no seeds, or the report cannot be written.
        """
        names = [name.strip() for name in self.arms.split(",") if name.strip()]
        unknown = [name for name in names if name not in (*ARMS, FIGA)]
        if unknown or not names:
            raise InputError(f"--arms must be some of {', '.join([*ARMS, FIGA])}, got {self.arms!r}")
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        check_output(Path(self.run_dir) / "report" / "report.md")
        return names


def run(options: FineGrainedRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the results of the report.

    Raises:
        InputError: if the input is invalid.
    """
    console = console or Console()
    names = options.check()
    root, sizes = Path(options.run_dir), SIZES[options.scale]
    seeds = 1 if options.scale == "smoke" else options.seeds

    def stage_options(kind: str, *folder: str) -> Mapping[str, Any]:
        """Returns the options of a stage: those that all stages share, and those that the scale sets."""
        shared = {name: getattr(options, name) for name in ("data", "layout", "dtype", "track")}
        return shared | sizes[kind] | {"run_dir": str(root.joinpath(*folder))}

    if Processes().count > 1:
        raise InputError(
            "'fine-grained run' runs in one process: only its stages sft, reward-model and ppo can share work"
        )
    start, pairs_folder = str(root / "sft"), root / "edit"
    sft_options = FineGrainedSFT(**stage_options("sft", "sft"), model=options.model)
    edit_options = FineGrainedEdit(
        **stage_options("edit", "edit"),
        policy=start,
        annotator=options.annotator,
        editor=options.editor,
        backend=options.backend,
        max_changed=options.max_changed,
    )
    EditParts.of(edit_options)  # wrong parts fail here, before the supervised training
    if options.dry_run:
        sft(replace(sft_options, dry_run=True), console)
        console.print(f"then edits, reward models, and {len(names)} arms of PPO over {seeds} seeds, in {root}")
        return {}
    sft(sft_options, console)
    # All reward models get the same number of pairs, so that they differ in the kind of pairs only.
    counts = edit(edit_options, console)["counts"]
    pair_limit = min(counts["edits"], counts["preferences"])
    # One reward model per name: arms that differ in the form of the reward share it.
    for arm in {ARMS[name].model: ARMS[name] for name in names if name != FIGA}.values():
        reward_model(
            FineGrainedRewardModel(
                **stage_options("reward-model", "reward-model", arm.model),
                pairs=str(pairs_folder / f"{arm.pairs}.jsonl"),
                model=options.model,
                level=arm.level,
                loss=arm.loss,
                unchanged_penalty=arm.unchanged_penalty,
                limit=pair_limit,
            ),
            console,
        )
    reference = str(root / "evaluate" / "sft")
    evaluate(FineGrainedEvaluate(**stage_options("evaluate", "evaluate", "sft"), policy=start, arm="sft"), console)
    for seed in range(seeds):
        for name in names:
            if name == FIGA:
                policy_folder = str(root / "figa" / f"{name}-{seed}")
                figa(
                    FineGrainedFIGA(
                        **stage_options("figa", "figa", f"{name}-{seed}"),
                        policy=start,
                        pairs=str(pairs_folder / "edits.jsonl"),
                        seed=seed,
                    ),
                    console,
                )
            else:
                policy_folder = str(root / "ppo" / f"{name}-{seed}")
                ppo(
                    FineGrainedPPO(
                        **stage_options("ppo", "ppo", f"{name}-{seed}"),
                        policy=start,
                        reward_model=str(root / "reward-model" / ARMS[name].model),
                        arm=name,
                        form=ARMS[name].form,
                        seed=seed,
                    ),
                    console,
                )
            evaluate(
                FineGrainedEvaluate(
                    **stage_options("evaluate", "evaluate", f"{name}-{seed}"),
                    policy=policy_folder,
                    against=reference,
                    arm=name,
                    seed=1 + seed,  # the reference was sampled with seed 0: responses must not have its random numbers
                ),
                console,
            )
    return report(FineGrainedReport(str(root)), console)
