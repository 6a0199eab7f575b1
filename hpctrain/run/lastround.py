"""The last round of an epoch, which may be smaller: how many samples a worker gets, and whether they suffice."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from hpctrain.data.generators import kept
from hpctrain.data.memory import unwrap
from hpctrain.data.order import round_bounds
from hpctrain.errors import DataError, ModelError
from hpctrain.replica.batchnorm import Synchronised

if TYPE_CHECKING:
    from hpctrain.data.loader import Batch
    from hpctrain.run.prepare import Prepared


def whole_rounds(length: int | None, round_size: int) -> int:
    """How many of an epoch's samples fill rounds of that size, for data.last = "drop". Raises DataError if none do."""
    if length is None:
        raise DataError('data.last = "drop": the length of the stream is unknown; define its __len__')
    if length < round_size:
        raise DataError(
            f'data.last = "drop": an epoch has {length} samples, fewer than the {round_size} of one round; '
            "lower train.batch_size, or keep the last round"
        )
    return length // round_size * round_size


def check_batchnorm(prepared: Prepared) -> None:
    """Refuse to train batch norm layers on a single value per channel; torch itself fails only when it happens.

    Raises ModelError. Not collective: all ranks get the same result.
    """
    layers: dict[nn.Module, str] = {
        module: name
        for name, module in prepared.model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and not isinstance(module, Synchronised)
    }
    base, _ = unwrap(prepared.splits.train)
    if not layers or isinstance(base, IterableDataset) or not (size := _round_with_one(prepared)):
        return
    layer = _starved(prepared, layers)
    if layer is not None:
        raise ModelError(
            f"layer {layers[layer]} is batch norm over a worker's own samples, and cannot be trained on a single one: "
            f"in an epoch of {prepared.epoch} samples, {size} per round, the last round has "
            f"{prepared.epoch % size or size} and may leave a worker a batch of one; "
            'set data.last = "drop", choose another train.batch_size, or (where workers step together) set '
            "train.sync_batchnorm = true"
        )


def _round_with_one(prepared: Prepared) -> int:
    """The round size of a phase whose last round, if the run reaches it, gives a worker a micro-batch of 1 (or may do
    so, where shares follow the workers' speeds); or 0."""
    own, epoch = prepared.job.train.batch_size, prepared.epoch
    for index, roles in enumerate(prepared.roles):
        strategy = prepared.strategy(index)
        together = not strategy.needs.queue or prepared.job.data.queue == "static"
        workers = len(roles.workers) if together else 1
        size = prepared.batch * workers
        start = epoch // size * size
        if start < epoch and start < prepared.total:
            shares = [b - a for a, b in pairwise(round_bounds(start, epoch, size, workers))]
            if strategy.balances or any(share % own == 1 for share in shares):
                return size
        if own == 1:
            return size
    return 0


def _starved(prepared: Prepared, layers: dict[nn.Module, str]) -> nn.Module | None:
    """The first layer that gets one value per channel from one sample; None if there is none or the model does not
    accept a single sample. Leaves model and generators unchanged."""
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(module)

    modes = [(module, module.training) for module in prepared.model.modules()]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with kept(), torch.no_grad(), prepared.autocast():
            prepared.model.eval()
            prepared.forward.outputs(_one_sample(prepared))
    except Exception:  # training will fail in the same way, with a better message
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found[0] if found else None


def _one_sample(prepared: Prepared) -> Batch:
    with prepared.loader(0, threads=0) as loader:
        return prepared.move(loader.take(0, 1))
