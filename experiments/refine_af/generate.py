"""``instructgym refine-af generate``: a policy writes instances of instructions, and rules drop the unusable ones.

Stage 3 of REFINE-AF (Roy et al., arXiv 2505.06548), with the policy of 'refine-af train' or with an untrained model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...envs.tasks.instruction.instance_prompts import read_response
from ...envs.tasks.instruction.instances import clean
from ...envs.tasks.instruction.pool import evaluation_split, load_tasks
from ...llm_backends import request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.records import write_lines
from ...rewards.quality.instance_format import Instance
from ..evolve.generate import Format, in_format
from ..runs.folder import read_json
from ..runs.options import Count, check_output, input_errors
from ..runs.responses import respond
from ..runs.statistics import distinct_n, known_mean
from ..runs.training import Run, policy_folder, run_stage, tokenizer_of, weights_digest
from ..teaching.evaluate import no_reward
from .common import ENV_ID, STATEFUL_PRESET, InstanceOptions, prompts_digest

CHUNK = 64
"""Responses generated together; a chunk that was not completed is generated again."""
RESPONSES = "responses.jsonl"
"""File of all responses in the run folder."""


@dataclass
class RefineAFGenerate(InstanceOptions):
    """Make a data set: instances of instructions by a trained policy, or by a model as it is."""

    policy: str = ""
    """Run folder of 'refine-af train', whose policy writes the instances. Empty: the untrained --model does."""
    model: str = ""
    """Untrained model that writes the instances: embedded (by default), or a local path or hub id. Not with --policy,
    which brings its own model."""
    samples: Count = 1
    """Instances sampled per instruction. If two of them give different outputs for one input, all are dropped."""
    reward: str = ""
    """Reward that scores every instance: quality, or other rewards written as for 'evolve train'. Empty: no scores."""
    seeds: str = ""
    """File of seed tasks whose own instances are added to the data set, except those of held-out tasks."""
    limit: int = 0
    """Number of instructions to use, taken from the beginning of the file. 0: all."""
    format: Format = "alpaca"
    """Format of a row. alpaca: fields instruction, input and output. messages: a chat of two messages."""
    out: str = ""
    """File to write the data set to, .jsonl. By default data.jsonl in the run folder."""

    def check(self) -> None:
        super().check()
        if self.policy and self.model:
            raise InputError("--policy and --model exclude each other: a policy brings the model it was trained on")
        if self.reward and self.reward_preset == STATEFUL_PRESET:
            raise InputError(
                f"--reward-preset {STATEFUL_PRESET} compares with earlier texts, which chunks do not share"
            )
        if self.out and Path(self.out).suffix != ".jsonl":
            raise InputError(f"--out must end in .jsonl, got {self.out!r}")

    @property
    def target(self) -> Path:
        """File that the data set is written to."""
        return Path(self.out) if self.out else Path(self.run_dir) / "data.jsonl"


def run(options: RefineAFGenerate, console: Console | None = None) -> dict[str, Any]:
    """Generates the data set, or resumes its generation, and returns the results.

    The run folder also gets all responses (``responses.jsonl``) and those that were dropped (``rejected.jsonl``).

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    start = policy_folder(options.policy, "--policy") if options.policy else None
    _check_training(options)
    model = read_state(start / SETTINGS)["model"] if start is not None else options.model or "embedded"
    examples = options.prompts(None, tokenizer_of(model))
    examples = examples[: options.limit or None]
    seeds = _seed_rows(options)
    check_output(options.target)
    if options.target.exists() and read_json(Path(options.run_dir) / "config.json") is None:
        raise InputError(f"{options.target} exists and was not written by this run: choose another --out")
    with input_errors():
        reward = resolve("reward", options.reward_part() if options.reward else no_reward)
    total = len(examples) * options.samples

    def work(opened: Run) -> dict[str, Any]:
        if start is None:
            policy = LanguageModelPolicy(model, value="none", reference="none", dtype=options.dtype)
        else:
            policy = policy_from(start, dtype=options.dtype)

        def rows(first: int) -> list[dict[str, Any]]:
            # The samples of one instruction are consecutive rows.
            chunk = [examples[i // options.samples] for i in range(first, min(first + CHUNK, total))]
            # A response depends on the run's seed and the number of its row.
            seed = request_seed(options.seed, "instances", first)
            responses = respond(
                policy, ENV_ID, chunk, options.temperature, seed, reward=reward, **options.env_options()
            )
            return [
                {
                    "number": number,
                    "id": example.id,
                    **{name: example.metadata[name] for name in ("instruction", "order", "opening")},
                    "text": response.text,
                    "finish_reason": response.finish_reason,
                    "reward": response.reward if options.reward and response.valid else None,
                }
                for number, (example, response) in enumerate(zip(chunk, responses, strict=True), start=first)
            ]

        written = opened.rows(RESPONSES, total, CHUNK, rows, "instances")
        accepted, rejected = _split_responses(written, options.samples)
        exported = [
            in_format(row, options.format)
            | {"id": row["id"], "source": row.get("source", "generated"), "reward": row.get("reward")}
            for row in [*seeds, *accepted]
        ]
        write_lines(opened.folder.file("rejected.jsonl"), rejected)
        write_lines(options.target, exported)
        opened.tracker.table("instances", exported[:50])
        reasons = Counter(row["rejected_by"] for row in rejected)
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none"
        console.print(f"{options.target}: {len(accepted)} of {total} instances kept; dropped: {dropped}")
        counts = {
            "instructions": len(examples),
            "responses": total,
            "accepted": len(accepted),
            "rejected": len(rejected),
            "rejected_by": dict(reasons),
            "seed_instances": len(seeds),
            "rows": len(exported),
        }
        return opened.finish(_metrics(options, written, accepted, reasons), counts)

    # A run is resumed only with the same prompts and, for a policy, the same weights.
    identity: dict[str, Any] = {"prompts": prompts_digest(examples)}
    if start is not None:
        identity["weights"] = weights_digest(start)
    plan = f"write {total} instances of {len(examples)} instructions into {options.target}"
    return run_stage(options, "refine-af generate", console, work, distributed=False, plan=plan, **identity)


def _check_training(options: RefineAFGenerate) -> None:
    """Raises an InputError if the policy was trained with another layout or maximum length of responses."""
    config = read_json(Path(options.policy) / "config.json") if options.policy else None
    if config is None or config.get("command") != "refine-af train":
        return
    for name in ("layout", "max_tokens"):
        value, trained = getattr(options, name), config["options"][name]
        if value != trained:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{options.policy} was trained with {option} {trained}, not {value}: give it here too")


def _split_responses(
    rows: Sequence[Mapping[str, Any]], samples: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits responses into instances that are accepted and responses that are rejected.

    Args:
        rows: rows of ``responses.jsonl``; the responses to an instruction are consecutive.
        samples: responses per instruction.

    Returns:
        Rows of the accepted instances, and rows of the rejected responses with the reason as ``rejected_by``.
    """
    accepted, rejected = [], []
    for start in range(0, len(rows), samples):
        drawn = rows[start : start + samples]
        # A parsed response is an instance, or a str: the reason why it is none.
        read = [read_response(row["text"], row) for row in drawn]
        instances = [(row, piece) for row, piece in zip(drawn, read, strict=True) if isinstance(piece, Instance)]
        rejected += [
            dict(row) | {"rejected_by": piece} for row, piece in zip(drawn, read, strict=True) if isinstance(piece, str)
        ]
        cleaned = clean([piece for _, piece in instances], limit=samples, instruction=drawn[0]["instruction"])
        remaining, reasons = list(cleaned.kept), dict(cleaned.dropped)
        for row, piece in instances:
            if piece in remaining:  # the first of equal instances is accepted, the others are duplicates
                remaining.remove(piece)
                accepted.append(dict(row) | asdict(piece))
            else:
                rejected.append(dict(row) | {"rejected_by": reasons[piece]})
    return accepted, rejected


def _seed_rows(options: RefineAFGenerate) -> list[dict[str, Any]]:
    """Returns the instances of the seed tasks that are not held out; none without ``--seeds``.

    Raises:
        InputError: for a file that cannot be used or has no instances.
    """
    if not options.seeds:
        return []
    with input_errors():
        shown, _ = evaluation_split(load_tasks(options.seeds), options.held_out)
    rows = [
        {"id": task.id, "instruction": task.instruction, "source": "seed"} | asdict(instance)
        for task in shown
        for instance in task.instances
    ]
    if not rows:
        raise InputError(f"--seeds {options.seeds} has no instances: give tasks with 'instances', or leave it out")
    return rows


def _metrics(
    options: RefineAFGenerate,
    responses: Sequence[Mapping[str, Any]],
    accepted: Sequence[Mapping[str, Any]],
    reasons: Counter[str],
) -> dict[str, float | None]:
    """Returns rates and means over the responses; None where there is nothing to average."""
    # A contradiction or a duplicate has the format of an instance.
    malformed = reasons.total() - reasons["contradiction"] - reasons["duplicate"]
    outputs = [row["output"] for row in accepted]
    return {
        "acceptance_rate": len(accepted) / len(responses),
        "format_rate": 1 - malformed / len(responses),
        "mean_reward": known_mean([row["reward"] for row in responses]),
        "mean_reward_accepted": known_mean([row["reward"] for row in accepted]),
        "with_instances": len({row["id"] for row in accepted}) * options.samples / len(responses),
        "with_input": known_mean([float(bool(row["input"])) for row in accepted]),
        "output_words": known_mean([float(len(text.split())) for text in outputs]),
        "distinct_2": distinct_n(outputs, 2),
    }
