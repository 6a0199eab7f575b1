"""What the options of strategies, rules and codecs derive from, and every other table of a job."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table with fixed keys: unknown ones are refused, nothing is converted (but 1 to 1.0) or changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    EXCLUSIVE: ClassVar[tuple[frozenset[str], ...]] = ()  # keys of which one may be given at most

    def plain(self) -> dict[str, Any]:
        """As nested dicts and lists for a job file, every default written out; what is None is left out."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: _plain(value) for name, value in pairs if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel) and hasattr(value, "plain"):
        return value.plain()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class Options(Table):
    """What a strategy or rule can be told: the base of their `Options` classes."""
