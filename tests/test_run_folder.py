import json

import pytest

from instructgym.experiments.runs.folder import RowWriter, RunFolder
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records

CONFIG = {"seed": 1, "minutes": 0.0, "seeds": "a.jsonl"}


def test_config_comes_first_and_results_last(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, "evolve train")
    with folder.opened():
        stored = json.loads((tmp_path / "run" / "config.json").read_text())
        assert stored["options"] == CONFIG and stored["command"] == "evolve train"
        assert stored["versions"]["torch"]
        assert folder.results is None
        folder.finish({"mean_return": 1.0}, {"episodes": 3})
    assert RunFolder(tmp_path / "run", CONFIG, "evolve train").results["metrics"] == {"mean_return": 1.0}


def test_a_stopped_run_is_not_finished(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, "evolve train")
    with folder.opened():
        folder.finish({}, {}, status="stopped")
    assert folder.results is None


def test_other_options_are_refused_by_name_but_the_time_limit_may_change(tmp_path):
    with RunFolder(tmp_path, CONFIG, "evolve train").opened():
        pass
    RunFolder(tmp_path, CONFIG | {"minutes": 5.0}, "evolve train")
    with pytest.raises(InputError, match="seed=1, not 2"):
        RunFolder(tmp_path, CONFIG | {"seed": 2}, "evolve train")
    with pytest.raises(InputError, match="evolve train"):
        RunFolder(tmp_path, CONFIG, "evolve compare")


def test_two_processes_cannot_share_a_folder(tmp_path):
    with RunFolder(tmp_path, CONFIG, "evolve train").opened():
        second = RunFolder(tmp_path, CONFIG, "evolve train")
        with pytest.raises(InputError, match="in use"), second.opened():
            pass


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run", CONFIG, "evolve train")
    with pytest.raises(InputError, match="cannot write the run folder"), folder.opened():
        pass


@pytest.mark.parametrize("text", ['{"comm', "[]", "{}", '{"command": "evolve train", "options": []}'])
def test_a_broken_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config|holds a run"):
        RunFolder(tmp_path, CONFIG, "evolve train")


def test_a_folder_with_strange_rows_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="no config"):
        RunFolder(tmp_path, CONFIG, "evolve train")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"mine": 1}'


def test_replayed_rows_are_written_once_and_a_torn_line_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = RowWriter(path)
    assert all(first.write({"row": i}) for i in range(3))
    path.write_bytes(path.read_bytes()[:-4])  # killed while writing the third
    second = RowWriter(path)
    assert [second.write({"row": i}) for i in range(5)] == [False, False, True, True, True]
    with pytest.raises(InputError, match=r"row 1 of .* is not the one"):
        RowWriter(path).write({"row": 7})
    assert RowWriter(path).write({"row": 0.00001}) is False  # floating-point noise
    assert [row["row"] for row in read_records(path)] == [0, 1, 2, 3, 4]
