"""Every key of a job with its type, default, range and meaning, as rows, plain text or the docs' table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hpctrain.job import Job, registry
from hpctrain.job.messages import allowed_text, kind_text, table_of, value_text
from hpctrain.job.phases import PhaseTable, StrategySpec
from hpctrain.job.spec import Choice, Named, options_class
from hpctrain.job.tables import Amount
from hpctrain.options import Options

OWN = '"package.module:attribute"'
WRITTEN_OUT = {"strategy": "strategy", "rule": "phases.N.until"}  # where each kind's options are listed
AMOUNT = "one of {epochs = ...}, {steps = ...}, {samples = ...}, {fraction = ...}"


class Row(NamedTuple):
    """One key. `default` is written as in TOML, or "none" if the key is left out by default."""

    key: str
    type: str
    default: str
    allowed: str
    description: str


def explain() -> list[Row]:
    """All keys in the order of `Job.dump`, including the options of built-in strategies and rules.

    Imports the modules of strategies and rules, which do not import torch.
    """
    return list(_rows(Job, ""))


def _rows(model: type[BaseModel], above: str, prefix: str = "") -> Iterator[Row]:
    for name, field in model.model_fields.items():
        key, table = above + (field.alias or name), table_of(field.annotation)
        if table is not None and issubclass(table, Choice):
            yield from _choice(table, key, field, prefix)
        elif table is not None and not issubclass(table, Amount) and kind_text(field.annotation) == "table":
            yield from _rows(table, f"{key}.", prefix)
        else:
            allowed = _names(model, name) or _allowed(field)
            text = prefix + (field.description or "")
            yield Row(key, _type(field, table), _default(field), allowed, text)
        if table is not None and issubclass(table, Options) and table.KEY:  # a name, or a table with more
            yield from (row for row in _rows(table, f"{key}.", prefix) if row.key != f"{key}.{table.KEY}")
        if model is Job and name == "phases":
            yield from _rows(PhaseTable, "phases.N.")
    if issubclass(model, Named):
        text = f"{prefix}keyword arguments of the object that {above}name names"
        yield Row(f"{above}*", "any value", "none", "", text)


def _choice(choice: type[Choice], key: str, field: FieldInfo, prefix: str) -> Iterator[Row]:
    where = WRITTEN_OUT[choice.KIND]
    if key != where:
        default = f'{{{choice.KEY} = "{choice.DEFAULT}"}}'
        yield Row(key, "table", default, "", f"{prefix}{field.description}: the keys of {where}")
        return
    names = registry.TABLES[choice.KIND]
    default = value_text(choice.DEFAULT) if choice is StrategySpec else "none"
    yield Row(f"{key}.{choice.KEY}", "text", default, _listed(names), field.description or "")
    for name in names:
        options = options_class(registry.resolve(choice.KIND, name))
        if options is not None:
            yield from _rows(options, f"{key}.", f"({name}) ")


def _names(model: type[BaseModel], field: str) -> str:
    if issubclass(model, Named) and field == "name":
        return _listed(registry.TABLES[model.KIND])
    return _listed(registry.AUGMENTATIONS) if field == "augment" else ""


def _listed(names: dict[str, str]) -> str:
    return ", ".join([*map(value_text, names), OWN])


def _allowed(field: FieldInfo) -> str:
    if table_of(field.annotation) is Amount:
        return AMOUNT
    return _extra(field, "allowed") or allowed_text(field.annotation, field.metadata)


def _extra(field: FieldInfo, key: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(key, "")) if isinstance(extra, dict) else ""


def _type(field: FieldInfo, table: type[BaseModel] | None) -> str:
    return "amount" if table is Amount else kind_text(field.annotation)


def _default(field: FieldInfo) -> str:
    default: Any = field.get_default(call_default_factory=True, validated_data={})
    if _extra(field, "default"):
        return _extra(field, "default")
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Amount):
        return f"{{{default.unit} = {default.value:g}}}"
    if default is None:
        return "none"
    return _literal(default)


def _literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_literal(item)}' for key, item in value.items())}}}"
    return value_text(value)


def as_text(rows: Sequence[Row], width: int = 110) -> str:
    """Two or more lines per key: its allowed values, then its meaning."""
    lines = []
    for row in rows:
        allowed = f" ({row.allowed})" if row.allowed else ""
        lines.append(f"{row.key} = {row.default}    {row.type}{allowed}")
        lines += textwrap.wrap(row.description, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def as_markdown(rows: Sequence[Row]) -> str:
    """The page docs/job.md."""
    lines = [
        "# The keys of a job",
        "",
        "Written by `hpctrain job explain --markdown`; change the descriptions in the code, not here.",
        "",
        "A job is a TOML file, or `hpctrain.Job(...)` in Python. Every key may be overridden on the command",
        "line as `a.b=value`; `a.b=default` restores the default. A default of *none* means that the key is",
        "left out. An *amount* is a stretch of training. A name in brackets: the strategy or rule that has",
        "this option.",
        "",
        "| key | type | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        default = row.default if row.default in ("none", "required") else f"`{row.default}`"
        cells = [f"`{row.key}`", row.type, default, row.allowed, row.description]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
