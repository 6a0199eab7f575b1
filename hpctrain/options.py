"""The base classes for the options of strategies, rules and codecs, and for every other table of a job."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table with fixed keys. Unknown keys are refused; no value is converted (except 1 to 1.0) or changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    EXCLUSIVE: ClassVar[tuple[frozenset[str], ...]] = ()  # groups of keys of which at most one may be given
    KEY: ClassVar[str] = ""  # the key that a text in place of the table stands for; "": none may be

    def plain(self) -> dict[str, Any]:
        """Nested dicts and lists for a job file, with every default written out; None values are left out."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: _plain(value) for name, value in pairs if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel) and hasattr(value, "plain"):
        return value.plain()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class Options(Table):
    """The base class of the `Options` of strategies and rules."""
