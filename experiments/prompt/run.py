"""``instructgym prompt run``: searches for a prompt with which a frozen model solves a labelled task.

The search methods are in :mod:`~instructgym.experiments.prompt.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, cast

from rich.console import Console

from ...envs.tasks.prompt_search.tasks import PromptTask, load_prompt_task, minibatch
from ...llm_backends import Backend, Journal, Journaled
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.records import read_records, write_lines
from ...rewards.prompt_scoring.scorer import Calibration, LimitedScorer, TaskScorer, calibration_method, check_batch
from ..runs.folder import RunFolder, Tracker, accounted, journaled_roles, read_json
from ..runs.options import Count, DType, Positive, RunOptions, Scale, input_errors, parse_part
from ..runs.progress import Deadline, OutOfTimeError, StepProgress
from .methods import TESTED, PromptSearch, least_calls, longest_instruction, run_search, test_incumbents

BOTH = {"copies": 4, "episodes": 8}
SIZES = {
    "smoke": BOTH | {"calls": 360, "validation": 16, "test": 32, "train": 64, "minibatch": 4},
    "report": BOTH | {"calls": 7200, "validation": 128, "test": 1000, "train": 400, "minibatch": 8},
}
"""Counts by scale, for options that are 0."""
PROMPTS = "prompts.jsonl"
SEARCHED = "searched"
"""Status of a run whose search is finished and whose test is not."""


@dataclass
class SearchOptions:
    """Options that all searches of a comparison share."""

    data_dir: str = ""
    """Folder with the files of GLUE or SuperGLUE. Empty: the datasets library downloads them."""
    calls: int = 0
    """Maximum number of task-model calls of a search, one per example and label, including validation. 0: set by
    --scale."""
    test: int = 0
    """Number of test examples. If it changes, a finished search is tested again, but not repeated. 0: set by
    --scale."""
    backend: str = "embedded"
    """Frozen task model, a backend with log-probs: embedded, transformers, vllm-server, or JSON {"id": ..., "kwargs":
    {...}}."""
    backend_dtype: DType = "float32"
    """Floating-point type of a frozen task model in this process. In bfloat16 the score of a prompt depends slightly on
    the other texts in its batch, and likelihoods may tie. auto: bfloat16 if the hardware supports it, else float32."""
    rewriter: str = "embedded"
    """Language model that edits prompts, or reflects on failures for gepa: embedded, transformers, openai, vllm, or
    JSON {"id": ..., "kwargs": {...}}. It needs no log-probs."""
    model: str = "embedded"
    """Model of the policy that ppo, grpo and soft-q train: embedded, or a local path or hub id."""
    scale: Scale = "report"
    """Size of a search, for the counts that are 0. smoke: minutes; report: hours."""


@dataclass
class PromptRun(SearchOptions, RunOptions):
    """Search for a prompt by one method and test the best one."""

    run_dir: str = ""
    """Folder of the run. An interrupted search starts again from the beginning, but takes stored replies from its
    journal."""
    task: str = "rotten-tomatoes"
    """Labelled task: rotten-tomatoes (offline), a task of GLUE or SuperGLUE, or a TOML file that describes one."""
    method: Literal["manual", "random", "beam", "maskable-ppo", "ppo", "grpo", "soft-q", "gepa"] = "maskable-ppo"
    """Search method. manual only validates the instructions that people wrote; random, beam and maskable-ppo edit
    prompts; ppo, grpo and soft-q train a policy that writes prompts token by token; gepa rewrites prompts after
    reflection on failures."""
    validation: int = 0
    """Number of validation examples, by which the best prompt is chosen. 0: set by --scale."""
    train: int = 0
    """Number of training examples, from which minibatches are drawn. 0: set by --scale."""
    minibatch: int = 0
    """Number of training examples on which a prompt is scored for its reward. 0: set by --scale."""
    copies: int = 0
    """Number of parallel copies of the edit environment (random, beam, maskable-ppo). 0: set by --scale."""
    episodes: int = 0
    """Number of instructions that ppo, grpo and soft-q write per update. 0: set by --scale."""
    horizon: Count = 4
    """Edits per episode of random, beam and maskable-ppo."""
    operator: Literal["edits", "phrases"] = "edits"
    """Kind of edits of random, beam and maskable-ppo: edits (of whole prompts, some by a language model) or phrases (of
    the phrases of the instruction)."""
    max_tokens: Count = 16
    """Maximum number of tokens of an instruction that ppo, grpo or soft-q writes."""
    learning_rate: Positive = 3e-4
    """Learning rate of the policy that ppo, grpo and soft-q train."""
    calibrate: Literal["", "contextual", "batch"] = ""
    """Calibration of the scores in the search: contextual (by content-free inputs), batch, or empty for none. The test
    always reports raw and calibrated accuracy."""
    dtype: DType = "auto"
    """Floating-point type of the policy that is trained, and of a rewriter in this process. auto: bfloat16 if the
    hardware supports it, else float32."""
    data_seed: int = 0
    """Seed that chooses training, validation and test examples; --seed does not."""
    minutes: float = 0.0
    """Number of minutes after which a search stops, before its next prompt; the same command starts it again from the
    beginning, with stored replies. A test is not stopped. 0: no limit."""

    def check(self) -> None:
        super().check()
        if self.method == "gepa" and not find_spec("gepa"):
            raise InputError("--method gepa needs the library gepa: pip install 'instructgym[gepa]'")

    def sized(self) -> PromptRun:
        """Returns the options with the counts of the scale in place of 0."""
        counts: dict[str, Any] = {name: getattr(self, name) or size for name, size in SIZES[self.scale].items()}
        return replace(self, **counts)

    @property
    def calibration(self) -> Calibration:
        """Calibration of the scores in the search."""
        return calibration_method(self.calibrate or False)


def run(options: PromptRun, console: Console | None = None) -> dict[str, Any]:
    """Searches and tests, and returns the results.

    A finished search is not repeated; it is tested again if the number of test examples has changed.

    Writes ``prompts.jsonl``, a row per validated prompt, and ``test.jsonl``, a row per test example with ``id``,
    ``label`` and the ``raw`` and ``calibrated`` predictions of the best prompt.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    options = options.sized()
    task = load(options)
    parts = {
        "task model": _part(options.backend, options.backend_dtype),
        "rewriter": _part(options.rewriter, options.dtype),
    }
    # The longest prompt of the method must fit into the context with every example.
    longest = longest_instruction(options.method, options.max_tokens)
    with input_errors():
        probe = journaled_roles(parts, None)
        TaskScorer(probe["task model"], options.calibration).check(
            [task.prompt(text) for text in (*task.instructions, longest) if text],
            [*task.train, *task.validation, *task.test],
        )
        for examples in (options.minibatch, len(task.validation)):
            check_batch(options.calibration, examples)
    if options.minibatch > len(task.train):
        raise InputError(
            f"--minibatch {options.minibatch} is more than the {len(task.train)} training examples: lower it or raise "
            "--train"
        )
    content_free = len(task.content_free) if options.calibration == "contextual" else 0
    calls_needed = least_calls(options.method, vars(options), len(task.labels), content_free)
    if options.calls < calls_needed:
        raise InputError(
            f"--calls {options.calls} are too few for one round of {options.method} and one validation, which take up "
            f"to {calls_needed}: raise --calls, or lower --validation, --minibatch, --copies, --episodes or --horizon"
        )
    if options.dry_run:
        console.print(f"would search by {options.method} with {options.calls} calls, in {options.run_dir}")
        return {}
    # The number of test examples is not part of the identity: a finished search can be tested again.
    identity = {name: value for name, value in vars(options).items() if name != "test"}
    folder = RunFolder(options.run_dir, identity, "prompt run")
    stored = read_json(folder.path / "results.json") or {}
    # A finished search with the same number of test examples has nothing left to do.
    if folder.results is not None and stored["counts"]["test"] == len(task.test):
        return folder.finished(console) or {}
    with folder.opened(), Tracker(folder, options.track) as tracker:
        roles = _journaled_backends(parts, folder)
        with accounted(roles, folder.path):
            # The search is stored before its test, so that an interrupted test does not repeat the search.
            if stored.get("status") not in (SEARCHED, "finished"):
                try:
                    stored = folder.finish({}, _search(options, task, roles, folder, console), SEARCHED)
                except OutOfTimeError:
                    console.print(f"out of time: the same command starts the search in {folder.path} again")
                    return folder.finish({}, {}, "stopped")
            history = read_records(folder.path / PROMPTS)
            metrics, rows = test_incumbents(task, history, options.calls, roles["task model"])
            write_lines(folder.path / TESTED, rows)
        results = folder.finish(metrics, stored["counts"] | {"test": len(task.test)})
        tracker.summary({name: metrics[name] for name in ("test_raw", "test_calibrated", "validation")})
    console.print(
        f"{options.method} on {task.name}: test {100 * metrics['test_raw']:.1f}% raw, "
        f"{100 * metrics['test_calibrated']:.1f}% calibrated, after {stored['counts']['calls']} calls: "
        f"{metrics['prompt']!r}",
        highlight=False,
        markup=False,
    )
    return results


def _search(
    options: PromptRun, task: PromptTask, roles: dict[str, Backend], folder: RunFolder, console: Console
) -> dict[str, int]:
    """Searches and returns the numbers of task-model calls, validated prompts and requests to the rewriter."""
    out = folder.file(PROMPTS)
    out.unlink(missing_ok=True)  # an interrupted search starts again, and its stored replies give the same rows
    scorer = LimitedScorer(options.calls, roles["task model"], options.calibration, content_free=task.content_free)
    # Drawn once more: the order says which examples are the first ones, and searches of before are to be repeated.
    validation = minibatch(task, "validation", len(task.validation), options.data_seed)
    rewriter, limit, settings = roles["rewriter"], Deadline(options.minutes), vars(options)
    with StepProgress(f"{options.method} on {task.name}", options.calls, console) as progress:
        search = PromptSearch(task, scorer, validation, rewriter, options.model, settings, out, progress, limit)
        run_search(search, options.method)
    if search.best is None:
        raise InputError(f"{options.method} found no prompt with {options.calls} calls: raise --calls")
    return {"calls": scorer.calls, "prompts": len(search.prompts), "rewriter_requests": rewriter.usage.requests}


def _journaled_backends(parts: dict[str, Any], folder: RunFolder) -> dict[str, Backend]:
    """Returns the backends, with the replies of the rewriter and of servers kept in the journal of the run.

    A task model in this process has no journal: its likelihoods are many, and it computes shared prefixes only once.
    """
    roles = journaled_roles(parts, Journal(folder.file("journal.jsonl")))
    inner = cast(Journaled, roles["task model"]).inner
    return roles | ({"task model": inner} if isinstance(inner, TransformersBackend) else {})


def load(options: PromptRun) -> PromptTask:
    """Returns the task with as many examples of each split as the run needs, given the options with their sizes."""
    with input_errors():
        task = load_prompt_task(options.task, limit=None, seed=options.data_seed, data_dir=options.data_dir)
    drawn: dict[str, Any] = {
        split: minibatch(task, split, min(getattr(options, split), len(task.examples(split))), options.data_seed)
        for split in ("train", "validation", "test")
    }
    return replace(task, **drawn)


def _part(text: str, dtype: str) -> Any:
    """Returns a backend's specification, with the floating-point type as the default for models in this process."""
    part = parse_part(text)
    if part["id"] in ("embedded", "transformers"):
        part = part | {"kwargs": {"dtype": dtype} | dict(part.get("kwargs") or {})}
    return part
