"""``instructgym evolve generate``: the trained policy evolves every seed, a model answers, filters drop the rest.

Every intermediate text of an episode is a candidate, as in TeaMs-RL. A candidate is dropped by the four elimination
rules (on the edit and on the answer) and by ROUGE-L above a threshold to any seed or accepted instruction.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from ..agents.baselines import BaselineAgent
from ..agents.callbacks import StepProgress
from ..agents.policy_io import load_policy
from ..envs.edit_process import EditProcess, Transition
from ..envs.operators import tidy
from ..envs.sb3 import VectorToVecEnv
from ..envs.tasks.instructions import Instruction
from ..llm_backends import BackendError, Journal, Message, Sampling, request_seed, resolve
from ..llm_backends.errors import InputError
from ..llm_backends.records import read_records
from ..rewards import RougePool, eliminated_by
from ..rewards.elimination import STRING_RULES
from .evolve import (
    EnvOptions,
    Roles,
    RunOptions,
    check_context,
    config_of,
    describe,
    input_errors,
    load_seeds,
    make_env,
    output_error,
    roles_of,
)
from .evolve_train import EvolveTrain
from .metrics import distinct_n, mean_pairwise_distance
from .run_folder import RowWriter, RunFolder, read_json
from .tracking import Tracker

FORMATS = ("alpaca", "messages")


@dataclass
class EvolveGenerate(RunOptions):
    """Make an instruction data set with a trained policy."""

    seeds: str = ""
    """Seed instructions to evolve, in any of the formats of training. By default the package's own."""
    out: str = ""
    """The data set: .jsonl, or .parquet for Parquet. By default data.jsonl in the run folder."""
    format: str = "alpaca"
    """alpaca: instruction, input, output. messages: a chat of two messages."""
    limit: int = 0
    """Evolve only the first so many seeds. 0: all."""
    chunk: int = 16
    """Seeds evolved together in one batch."""
    rouge_threshold: float = 0.7
    """Drop an instruction whose ROUGE-L to a seed or an accepted one is above this."""
    answer_tokens: int = 96
    """Longest answer, in tokens; an answer that is cut there loses its unfinished sentence."""
    responder_backend: str = ""
    """Who answers, written like --backend; by default the rewriter."""
    deterministic: bool = False
    """Take the policy's most likely operation instead of sampling one."""

    def check(self) -> None:
        super().check()
        if self.format not in FORMATS:
            raise InputError(f"--format must be {' or '.join(FORMATS)}, got {self.format!r}")
        if self.chunk < 1 or self.answer_tokens < 1:
            raise InputError("--chunk and --answer-tokens must be at least 1")
        if not 0 < self.rouge_threshold <= 1:
            raise InputError(f"--rouge-threshold must be in (0, 1], got {self.rouge_threshold}")
        if self.out and Path(self.out).suffix not in (".jsonl", ".json", ".parquet"):
            raise InputError(f"--out must end in .jsonl or .parquet, got {self.out!r}")


@dataclass
class Generated:
    """What one chunk of seeds gave."""

    accepted: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


class InstructionGenerator:
    """Evolves chunks of seeds with a policy, filters the results and has them answered.

    Args:
        agent: the policy.
        env: the env it acts in, with as many copies as a chunk has seeds; elimination must not end episodes.
        roles: the language models.
        options: thresholds and sampling.
    """

    def __init__(self, agent: Any, env: VectorToVecEnv, roles: Roles, options: EvolveGenerate) -> None:
        self.agent, self.roles, self.options = agent, roles, options
        vector: Any = env.env.unwrapped
        self.process: EditProcess = vector.process
        self.observer = vector.observer
        self.normalizer: VecNormalize | None = unwrap_vec_normalize(agent.get_env())
        self.pool = RougePool([instruction.text for instruction in self.process.instructions])

    @property
    def max_chunk_calls(self) -> int:
        """LLM calls that one chunk takes at most, retries aside."""
        return self.options.chunk * self.process.settings.horizon * 3

    def chunk(self, rows: Sequence[int], epoch: int = 0) -> Generated:
        """Evolves the instructions with the given indices.

        Args:
            rows: at most ``chunk`` indices.
            epoch: another one gives other requests for the same rows.
        """
        episodes = self._evolve(rows, epoch)
        result = Generated()
        candidates: list[dict[str, Any]] = []
        for row, transitions in zip(rows, episodes, strict=True):
            result.returns.append(sum(t.reward for t in transitions))
            candidates += self._filter(self.process.instructions[row], row, transitions, epoch, result)
        self._answer(candidates, result)
        return result

    def _evolve(self, rows: Sequence[int], epoch: int) -> list[list[Transition]]:
        copies = list(range(len(rows)))
        indices = np.zeros(len(self.process.episodes), dtype=np.int64)
        indices[: len(rows)] = rows
        seed = self.options.seed
        for copy, row in zip(copies, rows, strict=True):
            self.process.generators[copy], _ = seeding.np_random(request_seed(seed, "generate", epoch, row))
        self._reseed(request_seed(seed, "policy", epoch, rows[0]))
        self.process.begin(copies, {"index": indices})
        episodes: list[list[Transition]] = [[] for _ in rows]
        state, starts = None, np.ones(len(rows), dtype=bool)
        for _ in range(self.process.settings.horizon):
            observation = self._observe(copies)
            actions, state = self._predict(observation, state, starts, copies)
            starts[:] = False
            for episode, transition in zip(episodes, self.process.step(list(actions), copies), strict=True):
                episode.append(transition)
        return episodes

    def _observe(self, copies: Sequence[int]) -> Any:
        rows = self.observer.encode([self.process.state(copy) for copy in copies])
        batch = (
            {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            if isinstance(rows[0], dict)
            else np.stack(rows)
        )
        return batch if self.normalizer is None else self.normalizer.normalize_obs(batch)

    def _predict(self, observation: Any, state: Any, starts: np.ndarray, copies: Sequence[int]) -> tuple[Any, Any]:
        masks = np.stack([self.process.mask(copy) for copy in copies]).astype(bool)
        kwargs = {"state": state, "episode_start": starts, "deterministic": self.options.deterministic}
        if isinstance(self.agent, BaselineAgent) or type(self.agent).__name__ == "MaskablePPO":
            kwargs["action_masks"] = masks
        return self.agent.predict(observation, **kwargs)

    def _reseed(self, seed: int) -> None:
        if isinstance(self.agent, BaselineAgent):
            self.agent.rng = np.random.default_rng(seed)
        else:
            set_random_seed(seed % 2**32)

    def _filter(
        self, instruction: Instruction, row: int, transitions: Sequence[Transition], epoch: int, result: Generated
    ) -> list[dict[str, Any]]:
        survivors = []
        lineage: list[dict[str, Any]] = []
        for step, transition in enumerate(transitions, start=1):
            info = transition.info
            calls = {"rewrite": info["rewrite_calls"], "judge": info["judge_calls"]}
            result.calls.update(calls)
            lineage.append(
                {"operation": info["operation"], "text": info["edit"], "reward": round(transition.reward, 6)}
            )
            candidate = {
                "instruction": info["edit"],
                "input": instruction.input,
                "seed_id": instruction.id,
                "seed_index": row,
                "epoch": epoch,
                "step": step,
                "reward": round(transition.reward, 6),
                "reward_valid": info["reward_valid"],
                "reward_terms": {name: round(value, 6) for name, value in info["reward_terms"].items()},
                "lineage": [{"operation": "seed", "text": instruction.text}, *lineage],
                "calls": calls,
            }
            reason = info["eliminated_by"] or (
                "rewriter_failed" if info["invalid_reason"] and not info["judge_calls"] else ""
            )
            if info["edit"] == info["previous_text"]:
                reason = reason or "no_information_gain"
            if not reason and self.pool.nearest(info["edit"]) > self.options.rouge_threshold:
                reason = "rouge"
            if reason:
                result.rejected.append(candidate | {"rejected_by": reason})
            else:
                self.pool.add(info["edit"])
                survivors.append(candidate)
        return survivors

    def _answer(self, candidates: list[dict[str, Any]], result: Generated) -> None:
        prompts: list[list[Message]] = [
            [{"role": "user", "content": f"{c['instruction']}\n\n{c['input']}".strip()}] for c in candidates
        ]
        samplings = [
            Sampling(
                max_tokens=self.options.answer_tokens,
                temperature=0.7,
                top_p=0.95,
                seed=request_seed(self.options.seed, "answer", c["epoch"], c["seed_index"], c["step"]),
            )
            for c in candidates
        ]
        for candidate, reply in zip(candidates, self.roles.responder.generate(prompts, samplings), strict=True):
            candidate["calls"] = candidate["calls"] | {"answer": 1}
            result.calls["answer"] += 1
            if isinstance(reply, BackendError):
                result.rejected.append(candidate | {"rejected_by": "responder_failed", "error": str(reply)})
                continue
            output = reply[0].text.strip()
            if reply[0].finish_reason == "length":
                output = tidy(output, cut=True)
            rules = [rule for rule in STRING_RULES if rule != "no_information_gain"]
            reason = eliminated_by(output, candidate["instruction"], rules) if output else "no_content"
            if reason:
                result.rejected.append(candidate | {"output": output, "rejected_by": f"answer_{reason}"})
            else:
                result.accepted.append(candidate | {"output": output})


def run(options: EvolveGenerate, console: Console | None = None) -> dict[str, Any]:
    """Generates, or goes on generating, and returns the results.

    Raises:
        InputError: for bad input, before anything heavy.
    """
    console = console or Console()
    options.check()
    trained = trained_options(options)
    instructions = load_seeds(options.seeds)
    instructions = instructions[: options.limit or len(instructions)]
    out = Path(options.out) if options.out else Path(options.run_dir) / "data.jsonl"
    rows_path = out.with_suffix(".jsonl")
    name = f"{out.stem}-{request_seed(str(out.resolve())) % 16**6:06x}"
    identity = config_of(options) | {"out": str(out), "policy": _fingerprint(Path(options.run_dir) / "checkpoints")}
    folder = RunFolder(Path(options.run_dir) / "generate" / name, identity, "evolve generate")
    problem = output_error(rows_path)
    if problem is not None:
        raise problem
    with input_errors():
        probe = roles_of(trained, None, options.responder_backend)
    check_context(probe.rewriter, instructions, options.seeds)
    if options.dry_run:
        console.print(f"would evolve {len(instructions)} seeds with the policy in {options.run_dir} into {out}")
        console.print(describe(_env(trained, options, probe, instructions).env))
        return {}
    if folder.results is not None and out.exists():
        console.print(f"{out} is finished: nothing to do (choose another --out to make a new one)")
        return folder.results
    if not (folder.path / "config.json").exists() and rows_path.exists():
        raise InputError(f"{rows_path} exists and was not written by this command: choose another --out")
    with folder.opened():
        journal = Journal(folder.file("journal.jsonl"))
        if len(journal):
            console.print(f"resuming {out}: {len(journal)} stored replies are replayed, none is paid for again")
        roles = roles_of(trained, journal, options.responder_backend)
        env = _env(trained, options, roles, instructions)
        agent = load_policy(Path(options.run_dir) / "checkpoints", env, options.seed)
        generator = InstructionGenerator(agent, env, roles, options)
        return _generate(options, folder, generator, out, console)


def _env(
    trained: EvolveTrain, options: EvolveGenerate, roles: Roles, instructions: Sequence[Instruction]
) -> VectorToVecEnv:
    return generation_env(trained, roles, instructions, options.chunk)


def generation_env(
    trained: EnvOptions, roles: Roles, instructions: Sequence[Instruction], copies: int
) -> VectorToVecEnv:
    """The env for generation: each seed from its own text, all rules on, no rule ends an episode."""
    return make_env(
        trained,
        roles,
        instructions,
        n_envs=copies,
        carry_text=False,
        elimination=tuple(STRING_RULES),
        elimination_ends=False,
    )


def chunks(count: int, size: int) -> Iterator[list[int]]:
    """Row numbers 0..count-1 in chunks: their composition depends on row numbers only."""
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _generate(
    options: EvolveGenerate, folder: RunFolder, generator: InstructionGenerator, out: Path, console: Console
) -> dict[str, Any]:
    begun, deadline = time.monotonic(), options.deadline
    rows = RowWriter(out.with_suffix(".jsonl"))
    rejected = RowWriter(folder.file("rejected.jsonl"))
    calls: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    returns: list[float] = []
    accepted: list[dict[str, Any]] = []
    count = len(generator.process.instructions)
    done = 0
    with (
        Tracker(folder, options.track, step_name="seeds") as tracker,
        StepProgress("seeds evolved", count, console) as progress,
    ):
        for members in chunks(count, options.chunk):
            if deadline is not None and time.monotonic() >= deadline:
                break
            result = generator.chunk(members)
            for row in result.accepted:
                rows.write(formatted(row, options.format, generator.roles))
            for row in result.rejected:
                rejected.write(row)
            accepted += result.accepted
            calls.update(result.calls)
            returns += result.returns
            reasons.update(row["rejected_by"] for row in result.rejected)
            done += len(members)
            counters = {f"calls/{role}": spent for role, spent in calls.items()}
            tracker.write(counters | {"accepted": len(accepted), "rejected": sum(reasons.values())}, {}, step=done)
            progress.update(done, f"{len(accepted)} instructions accepted")
    results = folder.finish(
        metrics=dataset_metrics([row["instruction"] for row in accepted], calls, returns),
        counts={
            "seeds": done,
            "accepted": len(accepted),
            "rejected": sum(reasons.values()),
            "calls": dict(calls),
            "rejected_by": dict(reasons),
            "seconds": round(time.monotonic() - begun, 1),
        },
        status="finished" if done == count else "stopped",
    )
    if out.suffix == ".parquet":
        write_parquet(out.with_suffix(".jsonl"), out)
    console.print(results_table(results, out))
    if done < count:
        console.print(f"stopped at the time limit after {done} of {count} seeds: the same command goes on")
    return results


def dataset_metrics(texts: Sequence[str], calls: Counter[str], returns: Sequence[float]) -> dict[str, Any]:
    """What a set of accepted instructions is worth, and what it cost."""
    spent = sum(calls.values())
    return {
        "mean_return": float(np.mean(returns)) if returns else 0.0,
        "calls_per_accepted": spent / len(texts) if texts else None,
        "embedding_distance": mean_pairwise_distance(texts, resolve("embedder", "minilm")),
        "distinct_2": distinct_n(texts, 2),
        "mean_words": float(np.mean([len(text.split()) for text in texts])) if texts else 0.0,
    }


def formatted(row: dict[str, Any], style: str, roles: Roles) -> dict[str, Any]:
    """A row of the data set: the pair in the chosen format, then where it comes from."""
    pair: dict[str, Any] = {"instruction": row["instruction"], "input": row["input"], "output": row["output"]}
    if style == "messages":
        question = f"{row['instruction']}\n\n{row['input']}".strip()
        pair = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]}
    origin = {k: v for k, v in row.items() if k not in ("instruction", "input", "output", "seed_index", "epoch")}
    return pair | origin | {"rewriter": roles.rewriter.name, "responder": roles.responder.name}


def write_parquet(source: Path, target: Path) -> None:
    """Writes the rows of a JSONL file as Parquet, in one move."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scratch = target.with_suffix(".parquet.part")
    pq.write_table(pa.Table.from_pylist(read_records(source)), scratch)
    scratch.replace(target)


def results_table(results: dict[str, Any], out: Path) -> Table:
    """The results as a table for the terminal."""
    counts, metrics = results["counts"], results["metrics"]
    table = Table(title=f"{out}", show_header=False)
    for name, value in (
        ("seeds evolved", counts["seeds"]),
        ("instructions accepted", counts["accepted"]),
        ("candidates dropped", ", ".join(f"{n} {k}" for k, n in sorted(counts["rejected_by"].items())) or "none"),
        ("LLM calls", ", ".join(f"{n} {k}" for k, n in sorted(counts["calls"].items()))),
        ("LLM calls per accepted instruction", _two(metrics["calls_per_accepted"])),
        ("mean return per episode", _two(metrics["mean_return"])),
        ("mean pairwise cosine distance", _two(metrics["embedding_distance"])),
        ("distinct-2", _two(metrics["distinct_2"])),
        ("mean words per instruction", _two(metrics["mean_words"])),
    ):
        table.add_row(name, str(value))
    return table


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def trained_options(options: EvolveGenerate) -> EvolveTrain:
    """The options the policy was trained with, under the backend and model that generation names, if it names any.

    Raises:
        InputError: if the run folder holds no training run or no policy.
    """
    stored = read_json(Path(options.run_dir) / "config.json")
    if stored is None or stored.get("command") != "evolve train":
        raise InputError(f"{options.run_dir} holds no run of 'evolve train': train first, or name its --run-dir")
    if not (Path(options.run_dir) / "checkpoints" / "agent.json").exists():
        raise InputError(f"{options.run_dir} holds no trained policy yet: run 'evolve train' there to its end")
    known = {f.name for f in fields(EvolveTrain)}
    trained = EvolveTrain(**{k: v for k, v in stored["options"].items() if k in known})
    if options.backend != RunOptions.backend or options.model:
        trained.backend, trained.model = options.backend, options.model
    return trained


def _fingerprint(checkpoint: Path) -> str:
    """Which policy: generation must not be resumed with another one."""
    data = b"".join((checkpoint / name).read_bytes() for name in ("agent.json", "policy.safetensors"))
    return f"{request_seed(data.hex()):016x}"
