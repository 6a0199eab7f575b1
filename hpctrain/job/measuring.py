"""The tables of a job that say what training minimises and what evaluations compute."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hpctrain.job.messages import fail
from hpctrain.job.spec import Named


class Loss(Named):
    """The loss, which training minimises."""

    KIND = "loss"
    name: str = Field(
        default="cross_entropy",
        description="function of (outputs, targets), or model: the model returns its loss. Further keys are the "
        "function's keyword arguments",
    )


class Scored(Named):
    """A function, or a class whose instances accumulate what they are given."""

    @classmethod
    def _check_object(cls, thing: object) -> None:
        if not callable(thing) and hasattr(thing, "update"):
            fail((), thing, f"must be the {cls.KIND}'s class, with its options beside it, not an instance")
        super()._check_object(thing)


class AlsoMetric(Scored):
    """A metric besides the main one."""

    KIND = "metric"
    name: str = Field(description="as metric.name; further keys are keyword arguments")


class Evaluate(Scored):
    """An evaluation of your own, in place of the loss and the metric."""

    KIND = "evaluation"
    name: str = Field(
        description="function of (model, batch) that returns a dictionary by name of numbers, means over the batch's "
        "samples, or pairs (sum, weight); or a class with start, update(model, batch), state, merge and value. The "
        "entry loss is the loss, the first other one the metric. Further keys are keyword arguments",
    )


class Metric(Scored):
    """What is reported, and what train.target and train.patience use."""

    KIND = "metric"
    KEPT = ("goal", "also", "monitor")
    name: str = Field(
        default="accuracy",
        description="function of a batch's (outputs, targets) that returns a number, its mean over the batch; or a "
        "pair (sum, weight); or a dictionary of these, whose first entry is the metric. Or a class with start, update, "
        "state, merge and value, for a metric that is not a mean over batches. Further keys are keyword "
        "arguments of the function, or of the class's constructor; accuracy has dim, ignore_index and threshold",
    )
    goal: Literal["max", "min"] = Field(
        default="max", description="whether larger or smaller values of the metric are better"
    )
    also: list[AlsoMetric] = Field(
        default=[],
        description="further metrics, names or tables; each has a column metric.NAME in metrics.csv",
    )
    monitor: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="which of several values is the metric, for train.target, train.patience, rules and comparisons: a "
        "name in a metric's dictionary, the name of one of metric.also, or loss; left out: the first",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.monitor == "loss" and self.goal == "max":
            fail(("monitor",), self.monitor, 'smaller losses are better: set metric.goal = "min" too')
        return self
