"""SIGKILL at random points, then the same command again: the rows of an undisturbed run, no reply paid for twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instructgym.agents.policy.checkpoints import STATE, latest_checkpoint, replace_checkpoint
from instructgym.llm_backends import Journal
from instructgym.llm_backends.records import read_records

SLOW_SCRIPT = json.dumps({"id": "scripted", "kwargs": {"latency": 0.03}})


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "instructgym.experiments.cli", *arguments]


def run_with_kills(arguments: list[str], journal: Path, kills: int, rng: random.Random) -> list[int]:
    """Runs a command to its end, killed at random points on the way; returns the journal's sizes at the kills."""
    sizes = []
    for _ in range(kills):
        known = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size <= known):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        sizes.append(journal.stat().st_size)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return sizes


def journal_keys(path: Path) -> list[str]:
    return [row["key"] for row in read_records(path)]


@pytest.mark.timeout(900)  # a dozen starts of the command, each of which imports torch
@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kills"), [("PPO", 3), ("DQN", 1)])
def test_killed_training_and_generation_give_the_rows_of_an_undisturbed_run(tmp_path, algorithm, kills):
    rng = random.Random(7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        train = command("evolve", "train", "--run-dir", str(folder), "--backend", SLOW_SCRIPT, "--algorithm", algorithm,
                        "--episodes", "24", "--reward", "judge + diversity")  # fmt: skip
        generate = command("evolve", "generate", "--run-dir", str(folder), "--limit", "12", "--chunk", "4",
                           "--out", str(folder / "data.jsonl"))  # fmt: skip
        if folder is whole:
            subprocess.run(train, check=True, capture_output=True)
            subprocess.run(generate, check=True, capture_output=True)
            continue
        run_with_kills(train, folder / "journal.jsonl", kills, rng)
        # The generation folder's name depends on the output path: find out by a first start that is killed at once.
        first = subprocess.Popen(generate, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(folder.glob("generate/*/journal.jsonl")) and first.poll() is None:
            time.sleep(0.01)
        first.kill()
        first.wait()
        run_with_kills(generate, next(folder.glob("generate/*/journal.jsonl")), 1, rng)
    for name in ("episodes.jsonl", "data.jsonl"):
        assert (killed / name).read_text() == (whole / name).read_text()
    steps = [row["timesteps"] for row in read_records(killed / "metrics.jsonl")]
    assert steps == [row["timesteps"] for row in read_records(whole / "metrics.jsonl")]
    for path in ("journal.jsonl", "generate/*/journal.jsonl"):
        keys = journal_keys(next(killed.glob(path)))
        assert len(set(keys)) == len(keys)
        assert set(keys) == set(journal_keys(next(whole.glob(path))))
    assert len(Journal(killed / "journal.jsonl")) == len(journal_keys(whole / "journal.jsonl"))


@pytest.mark.parametrize("kills", [1, 2])
def test_a_checkpoint_survives_kills_between_its_renames(tmp_path, monkeypatch, kills):
    def write(text):
        return lambda folder: (folder / STATE).write_text(text)

    replace_checkpoint(tmp_path, write("first"))
    rename = Path.rename

    def killed(self, target):
        if self.name == "writing":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    for _ in range(kills):
        with pytest.raises(KeyboardInterrupt):
            replace_checkpoint(tmp_path, write("second"))
        assert (latest_checkpoint(tmp_path) / STATE).read_text() == "first"
    monkeypatch.undo()
    replace_checkpoint(tmp_path, write("third"))
    assert (latest_checkpoint(tmp_path) / STATE).read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
