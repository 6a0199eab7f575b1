"""The job: a typed, serialisable description of one run.

`Job.load` and `Job(...)` raise JobError with one line per mistake, and do not import torch (unless a strategy or
rule of the user does). A job is immutable; `override` makes a new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hpctrain.errors import ClusterError, JobError
from hpctrain.job import file as jobfile
from hpctrain.job.measuring import Evaluate, Loss, Metric
from hpctrain.job.messages import LARGEST, FaultyJobError, fail, faults, job_error, raise_all, unwritable
from hpctrain.job.phases import Enter, PhaseTable, StrategySpec, SwitchOptions
from hpctrain.job.spec import RECORDED, Choice, Named
from hpctrain.job.tables import (
    Amount,
    CommunicatorTable,
    Data,
    Debug,
    ModelTable,
    Optimizer,
    Trace,
    Train,
)
from hpctrain.options import Options, Table
from hpctrain.text import shown_path

__all__ = ["Amount", "Job", "Options", "PhaseTable", "check_ranks"]

_NAME = re.compile(r"\w[\w.+-]*")


def _threads(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096):
        return value
    raise ValueError('must be "auto" or an integer, at least 1 and at most 4096')


class Job(Table):
    """One run. `Job(model=MyNet, data=my_data, train={"epochs": 3})` or `Job.load("job.toml", ["seed=1"])`.

    In place of a table: its name, or (model, data, loss, metric, optimizer) the object itself.
    """

    EXCLUSIVE = (frozenset({"strategy", "phases"}),)
    name: str = Field(default="train", description="the first part of the run folder's name")
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=0,
        description="seed of everything random: initial parameters, the order of samples, augmentation, dropout",
    )
    output: str = Field(default="runs", min_length=1, description="the folder that run folders are created in")
    threads: Annotated[int | Literal["auto"], PlainValidator(_threads)] = Field(
        default="auto",
        description="torch threads per rank; auto: the rank's share of the node's cores",
        json_schema_extra={"allowed": "at least 1 and at most 4096"},
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where workers compute; auto: CUDA if usable"
    )
    ranks: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        default=None, description="how many ranks the job needs; any number if left out"
    )
    model: ModelTable = Field(default_factory=ModelTable, description=ModelTable.__doc__)
    data: Data = Field(default_factory=Data, description=Data.__doc__)
    loss: Loss = Field(default_factory=Loss, description=Loss.__doc__)
    metric: Metric = Field(default_factory=Metric, description=Metric.__doc__)
    evaluate: Evaluate | None = Field(
        default=None,
        description="an evaluation of your own, in place of the loss and the metric; metric.goal and metric.monitor "
        "still apply",
    )
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer.model_validate({}), description=Optimizer.__doc__)
    train: Train = Field(default_factory=lambda: Train.model_validate({}), description=Train.__doc__)
    strategy: StrategySpec | None = Field(
        default=None,
        description="how the replicas agree: the strategy's name and its options; not together with phases",
        json_schema_extra={"default": '{name = "all_reduce"}, or none with phases'},
    )
    phases: Annotated[list[PhaseTable], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="several phases, each with a strategy and the rule that ends it"
    )
    trace: Trace = Field(default_factory=Trace, description=Trace.__doc__)
    communicator: CommunicatorTable = Field(default_factory=CommunicatorTable, description=CommunicatorTable.__doc__)
    debug: Debug = Field(default_factory=Debug, description=Debug.__doc__)
    _file: str = PrivateAttr("")
    _overrides: tuple[str, ...] = PrivateAttr(())

    def __init__(self, /, **keys: Any) -> None:
        """Raises JobError, one line per mistake."""
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise job_error(faults(error, Job)) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Job:
        """The job in a TOML file, with overrides ("a.b=value") applied before validation.

        See `job.file.override`. Raises JobError.
        """
        tables = jobfile.read(path)
        if (other := jobfile.other_than("job file", tables)) is not None:
            raise JobError(f"{shown_path(path)} is a {other}, not a job file")
        job = cls._checked(tables, overrides, shown_path(path))
        job._file = os.path.abspath(path)
        return job

    @classmethod
    def recorded(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Job:
        """The job in a file that is only read, such as a run folder's: like `load`, but imports nothing that it names.

        What is not built in keeps its name, including "<...>", and its options as written. Resolving it raises
        JobError, also in a job that `override` makes from this one. Raises JobError, like `load`.
        """
        return cls._checked(jobfile.read(path), overrides, shown_path(path), recorded=True)

    @property
    def unchecked(self) -> list[str]:
        """The keys of a recorded job that name strategies and rules whose options could not be checked."""
        return [f"{key}.{spec.KEY}" for key, spec in self._specs() if isinstance(spec, Choice) and spec.unresolved]

    def override(self, overrides: Iterable[str]) -> Job:
        """A new job with some keys changed: "a.b=value", see `job.file.override`. Raises JobError."""
        job = self._checked(self._tables(), overrides, recorded=any(spec.unresolved for _, spec in self._specs()))
        job._file, job._overrides = self._file, (*self._overrides, *job._overrides)
        return job

    def only(self, phase: int) -> Job:
        """A new job that trains with the strategy of that phase from beginning to end."""
        tables = {key: value for key, value in self._tables().items() if key not in ("strategy", "phases")}
        job = Job(**tables, strategy=self.schedule[phase].strategy.with_objects())
        job._file, job._overrides = self._file, self._overrides
        return job

    def resolved(self, values: Mapping[str, Any]) -> Job:
        """A new job in which these keys ("strategy.bucket_mb") have values that were found out, not overridden."""
        job = self.override([f"{key}={value}" for key, value in values.items()])
        job._overrides = self._overrides
        return job

    @property
    def file(self) -> str:
        """The file that the job was loaded from; "" if none."""
        return self._file

    @property
    def measured(self) -> str:
        """What the metric is called: metric.monitor, else the name of the metric, or of an evaluation of one's own."""
        return self.metric.monitor or (self.metric.name if self.evaluate is None else "metric")

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides applied by `load`, followed by those applied by `override`."""
        return self._overrides

    def __eq__(self, other: object) -> bool:
        """Compare keys and values, regardless of where the values came from."""
        if not isinstance(other, Job):
            return NotImplemented
        return all(getattr(self, key) == getattr(other, key) for key in Job.model_fields)

    @classmethod
    def _checked(
        cls, tables: dict[str, Any], overrides: Iterable[str], source: str = "", recorded: bool = False
    ) -> Job:
        overrides = overrides if isinstance(overrides, str) else tuple(overrides)
        tables, places = jobfile.override(tables, overrides, cls)
        try:
            job = cls._of_record(tables) if recorded else cls(**tables)
        except FaultyJobError as error:
            raise job_error(error.found, source, places) from None
        job._overrides = tuple(overrides)
        return job

    @classmethod
    def _of_record(cls, tables: dict[str, Any]) -> Job:
        job = cls.__new__(cls)
        try:  # what `__init__` does, but `__init__` takes no context
            return cls.__pydantic_validator__.validate_python(tables, self_instance=job, context=RECORDED)
        except ValidationError as error:
            raise job_error(faults(error, Job)) from None

    def _specs(self) -> Iterator[tuple[str, Named | Choice]]:
        """Every table that names something, with its key."""
        yield from _specs_in(self)
        for index, phase in enumerate(self.phases or []):
            yield from ((f"phases.{index}.{key}", spec) for key, spec in _specs_in(phase))

    def _tables(self) -> dict[str, Any]:
        """Like `plain`, but with the objects themselves where names cannot be imported."""
        tables = self.plain()
        specs = [(tables[name], getattr(self, name)) for name in tables if isinstance(tables[name], dict)]
        specs += [(tables["optimizer"].get(key), getattr(self.optimizer, key)) for key in ("schedule", "groups")]
        specs += [(tables["data"].get("collate"), self.data.collate)]
        specs += zip(tables["metric"].get("also", []), self.metric.also, strict=True)
        for table, spec in specs:
            if isinstance(spec, Named) and spec.thing is not None:
                table[spec.KEY] = spec.thing
        if self.strategy is not None:
            tables["strategy"] = self.strategy.with_objects()
        for table, phase in zip(tables.get("phases", []), self.phases or [], strict=True):
            choices = {"strategy": phase.strategy, "until": phase.until}
            table |= {key: choice.with_objects() for key, choice in choices.items() if choice is not None}
        return tables

    def dump(self) -> str:
        """The job as TOML, with every default written out, in declaration order; `Job.load` gives an equal job.

        Keys whose value is None are left out: None is always their default, and TOML has no null.
        """
        return jobfile.write(self.plain())

    @property
    def schedule(self) -> list[PhaseTable]:
        """The phases of the run. A job with `strategy` has one, which ends with the run, or the two of a switch.

        All but the last have `until`, all but the first `enter`.
        """
        if self.phases is not None:
            return list(self.phases)
        strategy = self.strategy or StrategySpec.model_validate({})
        if isinstance(strategy.options, SwitchOptions):
            return strategy.options.phases()
        return [PhaseTable(strategy=strategy)]

    def key(self, phase: int, table: Literal["strategy", "until", "enter"]) -> str:
        """The key of a phase's table in the job, for messages: "phases.1.until", "strategy.then"."""
        if self.phases is not None:
            return f"phases.{phase}.{table}"
        if self.strategy is not None and isinstance(self.strategy.options, SwitchOptions):
            return f"strategy.{self.strategy.options.key(phase, table)}"
        return "strategy"

    @field_validator("name", "output")
    @classmethod
    def _check_text(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "name" and (not _NAME.fullmatch(value) or len(value.encode()) > 100):
            raise ValueError(
                "must be usable as a file name: letters, digits and _ - . +, first a letter, digit or _, "
                "at most 100 bytes"
            )
        raise_all(unwritable(value))
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("strategy") is None and value.get("phases") is None:
            return {**value, "strategy": {}}
        if isinstance(value, dict) and isinstance(value.get("phases"), list):
            phases = value["phases"]
            return {**value, "phases": [*phases[:1], *map(_entered, phases[1:])]}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy is not None and self.phases is not None:
            fail(
                ("strategy",),
                None,
                "phases are also given; put the strategy into a phase, or leave the phases out",
            )
        for index, phase in enumerate((self.phases or [])[:-1]):
            if phase.until is None:
                fail(
                    ("phases", index, "until"),
                    None,
                    "is missing: only the last phase may continue to the end of the run",
                )
        if self.phases is not None and self.phases[0].enter is not None:
            fail(("phases", 0, "enter"), None, "has no effect in the first phase; leave it out")
        for rank in self.debug.slow:
            if self.ranks is not None and rank >= self.ranks:
                fail(
                    ("debug", "slow", str(rank)),
                    None,
                    f"ranks = {self.ranks}, so ranks are 0 to {self.ranks - 1}",
                )
        return self


def _specs_in(table: BaseModel) -> Iterator[tuple[str, Named | Choice]]:
    for name in type(table).model_fields:
        spec = getattr(table, name)
        if isinstance(spec, (Named, Choice)):
            yield name, spec
            inner = spec.options if isinstance(spec, Choice) else spec
            yield from ((f"{name}.{key}", below) for key, below in _specs_in(inner))


def _entered(phase: Any) -> Any:
    """A phase that follows another, with the default of `enter` written out."""
    if isinstance(phase, dict) and phase.get("enter") is None:
        return {**phase, "enter": {}}
    lacks = isinstance(phase, PhaseTable) and phase.enter is None
    return phase.model_copy(update={"enter": Enter()}) if lacks else phase


def check_ranks(job: Job, size: int) -> None:
    """Raise ClusterError or JobError if `job` cannot run on `size` ranks."""
    if job.ranks is not None and job.ranks != size:
        raise ClusterError(
            f"ranks = {job.ranks}: a job that needs {job.ranks} ranks was started with {size}; "
            f"start {job.ranks}, or set ranks={size}"
        )
    for rank in job.debug.slow:
        if rank >= size:
            raise JobError(f"debug.slow.{rank}: this run has {size} ranks, 0 to {size - 1}; name one of them")
