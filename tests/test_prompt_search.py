"""Searches for prompts: calls that are counted and never exceeded, reflection by GEPA, every method, the report."""

import json

import numpy as np
import pytest
from prompt_cases import likelihoods, task
from rich.console import Console

from instructgym.agents.reflective import PromptAdapter, reflective_search
from instructgym.experiments.prompt import run as prompt
from instructgym.experiments.prompt.compare import PromptCompare
from instructgym.experiments.prompt.compare import run as compare
from instructgym.experiments.prompt.methods import METHODS, PromptSearch, best_prompts, incumbents, run_search
from instructgym.experiments.prompt.report import PromptReport
from instructgym.experiments.prompt.report import run as report
from instructgym.experiments.prompt.run import PromptRun
from instructgym.experiments.runs.folder import read_json
from instructgym.llm_backends import BackendError, ContextLengthError, ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.rewards.prompt_scoring.scorer import CallLimitError, LimitedScorer
from instructgym.rewards.prompt_scoring.task_prompt import TaskPrompt

QUIET = Console(quiet=True)
MAGIC = "magic"


def by_magic(text, word):
    """The likelihood of a label: right answers become likelier with every "magic" in the instruction."""
    body = text.split("Input: ")[-1]
    right = "Positive" if "good film" in body else "Negative"
    strength = 0.4 * text.count(MAGIC) - 0.3 if "film 1" not in body else 0.1
    return (strength if word.strip() == right else -strength) - 3.0


def rewrite(text):
    """A rewriter that puts one more "magic" in."""
    before = text.rsplit("Instruction: ", 1)[-1].split("\n")[0]
    return f"{before} {MAGIC}"


def model():
    return ScriptedBackend(score=by_magic, reply=rewrite)


def films(directory):
    """The task as files."""
    rows = [{"text": one.text, "label": ("bad", "good")[one.label]} for one in task(120).train]
    for number, split in enumerate(("train", "validation", "test")):
        part = rows[40 * number : 40 * number + 40]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    lines = ['labels = ["bad", "good"]', 'verbalizers = ["Negative", "Positive"]']
    lines += ['instructions = ["Judge the film.", "Is it magic?"]']
    lines += [f'{split} = "{split}.jsonl"' for split in ("train", "validation", "test")]
    path = directory / "films.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_model_path):
    toml = films(tmp_path_factory.mktemp("films"))

    def build(folder, method="manual", **others):
        given = {
            "task": toml,
            "method": method,
            "backend": f"{__name__}:model",
            "rewriter": f"{__name__}:model",
            "model": tiny_model_path,
            "scale": "smoke",
            "dtype": "float32",
            "calls": 400,
            "max_tokens": 4,
        }
        return PromptRun(run_dir=str(folder), **given | others)

    return build


# --- calls -----------------------------------------------------------------------------------------------------------


def test_calls_are_counted_by_label_and_never_exceed_the_limit():
    films = task(6)
    backend = ScriptedBackend(score=likelihoods)
    scorer = LimitedScorer(30, backend)
    prompts = [films.prompt("Judge."), films.prompt("Is it good?")]
    scorer.score(prompts, films.train)
    assert scorer.calls == 24 and scorer.remaining == 6
    asked = backend.usage.requests
    with pytest.raises(CallLimitError, match="24 task-model calls are needed, 6 of 30 are left"):
        scorer.score(prompts, films.train)
    assert scorer.calls == 24 and backend.usage.requests == asked
    scorer.score(prompts[:1], films.train[:3])  # answered by the cache, and counted
    assert scorer.remaining == 0 and backend.usage.requests == asked
    with pytest.raises(InputError, match="at least 1"):
        LimitedScorer(0, backend)


def test_calibration_is_counted_too():
    films = task(4)
    scorer = LimitedScorer(1000, ScriptedBackend(score=likelihoods), calibrate=True)
    [result] = scorer.score([films.prompt("Judge.")], films.train)
    assert scorer.calls == result.calls > 8


# --- reflection ------------------------------------------------------------------------------------------------------


def adapter(backend=None, **others):
    films = task(40)
    scorer = LimitedScorer(100_000, model())
    return PromptAdapter(films.prompt("Judge the film."), scorer, backend or model(), **others), films


def test_an_examples_score_is_the_probability_of_its_label():
    mine, films = adapter()
    found = mine.evaluate(list(films.train[:6]), {"instruction": f"Judge {MAGIC}."}, capture_traces=True)
    [result] = mine.scorer.score([films.prompt(f"Judge {MAGIC}.")], films.train[:6])
    assert found.scores == pytest.approx(
        [row[e.label] for row, e in zip(result.probabilities, films.train, strict=False)]
    )
    assert [trace["right"] for trace in found.trajectories] == ["Negative", "Positive"] * 3
    assert mine.evaluate(list(films.train[:2]), {"instruction": "Judge."}).trajectories is None


def test_failures_are_what_the_writer_reads_and_its_answer_is_the_instruction():
    asked = []
    reply = lambda prompt: asked.append(prompt) or " Say it\nbetter. "  # noqa: E731
    backend = ScriptedBackend(reply=reply, prompt_style="chat")
    mine, films = adapter(backend)
    batch = mine.evaluate(list(films.train[:8]), {"instruction": "Judge the film."}, capture_traces=True)
    wrong = [t for t in batch.trajectories if t["answer"] != t["right"]]
    assert wrong
    shown = mine.make_reflective_dataset({"instruction": "Judge the film."}, batch, ["instruction"])["instruction"]
    assert 0 < len(shown) <= 3 and all(r["Generated Outputs"] not in r["Feedback"] for r in shown)
    assert mine.propose_new_texts({"instruction": "Judge the film."}, {"instruction": shown}, ["instruction"]) == {
        "instruction": "Say it better."
    }
    text = str(asked[0])
    assert "Judge the film." in text and shown[0]["Inputs"]["text"] in text and shown[0]["Feedback"] in text


def test_a_writer_that_fails_leaves_the_instruction_as_it_is():
    mine, _ = adapter(ScriptedBackend(reply=lambda prompt: BackendError("gone")))
    records = {"instruction": [{"Inputs": {"text": "a"}, "Generated Outputs": "b", "Feedback": "c"}]}
    assert mine.propose_new_texts({"instruction": "Old."}, records, ["instruction"]) == {"instruction": "Old."}


def test_half_an_emoji_is_no_instruction():
    mine, _ = adapter(ScriptedBackend(reply=lambda prompt: "Say \ud83d it."))
    records = {"instruction": [{"Inputs": {"text": "a"}, "Generated Outputs": "b", "Feedback": "c"}]}
    assert mine.propose_new_texts({"instruction": "Old."}, records, ["instruction"]) == {"instruction": "Old."}


def test_what_a_writer_raises_ends_the_search():
    def broken(prompt):
        raise RuntimeError("no such server")

    mine, films = adapter(ScriptedBackend(reply=broken))
    with pytest.raises(RuntimeError, match="no such server"):
        reflective_search(mine, films.train[:20], films.train[20:], calls=1200, minibatch=4, seed=0)
    assert mine.scorer.calls < 200


def test_reflection_finds_what_helps_and_stays_within_its_calls():
    seen = []
    mine, films = adapter(on_result=lambda prompt, result: seen.append((prompt.instruction, len(result.examples))))
    found = reflective_search(mine, films.train[:20], films.train[20:], calls=1200, minibatch=4, seed=0)
    assert found.instruction.count(MAGIC) >= 2
    assert mine.scorer.calls <= 1200 + 2 * 24  # the library looks at the count between rounds
    assert {length for _, length in seen} == {4, 20}
    again, _ = adapter()
    assert reflective_search(again, films.train[:20], films.train[20:], 1200, 4, 0) == found
    with pytest.raises(InputError, match="10 task-model calls are too few for one prompt on 20 validation examples"):
        reflective_search(mine, films.train[:20], films.train[20:], calls=10)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(options, tmp_path_factory):
    """``searched(method)``: the folder of a search and its results; each method searches once."""
    root, results = tmp_path_factory.mktemp("searched"), {}

    def search_once(method):
        if method not in results:
            results[method] = prompt.run(options(root / method, method), QUIET)
        return root / method, results[method]

    return search_once


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_prompt_within_its_calls(method, options, searched):
    folder, results = searched(method)
    metrics, counts = results["metrics"], results["counts"]
    rows = read_records(folder / "prompts.jsonl")
    assert 0 < counts["calls"] <= 400 and counts["prompts"] == len(rows) > 0
    assert [row["calls"] for row in rows] == sorted(row["calls"] for row in rows) and rows[0]["best"]
    assert metrics["validation"] == max(row["accuracy"] for row in rows)
    assert 0 <= metrics["test_raw"] <= 1 and metrics["curve"][-1]["calls"] == 400
    tested = read_records(folder / "test.jsonl")
    assert len(tested) == 32 and {row["label"] for row in tested} == {0, 1}
    for kind in ("raw", "calibrated"):
        right = np.mean([row[kind] == row["label"] for row in tested])
        assert right == pytest.approx(metrics[f"test_{kind}"]) and metrics["curve"][-1][kind] == right
    assert prompt.run(options(folder, method), QUIET) == results
    if method == "manual":
        assert [row["instruction"] for row in rows] == ["Judge the film.", "Is it magic?"]
        assert counts["calls"] == 2 * 16 * 2 and "Is it magic?" in metrics["prompt"]


@pytest.mark.parametrize("method", ["random", "maskable-ppo", "gepa", "soft-q"])
def test_a_search_is_repeated_exactly(method, options, searched, tmp_path):
    (folder, first), second = searched(method), prompt.run(options(tmp_path, method), QUIET)
    assert first["metrics"] == second["metrics"]
    assert read_records(folder / "prompts.jsonl") == read_records(tmp_path / "prompts.jsonl")


def search(tmp_path, limit=200):
    films = task(40)
    scorer = LimitedScorer(limit, model())
    return PromptSearch(films, scorer, films.train[:10], model(), "none", {"seed": 0}, tmp_path / "prompts.jsonl")


def test_the_best_is_by_validation_and_ties_go_to_the_larger_gap(tmp_path):
    mine = search(tmp_path)
    for count in (0, 2, 1, 3):
        mine.validate(mine.task.prompt(f"Judge {MAGIC} " * count + "now"))
    assert mine.best is not None and mine.best.instruction.count(MAGIC) == 3
    assert [row["best"] for row in mine.history] == [True, True, False, True]
    found = incumbents(mine.task, read_records(mine.out))
    assert [calls for calls, _ in found] == [20, 40, 80] and [prompt for _, prompt in found][-1] == mine.best
    mine.validate(mine.prompts[0])  # known: no call
    assert mine.scorer.calls == 80


def test_prompts_that_stand_a_chance_are_validated(tmp_path):
    mine = search(tmp_path, limit=1000)
    texts = {magic: f"Judge {MAGIC} " * magic + "now" for magic in range(4)}
    mine.validate_best(
        [(0.1, mine.task.prompt(texts[0])), (0.2, mine.task.prompt(texts[2])), (0.0, mine.task.prompt("Say"))]
    )
    assert [one.instruction for one in mine.prompts] == [texts[2]]  # of the best two, the second one is worse
    calls = mine.scorer.calls
    assert calls == (10 + 3) * 2
    mine.validate_best([(0.3, mine.task.prompt(texts[2])), (0.2, mine.task.prompt(texts[0]))])  # both known
    assert mine.scorer.calls == calls
    mine.validate_best([(-1.0, mine.task.prompt(texts[3]))])
    assert mine.best is not None and mine.best.instruction == texts[3]


def test_a_prompt_that_does_not_fit_is_dropped_and_the_search_goes_on(tmp_path, monkeypatch):
    mine = search(tmp_path, limit=1000)
    over = lambda prompt, room: ContextLengthError("too long") if "endless" in str(prompt) else None  # noqa: E731
    monkeypatch.setattr(mine.scorer.backend, "context_error", over)
    mine.validate(mine.task.prompt("An endless one."))
    assert mine.best is None and mine.scorer.calls == 0
    for text in ("Judge now", "An endless film."):
        mine.validate_best([(0.1, mine.task.prompt(text))])
    assert [one.instruction for one in mine.prompts] == ["Judge now"]


def test_batch_calibration_needs_all_validation_examples(tmp_path):
    mine = search(tmp_path, limit=1000)
    mine.scorer.calibration = "batch"
    for text in ("Judge now", f"Judge {MAGIC} now"):
        mine.validate_best([(0.1, mine.task.prompt(text))])
    assert [row["calls"] for row in mine.history] == [20, 40]


def test_a_beam_keeps_each_prompt_at_its_best():
    one, other, third = (TaskPrompt(text) for text in "abc")
    found = best_prompts([(0.0, one), (0.1, other), (0.2, one), (-1.0, third)], 2)
    assert found == [(0.2, one), (0.1, other)]


def test_a_search_ends_where_its_calls_do(tmp_path):
    mine = search(tmp_path, limit=30)
    run_search(mine, "manual")
    assert len(mine.prompts) == 1 and mine.scorer.calls == 20


READ = []
"""Inputs that the model below was asked about."""


def reader():
    def score(text, word):
        READ.append(text.split("Input: ")[-1].split("\n")[0])
        return by_magic(text, word)

    return ScriptedBackend(score=score, reply=rewrite)


def test_the_test_examples_are_looked_at_once_the_search_is_over(options, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "test_incumbents", lambda *_: 1 / 0)  # killed in the test
    READ.clear()
    with pytest.raises(ZeroDivisionError):
        prompt.run(options(tmp_path, "random", backend=f"{__name__}:reader"), QUIET)
    texts = set(READ)
    loaded = prompt.load(options(tmp_path).sized())
    parts = {split: {e.text for e in loaded.examples(split)} for split in ("train", "validation", "test")}
    assert texts and texts <= parts["train"] | parts["validation"] and not texts & parts["test"]
    assert not parts["train"] & parts["validation"]


def test_a_search_that_is_over_is_tested_and_not_repeated(options, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "test_incumbents", lambda *_: 1 / 0)  # killed in the test
    with pytest.raises(ZeroDivisionError):
        prompt.run(options(tmp_path, "random"), QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(prompt, "run_search", lambda *_: pytest.fail("the search was repeated"))
    first = prompt.run(options(tmp_path, "random"), QUIET)
    more = prompt.run(options(tmp_path, "random", test=40), QUIET)
    assert len(read_records(tmp_path / "test.jsonl")) == 40 == more["counts"].pop("test")
    assert first["counts"].pop("test") == 32 and more["counts"] == first["counts"]
    assert more["metrics"]["prompt"] == first["metrics"]["prompt"]
    monkeypatch.undo()
    again = prompt.run(options(tmp_path / "again", "random"), QUIET)
    assert again["metrics"] == first["metrics"]


# --- comparison and report -------------------------------------------------------------------------------------------


def test_methods_are_compared_at_equal_calls(options, tmp_path, monkeypatch):
    one = options(tmp_path)
    shared = {"backend": one.backend, "rewriter": one.rewriter, "model": one.model, "calls": 400, "scale": "smoke"}
    given = PromptCompare(str(tmp_path), tasks=one.task, methods="manual,random,manual", seeds=2, **shared)
    figures = compare(given, QUIET)
    assert list(figures) == [one.task] and list(figures[one.task]) == ["manual", "random"]
    mine = figures[one.task]["random"]
    assert mine["seeds"] == [0, 1] and mine["raw"]["mean"] == pytest.approx(np.mean(mine["raw"]["values"]))
    assert mine["curve"][-1]["calls"] == 400
    assert figures[one.task]["manual"]["seeds"] == [0]
    manual, over = figures[one.task]["manual"], mine["raw"]["over_manual"]
    assert over["mean"] == pytest.approx(mine["raw"]["mean"] - manual["raw"]["mean"])
    assert manual["raw"]["over_manual"] == {"mean": 0.0, "half": 0.0}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| manual |" in text and "| random |" in text and (tmp_path / "report" / "methods.png").exists()
    prompt.run(options(tmp_path / "other", "manual", calls=200), QUIET)
    with pytest.raises(InputError, match="differ in calls"):
        report(PromptReport(str(tmp_path)), QUIET)
    assert compare(given, QUIET) == figures  # of its own searches alone


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "magic"}, "--method"),
        ({"task": "nowhere.toml"}, "nowhere.toml"),
        ({"task": "STS-B"}, "label"),
        ({"calls": 20}, "--calls 20 are too few for one round of manual and one validation, which take up to 32"),
        ({"calls": 220, "method": "random"}, "one round of random and one validation, which take up to 224"),
        ({"minibatch": 65}, "--minibatch 65 is more than the"),
        ({"operator": "words"}, "--operator"),
        ({"backend": "openai"}, "log-probs|model"),
        ({"backend": "nobody"}, "nobody"),
        ({"scale": "huge"}, "--scale"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"calibrate": "batch", "minibatch": 1}, "batch calibration of one example"),
        ({"calibrate": "batch", "validation": 1}, "batch calibration of one example"),
        ({"run_dir": ""}, "--run-dir"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(changed, said, options, tmp_path):
    from dataclasses import replace

    with pytest.raises((InputError, BackendError, ValueError), match=said):
        prompt.run(replace(options(tmp_path / "run"), **changed), QUIET)
    assert not (tmp_path / "run").exists()


def test_instructions_that_could_get_too_long_are_refused(options, tmp_path, tiny_model_path):
    backend = json.dumps({"id": "transformers", "kwargs": {"model": tiny_model_path}})
    given = {"backend": backend, "max_tokens": 250, "dry_run": True}
    prompt.run(options(tmp_path / "run", "random", **given), QUIET)  # writes no instructions token by token
    with pytest.raises(InputError, match=r"prompt 2 is too long: .* reads 256"):
        prompt.run(options(tmp_path / "run", "soft-q", **given), QUIET)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": "magic"}, "magic"),
        ({"tasks": ","}, "--tasks"),
        ({"tasks": "a/films.toml,b/films.toml"}, "--tasks names files of one name"),
        ({"seeds": -1}, "--seeds"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"calls": 300, "data_dir": "", "methods": "manual,random"}, "one round of random"),
    ],
)
def test_bad_comparisons_are_refused(changed, said, options, tmp_path):
    one = options(tmp_path)
    given = {"tasks": one.task, "backend": one.backend, "rewriter": one.rewriter}
    with pytest.raises(InputError, match=said):
        compare(PromptCompare(str(tmp_path / "run"), **given | changed), QUIET)
    with pytest.raises(InputError, match="no finished run"):
        report(PromptReport(str(tmp_path)), QUIET)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_a_comparison_to_its_end_on_the_embedded_model(tmp_path):
    figures = compare(PromptCompare(str(tmp_path), scale="smoke"), QUIET)
    methods = ["manual", "random", "maskable-ppo", "soft-q", "gepa"]
    assert list(figures["rotten-tomatoes"]) == [*methods, "best learned"]
    assert all(0.3 <= mine["raw"]["mean"] <= 1 for mine in figures["rotten-tomatoes"].values())
    config = read_json(tmp_path / "rotten-tomatoes-gepa-0" / "config.json")
    assert config["options"]["calls"] == 360
