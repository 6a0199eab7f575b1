"""The tables that describe how a job's phases train: strategies, rules, what a phase takes over, the switch."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hpctrain.errors import JobError
from hpctrain.job import registry
from hpctrain.job.messages import fail
from hpctrain.job.spec import Choice, Composite
from hpctrain.job.tables import Amount, Positive
from hpctrain.options import Table


class StrategySpec(Choice):
    """A strategy's `name` and its validated `options`."""

    KIND = "strategy"
    DEFAULT = "all_reduce"


class RuleSpec(Choice):
    """The rule that ends a phase: its `name` (the key is `rule`) and its validated `options`."""

    KIND = "rule"
    KEY = "rule"
    DEFAULT = "after"

    @classmethod
    def _class_of(cls, thing: Any) -> Any:
        return registry.resolve(cls.KIND, registry.FUNCTION_AS_RULE)(thing) if inspect.isfunction(thing) else thing

    @model_validator(mode="after")
    def _check_keywords(self) -> Self:
        if self.unresolved:
            return self
        rule = self.resolve()
        if isinstance(rule, registry.resolve(self.KIND, registry.FUNCTION_AS_RULE)):
            try:
                rule.check(self.options)
            except JobError as error:
                fail((self.KEY,), self.name, str(error).partition('" ')[2])
        return self


class Enter(Table):
    """How learning rate and momentum continue from the previous phase."""

    learning_rate: Literal["auto", "keep", "scale", "reset", "ramp"] = Field(
        default="auto",
        description="auto: the schedule continues, times the strategy's own factor (lr_per_update); keep: the "
        "schedule continues without that factor; scale: keep, times enter.scale; reset: the "
        "schedule starts again over the rest of the run, including the warm-up; ramp: auto, times a "
        "linear rise over enter.ramp",
    )
    momentum: Literal["keep", "scale", "reset", "ramp"] = Field(
        default="keep",
        description="keep: unchanged; scale: times enter.scale; reset: start with a fresh optimizer (all of its "
        "state); ramp: a linear rise to the former value over enter.ramp",
    )
    scale: Positive | None = Field(
        default=None,
        description="the factor of learning_rate = scale and momentum = scale; left out: 1 / the phase's workers",
    )
    ramp: Amount = Field(
        default_factory=lambda: Amount(fraction=0.05),
        description="how long the rise from 0 takes with learning_rate = ramp or momentum = ramp",
    )


class PhaseTable(Table):
    """A stretch of the run under one strategy."""

    strategy: StrategySpec = Field(description="how the replicas agree in this phase")
    until: RuleSpec | None = Field(
        default=None,
        description="the rule that ends the phase, a class or a function of the losses (over intervals of 10 rounds); "
        "left out (in the last phase only): the end of the run",
    )
    enter: Enter | None = Field(
        default=None,
        description="how learning rate and momentum start in this phase; not for the first phase",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        return {**value, "strategy": {}} if isinstance(value, dict) and "strategy" not in value else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_schedule("strategy", self.strategy)
        return self


def _refuse_schedule(key: str, spec: StrategySpec) -> None:
    if isinstance(spec.options, Composite):
        fail((key, spec.KEY), spec.name, "consists of phases itself, so it cannot be one of them; name another")


class FirstRule(RuleSpec):
    """The rule that ends the first phase of a switch."""

    DEFAULT = "loss_stable"


class SecondStrategy(StrategySpec):
    """The strategy of the second phase of a switch."""

    DEFAULT = "parameter_server"


class SwitchOptions(Composite):
    """The keys of strategy.name = "switch"."""

    first: StrategySpec = Field(
        default_factory=lambda: StrategySpec.model_validate({}), description="the strategy of the first phase"
    )
    until: FirstRule = Field(
        default_factory=lambda: FirstRule.model_validate({}), description="the rule that ends the first phase"
    )
    then: SecondStrategy = Field(
        default_factory=lambda: SecondStrategy.model_validate({}), description="the strategy of the second phase"
    )
    enter: Enter = Field(default_factory=Enter, description="how learning rate and momentum start in the second phase")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_schedule("first", self.first)
        _refuse_schedule("then", self.then)
        return self

    def phases(self) -> list[PhaseTable]:
        """The two phases that the switch stands for."""
        return [PhaseTable(strategy=self.first, until=self.until), PhaseTable(strategy=self.then, enter=self.enter)]

    def key(self, phase: int, table: str) -> str:
        """The key of that phase's `table` ("strategy", "until", "enter")."""
        return ("first", "then")[phase] if table == "strategy" else table


class Switch:
    """Strategy-switch (Provatas et al., IEEE Access 13:9510, 2025): one strategy until a rule fires, then another.

    A schedule of two phases under a name of its own: `Job.schedule` has them, and nothing is ever trained by this.
    """

    Options = SwitchOptions
