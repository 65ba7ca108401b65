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

from ...agents.policy.checkpoints import policy_from
from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.supervised.sft import TokenizedDemonstration
from ...envs.tasks.instruction.data import InstructionExample, read_instruction_data
from ...llm_backends.errors import InputError
from ...llm_backends.records import append_lines, read_records
from ..runs.options import Count
from ..runs.report import rich_table
from ..runs.training import Run, TrainingOptions, digest, run_stage, tokenizer_of, weights_digest
from .evaluate import Arm, find_arms
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
    resamples: Count = 2000
    """Bootstrap samples behind each interval."""

    def check(self) -> None:
        super().check()
        if bool(self.members) != bool(self.nonmembers):
            present, missing = ("members", "nonmembers") if self.members else ("nonmembers", "members")
            raise InputError(f"--{present} without --{missing}: name both files, or neither to take those of the run")


@dataclass(frozen=True)
class _Row:
    """One row to score."""

    key: dict[str, Any]
    """The fields by which a stored score is recognised as that of this row: policy, side, place in the file of that
    side, content and weights."""
    tokens: TokenizedDemonstration
    """The row as token ids, as in training."""


@dataclass
class _AttackedArm:
    """One policy with its members and non-members."""

    arm: Arm
    weights: str
    """Digest of the policy's weights."""
    rows: list[_Row]
    """Members, then non-members."""
    too_long: int
    """Number of rows that were left out because of their length."""


def run(options: Privacy, console: Console | None = None) -> dict[str, Any]:
    """Scores all rows by all attacks, draws the ROC curves and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    arms = [_attacked(options, arm) for arm in find_arms(options.policy) if arm.policy]
    if not arms:
        raise InputError("--policy is missing: name the run folder of a fine-tuning")

    def work(opened: Run) -> dict[str, Any]:
        scores = _scores(options, opened, arms)
        metrics = {name: _measure(rows, options) for name, rows in scores.items()}
        opened.tracker.image("roc", plot_roc(scores, opened.folder.file("figures", "roc.png")))
        counts = {name: {side: len(side_of(rows, side)) for side in SIDES} for name, rows in scores.items()}
        for attacked in arms:
            counts[attacked.arm.name]["too_long"] = attacked.too_long
        results = opened.finish(metrics, counts)
        _show(metrics, console)
        return results

    weights = digest([attacked.weights for attacked in arms])
    plan = "score " + ", ".join(f"{len(attacked.rows)} rows by {attacked.arm.policy}" for attacked in arms)
    return run_stage(options, "privacy", console, work, distributed=False, plan=plan, weights=weights)


def _attacked(options: Privacy, arm: Arm) -> _AttackedArm:
    """Reads a policy's rows and tokenizes them as in its training.

    Raises:
        InputError: for a layout that is not known, rows that cannot be used, and a reference model with another
            tokenizer.
    """
    assert arm.run is not None and arm.policy is not None
    layout = options.layout or arm.training.get("layout")
    if not layout:
        raise InputError(f"--policy {arm.run} does not record the layout of its rows: name --layout")
    # A run without --holdout has an empty file of withheld rows.
    held_out = arm.run / HELD_OUT
    if not options.nonmembers and held_out.exists() and not held_out.stat().st_size:
        raise InputError(f"{arm.run} withheld no rows from training: fine-tune with --holdout, or name --nonmembers")
    files = {"members": options.members or arm.run / TRAIN, "nonmembers": options.nonmembers or held_out}
    drawn = _draw(files, options)
    tokenizer, weights = tokenizer_of(arm.model), weights_digest(arm.policy)
    longest = options.context_length or arm.training.get("context_length") or tokenizer.context_length
    tokenized = demonstrations([example for *_, example in drawn], layout, tokenizer)
    rows = [
        _Row({"policy": arm.name, "member": member, "row": number, "id": example.id, "weights": weights}, tokens)
        for (member, number, example), tokens in zip(drawn, tokenized, strict=True)
        if len(tokens.prompt) + len(tokens.response) <= longest
    ]
    for side in SIDES:
        if not side_of([row.key for row in rows], side):
            raise InputError(f"none of the rows of {files[side]} fits {longest} tokens: raise --context-length")
    # The losses per token of models with different tokenizers are not comparable.
    if options.model != "base" and tokenizer_of(options.model).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"--model {options.model} counts other tokens than the policy's model: its losses do not compare"
        )
    return _AttackedArm(arm, weights, rows, len(drawn) - len(rows))


def _draw(files: Mapping[str, str | Path], options: Privacy) -> list[tuple[bool, int, InstructionExample]]:
    """Returns the rows of both files, members first; with a limit, at most that many of each, drawn by the seed.

    Returns:
        For each row, whether it is a member, its index in its file, and its content.

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
        rows += [(side == "members", number, examples[number]) for number in numbers]
    return rows


def _scores(options: Privacy, opened: Run, arms: Sequence[_AttackedArm]) -> dict[str, list[dict[str, Any]]]:
    """Returns the scores of every row by policy, after computing those that are not stored.

    Raises:
        OutOfTimeError: if the time limit is reached, after the scores of a chunk are stored.
        InputError: for a stored score of another row or of other weights.
    """
    path = opened.folder.file(SCORES)

    def place(key: Mapping[str, Any]) -> tuple[str, bool, int]:
        return key["policy"], key["member"], key["row"]

    stored = {place(row): row for row in read_records(path, repair=True)}
    for key in (row.key for attacked in arms for row in attacked.rows):
        if place(key) in stored and not key.items() <= stored[place(key)].items():
            raise InputError(
                f"{path} has the score of another row or of other weights for {place(key)}: its policy or rows have "
                "changed since; choose another --run-dir"
            )
    # Always score whole chunks, even if some rows are stored: the batch of a row must not depend on interruptions.
    chunks = [
        (attacked.arm, rows)
        for attacked in arms
        for rows in (attacked.rows[start : start + CHUNK] for start in range(0, len(attacked.rows), CHUNK))
        if any(place(row.key) not in stored for row in rows)
    ]
    loaded: Arm | None = None
    for number, (arm, rows) in enumerate(chunks):
        if number:  # at least one chunk is scored
            opened.check_time()
        if arm is not loaded:
            models, loaded = _models(options, arm), arm
        scores = score_rows(*models, [row.tokens for row in rows], options.token_budget)
        new = {
            place(row.key): row.key | {"tokens": len(row.tokens.response)} | score
            for row, score in zip(rows, scores, strict=True)
            if place(row.key) not in stored
        }
        append_lines(path, list(new.values()))
        stored |= new
    return {attacked.arm.name: [stored[place(row.key)] for row in attacked.rows] for attacked in arms}


def _models(options: Privacy, arm: Arm) -> tuple[LanguageModelPolicy, LanguageModelPolicy]:
    """Loads the policy at temperature 1, and the policy that holds the reference model of the attack."""
    assert arm.policy is not None
    policy = policy_from(arm.policy, temperature=1.0, dtype=options.dtype)
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
    rows, remarks = [["policy", "attack", "AUC", "|AUC - 0.5|", "TPR at 1% FPR", ""]], []
    for name, measured in metrics.items():
        for attack, figures in measured["attacks"].items():
            area = "{auc:.3f} [{auc_low:.3f}, {auc_high:.3f}]".format_map(figures)
            rate = figures["tpr_at_1_percent_fpr"]
            shown = "-" if rate is None else f"{rate:.3f}"
            rows.append([name, attack, area, f"{figures['distance_to_chance']:.3f}", shown, figures["verdict"]])
        reasons = dict.fromkeys(figures["reason"] for figures in measured["attacks"].values() if figures["reason"])
        missing = [f"no TPR at 1% FPR: {reason}" for reason in reasons]
        remarks += [f"{name}: {remark}" for remark in (*measured["warnings"], *missing)]
    table = rich_table(rows)
    table.title = "Membership inference (0.5: guessing; intervals: 95%, bootstrap)"
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False)
