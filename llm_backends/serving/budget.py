"""Hard limits on what a run may use of a server: requests, tokens, money."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError, check_at_least
from ..records import replaced


class BudgetExceededError(RunError):
    """Raised if the next request might exceed a limit; it was not sent, so a run can save its state and stop."""


@dataclass(frozen=True)
class Spending:
    """An amount of requests, tokens and money."""

    requests: int = 0
    tokens: int = 0
    """Prompt and completion tokens."""
    cost: float = 0.0
    """Money, in the currency of the backends' prices."""

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Spending) -> Spending:
        return Spending(self.requests - other.requests, self.tokens - other.tokens, self.cost - other.cost)


class Budget:
    """Limits on requests, tokens and money; shared by the backends of a run, and safe to use from several threads.

    Before an attempt is sent, the most that it can use is reserved; after it, the reservation is released and what it
    used is added to what is spent. Every attempt counts, including those that fail.

    Args:
        requests: limit of requests; 0: no limit.
        tokens: limit of prompt and completion tokens; 0: no limit.
        cost: limit of money, in the currency of the backends' prices; 0: no limit.
        spent: amounts that the run which this one continues has spent.

    Raises:
        InputError: for a negative limit.
    """

    def __init__(
        self, requests: int = 0, tokens: int = 0, cost: float = 0.0, spent: Spending | Mapping[str, Any] = Spending()
    ) -> None:
        check_at_least(0, requests=requests, tokens=tokens, cost=cost)
        self.limit, self.reserved = Spending(requests, tokens, cost), Spending()
        self.spent = spent if isinstance(spent, Spending) else Spending(**spent)
        self._file: Path | None = None
        self._lock = threading.Lock()

    def keep(self, file: str | Path) -> None:
        """Records spending in a file and adds the amounts that it already holds: limits then hold across restarts.

        Reserved amounts are recorded as spent, so that the file is never too low after a process is killed. A file
        belongs to one budget of one process at a time. Only the first call has an effect.

        Args:
            file: JSON file, created with its folders if missing.

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
            self._file = file
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            with replaced(self._file) as scratch:
                scratch.write_text(json.dumps(asdict(self.spent + self.reserved)) + "\n", "utf-8")

    def reserve(self, amount: Spending) -> bool:
        """Reserves the whole amount or nothing.

        Args:
            amount: amount to reserve.

        Returns:
            True if it is reserved; False if it does not fit now, but may once other reservations are settled.

        Raises:
            BudgetExceededError: if what is spent and this amount together exceed a limit.
        """
        with self._lock:
            # Spent amounts never come back: what does not fit beside them never will.
            for name in ("requests", "tokens", "cost"):
                limit, spent = getattr(self.limit, name), getattr(self.spent, name)
                if limit and spent + getattr(amount, name) > limit:
                    raise BudgetExceededError(
                        f"the budget of {limit:g} {name} has {limit - spent:g} left, the next request "
                        f"may need {getattr(amount, name):g}: raise the limit to go on"
                    )
            # Reserved amounts may come back, as most attempts use less than they reserve.
            total = self.spent + self.reserved + amount
            for name in ("requests", "tokens", "cost"):
                if 0 < getattr(self.limit, name) < getattr(total, name):
                    return False
            self.reserved += amount
            self._write()
            return True

    def settle(self, reserved: Spending, used: Spending) -> None:
        """Releases a reservation and adds what was used of it to what is spent."""
        with self._lock:
            self.reserved -= reserved
            self.spent += used
            self._write()
