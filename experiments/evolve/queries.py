"""What an evolved data set cost in LLM calls, against Evol-Instruct.

TeaMs-RL counts its queries against WizardLM's Evol-Instruct, which spends three calls on every seed in every round:
evolve, judge, answer (Xu et al. 2023, arXiv 2304.12244). A round is an edit of ours, so the same seeds and rounds cost
Evol-Instruct seeds x horizon x 3 calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...agents.sb3.factory import BASELINES
from ...llm_backends.errors import InputError
from ..runs.folder import read_json

ROLES = {"rewrite": "rewriter", "judge": "judge", "answer": "responder"}
"""Kinds of calls, and the role that serves each."""
EVOL_INSTRUCT_CALLS = 3
"""Of Evol-Instruct per seed and round: evolve, judge, answer."""


@dataclass
class QueryAccounting:
    """Count the LLM calls behind the data sets of one 'evolve' run folder."""

    run_dir: str = ""
    """Run folder of 'evolve train', with the data sets that 'evolve generate' made from it."""


def run(options: QueryAccounting, console: Console | None = None) -> dict[str, Any]:
    """Prints the table and returns the figures.

    Raises:
        InputError: as of :func:`accounting`.
    """
    if not options.run_dir:
        raise InputError("--run-dir is missing: name the run folder of 'evolve train'")
    account = accounting(options.run_dir)
    (console or Console()).print(accounting_table(account))
    return account


def accounting(run_dir: str | Path) -> dict[str, Any]:
    """What training and the data sets of a run folder cost.

    Calls are logical ones, as env and generator count them: a request that failed and was sent again is two, a reply
    from the journal of a resumed run one, and so is a verdict by the likelihoods of both answers, for which the judge
    scores two texts. ``sent`` is what went to the models, from ``usage.json``: every text that was written or scored,
    without replies from journal or cache and without what was sent by starts that were killed.

    Args:
        run_dir: run folder of ``evolve train``.

    Returns:
        JSON-able. ``algorithm``; ``learner``: False for a baseline, to whose data sets training adds nothing;
        ``horizon``: edits per seed; ``training``: an account; ``datasets``: by name (file name and a hash of its path)
        an account with ``status``, ``seeds``, ``rows`` and

        * ``calls_per_row`` of generation, ``calls_per_row_with_training``: training counted whole into every data set;
          None without rows;
        * ``evol_instruct_calls``: seeds x horizon x 3;
        * ``ratio``, ``ratio_with_training``: calls over those;
        * ``ratio_per_row``, ``ratio_per_row_with_training``: calls per row over the 3 of an Evol-Instruct whose every
          evolution becomes a row. It drops some too, so this is the most that can be held against ours.

        ``total``: an account of training and all data sets. An account has ``calls`` by kind (``rewrite``, ``judge``,
        ``answer``), ``all_calls``, and ``sent`` by role (``requests``, ``prompt_tokens``, ``completion_tokens``).

    Raises:
        InputError: if the folder holds no ended run of ``evolve train``, or a file of it is broken.
    """
    folder = Path(run_dir)
    config, trained = read_json(folder / "config.json"), read_json(folder / "results.json")
    if config is None or config.get("command") != "evolve train":
        raise InputError(f"{folder} holds no run of 'evolve train': name the run folder that it trained in")
    if trained is None:
        raise InputError(f"the training in {folder} has not ended: repeat its 'evolve train' command first")
    options = config["options"]
    training = _account({kind: _count(trained, f"{kind}_calls", folder) for kind in ("rewrite", "judge")}, folder)
    datasets = {}
    for place in sorted((folder / "generate").glob("*/config.json")):
        made = read_json(place.parent / "results.json")
        if made is None:
            raise InputError(f"the generation in {place.parent} has not ended: repeat its 'evolve generate' command")
        datasets[place.parent.name] = _dataset(made, place.parent, options["horizon"], training["all_calls"])
    return {
        "algorithm": options["algorithm"],
        "learner": options["algorithm"] not in BASELINES,
        "horizon": options["horizon"],
        "training": training,
        "datasets": datasets,
        "total": _total([training, *datasets.values()]),
    }


def _dataset(made: Mapping[str, Any], folder: Path, horizon: int, training: int) -> dict[str, Any]:
    """The account of one data set."""
    seeds, rows = _count(made, "seeds", folder), _count(made, "accepted", folder)
    account = _account(made["counts"].get("calls", {}), folder)
    theirs = seeds * horizon * EVOL_INSTRUCT_CALLS
    figures: dict[str, Any] = {"status": made["status"], "seeds": seeds, "rows": rows, "evol_instruct_calls": theirs}
    for name, calls in (("", account["all_calls"]), ("_with_training", account["all_calls"] + training)):
        per_row = calls / rows if rows else None
        figures[f"calls_per_row{name}"] = per_row
        figures[f"ratio{name}"] = calls / theirs if theirs else None
        figures[f"ratio_per_row{name}"] = None if per_row is None else per_row / EVOL_INSTRUCT_CALLS
    return account | figures


def _account(calls: Mapping[str, int], folder: Path) -> dict[str, Any]:
    counted = {kind: int(calls.get(kind, 0)) for kind in ROLES}
    usage = read_json(folder / "usage.json") or {}
    sent = {
        role: {key: usage[role].get(key, 0) for key in ("requests", "prompt_tokens", "completion_tokens")}
        for role in ROLES.values()
        if role in usage
    }
    return {"calls": counted, "all_calls": sum(counted.values()), "sent": sent}


def _total(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    calls: Counter[str] = Counter(dict.fromkeys(ROLES, 0))
    sent: dict[str, Counter[str]] = {}
    for account in accounts:
        calls.update(account["calls"])
        for role, usage in account["sent"].items():
            sent.setdefault(role, Counter()).update(usage)
    return {
        "calls": dict(calls),
        "all_calls": calls.total(),
        "sent": {role: dict(usage) for role, usage in sent.items()},
    }


def _count(results: Mapping[str, Any], name: str, folder: Path) -> int:
    value = results.get("counts", {}).get(name)
    if not isinstance(value, int):
        raise InputError(f"{folder / 'results.json'} has no count {name!r}: it was not written by this command")
    return value


def accounting_table(account: Mapping[str, Any]) -> Table:
    """The figures of :func:`accounting` as a table for the terminal."""
    kind = "" if account["learner"] else ", a baseline: its training adds nothing to the data"
    table = Table(title=f"LLM calls ({account['algorithm']}{kind})")
    for title in ("", *ROLES, "all", "rows", "per row", "of Evol-Instruct's", "per row, of its 3"):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("training", *_calls(account["training"]))
    for name, one in account["datasets"].items():
        table.add_row(name, *_calls(one), str(one["rows"]), *_ratios(one, ""))
        table.add_row("  training included", *[""] * 5, *_ratios(one, "_with_training"))
    table.add_row("total", *_calls(account["total"]))
    return table


def _calls(account: Mapping[str, Any]) -> list[str]:
    return [str(account["calls"][kind]) for kind in ROLES] + [str(account["all_calls"])]


def _ratios(one: Mapping[str, Any], name: str) -> list[str]:
    per_row, ratio, row_ratio = (one[f"{key}{name}"] for key in ("calls_per_row", "ratio", "ratio_per_row"))
    return [
        "-" if per_row is None else f"{per_row:.2f}",
        "-" if ratio is None else f"{100 * ratio:.1f}%",
        "-" if row_ratio is None else f"{100 * row_ratio:.1f}%",
    ]
