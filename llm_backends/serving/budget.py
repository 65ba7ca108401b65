"""Hard limits on what a run may ask of a server: requests, tokens, money."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError


class BudgetExceededError(RunError):
    """The next request might exceed a limit and was not sent: a run can save its state and stop."""


@dataclass(frozen=True)
class Spending:
    """An amount of requests, tokens and money."""

    requests: int = 0
    tokens: int = 0
    """Prompt and completion tokens."""
    cost: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Spending) -> Spending:
        return Spending(self.requests - other.requests, self.tokens - other.tokens, self.cost - other.cost)


class Budget:
    """What may be spent; shared by the backends of a run, and safe to use from several threads.

    The most that an attempt can use is reserved before it is sent, what it used is booked after it. Every attempt
    counts, those that fail included.

    Args:
        requests: limit; 0 for none.
        tokens: limit of prompt and completion tokens; 0 for none.
        cost: limit of money, in the currency of the backends' prices; 0 for none.
        spent: what was spent before, by the run that this one continues.

    Raises:
        InputError: for a negative limit.
    """

    def __init__(
        self,
        requests: int = 0,
        tokens: int = 0,
        cost: float = 0.0,
        spent: Spending | Mapping[str, Any] = Spending(),
    ) -> None:
        for name, limit in (("requests", requests), ("tokens", tokens), ("cost", cost)):
            if limit < 0:
                raise InputError(f"a budget's {name} must be at least 0, got {limit}")
        self.limit, self.reserved = Spending(requests, tokens, cost), Spending()
        self.spent = spent if isinstance(spent, Spending) else Spending(**spent)
        self._file: Path | None = None
        self._lock = threading.Lock()

    def keep(self, file: str | Path) -> None:
        """Keeps what is spent in a file, and goes on from what stands there: limits then hold over restarts.

        Reserved amounts count as spent there, so that a process that is killed leaves no spending out. A file belongs
        to one budget of one process at a time. Of a budget that is kept already, further calls are ignored.

        Raises:
            InputError: if the file is broken.
        """
        file = Path(file)
        with self._lock:
            if self._file is not None:
                return
            try:
                if file.exists():
                    self.spent += Spending(**json.loads(file.read_text("utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"{file} is no record of a budget: {error}; remove it to start from nothing"
                ) from error
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            scratch = self._file.with_name(self._file.name + ".part")
            scratch.write_text(json.dumps(asdict(self.spent + self.reserved)) + "\n", "utf-8")
            scratch.replace(self._file)

    def reserve(self, wanted: Spending) -> bool:
        """Sets an amount aside, all of it or nothing; False where it may fit once others have settled.

        Raises:
            BudgetExceededError: if what is spent and wanted together exceed a limit.
        """
        with self._lock:
            for name in ("requests", "tokens", "cost"):
                limit, spent = getattr(self.limit, name), getattr(self.spent, name)
                if limit and spent + getattr(wanted, name) > limit:
                    raise BudgetExceededError(
                        f"the budget of {limit:g} {name} has {limit - spent:g} left, the next request "
                        f"may need {getattr(wanted, name):g}: raise the limit to go on"
                    )
            total = self.spent + self.reserved + wanted
            for name in ("requests", "tokens", "cost"):
                if 0 < getattr(self.limit, name) < getattr(total, name):
                    return False
            self.reserved += wanted
            self._write()
            return True

    def settle(self, reserved: Spending, used: Spending) -> None:
        """Gives a reservation back and books what was used of it."""
        with self._lock:
            self.reserved -= reserved
            self.spent += used
            self._write()
