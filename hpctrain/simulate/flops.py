"""What the passes of a model cost that was never run: counted in floating-point operations (flops)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.generators import Generators
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.moving import move
from hpctrain.data.splits import make_order
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.models.forward import Forward
from hpctrain.models.losses import weigh
from hpctrain.models.wrappers import named_parameters
from hpctrain.replica.layout import Layout
from hpctrain.run.prepare import Measurable, prepare_evaluation
from hpctrain.simulate.calibration import MeasuredCost, ModelCosts, ModelWork, PassWork

META = torch.device("meta")
TOLERANCE = 0.05  # relative, of the flops of one model
TORCH = frozenset(["aten", "prim", "prims"])  # namespaces of operators, whose flops are counted where they matter


@dataclass(frozen=True)
class CountedPasses:
    """Of one model. `order`: names of parameters in the order in which backward completes their gradients; `shares`: of
    backward's flops, the part that ends with each of them. They add up to 1."""

    work: ModelWork
    order: tuple[str, ...]
    shares: tuple[float, ...]

    def differs(self, known: ModelWork) -> bool:
        """Whether this is another model, or the same one with samples of another size."""
        works = (self.work.forward, known.forward), (self.work.backward, known.backward)
        return any(abs(new.flops / old.flops - 1.0) > TOLERANCE for new, old in works)

    def costs(self, known: ModelCosts, measured: ModelWork, name: str, layout: Layout) -> ModelCosts:
        """What these passes cost where those of `known` were measured, which do the work `measured`: for each batch in
        proportion to operators, for each sample to flops."""
        places = {slot.name: index for index, slot in enumerate(layout.slots)}
        return ModelCosts(
            name=name,
            parameters=layout.parameters,
            forward=scaled(known.forward, self.work.forward, measured.forward),
            backward=scaled(known.backward, self.work.backward, measured.backward),
            order=[places[each] for each in self.order],
            shares=list(self.shares),
            work=self.work,
        )


def scaled(cost: MeasuredCost, work: PassWork, measured: PassWork) -> MeasuredCost:
    """What a pass costs that does `work`, if one that does `measured` costs `cost`."""
    return MeasuredCost(
        fixed_s=cost.fixed_s * work.operators / measured.operators,
        each_s=cost.each_s * work.flops / measured.flops,
        spread=cost.spread,
    )


class _Operators(TorchDispatchMode):
    """Counts calls of operators. `foreign`: those that are not torch's own and have no formula for their flops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.foreign: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func.namespace not in TORCH and func.overloadpacket not in flop_registry:
            self.foreign.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def parameters_of(model: nn.Module) -> int:
    """Elements of its trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count(parts: Measurable) -> CountedPasses:
    """Run one batch of the job through its model and count. Without memory (on the meta device) if the model can, else
    really. Raises ClusterError if nothing can be counted."""
    samples = min(parts.job.train.batch_size, make_order(parts.splits.train).length or 1)
    try:
        return _counted(parts, samples, META)
    except ClusterError:
        raise
    except Exception:  # a model may need values that do not exist here
        try:
            return _counted(parts, samples, parts.device)
        except ClusterError:
            raise
        except Exception as error:
            raise _unknown(parts, f"a pass to count them raised {type(error).__name__}: {error}") from error


def counted(job: Job) -> CountedPasses:
    """The same for a job whose parts are not built yet. Raises HpctrainErrors."""

    def body(comm: Communicator) -> CountedPasses:
        return count(prepare_evaluation(job, comm))

    return World(1, [0]).run(body)[0]


def _unknown(parts: Measurable, why: str) -> ClusterError:
    return ClusterError(
        f"model.name = {parts.job.model.name!r}: how many floating-point operations it takes is not known ({why}); "
        "calibrate with this job: hpctrain calibrate --measure JOB"
    )


def _counted(parts: Measurable, samples: int, device: torch.device) -> CountedPasses:
    inner: nn.Module = getattr(parts.model, "_orig_mod", parts.model)  # torch.compile hides its operators
    model, random = copy.deepcopy(inner).to(device), Generators.now()
    flops, operators = FlopCounterMode(display=False), _Operators()
    order, marks = list[str](), list[float]()

    def complete(name: str) -> None:
        order.append(name)
        marks.append(flops.get_total_flops())

    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(lambda name, _: complete(name), name))
    try:
        train = parts.splits.train
        with Loader(train, make_order(train, shuffle=False), threads=0, collate=parts.collate) as loader:
            batch = parts.move(loader.take(0, samples))
        batch = Batch(move(batch.inputs, device, {}), move(batch.targets, device, {}), batch.size)
        with operators, flops:
            caller = Forward(model, parts.loss)
            outputs = caller.outputs(batch)
            forward, called = flops.get_total_flops(), operators.calls
            total = _total(outputs)
            (weigh(caller.loss(outputs, batch), samples).term if total is None else total).backward()
            backward = flops.get_total_flops() - forward
    finally:
        random.restore()
    if operators.foreign:
        raise _unknown(parts, f"torch does not know what its operator {operators.foreign[0]} takes")
    if not forward or not backward:
        raise _unknown(parts, "torch counts none for its operators")
    work = ModelWork(
        forward=PassWork(flops=forward / samples, operators=called),
        backward=PassWork(flops=backward / samples, operators=operators.calls - called),
    )
    return CountedPasses(work, tuple(order), _shares([mark - forward for mark in marks], backward))


def _total(outputs: Any) -> Tensor | None:
    """A scalar that depends on all outputs: what losses compute besides has hardly any flops. None if there is no
    tensor in plain sight, as in an object with a loss."""
    terms = [leaf.sum() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(terms).sum() if terms else None


def _shares(marks: Sequence[float], whole: float) -> tuple[float, ...]:
    """Parts of the pass that end at these marks; what follows the last one belongs to it."""
    ends = [*marks[:-1], whole]
    return tuple((b - a) / whole for a, b in zip([0.0, *ends], ends, strict=False))
