"""Files of options: what ``--config`` fills, what it refuses, and which code a file may name."""

import json

import pytest

from instructgym.experiments.cli import main, parse

RANKER = "elsewhere:longest"


def options(*words):
    return parse(["tuna", "rank", *words])[1]


def refused(capsys, *words):
    """Returns the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as exit:
        main(["tuna", "rank", *words])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.fixture
def file(tmp_path):
    """Returns a function that writes a file of options and returns its path."""

    def write(text, name="options.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
        return str(path)

    return write


def test_a_file_fills_options_and_typed_words_win(file):
    path = file(
        "candidates: runs/a\nseed: 3\ndry-run: true\nrun_dir: ''\nbackend: {id: embedded, kwargs: {dtype: auto}}\n"
    )
    filled = options("--config", path, "--seed", "4")
    assert (filled.candidates, filled.seed, filled.dry_run, filled.run_dir) == ("runs/a", 4, True, "")
    assert json.loads(filled.backend) == {"id": "embedded", "kwargs": {"dtype": "auto"}}
    assert options(f"--config={path}", "--no-dry-run").dry_run is False


def test_the_config_of_a_run_is_such_a_file(file):
    """Its digests are no options; it belongs to its command."""
    config = {"command": "tuna rank", "options": {"seed": 5, "candidates_digest": "a1"}, "versions": {}}
    assert options("--config", file(config, "config.json")).seed == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed: 3", "no option 'sed'"),
        ("- 3", "a mapping of option names"),
        ("seed: [3", "cannot read"),
        ("dry_run: maybe", "true or false"),
        ("backend: [a, b]", "--backend takes one value"),
        ({"command": "tuna train", "options": {}}, "has the options of 'tuna train', not of 'tuna rank'"),
    ],
)
def test_what_is_not_understood_is_one_line(file, capsys, text, words):
    assert words in refused(capsys, "--config", file(text))


def test_a_missing_file_is_one_line(capsys, tmp_path):
    assert "cannot read" in refused(capsys, "--config", str(tmp_path / "none.yaml"))
    assert "names one file" in refused(capsys, "--config")


@pytest.mark.parametrize(
    "value",
    [RANKER, {"id": RANKER}, {"id": "weighted-sum", "kwargs": {"terms": {"a": RANKER}}}, f"judge + 0.5*{RANKER}"],
)
def test_code_in_a_file_is_not_run_unasked(file, capsys, value):
    path = file({"ranker": value})
    assert f"--ranker {RANKER}" in refused(capsys, "--config", path)
    assert RANKER in options("--config", path, "--trust-run-folder").ranker
    assert options("--config", path, "--ranker", RANKER).ranker == RANKER


def test_texts_that_look_alike_are_no_code(file):
    path = file({"backend": {"id": "vllm-server", "kwargs": {"base_url": "http://localhost:8000/v1"}}})
    assert "8000" in options("--config", path).backend
    assert parse(["nlu", "--config", file({"start": "sft:64"}, "b.yaml")])[1].start == "sft:64"
