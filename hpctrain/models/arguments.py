"""Checks of models' keyword arguments, each with an error message of one sentence."""

from __future__ import annotations

from typing import Any

from hpctrain.errors import ModelError


def whole(key: str, value: Any, least: int = 1) -> int:
    """`value` if it is an integer of at least `least`; otherwise raises ModelError naming model.`key`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"model.{key} = {value!r}: expected a whole number of at least {least}")
    return value


def share(key: str, value: Any) -> float:
    """`value` if it is a number >= 0 and < 1; otherwise raises ModelError naming model.`key`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ModelError(f"model.{key} = {value!r}: expected a number from 0 to below 1")
    return float(value)
