"""What runs that are resumed by replaying their journal share: opening it, accounts of spending, time limits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from ...llm_backends import (Backend, Journal, Journaled, resolve)
from ...llm_backends.serving.budget import Budget
from .folder import (RunFolder, read_json, write_json)

Roles = TypeVar("Roles")


@contextmanager
def replayed(
    folder: RunFolder, build: Callable[[Journal], Roles], console: Console, name: Path | None = None
) -> Iterator[tuple[Journal, Roles]]:
    """Holds a run folder, opens its journal, says what is replayed, and accounts for what the roles spend.

    Args:
        folder: of the run.
        build: the run's backends by role, with their replies kept in the journal: a mapping, or an object whose
            attributes they are.
        console: where to say that a run is resumed.
        name: what is resumed; by default the folder.

    Yields:
        The journal and the roles.

    Raises:
        InputError: if the folder cannot be written or is in use.
    """
    with folder.opened():
        journal = Journal(folder.file("journal.jsonl"))
        if len(journal):
            console.print(
                f"resuming {name or folder.path}: {len(journal)} stored replies are replayed, none is paid for again"
            )
        roles = build(journal)
        with accounted(roles if isinstance(roles, Mapping) else vars(roles), folder.path):
            yield journal, roles


def journaled_roles(parts: Mapping[str, Any], journal: Journal | None) -> dict[str, Backend]:
    """Backends by role; equal parts are built once, and each role counts its own usage.

    Args:
        parts: by role, in the forms that ``resolve`` takes as JSON.
        journal: keeps the replies; None for the bare backends.
    """
    live: dict[str, Backend] = {}

    def role(part: Any) -> Backend:
        key = json.dumps(part, sort_keys=True)
        if key not in live:
            live[key] = resolve("backend", part)
        return live[key] if journal is None else Journaled(live[key], journal)

    return {name: role(part) for name, part in parts.items()}


@contextmanager
def accounted(backends: Mapping[str, Backend], folder: Path) -> Iterator[None]:
    """Keeps the spending of a run's backends in its folder, over all its starts.

    ``budget-ROLE.json`` is what a budget has spent, under the first of the roles that share it. ``usage.json`` is what
    each role sent to its model, replies from the journal left out; starts that were killed and calls that broke off are
    missing in it.

    Args:
        backends: by role.
        folder: the run's.
    """
    for name, backend in backends.items():
        inner: Any = backend
        while inner is not None:
            if isinstance(budget := getattr(inner, "budget", None), Budget):
                budget.keep(folder / f"budget-{name}.json")
            inner = getattr(inner, "inner", None)
    stored = read_json(folder / "usage.json") or {}
    try:
        yield
    finally:
        totals = {}
        for name, backend in backends.items():
            usage, before = backend.usage.as_dict(), stored.get(name, {})
            usage["requests"] -= usage.pop("cache_hits")
            totals[name] = {key: before.get(key, 0) + value for key, value in usage.items()}
        write_json(folder / "usage.json", totals)


class TimeLimit:
    """A limit on a run's time that does not count what is replayed from its journal.

    Args:
        minutes: the limit; 0 for none.
        journal: of the run, before the first reply is asked for.
    """

    def __init__(self, minutes: float, journal: Journal) -> None:
        self.minutes, self.journal, self.replies = minutes, journal, len(journal)
        self._asked: float | None = None
        self._paid_since: float | None = None

    def reached(self) -> bool:
        """Whether to stop; asked before every piece of work. Time counts from the first that a model worked on."""
        if self._paid_since is None and len(self.journal) > self.replies:
            self._paid_since = self._asked
        self._asked = time.monotonic()
        return (
            bool(self.minutes) and self._paid_since is not None and self._asked - self._paid_since >= 60 * self.minutes
        )
