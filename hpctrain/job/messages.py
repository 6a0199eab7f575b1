"""Messages about a job: the values that a field allows, and what is wrong with the value it has.

Both come from the same source, the field's annotation, so that messages and documentation cannot disagree.
"""

from __future__ import annotations

import datetime
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from hpctrain.errors import JobError
from hpctrain.text import did_you_mean, shown

LARGEST = 2**63 - 1  # largest integer in TOML
DEEPEST = 16
MOST_LINES = 10
SENTENCE = "sentence"  # the type of errors whose text and place are final
Place = tuple[int | str, ...]


class FaultyJobError(JobError):
    """A JobError that keeps its separate faults."""

    def __init__(self, message: str, found: Sequence[Fault]) -> None:
        super().__init__(message)
        self.found = found


class Fault(NamedTuple):
    """One mistake: `value` was found at `place` (None is not shown); `text` says what is wrong."""

    place: Place
    value: object
    text: str

    def __str__(self) -> str:
        found = "" if self.value is None or not self.place else f" = {value_text(self.value)}"
        return f"{dotted(self.place) or 'the job'}{found}: {self.text}"


def wrong(place: Place, value: object, text: str) -> InitErrorDetails:
    """An error for `raise_all`, at `place` within the model that is being validated."""
    return InitErrorDetails(type=PydanticCustomError(SENTENCE, "{text}", {"text": text}), loc=place, input=value)


def fail(place: Place, value: object, text: str) -> NoReturn:
    """Raise a single `wrong(...)`."""
    raise ValidationError.from_exception_data("job", [wrong(place, value, text)])


def raise_all(errors: Sequence[InitErrorDetails]) -> None:
    """Raise the errors, if any, as a ValidationError, which pydantic merges with its own."""
    if errors:
        raise ValidationError.from_exception_data("job", list(errors))


def dotted(place: Iterable[int | str]) -> str:
    """`place` as in TOML: keys joined by dots, quoted where they are not bare keys."""
    return ".".join(_key(part) for part in place)


def _key(part: int | str) -> str:
    text = str(part)
    bare = bool(text) and text.isascii() and all(c.isalnum() or c in "_-" for c in text)
    return shown(text) if bare else f'"{shown(text)}"'


def value_text(value: object) -> str:
    """A value as in TOML, short enough for a sentence."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{shown(value)}"'
    if isinstance(value, Mapping):
        return "a table" if value else "an empty table"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, int):
        return str(value) if abs(value) <= LARGEST else f"an integer of {value.bit_length()} bits"
    if isinstance(value, (float, datetime.date, datetime.time)) or value is None:
        return str(value)
    return f"<{type(value).__name__} object>"


def is_plain(value: object) -> bool:
    """True for values that a TOML file can hold, and for None; false for Python objects."""
    return value is None or isinstance(value, (bool, int, float, str, list, dict, datetime.date, datetime.time))


def unwritable(value: object, place: Place = ()) -> list[InitErrorDetails]:
    """Errors for what TOML cannot hold in `value`: objects, None, NaN, too large integers, too deep nesting."""
    if isinstance(value, (dict, list)):
        if len(place) >= DEEPEST:
            return [wrong(place, value, f"nested more than {DEEPEST} levels deep")]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [error for key, item in items for error in unwritable(item, (*place, key))]
    text = ""
    if value is None:
        text = "None cannot be written into a job file; leave the key out"
    elif not is_plain(value):
        text = "must be a TOML value (text, number, true or false, date, list or table)"
    elif isinstance(value, int) and abs(value) > LARGEST:
        text = f"must be at most {LARGEST} in size"
    elif isinstance(value, float) and value != value:
        text = "must be a number"
    elif isinstance(value, str):
        text = _bad_text(value)
    return [wrong(place, value, text)] if text else []


def _bad_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be valid Unicode text"
    return "must not contain the character NUL" if "\0" in value else ""


# Allowed values of a field


def kind_text(annotation: Any) -> str:
    """The type of a field in words: "integer", "number", "text", "table" ..."""
    if annotation is type(None):
        return ""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_text(arguments[0])
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(word for word in map(kind_text, arguments) if word)
        return " or ".join(words)
    if origin is Literal:
        return "text" if all(isinstance(a, str) for a in arguments) else "integer"
    if origin in (list, set, frozenset, tuple, Sequence):
        return f"list of {_plural(kind_text(arguments[0]))}" if arguments else "list"
    if origin is dict or annotation is dict or table_of(annotation):
        return "table"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, "any value")


def _plural(word: str) -> str:
    return word if word in ("text", "true or false") else word + "s"


def allowed_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The range or the choices of a field in words; "" if the type alone is enough."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    own = _limits(metadata)
    if origin is Annotated:
        inner = [m for a in arguments[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return own or allowed_text(arguments[0], inner)
    if origin in (Union, types.UnionType):
        texts = [allowed_text(a) for a in arguments if a is not type(None)]
        return own or " or ".join(text for text in texts if text)
    if origin is Literal:
        return ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in arguments)
    if origin is list and arguments:
        return own or allowed_text(arguments[0])
    return own


def _limits(metadata: Sequence[Any]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    parts = []
    for item in metadata:
        limits = {word: getattr(item, name) for name, word in words.items() if hasattr(item, name)}
        parts += [f"{word} {int(n) if n == int(n) else n}" for word, n in limits.items()]
        parts += ["not empty"] if getattr(item, "min_length", None) else []
    return " and ".join(parts)


def must_be(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The end of the sentence about a value that the field does not allow."""
    if _choices(annotation):
        return f"must be one of {allowed_text(annotation)}"
    kind, allowed = kind_text(annotation), allowed_text(annotation, metadata)
    article = "an" if kind[:1] in "aei" else "a"
    what = kind if kind.startswith(("text", "true", "any")) else f"{article} {kind}"
    return f"must be {what}{', ' + allowed if allowed else ''}"


def _choices(annotation: Any) -> bool:
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) in (Union, types.UnionType):
        return all(map(_choices, arguments))
    return get_origin(annotation) is Literal


# Faults


def faults(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """All faults that pydantic found in a `model`, one per place, in the order of the fields."""
    found: dict[tuple[Place, str], Fault] = {}
    for details in error.errors(include_url=False):
        place, annotation, metadata, parent = _walk(model, details["loc"])
        value, code = details["input"], details["type"]
        if code == SENTENCE:
            place, text = details["loc"], details["msg"]
        elif code == "extra_forbidden":
            place, value, text = details["loc"], None, _unknown(model, parent, details["loc"])
        elif code == "missing":
            value, text = None, "is missing; it has no default"
        elif code in ("value_error", "assertion_error"):
            text = str(details.get("ctx", {}).get("error") or details["msg"])
        elif code == "string_unicode":
            text = "must be valid Unicode text"
        else:
            text = must_be(annotation, metadata)
        found.setdefault((place, text), Fault(place, value, text))
    return list(found.values())


def _unknown(root: type[BaseModel], parent: type[BaseModel], place: Place) -> str:
    word, table = str(place[-1]), place[:-1]
    known = list(parent.model_fields)
    hint = did_you_mean(word, known)
    elsewhere = [key for key in dotted_keys(root) if key.split(".")[-1] == word]
    if hint == "" and elsewhere:
        hint = f" (did you mean {elsewhere[0]}?)"
    where = dotted(table) or "a job"
    return f"unknown key{hint}; {where} has {', '.join(known)}"


def dotted_keys(model: type[BaseModel], above: str = "") -> list[str]:
    """The dotted names of all fields of `model` and of the tables in it, without lists of tables."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(above + name)
        inner = table_of(field.annotation)
        if inner is not None:
            keys += dotted_keys(inner, f"{above}{name}.")
    return keys


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The only table that an annotation allows (`X`, `X | None`, `Annotated[X, ...]`)."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        found = [model for model in map(table_of, get_args(annotation)) if model is not None]
        return found[0] if len(found) == 1 else None
    return None


def _walk(model: type[BaseModel], location: Place) -> tuple[Place, Any, Sequence[Any], type[BaseModel]]:
    """Follow an error's location: (its real place, annotation and metadata there, the innermost table).

    pydantic appends the tried member of a union to locations; this is removed.
    """
    annotation: Any = model
    metadata: Sequence[Any] = ()
    parent, place = model, []
    for part in location:
        table = table_of(annotation)
        if table is not None:
            parent = table
            field = table.model_fields.get(str(part))
            if field is None:
                break
            annotation, metadata = field.annotation, field.metadata
        elif isinstance(part, int) and (element := _element(annotation)) is not None:
            annotation, metadata = element, ()
        else:
            break
        place.append(part)
    return tuple(place), annotation, metadata, parent


def model_at(model: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """The model of the table at `place` in `model`; None if there is no table or an unknown one."""
    numbered = [int(p) if len(str(p)) < 10 and str(p).isascii() and str(p).isdecimal() else p for p in place]
    reached, annotation, _, _ = _walk(model, tuple(numbered))
    return table_of(annotation) if len(reached) == len(place) else None


def _element(annotation: Any) -> Any:
    """The element type of `list[X]` or `list[X] | None`."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    found = [_element(argument) for argument in get_args(annotation)]
    found = [element for element in found if element is not None]
    return found[0] if found else None


def job_error(found: Sequence[Fault], source: str = "", overridden: Sequence[Place] = ()) -> FaultyJobError:
    """One line per fault, at most ten; faults from the file `source` begin with its name."""
    lines = []
    for fault in found[:MOST_LINES]:
        words = tuple(map(str, fault.place))
        given = any(words[: len(place)] == tuple(map(str, place)) for place in overridden)
        lines.append(str(fault) if given or not source else f"{source}: {fault}")
    if len(found) > MOST_LINES:
        lines.append(f"... and {len(found) - MOST_LINES} more")
    return FaultyJobError("\n".join(lines), found)
