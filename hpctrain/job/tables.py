"""The tables of a job: their keys, with defaults and meaning."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PlainValidator, field_validator, model_validator

from hpctrain.job import registry
from hpctrain.job.messages import fail
from hpctrain.job.spec import Named, names_of
from hpctrain.options import Table

MANY = 10**12
Policy = Literal["rank0", "mean", "own"]
Unit = Literal["epochs", "steps", "samples", "fraction"]
Whole = Annotated[int, Field(ge=0, le=MANY)]
Count = Annotated[int, Field(ge=1, le=MANY)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Amount(Table):
    """A stretch of training: {epochs = 1}, {steps = 100}, {samples = 5000} or {fraction = 0.1}."""

    EXCLUSIVE = (frozenset({"epochs", "steps", "samples", "fraction"}),)
    epochs: Positive | None = Field(default=None, description="passes over the training samples")
    steps: Count | None = Field(default=None, description="rounds: steps that all workers have taken")
    samples: Count | None = Field(default=None, description="training samples, of all workers together")
    fraction: Fraction | None = Field(default=None, description="share of the whole run")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.plain()) != 1:
            raise ValueError("must have exactly one of epochs, steps, samples and fraction, such as {epochs = 1}")
        return self

    @property
    def unit(self) -> Unit:
        """The unit given: one of the four."""
        units: tuple[Unit, ...] = ("epochs", "steps", "samples", "fraction")
        return next(unit for unit in units if getattr(self, unit) is not None)

    @property
    def value(self) -> float:
        """The number of units; a whole number for steps and samples."""
        return float(getattr(self, self.unit)) if self.unit in ("epochs", "fraction") else getattr(self, self.unit)


class ModelTable(Named):
    """What is trained."""

    KIND = "model"
    name: str = Field(default="convnet", description="the model; further keys are its function's keyword arguments")


class CollateTable(Named):
    """What makes a batch of samples."""

    KIND = "collate"
    name: str = Field(
        description="function of a list of samples that returns a batch, like torch's collate_fn: a pair (inputs, "
        "targets), or anything else, all of which is the inputs. Further keys are its keyword arguments",
    )


class Data(Named):
    """What it is trained on, and how samples reach the workers."""

    KIND = "dataset"
    KEPT = ("validation", "queue", "partition", "shuffle", "last", "prefetch", "threads", "augment", "collate")
    name: str = Field(default="digits", description="the data set; further keys are its function's keyword arguments")
    validation: Share = Field(default=0.0, description="share of the training samples held back for validation")
    queue: Literal["auto", "static", "shared"] = Field(
        default="auto",
        description="in asynchronous phases, static: each worker has its own share of the samples; shared: one queue "
        "for all, from which a slow worker takes fewer; auto: shared. Synchronous phases divide each round by rank",
    )
    partition: Literal["epoch", "fixed"] = Field(
        default="epoch",
        description="which samples a worker takes. epoch: others in every epoch; fixed: always those of its own shard, "
        "for strategies whose workers take rounds together",
    )
    shuffle: bool = Field(default=True, description="reshuffle the samples in every epoch, by the seed")
    last: Literal["keep", "drop"] = Field(
        default="keep",
        description="what happens to the samples left over at the end of an epoch, too few for a full round. keep: "
        "a smaller round; drop: the epoch ends without them (with shuffle, different ones in every "
        "epoch)",
    )
    prefetch: Annotated[int, Field(ge=0, le=1024)] = Field(default=2, description="batches fetched in advance")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=1,
        description="threads per worker that fetch and augment samples; 0: the training loop does it",
    )
    augment: list[str] = Field(default=[], description="augmentations of training samples, in this order")
    collate: CollateTable | None = Field(
        default=None,
        description="what makes a batch of samples, in training and in evaluations; left out: each tensor or number of "
        "a sample becomes a tensor with a row per sample",
    )

    @field_validator("augment", mode="before")
    @classmethod
    def _check_augment(cls, value: object) -> object:
        return names_of("augmentation", value)

    @classmethod
    def _check_object(cls, thing: object) -> None:
        if not callable(thing) and not any(hasattr(thing, n) for n in ("__getitem__", "__iter__", "train")):
            fail((), thing, "must be a data set, a pair (train, test), or a function that makes one")


class LearningRate(Named):
    """The course of the learning rate."""

    KIND = "schedule"
    KEPT = ("warmup",)
    name: str = Field(
        default="constant",
        description="the learning rate after the warm-up: a function of the completed share of the run that returns "
        "a factor of optimizer.lr; or a class of torch.optim.lr_scheduler; or a function of the "
        "optimizer that returns such a scheduler. Further keys are its keyword arguments",
    )
    warmup: Amount | None = Field(
        default=None, description="linear rise from 0 to optimizer.lr at the start; none if left out"
    )
    unit: Literal["epochs", "steps"] | None = Field(
        default=None,
        description="how often a scheduler is stepped, from the start of the run: every epoch, or every round (of "
        "the first phase's workers); left out: the unit of the run's length, but always rounds for "
        "OneCycleLR and CyclicLR",
    )

    @classmethod
    def _check_object(cls, thing: object) -> None:
        if hasattr(thing, "get_last_lr") and not isinstance(thing, type):
            fail(
                (),
                thing,
                "must be the scheduler's class, with its arguments beside it, or a function of the optimizer that "
                "returns one",
            )
        super()._check_object(thing)


class Groups(Named):
    """Which parameters the optimizer treats alike."""

    KIND = "groups"
    name: str = Field(
        default="decay",
        description="function of the model that returns parameter groups as torch.optim takes them: dictionaries with "
        "params and options; decay: weight_decay only on parameters of two or more dimensions",
        json_schema_extra={"default": "none"},
    )


class Optimizer(Named):
    """How gradients become updates."""

    KIND = "optimizer"
    KEPT = ("schedule", "groups", "scaling")
    name: str = Field(
        default="SGD",
        description="a class of torch.optim; MuonAdamW (Muon for matrices, AdamW for the rest); or SignSGD (by the "
        "sign of the gradient alone). Further keys are its keyword arguments",
    )
    lr: Positive | None = Field(
        default=None,
        description="learning rate; left out: 0.1 for SGD, torch's default for its other classes",
        json_schema_extra={"default": "by optimizer"},
    )
    scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="how the learning rate grows with the phase's workers, if lr suits one. linear: times their "
        "number; sqrt: times its square root, as is usual for Adam. Give optimizer.schedule.warmup with it",
    )
    elementwise: bool | None = Field(
        default=None,
        description="whether the update of each element depends on no other element, so that any slice can be "
        "updated separately; left out: known for torch's own classes, false for others",
        json_schema_extra={"default": "by optimizer"},
    )
    schedule: LearningRate = Field(default_factory=LearningRate, description="the course of the learning rate")
    groups: Groups | None = Field(
        default=None,
        description="parameter groups with options of their own; left out: all parameters alike",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("lr") is None:
            rate = registry.LEARNING_RATES.get(str(value.get("name", "SGD")))
            return value if rate is None else {**value, "lr": rate}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr is None:
            fail(("lr",), None, f'is needed: hpctrain has no default learning rate for optimizer "{self.name}"')
        if "params" in self.options:
            fail(("params",), None, "is the model's parameters, which hpctrain passes to the optimizer")
        return self

    @classmethod
    def _check_object(cls, thing: object) -> None:
        if hasattr(thing, "param_groups") or not callable(thing):
            fail(
                (),
                thing,
                "must be the optimizer's class, not an instance; lr and other arguments stand beside it",
            )


def _buffers(value: object) -> object:
    policies = get_args(Policy)
    if (
        value in policies
        if isinstance(value, str)
        else isinstance(value, dict)
        and all(isinstance(key, str) and key and policy in policies for key, policy in value.items())
    ):
        return value
    allowed = ", ".join(f'"{policy}"' for policy in policies)
    raise ValueError(f"must be one of {allowed}, or a table of these by pattern of buffer names")


class Train(Table):
    """How long and in what steps, and when to evaluate, save and stop."""

    EXCLUSIVE = (frozenset({"epochs", "steps"}),)
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="passes over the training samples; not together with train.steps",
        json_schema_extra={"default": "1.0, or none with train.steps"},
    )
    steps: Count | None = Field(
        default=None, description="rounds (steps of all workers); not together with train.epochs"
    )
    batch_size: Annotated[int, Field(ge=1, le=10**9)] = Field(
        default=32, description="samples per worker and micro-batch"
    )
    accumulate: Annotated[int, Field(ge=1, le=10**6)] = Field(
        default=1, description="micro-batches whose gradients are summed before workers agree"
    )
    precision: Literal["float32", "float64", "bfloat16", "mixed_bfloat16", "mixed_float16"] = Field(
        default="float32",
        description="dtype of parameters and arithmetic; mixed: float32 parameters, and bfloat16 or float16 "
        "arithmetic, the latter (slow on most CPUs) with dynamic loss scaling: steps that overflow are skipped",
    )
    clip_norm: Positive | None = Field(
        default=None,
        description="scale the gradient down if its global norm is larger than this; left out: no clipping",
    )
    target: float | None = Field(
        default=None, description="stop training when the metric reaches this value; left out: never"
    )
    patience: Count | None = Field(
        default=None,
        description="stop training after this many evaluations without improvement; left out: never",
    )
    min_delta: NotNegative = Field(
        default=0.0, description="the smallest change of the metric that counts as an improvement (for train.patience)"
    )
    evaluate_every: Amount = Field(
        default_factory=lambda: Amount(epochs=1.0),
        description="how often to evaluate; {fraction = 1}: only at the end",
    )
    keep_best: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="write best.safetensors whenever this value of the evaluations is better than ever: metric (by "
        "metric.goal), loss (smaller is better), or the name of another value (by metric.goal); left out: never",
    )
    evaluate_batch: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        default=None,
        description="samples per worker and forward pass in evaluations; left out: train.batch_size",
    )
    checkpoint_every: Amount | None = Field(
        default=None,
        description="how often to save a checkpoint; left out: only when the run ends or is interrupted",
    )
    keep_checkpoints: Annotated[int, Field(ge=1, le=10**6)] = Field(
        default=2, description="how many checkpoints to keep: the newest ones"
    )
    stop_seconds: Positive | None = Field(
        default=None,
        description="how long to wait for the current step to end after a stop signal (Ctrl-C, SIGTERM) before the "
        "ranks are ended without a checkpoint; left out: twice the longest step so far, and at least 10 "
        "s under `hpctrain run`, 30 s elsewhere",
    )
    nan: Literal["stop", "skip"] = Field(
        default="stop",
        description="what to do if a loss or gradient is not finite: end the run, or skip the update",
    )
    sync_batchnorm: bool = Field(
        default=False,
        description="batch norm over the samples of all workers instead of each worker's own; a worker without "
        "samples in a round computes on a dummy sample that does not count",
    )

    buffers: Annotated[Policy | dict[str, Policy], PlainValidator(_buffers)] = Field(
        default="rank0",
        description="which buffers of the model evaluation uses and the saved model has. rank0: those of rank 0; "
        "mean: the mean over the workers; own: each worker evaluates with its own, rank 0's are saved. "
        'A table assigns these to patterns of names: {"*.bank" = "own"}. Running statistics of batch '
        'norm are averaged unless a pattern other than "*" matches them',
        json_schema_extra={"allowed": '"rank0", "mean", "own"'},
    )

    @property
    def evaluation_batch(self) -> int:
        """Samples per worker in each forward pass of an evaluation."""
        return self.batch_size if self.evaluate_batch is None else self.evaluate_batch

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("epochs") is None and value.get("steps") is None:
            return {**value, "epochs": 1.0}
        return value

    @property
    def buffer_policies(self) -> dict[str, Policy]:
        """Policies by pattern; "*" applies to all buffers except running statistics of batch norm."""
        return self.buffers if isinstance(self.buffers, dict) else {"*": self.buffers}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            fail(("steps",), self.steps, f"train.epochs = {self.epochs:g} is also given; use one of the two")
        if self.min_delta > 0 and self.patience is None:
            fail(("min_delta",), self.min_delta, "has no effect without train.patience; set that too")
        return self


class Trace(Table):
    """What the ranks record about themselves."""

    enabled: bool = Field(default=True, description="write traces")
    flush_seconds: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=2.0, description="seconds between writes: at most this much is lost if a rank is killed"
    )
    resources_seconds: Annotated[float, Field(ge=0.01, le=86400)] = Field(
        default=1.0, description="seconds between samples of processor, memory, network and GPU use"
    )
    report: bool = Field(default=False, description="write report.html into the run folder at the end")


class CommunicatorTable(Table):
    """How ranks exchange."""

    wait: Literal["auto", "spin", "nap"] = Field(
        default="auto",
        description="waiting ranks spin (fast) or nap (yield the core to others); auto: depends on the number of "
        "cores",
    )
    shared: bool = Field(default=True, description="ranks of a node may exchange through shared memory windows")
    cuda_aware: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="whether the MPI library accepts buffers in GPU memory; auto: query the library, or try it in a "
        "separate process if it does not say; yes: only try it",
    )
    device_transport: Literal["auto", "ipc", "nccl", "mpi", "staged"] = Field(
        default="auto",
        description="how buffers in GPU memory are reduced; ipc: each rank sums its slice from the memory of its "
        "node's other ranks; nccl: by NCCL; mpi: MPI gets device pointers; staged: copied through pinned host memory; "
        "auto: the fastest of those that work, by a short measurement at the start (name one for identical bits)",
    )
    ranks_per_node: Count | None = Field(
        default=None,
        description="treat each group of this many ranks of a node as a node of its own (for tests and studies)",
    )


class Debug(Table):
    """For tests and studies."""

    slow: dict[int, Annotated[float, Field(ge=1, le=1e6)]] = Field(
        default={},
        description="rank = factor: the rank sleeps factor - 1 times its measured compute time in every step",
    )

    @field_validator("slow", mode="before")
    @classmethod
    def _ranks(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ranks: dict[int, Any] = {}
        for key, factor in value.items():
            rank = _rank(key)
            if rank is None or rank in ranks:
                fail((str(key),), None, "must be a rank, each once: a whole number from 0")
            elif isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor <= 1e6:
                fail((str(key),), factor, "must be a number, at least 1 and at most 1000000")
            else:
                ranks[rank] = factor
        return dict(sorted(ranks.items()))


def _rank(key: object) -> int | None:
    text = str(key)
    return int(text) if re.fullmatch(r"[0-9]{1,7}", text) else None
