"""Job files as text: reading TOML, overriding keys by "a.b=value", writing TOML."""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Callable, Iterable
from itertools import compress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hpctrain.errors import JobError
from hpctrain.filenames import JOB
from hpctrain.job.messages import Place, dotted, model_at, value_text
from hpctrain.job.spec import Choice
from hpctrain.options import Table
from hpctrain.text import shown, shown_path

LONGEST = 2**20  # bytes of a job file
_DEFAULT = object()
Setting = tuple[Place, Any]
Look = Callable[[Place], type[BaseModel] | None]  # the model of the table at a place


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. Raises JobError if it is missing, a folder, unreadable, not UTF-8 or not TOML."""
    name = shown_path(path)
    try:
        if os.path.isdir(path):
            inner = Path(path) / JOB
            hint = f"; did you mean {shown_path(inner)}?" if inner.exists() else ", not a job file"
            raise JobError(f"{name} is a folder{hint}")
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise JobError(f"there is no job file {name}{_neighbours(path)}") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > LONGEST:
        raise JobError(f"{name} is larger than {LONGEST} bytes, too large for a job file")
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(f"{name} is not UTF-8 text (line {line}), so it is not a job file") from None
    except ValueError as error:
        raise JobError(f"{name} is not valid TOML: {error}") from None


def parse(text: str) -> dict[str, Any]:
    """TOML text as tables; raises ValueError, with line and column, if the text is not valid."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def other_than(kind: str, tables: dict[str, Any]) -> str | None:
    """What these tables describe, if it is not a `kind` of: "job file", "cluster file", "calibration file"."""
    marks = {"cluster file": "hosts", "calibration file": "spans"}
    found = next((name for name, key in marks.items() if key in tables), None)
    if found is None and {"data", "train", "strategy", "phases"} & set(tables):
        found = "job file"
    return None if found == kind else found


def _neighbours(path: str | os.PathLike[str]) -> str:
    try:
        found = sorted(file.name for file in Path(path).parent.glob("*.toml"))
    except (OSError, ValueError):
        return ""
    return f" (in that folder: {', '.join(map(shown, found[:8]))})" if found else ""


def write(tables: dict[str, Any]) -> str:
    """The tables as TOML text, in their original order."""
    import tomli_w

    return tomli_w.dumps(tables)


# Overrides


def override(
    tables: dict[str, Any], overrides: Iterable[str], model: type[BaseModel]
) -> tuple[dict[str, Any], list[Place]]:
    """A copy of `tables` with the overrides applied, and the places that they set.

    "a.b=value": the value is TOML, or plain text if it is not valid TOML. `default` removes the key, which restores
    its default. An index selects an element of a list (phases.0.strategy.mode=sync). Names are set first: a new name
    removes the keys of the old one (its keyword arguments, a strategy's options). Among keys that exclude each other
    (train.epochs and train.steps, the units of an amount, strategy and phases), the overriding one is kept.
    Raises JobError for overrides that cannot be applied; validation finds unknown keys later.
    """
    if isinstance(overrides, str):
        raise JobError('overrides must be a list of "key=value", not one string')
    result: dict[str, Any] = _copied(tables)
    look = functools.partial(_table_at, model, tables=result)
    settings = [_setting(text) for text in overrides]
    places: list[Place] = []
    while settings:
        spelt = [_spelt_out(setting, look) for setting in settings]  # repeated, as it depends on the names set so far
        now = _names_first([place for place, _ in spelt], look)
        given = [*places, *(place for place, _ in spelt)]
        for place, value in compress(spelt, now):
            _set(result, place, value, look, given)
            places.append(place)
        settings = list(compress(settings, [not done for done in now]))
    return result, places


def _names_first(places: list[Place], look: Look) -> list[bool]:
    """Which places to set now: the outermost names first, because they determine the tables below; then the rest. A
    whole table comes before the names in it, which it would otherwise replace."""
    names = [place for place in places if _is_name(place, look)]
    if not names:
        return [True] * len(places)
    above = [place for place in places if any(len(place) < len(name) and name[: len(place)] == place for name in names)]
    first = above or names
    depth = min(map(len, first))
    return [len(place) == depth and place in first for place in places]


def _table_at(model: type[BaseModel], place: Place, tables: Any) -> type[BaseModel] | None:
    """Like `model_at`, but also finds tables within the options of the choice that `tables` names."""
    if (found := model_at(model, place)) is not None:
        return found
    for depth in range(1, len(place)):
        outer = model_at(model, place[:depth])
        if outer is not None and issubclass(outer, Choice):
            inner = _value_at(tables, place[:depth])
            name = inner.get(outer.KEY, outer.DEFAULT) if isinstance(inner, dict) else inner
            options = outer.options_of(outer.DEFAULT if name is None else name)
            return None if options is None else _table_at(options, place[depth:], inner)
    return None


def _value_at(tables: Any, place: Place) -> Any:
    for part in place:
        if isinstance(tables, list):
            tables = {str(index): item for index, item in enumerate(tables)}
        tables = tables.get(str(part)) if isinstance(tables, dict) else None
    return tables


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _setting(text: str) -> Setting:
    key, equals, value = text.partition("=")
    form = f'override "{shown(text)}"'
    if not equals:
        raise JobError(f"{form}: expected key=value, such as train.batch_size=64")
    if value.strip() == "":
        raise JobError(f"{form} has no value; {shown(key.strip())}=default restores the default")
    try:
        place = _place(parse(f"{key.strip()} = 0"))
    except ValueError:
        raise JobError(f"{form}: {shown(key)} is not a key; expected words joined by dots") from None
    return place, _value(value.strip())


def _spelt_out(setting: Setting, look: Look) -> Setting:
    """Expand the short form: strategy=all_reduce means strategy.name=all_reduce."""
    place, value = setting
    table = look(place)
    if isinstance(value, str) and (key := _naming(table)):
        return (*place, key), value
    return setting


def _place(tables: dict[str, Any]) -> Place:
    place: list[int | str] = []
    inner: Any = tables
    while isinstance(inner, dict):
        if len(inner) != 1:
            raise ValueError("not one key")
        [(key, inner)] = inner.items()
        place.append(key)
    return tuple(place)


def _value(text: str) -> Any:
    if text == "default":
        return _DEFAULT
    try:
        tables = parse(f"value = {text}")
    except ValueError:
        return text
    return tables["value"] if list(tables) == ["value"] else text


def _is_name(place: Place, look: Look) -> bool:
    """Whether `place` is the key that names what its table describes."""
    table = look(place[:-1])
    return place[-1] == _naming(table)


def _naming(table: type[BaseModel] | None) -> str:
    """The key that a text in place of the table stands for; "" if none may be."""
    return table.KEY if table is not None and issubclass(table, (Table, Choice)) else ""


def _set(tables: dict[str, Any], place: Place, value: Any, look: Look, given: list[Place]) -> None:
    here: Any = tables
    for depth, part in enumerate(place):
        at = place[:depth]
        if isinstance(here, list):
            part = _index(here, part, at)
        else:
            _make_way(here, place, depth, look, given)
        if depth == len(place) - 1:
            _put(here, part, value, look(at))
        else:
            here = _inner(here, part, place[: depth + 1], look)


def _index(here: list[Any], part: int | str, at: Place) -> int:
    text = str(part)
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(here):
        return int(text)
    has = f"has {len(here)}, numbered from 0" if here else "is empty"
    raise JobError(f"override {dotted((*at, part))}: {dotted(at)} is a list that {has}")


def _inner(here: Any, part: Any, place: Place, look: Look) -> Any:
    """The table or list at `place`, created if missing; a bare name is expanded to its table, also among options that
    are not known here: the user's own, or another strategy's."""
    value = here[part] if isinstance(here, list) else here.setdefault(part, {})
    table, outer = look(place), look(place[:-1])
    opaque = table is None and outer is not None and issubclass(outer, Choice)
    if isinstance(value, str) and (key := "name" if opaque else _naming(table)):
        value = here[part] = {key: value}
    if not isinstance(value, (dict, list)):
        raise JobError(f"override {dotted(place)}: is {value_text(value)}, so nothing below it can be set")
    return value


def _make_way(here: dict[str, Any], place: Place, depth: int, look: Look, given: list[Place]) -> None:
    """Remove the keys that exclude the one about to be set, unless an override sets them too."""
    at, part = place[:depth], str(place[depth])
    table = look(at)
    groups = table.EXCLUSIVE if table is not None and issubclass(table, Table) else ()
    for other in {key for group in groups if part in group for key in group} - {part}:
        if other not in here or any(setting[: depth + 1] == (*at, other) for setting in given):
            continue
        if depth < len(place) - 1 and part not in here and not _is_name(place, look):
            raise JobError(
                f"override {dotted(place)}: this job has {other} in place of {part}; "
                f"set a key of {other}, or set {part}.name too"
            )
        del here[other]


def _put(here: Any, part: Any, value: Any, table: type[BaseModel] | None) -> None:
    if value is _DEFAULT:
        if isinstance(here, list):
            raise JobError(f"override: element {part} of a list has no default; set the whole list")
        old = here.pop(part, None)
        value = _default_name(table, part)
    else:
        old = here.get(part, _default_name(table, part)) if isinstance(here, dict) else None
        here[part] = value
    if part == _naming(table) and old is not value and not (isinstance(old, str) and old == value):
        kept = (*getattr(table, "KEPT", ()), part)
        for key in [key for key in here if key not in kept]:
            del here[key]


def _default_name(table: type[BaseModel] | None, key: str) -> Any:
    if table is not None and issubclass(table, Choice):
        return table.DEFAULT
    field = table.model_fields.get(key) if table is not None else None
    return field.default if field is not None else None
