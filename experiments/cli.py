"""The command line ``instructgym``: a table of commands, whose modules are imported only when they are called.

To add a command, write a module with a function ``run(options: Options, console: Console)``, where ``Options`` is a
dataclass, and add a line to :data:`COMMANDS`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, get_type_hints

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..envs.registration import IDS
from ..llm_backends.errors import InputError, RunError
from .runs.config import FILE_OPTION, TRUST_OPTION, config_words

DESCRIPTION = (
    "Gymnasium environments for instructions, prompts and responses, and agents that solve them. "
    "'instructgym --version' prints the version. '--config FILE' after a command fills its options from YAML or from the "
    "config.json of a run; options that are typed win."
)
CONFIG = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    name: str
    """The words of the command after ``instructgym``."""
    entry_point: str
    """``"module:function"`` relative to this package; the function takes ``options`` and ``console``."""
    summary: str
    """One line of help, the same text as the summary of the options' docstring."""

    def load(self) -> tuple[type, Callable[[Any, Console], Any]]:
        """Imports the function and returns the class of its options, taken from its annotation, and the function."""
        module, _, name = self.entry_point.partition(":")
        function = getattr(importlib.import_module(f".{module}", __package__), name)
        return get_type_hints(function)["options"], function


GROUPS = {
    "evolve": "TeaMs-RL: an agent picks edit operations that evolve instructions.",
    "nlu": "RL for language understanding: 'nlu [run]' trains and evaluates one method, 'nlu report' gathers runs.",
    "fine-grained": "Fine-grained supervision: minimal edits give a reward per token, which drives token-level PPO.",
    "refine-af": "REFINE-AF: a small model bootstraps instructions and learns from automated feedback to write their "
    "instances.",
    "tuna": "Tuna: candidate responses are ranked by likelihood or by a judge, and a policy learns from the rankings.",
    "prompt": "Prompts for a frozen model: 'prompt [run]' searches by one method, 'prompt compare' by several.",
    "judge": "Judge LLMs: measure one on pairs with known answers.",
    "bench": "Measure speed, ours and theirs alternately in one run.",
}
"""Help of each group of commands, by the word with which the names of its commands begin."""

DEFAULTS = {"nlu": "run", "prompt": "run"}
"""Command of a group that is run if none is named: ``nlu --task ...`` is short for ``nlu run --task ...``."""

# fmt: off
COMMANDS = (
    Command("evolve run", "evolve.run:run", "Make data with an agent and at random for equally many LLM calls, fine-tune on both, evaluate, attack, report."),
    Command("evolve train", "evolve.train:run", "Train an agent to evolve instructions."),
    Command("evolve generate", "evolve.generate:run", "Make an instruction data set with a trained policy."),
    Command("evolve compare", "evolve.compare:run", "Compare agents and baselines at equal LLM budget."),
    Command("evolve finetune", "evolve.run:finetune", "Fine-tune the model on both data sets of 'evolve run', at equal size."),
    Command("evolve evaluate", "evolve.run:evaluate", "Evaluate and attack the models that 'evolve finetune' left."),
    Command("evolve report", "evolve.run:report", "Gather the stages of 'evolve run' into tables and a figure."),
    Command("evolve queries", "evolve.queries:run", "Count the LLM calls behind the data sets of one 'evolve' run folder."),
    Command("nlu run", "nlu.run:run", "Train or evaluate one method on language-understanding tasks."),
    Command("nlu report", "nlu.report:run", "Gather finished runs of 'nlu' into a table and a figure."),
    Command("fine-grained run", "fine_grained.run:run", "Run all stages: supervised start, edits, reward models, PPO, evaluation, report."),
    Command("fine-grained sft", "fine_grained.sft:run", "Train the start of all arms on given responses."),
    Command("fine-grained edit", "fine_grained.edit:run", "Sample responses, rank them by an annotator, and edit the worse ones minimally."),
    Command("fine-grained reward-model", "fine_grained.reward:run", "Train a reward model on edited or on preferred responses."),
    Command("fine-grained ppo", "fine_grained.ppo:run", "Train a policy by token-level PPO on the rewards of a reward model."),
    Command("fine-grained figa", "fine_grained.figa:run", "Train a policy on edited pairs directly (FIGA)."),
    Command("fine-grained evaluate", "fine_grained.evaluate:run", "Have a policy answer held-out prompts and judge its responses, alone and against a reference."),
    Command("fine-grained report", "fine_grained.report:run", "Gather the finished stages of an experiment into tables and figures."),
    Command("refine-af run", "refine_af.run:run", "Bootstrap, train by feedback, generate with and without that training, fine-tune, evaluate, attack, report."),
    Command("refine-af bootstrap", "refine_af.bootstrap:run", "Grow a pool of instructions from seed tasks, and write instances of the new ones."),
    Command("refine-af train", "refine_af.train:run", "Train a model by token-level PPO to write instances of instructions."),
    Command("refine-af generate", "refine_af.generate:run", "Make a data set: instances of instructions by a trained policy, or by a model as it is."),
    Command("refine-af finetune", "refine_af.run:finetune", "Fine-tune the model on both data sets of 'refine-af run', at equal size."),
    Command("refine-af evaluate", "refine_af.run:evaluate", "Evaluate and attack the models that 'refine-af finetune' left."),
    Command("refine-af report", "refine_af.run:report", "Gather the stages of 'refine-af run' into tables and a figure."),
    Command("refine-af filters", "cli:list_filters", "List the filters of new instructions."),
    Command("tuna run", "tuna.run:run", "Run all stages: supervised start, candidates, rankings, training, evaluation, report."),
    Command("tuna candidates", "tuna.candidates:run", "Draw several different responses to every request of a data set."),
    Command("tuna rank", "tuna.rank:run", "Rank the candidates of every request."),
    Command("tuna train", "tuna.train:run", "Train a policy on ranked candidates."),
    Command("tuna ppo", "tuna.ppo:run", "Train a reward model on ranked candidates, and a policy by token-level PPO on its reward."),
    Command("tuna evaluate", "tuna.evaluate:run", "Answer held-out tasks with several policies; compare ROUGE-L, and have a judge compare them with one of them."),
    Command("tuna report", "tuna.report:run", "Gather the stages of 'tuna run' into tables and a figure."),
    Command("prompt run", "prompt.run:run", "Search for a prompt by one method and test the best one."),
    Command("prompt compare", "prompt.compare:run", "Run methods side by side and gather them."),
    Command("prompt report", "prompt.report:run", "Gather runs of 'prompt run' into tables and a figure."),
    Command("finetune", "teaching.finetune:run", "Fine-tune a language model on instruction data; the loss is on the responses alone."),
    Command("evaluate", "teaching.evaluate:run", "Answer held-out tasks with a base model and what was fine-tuned from it, and compare the answers' ROUGE-L."),
    Command("privacy", "teaching.privacy:run", "Tell the rows that policies were fine-tuned on from held-out ones (membership inference)."),
    Command("judge calibrate", "judging.calibrate:run", "Measure a judge on labelled pairs: accuracy, position bias, self-consistency, invalid rate."),
    Command("judge list", "cli:list_judges", "List the judges."),
    Command("serve-check", "serving.check:run", "Show what an LLM server can do, how fast it is at each concurrency, and which settings to use with it."),
    Command("envs", "cli:list_envs", "List the environments with their spaces."),
    Command("bench edit-env", "benchmarks.edit_env:run", "Steps per second of n batched copies against n copies stepped one after the other."),
    Command("bench token-env", "benchmarks.token_env:run", "Tokens per CPU-second of sampling and play against transformers' generate, and steps per second of the env."),
    Command("bench token-ppo", "benchmarks.token_ppo:run", "Response tokens per CPU-second and peak memory of PPO with LoRA, ours and TRL's (or the bare passes)."),
    Command("bench ranking", "benchmarks.ranking:run", "Response tokens per CPU-second and peak memory of DPO with LoRA, ours and TRL's (or the bare passes)."),
    Command("bench token-learning", "benchmarks.token_learning:run", "Env steps (tokens) until the mean return of the last 64 episodes reaches 0.8 of the best."),
    Command("bench dense-reward", "benchmarks.dense_reward:run", "Tokens until 90% of what a policy writes is good: with a reward for each token, or their sum at the end."),
    Command("bench rollouts", "benchmarks.rollouts:run", "Response tokens per second of rollouts on a vLLM server, adapter pushed, against sampling in this process."),
    Command("bench task-score", "benchmarks.task_score:run", "Prompts scored on examples with shared prefixes, against a full request per prompt, example and label."),
    Command("bench backend", "benchmarks.backend:run", "Requests per second of the cached server backend, half of them duplicates, against a bare client of openai."),
    Command("bench list", "cli:list_benchmarks", "List the benchmarks."),
)
# fmt: on
"""All commands, in the order in which the help lists them."""


@dataclass
class ListEnvs:
    """List the environments with their spaces."""


@dataclass
class ListBenchmarks:
    """List the benchmarks."""


@dataclass
class ListJudges:
    """List the judges."""


@dataclass
class ListFilters:
    """List the filters of new instructions."""


def list_envs(options: ListEnvs, console: Console) -> None:
    """Prints every id with its spaces and its longest episode, as they are declared."""
    table = Table(title="instructgym environments", show_lines=True)
    table.add_column("id", no_wrap=True)  # ids that are cut look alike
    table.add_column("spaces and episode", overflow="fold")
    for env_id, entry in IDS.items():
        lines = (f"actions: {entry.action_space}", f"observations: {entry.observation_space}", entry.episode)
        table.add_row(env_id, "\n".join(lines))
    console.print(table)


def list_benchmarks(options: ListBenchmarks, console: Console) -> None:
    """Prints the name and summary of every benchmark."""
    rows = [(command.name.split()[-1], command.summary) for command in COMMANDS if command.name.startswith("bench ")]
    # The last row is "bench list", this command.
    _print_list(rows[:-1], console)


def list_judges(options: ListJudges, console: Console) -> None:
    """Prints the id of every reward that queries a judge, with the first paragraph of its docstring."""
    from ..llm_backends import part_ids, resolve

    judges = [(part_id, type(resolve("reward", part_id))) for part_id in part_ids("reward") if "judge" in part_id]
    _print_list([(part_id, (judge.__doc__ or "").partition("\n\n")[0]) for part_id, judge in judges], console)


def list_filters(options: ListFilters, console: Console) -> None:
    """Prints the name and reason of every filter of new instructions, in the order in which they are applied."""
    from ..envs.tasks.instruction.pool import FILTERS

    _print_list([(rule.name, rule.reason) for rule in FILTERS], console)


def _print_list(rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Prints names and descriptions in two columns; a long description wraps within its column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(" ".join(text.split())))
    console.print(table)


def command_of(args: Sequence[str]) -> tuple[Command, list[str]] | None:
    """Returns the command that the arguments begin with, and the arguments after its name; None if they name none."""
    # The parser takes refine_af for refine-af, so the words that may name a command are read as it reads them.
    args = [word if word.startswith("-") else word.replace("_", "-") for word in args[:2]] + list(args[2:])
    # The help of a group stays that of the group.
    if args and args[0] in DEFAULTS and (args[1:] or ["--"])[0].startswith("--") and args[1:2] != ["--help"]:
        args.insert(1, DEFAULTS[args[0]])
    for command in COMMANDS:
        words = command.name.split()
        if args[: len(words)] == words:
            return command, args[len(words) :]
    return None


def take_config(words: Sequence[str]) -> tuple[list[str], str, bool]:
    """Splits the words of a command line: those of the command, the file after ``--config``, whether it is trusted.

    Raises:
        InputError: if ``--config`` names no file, or stands twice.
    """
    rest, files, trusted = [], [], False
    pending = iter(words)
    for word in pending:
        if word == FILE_OPTION or word.startswith(f"{FILE_OPTION}="):
            files.append(word.partition("=")[2] or next(pending, ""))
        elif word == TRUST_OPTION:
            trusted = True
        else:
            rest.append(word)
    if len(files) > 1 or "" in files:
        raise InputError(f"{FILE_OPTION} names one file of options, YAML or the config.json of a run")
    return rest, files[0] if files else "", trusted


def parse(args: Sequence[str]) -> tuple[Callable[[Any, Console], Any], Any]:
    """Parses a command line; prints the help or an error and exits if it names no command or has wrong options.

    The parser knows all commands by name and summary, but only the options of the command that is called: the modules of
    the others are not imported.

    Returns:
        The function of the command, and its options.

    Raises:
        InputError: if the command is unknown, or ``--config`` is wrong.
    """
    called, words = command_of(args) or (None, list(args))
    words, config, trusted = take_config(words)
    if called is None and config:
        raise InputError("--config fills the options of a command: name the command first")
    if called is None and words and not words[0].startswith("-") and words[0].replace("_", "-") not in GROUPS:
        known = dict.fromkeys(command.name.partition(" ")[0] for command in COMMANDS)
        raise InputError(f"unknown command {words[0]!r}: use {', '.join(known)}")
    app, groups = tyro.extras.SubcommandApp(), dict[str, tyro.extras.SubcommandApp]()
    function: Callable[..., Any] = _not_called
    completes = any(word.startswith("--tyro-") for word in words)  # completions for shells list all options
    for command in COMMANDS:
        group, _, name = command.name.partition(" ")
        if name and group not in groups:
            groups[group] = tyro.extras.SubcommandApp()
            app.command(groups[group], name=group, help=GROUPS[group])
        parent = groups[group] if name else app
        if command is called or completes:
            options, function = command.load()
            if config:  # typed words come last, so that they win
                words = [*config_words(config, command.name, options, words, trusted), *words]
            parent.command(name=name or group)(options)
        else:
            parent.command(name=name or group, help=command.summary)(_not_called)
    # With the words that DEFAULTS may have added.
    if called is not None:
        words = [*called.name.split(), *words]
    return function, app.cli(prog="instructgym", description=DESCRIPTION, args=words, config=CONFIG)


def _not_called() -> None:
    """Stands in for the function of a command that is not called, so that its module is not imported."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command line and exits: with 0 on success, 2 after bad input or a failed run, 130 after an interrupt.

    Args:
        args: the words after ``instructgym``; None: those of ``sys.argv``.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words == ["--version"]:
        print(f"instructgym {version('instructgym')}")
        sys.exit(0)

    def work(console: Console) -> None:
        function, options = parse(words)
        function(options, console)

    sys.exit(guarded(work))


def guarded(work: Callable[[Console], Any]) -> int:
    """Runs ``work(console)`` and returns the exit code: 0, or 2 or 130 after an error line on stderr.

    Only errors that a user can fix become a line: bad input, a failed run, a file error (2) and an interrupt (130).
    """
    try:
        work(Console())
    except (InputError, RunError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: a command with a run folder goes on from here when it is repeated", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    main()
