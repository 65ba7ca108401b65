"""The program of ``make demo``: trains an agent on the embedded model and evolves 16 seed instructions with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from ..llm_backends.records import read_records
from .cli import guarded
from .evolve import generate as evolve_generate
from .evolve import train as evolve_train
from .runs.folder import write_json

RUN = Path("runs") / "demo"
"""Run folder of the demo."""


def run(console: Console) -> None:
    """Trains for 240 steps, evolves 16 seeds, prints three of the rows and the paths of the files."""
    start = time.monotonic()
    console.rule("1 of 2: an agent learns which edits raise the reward (TRPO, 240 steps on SmolLM2-135M-Instruct)")
    training = evolve_train.run(
        evolve_train.EvolveTrain(
            run_dir=str(RUN),
            algorithm="TRPO",
            episodes=40,
            num_envs=16,
            n_steps=1,
            reward="judge + diversity",
            backend='{"id": "embedded", "kwargs": {"dtype": "auto"}}',
        ),
        console,
    )
    console.rule("2 of 2: its policy evolves 16 seeds, the model answers")
    results = evolve_generate.run(
        evolve_generate.EvolveGenerate(run_dir=str(RUN), limit=16, out=str(RUN / "data.jsonl"), answer_tokens=64),
        console,
    )
    rows = read_records(RUN / "data.jsonl")
    console.rule("three of the rows")
    for row in rows[:: max(len(rows) // 3, 1)][:3]:
        path = " > ".join(edit["operation"] for edit in row["lineage"])
        console.print(f"[dim]{path}[/dim]", f"[bold]{row['instruction']}[/bold]", row["output"], sep="\n", end="\n\n")
    write_json(RUN / "metrics.json", {"training": training, "generation": results})
    console.print(f"data set    {RUN / 'data.jsonl'} ({len(rows)} rows)")
    console.print(f"figure      {RUN / 'figures' / 'training.png'}")
    console.print(f"metrics     {RUN / 'metrics.json'}")
    console.print(f"{time.monotonic() - start:.0f} seconds in total")


if __name__ == "__main__":
    sys.exit(guarded(run))
