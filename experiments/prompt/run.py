"""``instructgym prompt``: search for a prompt with which a frozen model solves a labelled task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal, cast

from rich.console import Console

from ...envs.tasks.prompt_search.tasks import PromptTask, load_prompt_task, minibatch
from ...llm_backends import Backend, Journal, Journaled
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.records import read_records, write_lines
from ...rewards.prompt_scoring.scorer import LimitedScorer, TaskScorer, calibration_method, check_batch
from ..runs.folder import RunFolder, Tracker, accounted, journaled_roles, read_json
from ..runs.options import SCALES, check_counts, check_run, input_errors, parse_part
from ..runs.progress import StepProgress
from .methods import (
    KINDS,
    METHODS,
    TESTED,
    PromptSearch,
    accuracy,
    incumbents,
    least_calls,
    longest_instruction,
    run_search,
    test_incumbents,
    validation_set,
)

SIZES = {
    "smoke": {"calls": 360, "validation": 16, "test": 32, "train": 64, "copies": 4, "episodes": 8, "minibatch": 4},
    "report": {
        "calls": 7200,
        "validation": 128,
        "test": 1000,
        "train": 400,
        "copies": 4,
        "episodes": 8,
        "minibatch": 8,
    },
}
"""Where a count is left at 0."""
PROMPTS = "prompts.jsonl"
SEARCHED = "searched"
"""Status of a run whose test is left to do."""


@dataclass
class PromptRun:
    """Search for a prompt by one method and test the best one."""

    run_dir: str = ""
    """Folder of the run. A search that was killed is repeated, with the replies of servers that are there already."""
    task: str = "rotten-tomatoes"
    """rotten-tomatoes (offline), a task of GLUE or SuperGLUE, or a TOML file that describes one."""
    data_dir: str = ""
    """Folder of GLUE's or SuperGLUE's files; by default the datasets library fetches them."""
    method: Literal["manual", "random", "beam", "maskable-ppo", "ppo", "grpo", "soft-q", "gepa"] = "maskable-ppo"
    """manual: the instructions that people wrote; random, beam and maskable-ppo edit prompts; ppo, grpo and soft-q
    write them token by token; gepa reflects on failures."""
    calls: int = 0
    """Task-model calls of the search at most, validation included: one per example and label. 0: by --scale."""
    validation: int = 0
    """Validation examples, which choose among prompts. 0: by --scale."""
    test: int = 0
    """Test examples; a finished search is tested anew, not repeated, where this changes. 0: by --scale."""
    train: int = 0
    """Training examples to draw minibatches from. 0: by --scale."""
    minibatch: int = 0
    """Examples by which a prompt is rewarded. 0: by --scale."""
    copies: int = 0
    """Copies of the edit environment. 0: by --scale."""
    episodes: int = 0
    """Instructions that ppo, grpo and soft-q write per update. 0: by --scale."""
    horizon: int = 4
    """Edits per episode."""
    operator: str = "edits"
    """Of random, beam and maskable-ppo: edits (of whole prompts, some by a language model) or phrases (of the
    instruction)."""
    max_tokens: int = 16
    """Tokens of an instruction that is written, at most."""
    learning_rate: float = 3e-4
    """Of ppo, grpo and soft-q."""
    backend: str = "embedded"
    """The frozen model, one that reports log-probs: embedded, transformers, vllm-server, or JSON."""
    rewriter: str = "embedded"
    """Who edits, or reflects: as --backend, log-probs or not."""
    model: str = "embedded"
    """The policy of ppo, grpo and soft-q: embedded, or a local path or hub id."""
    calibrate: Literal["", "contextual", "batch"] = ""
    """Search by calibrated scores; the test reports raw and calibrated ones anyway."""
    scale: Literal["smoke", "report"] = "report"
    """Size of what is left at 0."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the policy that is trained, and of a rewriter in this process."""
    backend_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Arithmetic of a frozen model in this process. In bfloat16 a prompt's score depends a little on what else is read
    with it, and likelihoods can be equal."""
    seed: int = 0
    """Of the search; train, validation and test examples are those of --data-seed."""
    data_seed: int = 0
    """Of the examples."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    def check(self) -> None:
        """Refuses what can be refused without data.

        Raises:
            InputError: naming the option.
        """
        check_run(self)
        check_counts(self, "horizon", "max_tokens")
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        if self.method not in METHODS:
            raise InputError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.operator not in ("edits", "phrases"):
            raise InputError(f"--operator must be edits or phrases, got {self.operator!r}")
        if not self.learning_rate:
            raise InputError("--learning-rate must be above 0")
        if self.method == "gepa" and not find_spec("gepa"):
            raise InputError("--method gepa needs the library gepa: pip install 'instructgym[gepa]'")

    def sized(self) -> dict[str, Any]:
        """The options, with what is left at 0 taken from the scale."""
        given = asdict(self)
        return given | {name: given[name] or size for name, size in SIZES[self.scale].items()}


def run(options: PromptRun, console: Console | None = None) -> dict[str, Any]:
    """Searches and tests, and returns the results. A search that is over is not repeated, but perhaps tested anew.

    The run folder gets ``prompts.jsonl``, a row per prompt that was validated, and ``test.jsonl``, a row per test
    example: ``id``, ``label`` and what the best prompt predicts, ``raw`` and ``calibrated``.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    sized = options.sized()
    task = load(options, sized)
    parts = {
        "task model": _part(options.backend, options.backend_dtype),
        "rewriter": _part(options.rewriter, options.dtype),
    }
    longest = longest_instruction(options.method, options.max_tokens)
    with input_errors():
        probe = journaled_roles(parts, None)
        TaskScorer(probe["task model"], options.calibrate or False).check(
            [task.prompt(text) for text in (*task.instructions, longest) if text],
            [*task.train, *task.validation, *task.test],
        )
    if sized["minibatch"] > len(task.train):
        raise InputError(
            f"--minibatch {sized['minibatch']} is more than the {len(task.train)} training examples: lower it or raise "
            "--train"
        )
    with input_errors():
        for examples in (sized["minibatch"], len(task.validation)):
            check_batch(calibration_method(options.calibrate or False), examples)
    content_free = len(task.content_free) if options.calibrate == "contextual" else 0
    least = least_calls(options.method, sized, len(task.labels), content_free)
    if sized["calls"] < least:
        raise InputError(
            f"--calls {sized['calls']} do not do for one round of {options.method} and one validation, which take up "
            f"to {least}: raise --calls, or lower --validation, --minibatch, --copies, --episodes or --horizon"
        )
    if options.dry_run:
        console.print(f"would search by {options.method} with {sized['calls']} calls, in {options.run_dir}")
        return {}
    identity = {name: value for name, value in (asdict(options) | sized).items() if name != "test"}
    folder = RunFolder(options.run_dir, identity, "prompt run")
    stored = read_json(folder.path / "results.json") or {}
    if folder.results is not None and stored["counts"]["test"] == len(task.test):
        return folder.finished(console) or {}
    with folder.opened(), Tracker(folder, options.track) as tracker:
        roles = _kept(parts, folder)
        with accounted(roles, folder.path):
            if stored.get("status") not in (SEARCHED, "finished"):
                stored = folder.finish({}, _search(options, sized, task, roles, folder, console), SEARCHED)
            history = read_records(folder.path / PROMPTS)
            curve, rows = test_incumbents(task, history, sized["calls"], roles["task model"])
            write_lines(folder.path / TESTED, rows)
        best = incumbents(task, history)[-1][1]
        results = folder.finish(
            {f"test_{kind}": accuracy(rows, kind) for kind in KINDS}
            | {"validation": max(row["accuracy"] for row in history), "curve": curve, "prompt": best.text},
            stored["counts"] | {"test": len(task.test)},
        )
        metrics = results["metrics"]
        tracker.summary({name: metrics[name] for name in ("test_raw", "test_calibrated", "validation")})
    console.print(
        f"{options.method} on {task.name}: test {100 * metrics['test_raw']:.1f}% raw, "
        f"{100 * metrics['test_calibrated']:.1f}% calibrated, after {stored['counts']['calls']} calls: {best.text!r}",
        highlight=False,
        markup=False,
    )
    return results


def _search(
    options: PromptRun,
    sized: dict[str, Any],
    task: PromptTask,
    roles: dict[str, Backend],
    folder: RunFolder,
    console: Console,
) -> dict[str, int]:
    """Searches, and counts what that took."""
    out = folder.file(PROMPTS)
    out.unlink(missing_ok=True)  # a search that was killed replays its replies and writes the same rows
    scorer = LimitedScorer(
        sized["calls"], roles["task model"], options.calibrate or False, content_free=task.content_free
    )
    validation = validation_set(task, sized["validation"], options.data_seed)
    with StepProgress(f"{options.method} on {task.name}", sized["calls"], console) as progress:
        search = PromptSearch(task, scorer, validation, roles["rewriter"], options.model, sized, out, progress)
        run_search(search, options.method)
    if search.best is None:
        raise InputError(f"{options.method} found no prompt with {sized['calls']} calls: raise --calls")
    return {
        "calls": scorer.calls,
        "prompts": len(search.prompts),
        "rewriter_requests": roles["rewriter"].usage.requests,
    }


def _kept(parts: dict[str, Any], folder: RunFolder) -> dict[str, Backend]:
    """The backends. The rewriter's replies are kept, and those of servers, so that none is paid for twice.

    A task model in this process is asked again: its likelihoods are many, and read at once where prompts share them.
    """
    kept = journaled_roles(parts, Journal(folder.file("journal.jsonl")))
    inner = cast(Journaled, kept["task model"]).inner
    return kept | ({"task model": inner} if isinstance(inner, TransformersBackend) else {})


def load(options: PromptRun, sized: dict[str, Any]) -> PromptTask:
    """The task with as many examples of each split as the run needs."""
    with input_errors():
        task = load_prompt_task(options.task, limit=None, seed=options.data_seed, data_dir=options.data_dir)
    drawn = {
        split: minibatch(task, split, min(sized[split], len(task.examples(split))), options.data_seed)
        for split in ("train", "validation", "test")
    }
    return PromptTask(**{**vars(task), **drawn})


def _part(text: str, dtype: str) -> Any:
    part = parse_part(text)
    if part["id"] in ("embedded", "transformers"):
        part = part | {"kwargs": {"dtype": dtype} | dict(part.get("kwargs") or {})}
    return part
