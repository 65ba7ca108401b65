"""``instructgym evolve generate``: evolves every seed with the trained policy, filters the texts and answers them.

Every intermediate text of an episode is a candidate, as in TeaMs-RL. A candidate is dropped if the edit or its answer
breaks one of the four elimination rules, or if its ROUGE-L to a seed or an accepted instruction is above a threshold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ...agents.sb3.policy_io import load_policy
from ...llm_backends import Backend, Journal, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records, replaced
from ..runs.folder import RowWriter, RunFolder, Tracker, replayed
from ..runs.options import check_output
from ..runs.progress import Deadline, OutOfTimeError, StepProgress
from .generator import GenerationOptions, InstructionGenerator, generation_env
from .train import EvolveTrain, check_context, describe, ended_training, identity, load_seeds, roles_of

Format = Literal["alpaca", "messages"]
"""Formats of the rows of a data set."""
PAIR = ("instruction", "input", "output")
"""Keys of a row that its format replaces."""


@dataclass
class EvolveGenerate(GenerationOptions):
    """Make an instruction data set with a trained policy."""

    backend: str = ""
    """Model that rewrites, judges and answers, written as for 'evolve train'. By default the one of the training."""
    seeds: str = ""
    """Seed instructions to evolve, in any format of 'evolve train --seeds'. By default the package's own."""
    out: str = ""
    """File to write the data set to: .jsonl, or .parquet for Parquet. By default data.jsonl in the run folder."""
    format: Format = "alpaca"
    """Format of a row. alpaca: fields instruction, input and output. messages: a chat of two messages."""
    limit: int = 0
    """Number of seeds to evolve, taken from the beginning of the list. 0: all."""
    responder_backend: str = ""
    """Model that answers, written like --backend. By default the rewriter."""
    deterministic: bool = False
    """Take the policy's most likely operation instead of sampling one."""

    def check(self) -> None:
        super().check()
        if self.out and Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise InputError(f"--out must end in .jsonl or .parquet, got {self.out!r}")


def run(options: EvolveGenerate, console: Console | None = None) -> dict[str, Any]:
    """Generates the data set, or resumes its generation, and returns the results.

    Raises:
        InputError: for bad input, before any expensive work.
    """
    console = console or Console()
    options.check()
    trained = trained_options(options)
    instructions = load_seeds(options.seeds)
    instructions = instructions[: options.limit or len(instructions)]
    out = Path(options.out) if options.out else Path(options.run_dir) / "data.jsonl"
    # Parquet is written at the end, from JSONL rows beside it.
    rows_path = out.with_suffix(".jsonl")
    check_output(rows_path)
    # The hash separates output files that have one name in different folders.
    name = f"{out.stem}-{request_seed(str(out.resolve())) % 16**6:06x}"
    config = identity(options, instructions) | {
        "out": str(out.resolve()),
        "policy": _fingerprint(Path(options.run_dir) / "checkpoints"),
    }
    folder = RunFolder(Path(options.run_dir) / "generate" / name, config, "evolve generate")
    # Roles without a journal: they check the options before the run folder is opened.
    probe = roles_of(trained, None, options.responder_backend)
    check_context(probe["rewriter"], instructions, options.seeds)
    if options.dry_run:
        console.print(f"would evolve {len(instructions)} seeds with the policy in {options.run_dir} into {out}")
        console.print(describe(generation_env(trained, probe, instructions, options.chunk)))
        return {}
    if folder.results is not None and out.exists():
        console.print(f"{out} is finished: nothing to do (choose another --out to make a new one)")
        return folder.results
    if not (folder.path / "config.json").exists() and rows_path.exists():
        raise InputError(f"{rows_path} exists and was not written by this command: choose another --out")

    def build(journal: Journal) -> dict[str, Backend]:
        return roles_of(trained, journal, options.responder_backend)

    with replayed(folder, build, console, out) as (journal, roles):
        env = generation_env(trained, roles, instructions, options.chunk)
        agent = load_policy(Path(options.run_dir) / "checkpoints", env, options.seed)
        responder = roles["responder"]
        generator = InstructionGenerator(agent, env, responder, options, options.seed, options.deterministic)
        origin = {"rewriter": roles["rewriter"].name, "responder": responder.name}
        return _generate(options, folder, generator, origin, Deadline(options.minutes, journal), out, console)


def _generate(
    options: EvolveGenerate,
    folder: RunFolder,
    generator: InstructionGenerator,
    origin: dict[str, str],
    limit: Deadline,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Evolves chunk after chunk, writes accepted and rejected rows, and returns the results."""
    begun, totals, count, done = time.monotonic(), generator.totals, len(generator.process.instructions), 0
    data, dropped = RowWriter(out.with_suffix(".jsonl")), RowWriter(folder.file("rejected.jsonl"))
    with (
        Tracker(folder, options.track, step_name="seeds") as tracker,
        StepProgress("seeds evolved", count, console) as progress,
        suppress(OutOfTimeError),
    ):
        for rows in generator.run(limit.check):
            for row in rows:
                if "rejected_by" in row:
                    dropped.write(row)
                else:
                    told = {k: v for k, v in row.items() if k not in (*PAIR, "seed_index", "epoch")}
                    data.write(in_format(row, options.format) | told | origin)
            done = len(totals.returns)
            counters = {f"calls/{role}": spent for role, spent in totals.calls.items()}
            counters |= {"accepted": len(totals.texts), "rejected": totals.rejected_by.total()}
            tracker.write(counters, {}, step=done)
            progress.update(done, f"{len(totals.texts)} instructions accepted")
    if out.suffix == ".parquet":
        write_parquet(out.with_suffix(".jsonl"), out)
    results = folder.finish(
        metrics=totals.metrics(),
        counts={
            "seeds": done,
            "accepted": len(totals.texts),
            "rejected": totals.rejected_by.total(),
            "calls": dict(totals.calls),
            "rejected_by": dict(totals.rejected_by),
            "seconds": round(time.monotonic() - begun, 1),
        },
        status="finished" if done == count else "stopped",
    )
    console.print(generation_table(results, out))
    if done < count:
        console.print(f"stopped at the time limit after {done} of {count} seeds: the same command goes on")
    return results


def in_format(row: Mapping[str, Any], style: str) -> dict[str, Any]:
    """Returns instruction, input and output of a row in the format ``style``, one of :data:`Format`."""
    if style == "alpaca":
        return {key: row[key] for key in PAIR}
    question = f"{row['instruction']}\n\n{row['input']}".strip()
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]}


def write_parquet(source: Path, target: Path) -> None:
    """Writes the rows of a JSONL file as Parquet; the target is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # As text: the terms differ from reward to reward, and Parquet has no type for an object without fields.
    rows = [row | {"reward_terms": json.dumps(row["reward_terms"])} for row in read_records(source)]
    with replaced(target) as scratch:
        pq.write_table(pa.Table.from_pylist(rows), scratch)


def generation_table(results: dict[str, Any], out: Path) -> Table:
    """Returns the results as a table for the terminal."""
    counts, metrics = results["counts"], results["metrics"]
    table = Table(title=f"{out}", show_header=False)
    for name, value in (
        ("seeds evolved", counts["seeds"]),
        ("instructions accepted", counts["accepted"]),
        ("candidates dropped", ", ".join(f"{n} {k}" for k, n in sorted(counts["rejected_by"].items())) or "none"),
        ("LLM calls", ", ".join(f"{n} {k}" for k, n in sorted(counts["calls"].items()))),
        ("LLM calls per accepted instruction", metrics["calls_per_accepted"]),
        ("mean return per episode", metrics["mean_return"]),
        ("mean pairwise cosine distance", metrics["embedding_distance"]),
        ("distinct-2", metrics["distinct_2"]),
        ("mean words per instruction", metrics["mean_words"]),
    ):
        table.add_row(name, "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    return table


def trained_options(options: EvolveGenerate) -> EvolveTrain:
    """Returns the options that the policy was trained with; ``--backend`` and ``--model``, if given, replace theirs.

    Raises:
        InputError: if the run folder holds no training run or no policy.
    """
    stored, _ = ended_training(options.run_dir)
    if not (Path(options.run_dir) / "checkpoints" / "agent.json").exists():
        raise InputError(f"the training in {options.run_dir} has left no policy: repeat its 'evolve train' command")
    trained = EvolveTrain(**{f.name: stored[f.name] for f in fields(EvolveTrain) if f.name in stored})
    if options.backend:
        # The model of the training belongs to its backend.
        trained.backend, trained.model = options.backend, ""
    trained.model = options.model or trained.model
    return trained


def _fingerprint(checkpoint: Path) -> str:
    """Returns a hash of the saved policy: generation must not be resumed with another policy."""
    data = b"".join((checkpoint / name).read_bytes() for name in ("agent.json", "policy.safetensors"))
    return f"{request_seed(data.hex()):016x}"
