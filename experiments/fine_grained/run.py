"""``instructgym fine-grained run``: all stages of the four-arm experiment, each resumable, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.optimization import Processes
from ...llm_backends.errors import InputError
from ..runs.options import check_output
from .edit import Editing, FineGrainedEdit
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
    """What an arm of PPO is rewarded by."""

    pairs: str
    level: Literal["token", "sequence"]
    loss: str
    form: Form = "auto"
    unchanged_penalty: float = 0.1

    @property
    def model(self) -> str:
        """Name of its reward model, which arms may share."""
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
"""The paper's ablation, then variants; the supervised policy is the reference of all."""

FIGA = "figa"
"""The arm that learns from the edits without a reward model."""

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
    """Folder for the run folders of all stages; those that are finished are kept."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: under three minutes on two cores; report: up to two hours."""
    arms: str = "sequence-preferences,sequence-edits,token-edits"
    """Arms beside the supervised policy, separated by commas; also: figa, token-whole, token-published,
    token-terminal, token-edited-only, token-tlcr."""
    seeds: int = 1
    """Seeds of PPO and evaluation, 0, 1, ...; smoke takes one."""
    model: str = "embedded"
    """embedded, or a local path or hub id of a causal language model."""
    data: str = "reviews"
    """Prompts: reviews, instructions, or a JSONL file."""
    layout: Literal["plain", "chat"] = "plain"
    """plain: the response continues the prompt; chat: the prompt is a user's message."""
    annotator: str = "vader"
    """Who says which response is better: a reward, as of 'evolve train'."""
    editor: str = "sentiment-swaps"
    """Who edits: sentiment-swaps, llm, 'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    backend: str = "embedded"
    """The LLM of the editor llm."""
    max_changed: float = 0.4
    """Share of words that a minimal edit may change."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check the options, load no model."""

    def check(self) -> list[str]:
        """The names of the arms.

        Raises:
            InputError: for an unknown arm, or no seeds.
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
    """Runs the stages that are not finished and returns the report's figures.

    Raises:
        InputError: for bad input.
    """
    console = console or Console()
    names = options.check()
    root, sizes = Path(options.run_dir), SIZES[options.scale]
    seeds = 1 if options.scale == "smoke" else options.seeds

    def given(kind: str, *folder: str) -> Mapping[str, Any]:
        """Options of a stage: what all share, and what the scale says."""
        shared = {name: getattr(options, name) for name in ("data", "layout", "dtype", "track")}
        return shared | sizes[kind] | {"run_dir": str(root.joinpath(*folder))}

    if Processes().count > 1:
        raise InputError(
            "'fine-grained run' runs in one process: only its stages sft, reward-model and ppo can share work"
        )
    start, made = str(root / "sft"), root / "edit"
    first = FineGrainedSFT(**given("sft", "sft"), model=options.model)
    second = FineGrainedEdit(
        **given("edit", "edit"),
        policy=start,
        annotator=options.annotator,
        editor=options.editor,
        backend=options.backend,
        max_changed=options.max_changed,
    )
    Editing.of(second)  # refused now, not behind the supervised training
    if options.dry_run:
        sft(replace(first, dry_run=True), console)
        console.print(f"then edits, reward models, and {len(names)} arms of PPO over {seeds} seeds, in {root}")
        return {}
    sft(first, console)
    counts = edit(second, console)["counts"]
    equal = min(counts["edits"], counts["preferences"])
    for arm in {ARMS[name].model: ARMS[name] for name in names if name != FIGA}.values():
        reward_model(
            FineGrainedRewardModel(
                **given("reward-model", "reward-model", arm.model),
                pairs=str(made / f"{arm.pairs}.jsonl"),
                model=options.model,
                level=arm.level,
                loss=arm.loss,
                unchanged_penalty=arm.unchanged_penalty,
                limit=equal,
            ),
            console,
        )
    reference = str(root / "evaluate" / "sft")
    evaluate(FineGrainedEvaluate(**given("evaluate", "evaluate", "sft"), policy=start, arm="sft"), console)
    for seed in range(seeds):
        for name in names:
            if name == FIGA:
                trained = str(root / "figa" / f"{name}-{seed}")
                figa(
                    FineGrainedFIGA(
                        **given("figa", "figa", f"{name}-{seed}"),
                        policy=start,
                        pairs=str(made / "edits.jsonl"),
                        seed=seed,
                    ),
                    console,
                )
            else:
                trained = str(root / "ppo" / f"{name}-{seed}")
                ppo(
                    FineGrainedPPO(
                        **given("ppo", "ppo", f"{name}-{seed}"),
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
                    **given("evaluate", "evaluate", f"{name}-{seed}"),
                    policy=trained,
                    against=reference,
                    arm=name,
                    seed=1 + seed,  # not the draws of the reference
                ),
                console,
            )
    return report(FineGrainedReport(str(root)), console)
