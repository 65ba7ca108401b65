"""Specs of envs that are made of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gymnasium.envs.registration import EnvSpec


class PartSpec(EnvSpec):
    """An env's spec that, asked for JSON, names the argument that holds a live object."""

    def to_json(self) -> str:
        """The spec as JSON.

        Raises:
            ValueError: naming the argument and the form that can be saved.
        """
        for key, value in self.kwargs.items():
            if not _is_json(value):
                raise ValueError(
                    f"{self.id} cannot be saved as JSON: argument {key!r} holds a live {type(value).__name__}; "
                    f'pass {key}="id", {key}="module:factory" or {key}={{"id": ..., "kwargs": {{...}}}} instead'
                )
        return super().to_json()


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)


class HasPartSpec:
    """Makes the spec that Gymnasium hands to an env a :class:`PartSpec`."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """The spec the env was made from."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = (
            spec
            if spec is None or isinstance(spec, PartSpec)
            else PartSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
        )
