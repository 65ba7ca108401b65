"""Pluggable parts: turns an id string, ``"module:factory"``, a JSON object or a live object into a backend or reward.

Environment arguments stay JSON-able, so that ``env.spec`` can be saved; heavy parts are built on first use.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import InputError

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

_ENTRY_POINTS: dict[str, dict[str, str]] = {}
_KINDS: dict[str, tuple[Any, Any]] = {}
"""Base class of each kind, and the wrapper that makes a part of a function; either may be ``"module:attribute"``."""


class UnknownPartError(InputError):
    """The error of an id or path that names no part, or a part of another kind."""


_PARTS_TOO = object()
"""Its id is a key of the memo of a deep copy that copies parts, too."""


def copy_with_parts(value: Any, memo: dict[int, Any], shared: Sequence[str] = ()) -> Any:
    """Returns the deep copy of an object that holds parts, e.g. an env; they are copied, but for models and backends.

    Args:
        value: the object, in its ``__deepcopy__``.
        memo: the argument of ``__deepcopy__``.
        shared: names of attributes that nothing changes, which are not copied.
    """
    memo[id(_PARTS_TOO)] = _PARTS_TOO
    clone = memo[id(value)] = value.__class__.__new__(value.__class__)
    memo |= {id(getattr(value, name)): getattr(value, name) for name in shared}
    state = copy.deepcopy(value.__getstate__() or {}, memo)
    if hasattr(clone, "__setstate__"):
        clone.__setstate__(state)
    else:
        clone.__dict__.update(state)
    return clone


class Part:
    """Base class of every pluggable part. Gymnasium deep-copies an env's kwargs; a live part is shared, not copied.

    The deep copy of an env has parts of its own: memories, means and caches. It shares models and backends.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        return self.own_copy(memo) if id(_PARTS_TOO) in memo else self

    def own_copy(self, memo: dict[int, Any]) -> Part:
        """Returns the part of a copied env: a deep copy; parts that remember nothing may return themselves."""
        return copy_with_parts(self, memo)


class SharedModel:
    """Base class of models, whose weights deep copies share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedModel:
        return self


class FixedValues(OrderedDict[KeyT, ValueT]):
    """An ordered dictionary whose values nothing changes: its deep copies share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedValues[KeyT, ValueT]:
        return self.copy()


class Lock:
    """A ``threading.Lock`` that an object can hold and be copied or pickled: the copy's is another one, and open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def register_part(kind: str, part_id: str, entry_point: str) -> None:
    """Makes ``entry_point`` ("module:factory") available as ``part_id`` to :func:`resolve`."""
    _ENTRY_POINTS.setdefault(kind, {})[part_id] = entry_point


def register_parts(kind: str, entry_points: Mapping[str, str]) -> None:
    """Registers several parts of one kind.

    Args:
        kind: name of the kind.
        entry_points: id to ``"module:factory"``.
    """
    for part_id, entry_point in entry_points.items():
        register_part(kind, part_id, entry_point)


def register_kind(kind: str, base: type | str, from_callable: Callable[..., Any] | str | None = None) -> None:
    """Declares a kind of part.

    Args:
        kind: name of the kind.
        base: class of its parts, or ``"module:Class"``, which is imported when the first part is resolved.
        from_callable: wraps a plain function into a part, or ``"module:attribute"``; None: functions are refused.
    """
    _KINDS[kind] = (base, from_callable)


def _load(entry_point: Any) -> Any:
    """Returns the object that ``"module:attribute"`` names; anything but a string is returned unchanged."""
    if not isinstance(entry_point, str):
        return entry_point
    module, _, attribute = entry_point.partition(":")
    return getattr(importlib.import_module(module), attribute)


def part_ids(kind: str) -> list[str]:
    """Returns the registered ids of a kind, sorted."""
    return sorted(_ENTRY_POINTS.get(kind, {}))


def resolve(kind: str, value: Any, **defaults: Any) -> Any:
    """Returns the live part that a user's argument describes.

    Args:
        kind: a kind that :func:`register_kind` has declared, e.g. ``"backend"``, ``"embedder"`` or ``"reward"``.
        value: an id string, ``"module:factory"``, ``{"id": ..., "kwargs": {...}}``, a live part, or a callable.
        defaults: arguments for the factory, passed if it has a parameter of that name and ``kwargs`` does not set it.

    Raises:
        UnknownPartError: if there is no such id, module or factory, or the factory returns something of another kind.
    """
    base, from_callable = _load(_KINDS[kind][0]), _KINDS[kind][1]
    if isinstance(value, base):
        return value
    if isinstance(value, Mapping):
        part_id, kwargs = value.get("id"), value.get("kwargs") or {}
        if set(value) - {"id", "kwargs"} or not isinstance(part_id, str) or not isinstance(kwargs, Mapping):
            raise UnknownPartError(f'a {kind} given as an object needs {{"id": ..., "kwargs": {{...}}}}, got {value!r}')
        return _build(kind, part_id, dict(kwargs), defaults)
    if isinstance(value, str):
        return _build(kind, value, {}, defaults)
    if callable(value) and from_callable is not None:
        return _load(from_callable)(value)
    choices = [*map(repr, part_ids(kind)), "'module:factory'", '{"id": ..., "kwargs": {...}}', f"a {base.__name__}"]
    choices += ["a callable"] if from_callable is not None else []
    raise UnknownPartError(f"{value!r} is no {kind}: pass {', '.join(choices[:-1])} or {choices[-1]}")


def _build(kind: str, name: str, kwargs: dict[str, Any], defaults: dict[str, Any]) -> Any:
    base, from_callable = _load(_KINDS[kind][0]), _KINDS[kind][1]
    entry_point = _ENTRY_POINTS.get(kind, {}).get(name, name)
    if not all(entry_point.partition(":")):
        raise UnknownPartError(f"unknown {kind} {name!r}: use one of {part_ids(kind)} or 'module:factory'")
    try:
        factory = _load(entry_point)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnknownPartError(f"cannot load {kind} {name!r}: {error}") from error
    if isinstance(factory, base):  # "module:object" names a live part, which needs no factory
        return factory
    if not callable(factory):
        raise UnknownPartError(f"{kind} {name!r} is a {type(factory).__name__}, not a factory")
    # Defaults go only to factories that take them: parts of one kind differ in their parameters.
    parameters = inspect.signature(factory).parameters
    try:
        part = factory(**{k: v for k, v in defaults.items() if k in parameters} | kwargs)
    except TypeError as error:
        raise UnknownPartError(f"cannot build {kind} {name!r}: {error}") from error
    if isinstance(part, base):
        return part
    if callable(part) and from_callable is not None:
        return _load(from_callable)(part)
    raise UnknownPartError(f"{kind} {name!r} returned a {type(part).__name__}, expected a {base.__name__}")
