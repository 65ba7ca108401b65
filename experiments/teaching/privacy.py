"""``instructgym privacy``: membership inference on fine-tuned policies, as TeaMs-RL reports it (ROC and AUC).

Members are the rows that a policy was fine-tuned on, non-members those of the same data that were held out. Which
attack TeaMs-RL ran is not known; the attacks here are those of ``experiments/membership.py``. Rows that were evolved
from one seed are alike: where some are members and some are not, the attacks have it harder, and the intervals, which
take rows for independent, are too narrow.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...agents.supervised.sft import TokenizedDemonstration
from ...envs.tasks.instruction.data import InstructionExample, read_instruction_data
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ...llm_backends.records import append_lines, read_records
from ..runs.folder import read_json
from ..runs.options import check_counts
from ..runs.training import TokenTraining, TrainingOptions, digest, policy_folder, stage, tokenizer_of, weights_digest
from .evaluate import find_arms
from .finetune import HELD_OUT, TRAIN, demonstrations
from .membership import ATTACKS, SIDES, attack_metrics, length_shift, plot_roc, score_rows, side_of

CHUNK = 64
SCORES = "scores.jsonl"


@dataclass
class Privacy(TrainingOptions):
    """Tell the rows that policies were fine-tuned on from held-out ones (membership inference)."""

    policy: str = ""
    """Run folder of a fine-tuning, or several to compare: name=RUN,name=RUN."""
    members: str = ""
    """Rows the policy was trained on, in any format of 'finetune --data'; by default the run's train.jsonl."""
    nonmembers: str = ""
    """Rows it was not trained on, likewise; by default the run's held_out.jsonl."""
    model: str = "base"
    """Reference of the calibrated attack: base (the model that the policy was trained from), or embedded, a local path
    or hub id of another model with the same tokenizer."""
    layout: Literal["", "chat", "plain", "alpaca"] = ""
    """How rows were shown in training; by default as the fine-tuning run says."""
    context_length: int = 0
    """Tokens of a row at most; longer ones are left out. 0: as in training."""
    limit: int = 0
    """Rows of either side at most, drawn at random. 0: all."""
    resamples: int = 2000
    """Of the bootstrap behind each interval."""

    def check(self) -> None:
        super().check()
        check_counts(self, "resamples")
        if bool(self.members) != bool(self.nonmembers):
            given, other = ("members", "nonmembers") if self.members else ("nonmembers", "members")
            raise InputError(f"--{given} without --{other}: name both files, or neither to take those of the run")


@dataclass(frozen=True)
class _Row:
    """One row of either side."""

    member: bool
    number: int
    """Of the row among those of its file, from 0."""
    example: InstructionExample


@dataclass
class _AttackedArm:
    """One policy with its members and non-members."""

    name: str
    folder: Path
    weights: str
    model: str
    rows: list[_Row]
    shown: list[TokenizedDemonstration]
    too_long: int

    def key(self, index: int) -> dict[str, Any]:
        """What a stored score of a row must agree with."""
        row = self.rows[index]
        return {
            "policy": self.name,
            "member": row.member,
            "row": row.number,
            "id": row.example.id,
            "weights": self.weights,
        }


def run(options: Privacy, console: Console | None = None) -> dict[str, Any]:
    """Scores all rows by all attacks, draws the curves and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    arms = [_arm(options, arm.name, Path(arm.run)) for arm in find_arms(options.policy) if arm.run]
    if not arms:
        raise InputError("--policy is missing: name the run folder of a fine-tuning")
    if options.dry_run:
        for arm in arms:
            console.print(f"would score {len(arm.rows)} rows by {arm.folder}, in {options.run_dir}")
        return {}
    weights = digest([arm.weights for arm in arms])
    with stage(options, "privacy", console, distributed=False, weights=weights) as opened:
        if isinstance(opened, dict):
            return opened
        scores = _scores(options, opened, arms)
        if scores is None:
            return opened.stopped()
        metrics = {arm.name: _measured(scores[arm.name], options) for arm in arms}
        figure = plot_roc(scores, opened.folder.file("figures", "roc.png"))
        counts = {arm.name: {side: len(side_of(scores[arm.name], side)) for side in SIDES} for arm in arms}
        for arm in arms:
            counts[arm.name]["too_long"] = arm.too_long
        results = opened.folder.finish(metrics, counts | {"seconds": opened.seconds})
        opened.tracker.image("roc", figure)
        opened.tracker.summary(results)
        _show(metrics, console)
        return results


def _arm(options: Privacy, name: str, run_folder: Path) -> _AttackedArm:
    folder = policy_folder(str(run_folder), "--policy")
    trained = (read_json(run_folder / "config.json") or {}).get("options", {})
    layout = options.layout or trained.get("layout")
    if not layout:
        raise InputError(f"--policy {run_folder} does not say how its rows were shown: name --layout")
    settings = read_state(folder / SETTINGS)
    tokenizer = tokenizer_of(settings["model"])
    files = {
        side: getattr(options, side) or str(run_folder / default)
        for side, default in zip(SIDES, (TRAIN, HELD_OUT), strict=True)
    }
    held_out = Path(files["nonmembers"])
    if not options.nonmembers and held_out.exists() and not held_out.stat().st_size:
        raise InputError(f"{run_folder} withheld no rows from training: fine-tune with --holdout, or name --nonmembers")
    rows = _rows(files, options)
    longest = options.context_length or trained.get("context_length") or tokenizer.context_length
    shown = demonstrations([row.example for row in rows], layout, tokenizer)
    fits = [len(one.prompt) + len(one.response) <= longest for one in shown]
    kept = [row for row, fit in zip(rows, fits, strict=True) if fit]
    for side in SIDES:
        if not any(row.member == (side == "members") for row in kept):
            raise InputError(f"none of the rows of {files[side]} fits {longest} tokens: raise --context-length")
    _check_reference(options.model, tokenizer)
    return _AttackedArm(
        name=name,
        folder=folder,
        weights=weights_digest(folder),
        model=settings["model"],
        rows=kept,
        shown=[one for one, fit in zip(shown, fits, strict=True) if fit],
        too_long=len(rows) - len(kept),
    )


def _rows(files: Mapping[str, str], options: Privacy) -> list[_Row]:
    """The rows of both files, members first; with a limit, at most so many of either, drawn by the seed."""
    found = {side: read_instruction_data(path, f"--{side}").examples for side, path in files.items()}
    members = {example.id: number for number, example in enumerate(found["members"], start=1)}
    for number, example in enumerate(found["nonmembers"], start=1):
        if example.id in members:
            raise InputError(
                f"row {number} of {files['nonmembers']} is row {members[example.id]} of {files['members']}: a row "
                "cannot be both trained on and held out, delete one of the two"
            )
    rows = []
    for side, examples in found.items():
        numbers: Sequence[int] = range(len(examples))
        if 0 < options.limit < len(examples):
            numbers = sorted(random.Random(f"{options.seed}/{side}").sample(numbers, options.limit))
        rows += [_Row(side == "members", number, examples[number]) for number in numbers]
    return rows


def _check_reference(model: str, tokenizer: Tokenizer) -> None:
    if model != "base" and tokenizer_of(model).fingerprint != tokenizer.fingerprint:
        raise InputError(f"--model {model} counts other tokens than the policy's model: its losses do not compare")


def _scores(
    options: Privacy, opened: TokenTraining, arms: Sequence[_AttackedArm]
) -> dict[str, list[dict[str, Any]]] | None:
    """The scores of every row by policy, those that are stored read; None when the time is over."""
    path = opened.folder.file(SCORES)
    stored = {(row["policy"], row["member"], row["row"]): row for row in read_records(path, repair=True)}
    scores: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        keys = [arm.key(i) for i in range(len(arm.rows))]
        places = [(key["policy"], key["member"], key["row"]) for key in keys]
        for key, place in zip(keys, places, strict=True):
            if place in stored and any(stored[place][name] != value for name, value in key.items()):
                raise InputError(
                    f"{path} has the score of another row or of other weights for {place}: --policy {arm.folder} or "
                    "its rows have changed since; choose another --run-dir"
                )
        # Whole chunks, whatever of one is stored: what stands in a batch with a row must not depend on a kill.
        starts = [s for s in range(0, len(keys), CHUNK) if any(place not in stored for place in places[s : s + CHUNK])]
        models = _models(options, arm) if starts else None
        for start in starts:
            assert models is not None
            made = score_rows(*models, arm.shown[start : start + CHUNK], options.token_budget)
            new = []
            for offset, row in enumerate(made, start=start):
                if places[offset] not in stored:
                    tokens = len(arm.shown[offset].response)
                    stored[places[offset]] = keys[offset] | {"tokens": tokens} | row
                    new.append(stored[places[offset]])
            append_lines(path, new)
            last = start == starts[-1] and arm is arms[-1]
            if options.minutes and opened.seconds > 60 * options.minutes and not last:
                return None
        scores[arm.name] = [stored[place] for place in places]
    return scores


def _models(options: Privacy, arm: _AttackedArm) -> tuple[LanguageModelPolicy, LanguageModelPolicy]:
    """The policy at temperature 1, and the policy whose reference is the one to compare with."""
    policy = policy_from(arm.folder, temperature=1.0, dtype=options.dtype)
    if options.model == "base" and (policy.lora.rank or policy.reference == "base"):
        policy.reference = "base"  # whatever it was trained against: the model without any adapter
        return policy, policy
    model = arm.model if options.model == "base" else options.model
    return policy, LanguageModelPolicy(model, value="none", dtype=options.dtype)


def _measured(rows: Sequence[Mapping[str, Any]], options: Privacy) -> dict[str, Any]:
    """Metrics of each attack on one policy, its lengths and what to beware of."""
    members, others = (side_of(rows, side) for side in SIDES)
    shift = length_shift([row["tokens"] for row in members], [row["tokens"] for row in others])
    warnings = []
    if len(members) != len(others):
        warnings.append(f"{len(members)} members and {len(others)} non-members: the smaller side widens the intervals")
    if shift.found:
        warnings.append(
            f"members have {shift.members:.1f} tokens per response, non-members {shift.nonmembers:.1f} "
            f"(p = {shift.p_value:.2g}): an AUC off 0.5 may come from the lengths, which alone reach {shift.auc:.2f}"
        )
    attacks = {
        attack: attack_metrics(
            [row[attack] for row in members], [row[attack] for row in others], options.seed, options.resamples
        ).as_dict()
        for attack in ATTACKS
    }
    lengths = {
        "members": shift.members,
        "nonmembers": shift.nonmembers,
        "p_value": shift.p_value,
        "auc": shift.auc,
    }
    return {"attacks": attacks, "lengths": lengths, "warnings": warnings}


def _show(metrics: Mapping[str, Any], console: Console) -> None:
    table = Table(title="Membership inference (0.5: guessing; intervals: 95%, bootstrap)")
    for title in ("policy", "attack", "AUC", "|AUC - 0.5|", "TPR at 1% FPR", ""):
        table.add_column(title, justify="right" if title and title not in ("policy", "attack") else "left")
    for name, measured in metrics.items():
        for attack, found in measured["attacks"].items():
            area = f"{found['auc']:.3f} [{found['auc_low']:.3f}, {found['auc_high']:.3f}]"
            rate = found["tpr_at_1_percent_fpr"]
            shown = "-" if rate is None else f"{rate:.3f}"
            table.add_row(name, attack, area, f"{found['distance_to_chance']:.3f}", shown, found["verdict"])
    console.print(table)
    for name, measured in metrics.items():
        reasons = dict.fromkeys(found["reason"] for found in measured["attacks"].values() if found["reason"])
        for remark in [*measured["warnings"], *(f"no TPR at 1% FPR: {reason}" for reason in reasons)]:
            console.print(f"{name}: {remark}", highlight=False)
