"""The kinds of table in a job: plain ones, ones that name an object, and ones that choose a class."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from hpctrain.errors import JobError
from hpctrain.job import registry
from hpctrain.job.messages import fail, faults, is_plain, raise_all, unwritable, wrong
from hpctrain.options import Options, Table
from hpctrain.text import did_you_mean, shown

# The context of a validation that must not import user code: see `Job.recorded`.
RECORDED = {"recorded": True}


class Composite(Options):
    """Options that contain tables with strategies and rules, which may name objects."""


class Unchecked(Options):
    """Unvalidated options of a strategy or rule that is not built in, in a job that is only read."""

    model_config = ConfigDict(extra="allow")

    def plain(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class _Recorded(str):
    """A name that records an object, not one that a user wrote: it may begin with "<"."""


def _stays(info: ValidationInfo, kind: str, name: object) -> bool:
    """Whether `name` must not be imported: it is user code, and the job is only read."""
    return info.context is RECORDED and name not in registry.TABLES[kind]


def _not_imported(kind: str, name: str) -> JobError:
    return JobError(f'{kind} "{shown(name)}" is not imported where a job is only read')


def _name_of(kind: str, thing: object) -> str:
    return thing if isinstance(thing, str) else _Recorded(registry.describe(kind, thing))


class Named(Table):
    """A table whose `name` stands for an object; its other keys are keyword arguments, `options`.

    In Python, an object (a module, a class, a function) may replace the table or the name.
    """

    model_config = ConfigDict(extra="allow")
    KIND: ClassVar[str]
    KEY: ClassVar[str] = "name"
    KEPT: ClassVar[tuple[str, ...]] = ()  # the keys that stay valid when the name changes
    name: str
    _object: Any = PrivateAttr(None)  # what `name` stands for, if it cannot be imported again
    _unresolved: bool = PrivateAttr(False)

    @property
    def thing(self) -> Any:
        """The object if `name` only records it ("<...>"), else None."""
        return self._object

    @property
    def unresolved(self) -> bool:
        """Whether the job was only read and `name` is not built in: it is never imported."""
        return self._unresolved

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        return dict(self.model_extra or {})

    def plain(self) -> dict[str, Any]:
        return {**super().plain(), **self.options}

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, name: object, info: ValidationInfo) -> object:
        known = isinstance(name, _Recorded) or info.context is RECORDED
        if isinstance(name, str) and not (known and name.startswith("<")):
            try:
                registry.check(cls.KIND, name)
            except JobError as error:
                raise ValueError(str(error)) from None
        return name

    @model_validator(mode="wrap")
    @classmethod
    def _take(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if isinstance(value, cls):
            return value
        table, thing = _split(value, "name")
        if thing is not None:
            cls._check_object(thing)
            table["name"] = _name_of(cls.KIND, thing)
        spec = handler(table)
        if thing is not None and table["name"].startswith("<"):
            spec._object = thing
        spec._unresolved = _stays(info, cls.KIND, spec.name)
        raise_all(_bad_options(spec.options))
        return spec

    @classmethod
    def _check_object(cls, thing: object) -> None:
        if not callable(thing):
            fail((), thing, f"must be the name of a {cls.KIND}, or a callable")

    def resolve(self) -> Any:
        """The object, imported by its name if necessary. Raises JobError (see `registry.resolve`)."""
        if self._object is not None:
            return self._object
        if self._unresolved:
            raise _not_imported(self.KIND, self.name)
        return registry.resolve(self.KIND, self.name)

    def bind(self, positional: int = 0) -> Callable[..., Any]:
        """The resolved callable with its keyword arguments bound, to be called with `positional` arguments.

        Raises JobError if the callable does not take these arguments; errors during the call are not checked here.
        """
        return bound(f'{self.KIND} "{self.name}"', self.resolve(), self.options, positional)


def bound(what: str, function: Any, options: dict[str, Any], positional: int) -> Callable[..., Any]:
    """`function` with the keyword arguments `options` bound, to be called with `positional` arguments.

    Raises JobError, with a message about `what`, if it is not callable or does not take these arguments.
    """
    if not callable(function):
        raise JobError(f"{what} is a {type(function).__name__}, which cannot be called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in without a signature: a wrong call will raise by itself
        return functools.partial(function, **options)
    parameters = signature.parameters.values()
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken = taken[positional:]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in taken:
                text = f"no keyword {key}{did_you_mean(key, taken)}; it takes {', '.join(taken) or 'none'}"
                raise JobError(f"{what} has {text}")
    try:
        signature.bind(*[None] * positional, **options)
    except TypeError as error:
        raise JobError(f"{what} cannot be called as the job says: {error}") from None
    return functools.partial(function, **options)


def _split(value: Any, key: str) -> tuple[dict[str, Any], Any]:
    """(table, object or None) from the value given for a table that names an object under `key`."""
    if isinstance(value, str):
        return {key: value}, None
    if not isinstance(value, dict):
        if is_plain(value):
            fail((), value, f'must be a table such as {{{key} = "..."}}, or a name')
        return {}, value
    table = dict(value)
    return table, None if is_plain(table.get(key)) else table.pop(key)


def _bad_options(options: dict[str, Any]) -> list[InitErrorDetails]:
    names = [
        wrong((key,), value, "is not the name of a keyword argument")
        for key, value in options.items()
        if not key.isidentifier()
    ]
    return names + unwritable(options)


class Choice(BaseModel):
    """A table that chooses a class by name (under KEY); the class's `Options` validate the other keys.

    In Python, the class itself may replace the table or the name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    KIND: ClassVar[str]
    KEY: ClassVar[str] = "name"
    DEFAULT: ClassVar[str]
    name: str
    options: Any  # the validated model, an instance of the class's Options
    _object: Any = PrivateAttr(None)

    def plain(self) -> dict[str, Any]:
        """Like `Table.plain`."""
        if isinstance(self.options, (Composite, Unchecked)):
            return {self.KEY: self.name, **self.options.plain()}
        return {self.KEY: self.name, **self.options.model_dump(mode="json", exclude_none=True)}

    def with_objects(self) -> dict[str, Any]:
        """Like `plain`, but with the objects themselves where their names cannot be imported."""
        table = {**self.plain(), self.KEY: self.name if self._object is None else self._object}
        if isinstance(self.options, Composite):
            inner = {name: getattr(self.options, name) for name in type(self.options).model_fields}
            table |= {name: spec.with_objects() for name, spec in inner.items() if isinstance(spec, Choice)}
        return table

    @property
    def thing(self) -> Any:
        """See `Named.thing`."""
        return self._object

    @property
    def unresolved(self) -> bool:
        """See `Named.unresolved`."""
        return isinstance(self.options, Unchecked)

    def resolve(self) -> Any:
        """The class. Raises JobError in a job that was only read, if the class is not built in."""
        if self.unresolved:
            raise _not_imported(self.KIND, self.name)
        return self._class_of(self._object if self._object is not None else registry.resolve(self.KIND, self.name))

    @classmethod
    def _class_of(cls, thing: Any) -> Any:
        """The class for a named object; a subclass may convert other objects to a class."""
        return thing

    @classmethod
    def options_of(cls, name: object) -> type[BaseModel] | None:
        """The options of the built-in `name`."""
        known = isinstance(name, str) and name in registry.TABLES[cls.KIND]
        return options_class(registry.resolve(cls.KIND, str(name))) if known else None

    @model_validator(mode="wrap")
    @classmethod
    def _take(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if isinstance(value, cls):
            return value
        table, thing = _split(value, cls.KEY)
        name = table.pop(cls.KEY, cls.DEFAULT) if thing is None else _name_of(cls.KIND, thing)
        if not isinstance(name, str):
            fail((cls.KEY,), name, f"must be text, the name of a {cls.KIND}")
        try:
            if _stays(info, cls.KIND, name):
                if not name.startswith("<"):
                    registry.check(cls.KIND, name)
                raise_all(unwritable(table))
                return handler({"name": name, "options": Unchecked.model_validate(table)})
            chosen = cls._class_of(registry.resolve(cls.KIND, name) if thing is None else thing)
        except JobError as error:
            prefix = f'{cls.KIND} "{shown(name)}"'
            fail((cls.KEY,), name, str(error).removeprefix(prefix).lstrip(": "))
        options = _options(cls, name, chosen, table, info.context)
        spec = handler({"name": str(name), "options": options})
        if name.startswith("<"):
            spec._object = thing
        return spec


def _options(cls: type[Choice], name: str, chosen: Any, table: dict[str, Any], context: Any) -> BaseModel | None:
    """The other keys, validated by the `Options` of the chosen class; raises all faults at once."""
    model = options_class(chosen)
    if model is None:
        text = f"is not a {cls.KIND}: it must be a class with a pydantic model named Options"
        fail((cls.KEY,), name, text)
    known = [field.alias or key for key, field in model.model_fields.items()]
    unknown = [] if model.model_config.get("extra") == "allow" else [key for key in table if key not in known]
    errors = [wrong((key,), None, _unknown_option(cls, name, key, known)) for key in unknown]
    given = {key: value for key, value in table.items() if key not in unknown}
    if not issubclass(model, Composite):  # a Composite's own tables check this
        errors += unwritable(given)
        given = {key: value for key, value in given.items() if not unwritable(value)}
    try:
        options = _validated(model, given, context)
    except ValidationError as error:
        errors += [wrong(fault.place, fault.value, fault.text) for fault in faults(error, model)]
        options = None
    raise_all(errors)
    return options


def _validated(model: type[BaseModel], table: dict[str, Any], context: Any) -> BaseModel:
    if issubclass(model, Composite):
        return model.model_validate(table, context=context)
    # As JSON: types are strict, but a list may become a tuple, "0" a rank, and text an enum.
    return model.model_validate_json(json.dumps(table, default=str), strict=True)


def options_class(chosen: Any) -> type[BaseModel] | None:
    """The pydantic model of a strategy's or rule's options; None if `chosen` has none."""
    model = getattr(chosen, "Options", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _unknown_option(cls: type[Choice], name: str, key: str, known: list[str]) -> str:
    has = ", ".join([cls.KEY, *known])
    hint = did_you_mean(key, known) or _of_another(cls, key)
    return f'unknown key{hint}; {cls.KIND} "{name}" has {has}'


def _of_another(cls: type[Choice], key: str) -> str:
    for name in registry.TABLES[cls.KIND]:
        model = options_class(registry.resolve(cls.KIND, name))
        if model is not None and key in model.model_fields:
            return f' ({cls.KIND} "{name}" has it)'
    return ""


def names_of(kind: str, value: object) -> object:
    """A list of names from a list of names and importable functions; other values are returned unchanged."""
    if not isinstance(value, list):
        return value
    names: list[object] = []
    for index, item in enumerate(value):
        name = item if is_plain(item) else registry.describe(kind, item)
        if isinstance(name, str):
            try:
                registry.check(kind, name)
            except JobError as error:
                own = "must be importable: define it in a module of its own, not in the main program"
                fail((index,), name, str(error) if is_plain(item) else own)
        names.append(name)
    return names
