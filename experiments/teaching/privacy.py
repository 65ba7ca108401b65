"""``instructgym privacy``: membership inference on fine-tuned policies, as TeaMs-RL reports it (ROC and AUC).

Members are the rows that a policy was fine-tuned on, non-members the rows of the same data that were withheld. It is
not known which attack TeaMs-RL ran; the attacks here are those of
:mod:`~instructgym.experiments.teaching.membership`.

Rows that were evolved from one seed are similar. If some of them are members and others are not, the attacks are
harder, and the intervals, which assume independent rows, are too narrow.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from ..runs.training import Run, TrainingOptions, digest, policy_folder, run_stage, tokenizer_of, weights_digest
from .evaluate import find_arms
from .finetune import HELD_OUT, TRAIN, demonstrations
from .membership import ATTACKS, SIDES, attack_metrics, length_shift, plot_roc, score_rows, side_of

CHUNK = 64
"""Rows scored together and appended to the file of scores at once."""
SCORES = "scores.jsonl"
"""File of all rows' scores in the run folder."""


@dataclass
class Privacy(TrainingOptions):
    """Tell the rows that policies were fine-tuned on from held-out ones (membership inference)."""

    policy: str = ""
    """Run folder of 'finetune', or several to compare: name=RUN,name=RUN."""
    members: str = ""
    """File of rows that the policy was trained on, in any format of 'finetune --data'. By default train.jsonl of its
    run folder."""
    nonmembers: str = ""
    """File of rows that the policy was not trained on, in any format of 'finetune --data'. By default held_out.jsonl of
    its run folder."""
    model: str = "base"
    """Reference model of the calibrated attack: base (the model that the policy was trained from), or embedded, a local
    path or hub id of another model with the same tokenizer."""
    layout: Literal["", "chat", "plain", "alpaca"] = ""
    """How requests were written in training: chat, plain or alpaca. By default as recorded in the policy's run
    folder."""
    context_length: int = 0
    """Maximum tokens of a row; longer rows are left out. 0: as in training."""
    limit: int = 0
    """Maximum number of members, and of non-members, drawn at random. 0: all."""
    resamples: int = 2000
    """Bootstrap samples behind each interval."""

    def check(self) -> None:
        super().check()
        check_counts(self, "resamples")
        if bool(self.members) != bool(self.nonmembers):
            present, missing = ("members", "nonmembers") if self.members else ("nonmembers", "members")
            raise InputError(f"--{present} without --{missing}: name both files, or neither to take those of the run")


@dataclass(frozen=True)
class _Row:
    """One row to score."""

    member: bool
    """Whether the policy was trained on it."""
    number: int
    """Index of the row in its file, from 0."""
    example: InstructionExample
    """Request and response."""


@dataclass
class _AttackedArm:
    """One policy with its members and non-members."""

    name: str
    folder: Path
    """Folder of the policy."""
    weights: str
    """Digest of the policy's weights."""
    model: str
    """The base model."""
    rows: list[_Row]
    """Members, then non-members."""
    tokenized: list[TokenizedDemonstration]
    """The rows as token ids, as in training."""
    too_long: int
    """Number of rows that were left out because of their length."""

    def key(self, index: int) -> dict[str, Any]:
        """Returns the fields by which a stored score is recognised as that of a row."""
        row = self.rows[index]
        return {
            "policy": self.name,
            "member": row.member,
            "row": row.number,
            "id": row.example.id,
            "weights": self.weights,
        }


def run(options: Privacy, console: Console | None = None) -> dict[str, Any]:
    """Scores all rows by all attacks, draws the ROC curves and returns the results.

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

    def work(opened: Run) -> dict[str, Any]:
        scores = _scores(options, opened, arms)
        metrics = {arm.name: _measure(scores[arm.name], options) for arm in arms}
        figure = plot_roc(scores, opened.folder.file("figures", "roc.png"))
        counts = {arm.name: {side: len(side_of(scores[arm.name], side)) for side in SIDES} for arm in arms}
        for arm in arms:
            counts[arm.name]["too_long"] = arm.too_long
        results = opened.folder.finish(metrics, counts | {"seconds": opened.seconds})
        opened.tracker.image("roc", figure)
        opened.tracker.summary(results)
        _show(metrics, console)
        return results

    return run_stage(options, "privacy", console, work, distributed=False, weights=weights)


def _arm(options: Privacy, name: str, run_folder: Path) -> _AttackedArm:
    """Reads a policy's rows and tokenizes them as in its training.

    Raises:
        InputError: for a layout that is not known, rows that cannot be used, and a reference model with another
            tokenizer.
    """
    folder = policy_folder(str(run_folder), "--policy")
    trained = (read_json(run_folder / "config.json") or {}).get("options", {})
    layout = options.layout or trained.get("layout")
    if not layout:
        raise InputError(f"--policy {run_folder} does not record the layout of its rows: name --layout")
    settings = read_state(folder / SETTINGS)
    tokenizer = tokenizer_of(settings["model"])
    files = {
        side: getattr(options, side) or str(run_folder / default)
        for side, default in zip(SIDES, (TRAIN, HELD_OUT), strict=True)
    }
    # A run without --holdout has an empty file of withheld rows.
    held_out = Path(files["nonmembers"])
    if not options.nonmembers and held_out.exists() and not held_out.stat().st_size:
        raise InputError(f"{run_folder} withheld no rows from training: fine-tune with --holdout, or name --nonmembers")
    rows = _rows(files, options)
    longest = options.context_length or trained.get("context_length") or tokenizer.context_length
    tokenized = demonstrations([row.example for row in rows], layout, tokenizer)
    fits = [len(tokens.prompt) + len(tokens.response) <= longest for tokens in tokenized]
    fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
    for side in SIDES:
        if not any(row.member == (side == "members") for row in fitting):
            raise InputError(f"none of the rows of {files[side]} fits {longest} tokens: raise --context-length")
    _check_reference(options.model, tokenizer)
    return _AttackedArm(
        name=name,
        folder=folder,
        weights=weights_digest(folder),
        model=settings["model"],
        rows=fitting,
        tokenized=[tokens for tokens, fit in zip(tokenized, fits, strict=True) if fit],
        too_long=len(rows) - len(fitting),
    )


def _rows(files: Mapping[str, str], options: Privacy) -> list[_Row]:
    """Returns the rows of both files, members first; with a limit, at most that many of each, drawn by the seed.

    Raises:
        InputError: for a row that is in both files.
    """
    examples_of = {side: read_instruction_data(path, f"--{side}").examples for side, path in files.items()}
    members = {example.id: number for number, example in enumerate(examples_of["members"], start=1)}
    for number, example in enumerate(examples_of["nonmembers"], start=1):
        if example.id in members:
            raise InputError(
                f"row {number} of {files['nonmembers']} is row {members[example.id]} of {files['members']}: a row "
                "cannot be both trained on and held out, delete one of the two"
            )
    rows = []
    # Each side has its own generator: the draw of members does not depend on the non-members.
    for side, examples in examples_of.items():
        numbers: Sequence[int] = range(len(examples))
        if 0 < options.limit < len(examples):
            numbers = sorted(random.Random(f"{options.seed}/{side}").sample(numbers, options.limit))
        rows += [_Row(side == "members", number, examples[number]) for number in numbers]
    return rows


def _check_reference(model: str, tokenizer: Tokenizer) -> None:
    """Raises an InputError for a reference model with another tokenizer, whose losses per token are not comparable."""
    if model != "base" and tokenizer_of(model).fingerprint != tokenizer.fingerprint:
        raise InputError(f"--model {model} counts other tokens than the policy's model: its losses do not compare")


def _scores(options: Privacy, opened: Run, arms: Sequence[_AttackedArm]) -> dict[str, list[dict[str, Any]]]:
    """Returns the scores of every row by policy, after computing those that are not stored.

    Raises:
        OutOfTimeError: if the time limit is reached, after the scores of a chunk are stored.
        InputError: for a stored score of another row or of other weights.
    """
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
        # Always score whole chunks, even if some rows are stored: the batch of a row must not depend on interruptions.
        starts = [s for s in range(0, len(keys), CHUNK) if any(place not in stored for place in places[s : s + CHUNK])]
        models = _models(options, arm) if starts else None
        for start in starts:
            assert models is not None
            results = score_rows(*models, arm.tokenized[start : start + CHUNK], options.token_budget)
            new = []
            for index, row in enumerate(results, start=start):
                if places[index] not in stored:
                    tokens = len(arm.tokenized[index].response)
                    stored[places[index]] = keys[index] | {"tokens": tokens} | row
                    new.append(stored[places[index]])
            append_lines(path, new)
            # The time limit does not stop a run that has scored everything.
            if start != starts[-1] or arm is not arms[-1]:
                opened.check_time()
        scores[arm.name] = [stored[place] for place in places]
    return scores


def _models(options: Privacy, arm: _AttackedArm) -> tuple[LanguageModelPolicy, LanguageModelPolicy]:
    """Loads the policy at temperature 1, and the policy that holds the reference model of the attack."""
    policy = policy_from(arm.folder, temperature=1.0, dtype=options.dtype)
    if options.model == "base" and (policy.lora.rank or policy.reference == "base"):
        policy.reference = "base"  # the model without an adapter, whatever the reference in training was
        return policy, policy
    model = arm.model if options.model == "base" else options.model
    return policy, LanguageModelPolicy(model, value="none", dtype=options.dtype)


def _measure(rows: Sequence[Mapping[str, Any]], options: Privacy) -> dict[str, Any]:
    """Returns the metrics of each attack on one policy, the lengths of its rows, and warnings."""
    members, others = (side_of(rows, side) for side in SIDES)
    shift = length_shift([row["tokens"] for row in members], [row["tokens"] for row in others])
    warnings = []
    if len(members) != len(others):
        warnings.append(f"{len(members)} members and {len(others)} non-members: the smaller side widens the intervals")
    if shift.significant:
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
    return {"attacks": attacks, "lengths": asdict(shift), "warnings": warnings}


def _show(metrics: Mapping[str, Any], console: Console) -> None:
    """Prints the table of the attacks, then warnings and the reasons for missing rates."""
    table = Table(title="Membership inference (0.5: guessing; intervals: 95%, bootstrap)")
    for title in ("policy", "attack", "AUC", "|AUC - 0.5|", "TPR at 1% FPR", ""):
        table.add_column(
            title, justify="right" if title and title not in ("policy", "attack") else "left", overflow="fold"
        )
    for name, measured in metrics.items():
        for attack, figures in measured["attacks"].items():
            area = f"{figures['auc']:.3f} [{figures['auc_low']:.3f}, {figures['auc_high']:.3f}]"
            rate = figures["tpr_at_1_percent_fpr"]
            shown = "-" if rate is None else f"{rate:.3f}"
            table.add_row(name, attack, area, f"{figures['distance_to_chance']:.3f}", shown, figures["verdict"])
    console.print(table)
    for name, measured in metrics.items():
        reasons = dict.fromkeys(figures["reason"] for figures in measured["attacks"].values() if figures["reason"])
        for remark in [*measured["warnings"], *(f"no TPR at 1% FPR: {reason}" for reason in reasons)]:
            console.print(f"{name}: {remark}", highlight=False)
