"""``instructgym evolve queries``: counts the LLM calls behind evolved data sets and compares them with Evol-Instruct's.

TeaMs-RL compares its queries with those of WizardLM's Evol-Instruct, which spends three calls on every seed in every
round: evolve, judge, answer (Xu et al. 2023, arXiv 2304.12244). One edit here corresponds to one round there, so for
the same seeds and rounds Evol-Instruct needs seeds x horizon x 3 calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...agents.sb3.factory import BASELINES
from ...llm_backends.errors import InputError
from ..runs.folder import read_json
from .train import ended_training

ROLES = {"rewrite": "rewriter", "judge": "judge", "answer": "responder"}
"""Kinds of LLM calls, and the role that serves each."""
SENT = ("requests", "prompt_tokens", "completion_tokens")
"""What is counted of the requests of a role."""
EVOL_INSTRUCT_CALLS = 3
"""LLM calls of Evol-Instruct per seed and round: evolve, judge, answer."""


@dataclass
class QueryAccounting:
    """Count the LLM calls behind the data sets of one 'evolve' run folder."""

    run_dir: str = ""
    """Run folder of 'evolve train', which also holds the data sets that 'evolve generate' made with its policy."""


def run(options: QueryAccounting, console: Console | None = None) -> dict[str, Any]:
    """Prints the table of LLM calls and returns the figures of :func:`accounting`.

    Raises:
        InputError: if the folder is not named, holds no ended run of ``evolve train``, or a file of it is broken.
    """
    if not options.run_dir:
        raise InputError("--run-dir is missing: name the run folder of 'evolve train'")
    account = accounting(options.run_dir)
    (console or Console()).print(accounting_table(account))
    return account


def accounting(run_dir: str | Path) -> dict[str, Any]:
    """Counts the LLM calls of the training and of all data sets in a run folder.

    Calls are logical calls, as env and generator count them. A request that failed and was sent again counts twice. A
    reply from the journal of a resumed run counts once. A verdict by the likelihoods of both answers counts once,
    although the judge scores two texts for it. ``sent`` is what was sent to the models, from ``usage.json``: every text
    that was written or scored, without replies from journal or cache and without requests of processes that were
    killed.

    Args:
        run_dir: run folder of ``evolve train``.

    Returns:
        A JSON-able dict. ``algorithm``; ``learner``: False for a baseline, to whose data sets training adds nothing;
        ``horizon``: edits per seed; ``training``: an account; ``datasets``: by name (file name and a hash of its path),
        an account with ``status``, ``seeds``, ``rows`` and

        * ``calls_per_row``: calls of generation per row; ``calls_per_row_with_training``: the same with all calls of
          the training added to every data set; None without rows;
        * ``evol_instruct_calls``: seeds x horizon x 3;
        * ``ratio``, ``ratio_with_training``: calls divided by ``evol_instruct_calls``; None without seeds;
        * ``ratio_per_row``, ``ratio_per_row_with_training``: calls per row divided by 3, the calls per row of an
          Evol-Instruct that keeps every evolution. Evol-Instruct drops some too, so this is an upper bound.

        ``total``: an account of training and all data sets. An account has ``calls`` by kind (``rewrite``, ``judge``,
        ``answer``), ``all_calls``, and ``sent`` by role (``requests``, ``prompt_tokens``, ``completion_tokens``).

    Raises:
        InputError: if the folder holds no ended run of ``evolve train``, or a file of it is broken.
    """
    folder = Path(run_dir)
    options, trained = ended_training(folder)
    training = _account({kind: _count(trained, f"{kind}_calls", folder) for kind in ("rewrite", "judge")}, folder)
    datasets = {}
    # Each data set made with the policy has a run folder of its own.
    for made in sorted(path.parent for path in (folder / "generate").glob("*/config.json")):
        results = read_json(made / "results.json")
        if results is None:
            raise InputError(f"the generation in {made} has not ended: repeat its 'evolve generate' command")
        datasets[made.name] = _dataset(results, made, options["horizon"], training["all_calls"])
    return {
        "algorithm": options["algorithm"],
        "learner": options["algorithm"] not in BASELINES,
        "horizon": options["horizon"],
        "training": training,
        "datasets": datasets,
        "total": _total([training, *datasets.values()]),
    }


def _dataset(results: Mapping[str, Any], folder: Path, horizon: int, training: int) -> dict[str, Any]:
    """Returns the account of one data set.

    Args:
        results: results of its ``evolve generate``.
        folder: run folder of its ``evolve generate``.
        horizon: edits per seed.
        training: LLM calls of the training.
    """
    seeds, rows = _count(results, "seeds", folder), _count(results, "accepted", folder)
    account = _account(results["counts"].get("calls", {}), folder)
    evolving = seeds * horizon * EVOL_INSTRUCT_CALLS
    account |= {"status": results["status"], "seeds": seeds, "rows": rows, "evol_instruct_calls": evolving}
    # Figures for generation alone, and with all calls of the training added.
    for name, added in (("", 0), ("_with_training", training)):
        calls = account["all_calls"] + added
        per_row = calls / rows if rows else None
        account[f"calls_per_row{name}"] = per_row
        account[f"ratio{name}"] = calls / evolving if evolving else None
        account[f"ratio_per_row{name}"] = None if per_row is None else per_row / EVOL_INSTRUCT_CALLS
    return account


def _account(calls: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """Returns calls by kind, their sum, and the requests and tokens by role from the folder's ``usage.json``."""
    counted = {kind: int(calls.get(kind, 0)) for kind in ROLES}
    usage = read_json(folder / "usage.json") or {}
    sent = {role: {key: usage[role].get(key, 0) for key in SENT} for role in ROLES.values() if role in usage}
    return {"calls": counted, "all_calls": sum(counted.values()), "sent": sent}


def _total(accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sum of accounts."""
    calls = {kind: sum(account["calls"][kind] for account in accounts) for kind in ROLES}
    sent: dict[str, dict[str, int]] = {}
    for account in accounts:
        for role, used in account["sent"].items():
            sent[role] = {key: sent.get(role, {}).get(key, 0) + used[key] for key in SENT}
    return {"calls": calls, "all_calls": sum(calls.values()), "sent": sent}


def _count(results: Mapping[str, Any], name: str, folder: Path) -> int:
    """Returns one of the counts of a stage's results; raises an InputError if they lack it."""
    value = results.get("counts", {}).get(name)
    if not isinstance(value, int):
        raise InputError(f"{folder / 'results.json'} has no count {name!r}: it was not written by this command")
    return value


def accounting_table(account: Mapping[str, Any]) -> Table:
    """Returns the figures of :func:`accounting` as a table for the terminal."""
    kind = "" if account["learner"] else ", a baseline: its training adds nothing to the data"
    table = Table(title=f"LLM calls ({account['algorithm']}{kind})")
    for title in ("", *ROLES, "all", "rows", "per row", "relative to Evol-Instruct", "per row, relative to its 3"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    table.add_row("training", *_calls(account["training"]))
    for name, dataset in account["datasets"].items():
        table.add_row(name, *_calls(dataset), str(dataset["rows"]), *_ratios(dataset, ""))
        table.add_row("  training included", *[""] * 5, *_ratios(dataset, "_with_training"))
    table.add_row("total", *_calls(account["total"]))
    return table


def _calls(account: Mapping[str, Any]) -> list[str]:
    return [*map(str, account["calls"].values()), str(account["all_calls"])]


def _ratios(dataset: Mapping[str, Any], name: str) -> list[str]:
    """Returns the last cells of a data set's row; ``name`` is the suffix of the figures' keys."""
    formats = {"calls_per_row": ".2f", "ratio": ".1%", "ratio_per_row": ".1%"}
    values = {key: dataset[f"{key}{name}"] for key in formats}
    return ["-" if value is None else format(value, formats[key]) for key, value in values.items()]
