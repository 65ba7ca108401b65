"""The command line as a whole: its table, light doors, help, and what it lists."""

import subprocess
import sys

import gymnasium as gym
import pytest
from rich.console import Console

from instructgym.envs.registration import IDS
from instructgym.experiments.cli import COMMANDS, GROUPS, ListEnvs, list_envs, main

HEAVY = ("torch", "transformers", "stable_baselines3", "sb3_contrib", "peft", "wandb", "matplotlib", "datasets")


@pytest.mark.parametrize("words", ["--help", "nlu --help", "evolve --help", "envs", "--version", "bench list"])
def test_help_and_lists_import_nothing_heavy(words):
    code = f"""
import sys
sys.argv = ["instructgym", *{words.split()!r}]
from instructgym.experiments.cli import main
try:
    main()
except SystemExit as done:
    assert done.code == 0, done.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_is_what_the_table_says(command):
    options, function = command.load()
    assert callable(function)
    assert " ".join((options.__doc__ or "").partition("\n\n")[0].split()) == command.summary
    group, _, leaf = command.name.partition(" ")
    assert not leaf or group in GROUPS


def test_the_table_names_every_command_once():
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names)
    assert not {name for name in names if " " not in name} & set(GROUPS)


def run(capsys, *args):
    with pytest.raises(SystemExit) as done:
        main(args)
    output = capsys.readouterr()
    return done.value.code, output.out + output.err


def test_help_of_one_command_shows_its_options(capsys):
    code, said = run(capsys, "evolve", "train", "--help")
    assert code == 0 and "--algorithm" in said and "usage: instructgym evolve train" in said


@pytest.mark.parametrize(("args", "named"), [(("nonsense",), "nonsense"), (("evolve",), "queries"), ((), "tuna")])
def test_words_that_are_no_command_are_refused_with_the_choices(args, named, capsys):
    code, said = run(capsys, *args)
    assert code == 2 and named in said


def test_an_unknown_command_gets_one_line(capsys):
    code, said = run(capsys, "nonsense", "--seed", "1")
    assert code == 2 and said.count("\n") == 1 and "unknown command 'nonsense': use evolve" in said


def test_words_of_a_command_may_have_underscores(capsys):
    assert run(capsys, "refine_af", "filters") == run(capsys, "refine-af", "filters")
    code, said = run(capsys, "bench", "edit_env", "--help")
    assert code == 0 and "--rounds" in said


@pytest.mark.parametrize("group", ["nlu", "prompt"])
def test_run_may_be_left_out(group, capsys):
    assert run(capsys, group, "--nonsense")[0] == 2
    code, said = run(capsys, group, "--seed", "0", "--help")
    assert code == 0 and f"usage: instructgym {group} run" in said


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "instructgym", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("instructgym ")


def test_no_id_is_cut_at_80_columns(capsys):
    list_envs(ListEnvs(), Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    for env_id in IDS:
        assert any(f" {env_id} " in line for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("env_id", IDS)
def test_environments_are_as_declared(env_id):
    entry = IDS[env_id]
    tokens = "Generate" in env_id
    env = gym.make(env_id)
    settings = env.unwrapped.process.settings
    length = f"at most {settings.max_tokens} tokens" if tokens else f"at most {settings.horizon} edits"
    assert (str(env.action_space), str(env.observation_space), length) == (
        entry.action_space,
        entry.observation_space,
        entry.episode,
    )
