"""Batch norm over the samples of all workers (`train.sync_batchnorm`): N workers compute the same as one would.

The forward pass gathers every worker's count, mean and sum of squared deviations per channel, as torch.nn.SyncBatchNorm
does; combining them in rank order gives the same bits everywhere and avoids cancellation. The backward pass all-reduces
the two sums of the gradient. All workers must therefore run the same layers in the same order, equally often: a worker
whose share of a round has fewer micro-batches than another's runs extra ones on a borrowed sample that does not count
(see `Trainer`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hpctrain.comm.base import Communicator
from hpctrain.errors import ModelError
from hpctrain.replica.coupling import Coupling


class BatchNorms(Coupling):
    """All batch norm layers of one model, which normalise together between `join` and `leave`.

    Before and after that, and in evaluation mode, they behave as torch's own; names in the state_dict do not change.
    `counted`: whether the samples now passing through the model count. Raises ModelError if the model has no such
    layer, or a layer whose class has its own `forward`.
    """

    waits_in_forward = True

    def __init__(self, model: nn.Module) -> None:
        self.counted = True
        self._comm: Communicator | None = None
        self._ferry: _Ferry | None = None
        self._layers: list[tuple[nn.Module, type[nn.Module]]] = []
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
        for name, layer in found:
            if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
                raise ModelError(
                    f"train.sync_batchnorm = true: layer {name or 'model'} is a {type(layer).__name__} with its own "
                    "forward, which cannot be replaced; use torch.nn.BatchNorm1d, 2d or 3d"
                )
        if not found:
            raise ModelError(
                f"train.sync_batchnorm = true: the model {type(model).__name__} has no torch.nn.BatchNorm1d, 2d or 3d "
                "layer; leave the key out"
            )
        for _, layer in found:
            self._layers.append((layer, type(layer)))
            layer.__class__ = _synchronised(type(layer))  # type: ignore[assignment]
            layer.__dict__["norms"] = self

    @property
    def comm(self) -> Communicator | None:
        """The workers that normalise together; None if each worker normalises alone."""
        return self._comm

    def join(self, workers: Communicator) -> None:
        """Normalise over the samples of all `workers` from now on, through a separate communicator. Collective."""
        if workers.size > 1:
            self._comm = workers.split(0, workers.rank)
            self._ferry = None if workers.concurrent else _Ferry()

    def idle(self, batches: Iterable[int], own: int) -> int:
        """The number of micro-batches that this worker has fewer than the worker with the most."""
        return max(batches) - own

    def before(self, counts: bool) -> None:
        """Set whether the next samples through the model count."""
        self.counted = counts

    def leave(self) -> None:
        """Normalise separately again. Collective, like `join`."""
        if self._comm is not None:
            self._comm.free()
        self._comm, self.counted = None, True

    def restore(self) -> None:
        """Give the layers their original classes again."""
        for layer, cls in self._layers:
            layer.__class__ = cls
            layer.__dict__.pop("norms", None)
        self._layers = []

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, during which virtual ranks may wait for each other."""
        if self._comm is None or self._ferry is None:
            loss.backward()
        else:
            self._ferry.run(loss.backward)

    def moments(self, count: float, mean: NDArray[Any], squares: NDArray[Any]) -> tuple[float, Any, Any]:
        """(count, mean, biased variance) per channel over all workers, from this one's; float64. Collective."""
        assert self._comm is not None
        with self._waiting(self._comm):
            table = self._comm.gather_rows(np.concatenate([[count], mean, squares]))
        counts, means, deviations = table[:, :1], table[:, 1 : 1 + mean.size], table[:, 1 + mean.size :]
        total = float(counts.sum())
        if total == 0:
            raise ValueError("batch norm over no samples")
        joint = (counts * means).sum(0) / total
        return total, joint, (deviations + counts * (means - joint) ** 2).sum(0) / total

    def add_up(self, sums: NDArray[Any]) -> None:
        """Sum over all workers, in place; float64. Collective, called during backward."""
        assert self._comm is not None
        comm = self._comm
        with self._waiting(comm):
            if self._ferry is None:
                comm.all_reduce(sums)
            else:
                self._ferry.carry(lambda: comm.all_reduce(sums))

    @contextmanager
    def _waiting(self, comm: Communicator) -> Iterator[None]:
        """Count the time inside as waiting."""
        begun = comm.now()
        yield
        self.waited += comm.now() - begun

    def __deepcopy__(self, memo: Any) -> BatchNorms:
        return self  # a copied model (such as a moving average) normalises with the same workers


def sync_layers(model: nn.Module) -> list[str]:
    """The names of torch.nn.SyncBatchNorm layers, which do not use our workers by themselves."""
    return [name or "the model" for name, layer in model.named_modules() if isinstance(layer, nn.SyncBatchNorm)]


class Synchronised(_BatchNorm):
    """The class that a batch norm layer gets; its original class follows in the MRO."""

    norms: BatchNorms

    def forward(self, input: Tensor) -> Tensor:
        """(n, channels, ...) -> the same. Collective over the workers in training mode."""
        norms: BatchNorms | None = self.__dict__.get("norms")
        if norms is None or norms.comm is None or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            total, mean, variance = _joint_moments(norms, input)
            if total <= 1:  # torch raises the same error for one process
                raise ValueError(f"expected more than 1 value per channel when training, got {list(input.shape)}")
            if self.track_running_stats:
                self._track(mean, variance * (total / (total - 1)))
        return cast(
            Tensor,
            _Normalise.apply(input, self.weight, self.bias, mean, variance, self.eps, total, norms),
        )

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(running.to(value.dtype) * (1 - share) + value * share)


class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d):
    """BatchNorm1d over all workers' samples."""


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d):
    """BatchNorm2d over all workers' samples."""


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d):
    """BatchNorm3d over all workers' samples."""


def _synchronised(cls: type[nn.Module]) -> type[nn.Module]:
    known: dict[type[nn.Module], type[nn.Module]] = {
        nn.BatchNorm1d: SyncBatchNorm1d,
        nn.BatchNorm2d: SyncBatchNorm2d,
        nn.BatchNorm3d: SyncBatchNorm3d,
    }
    return known.get(cls) or type(f"Sync{cls.__name__}", (Synchronised, cls), {})


def _joint_moments(norms: BatchNorms, x: Tensor) -> tuple[float, Tensor, Tensor]:
    wide, axes = _wide(x), _axes(x)
    channels = x.shape[1]
    count = x.numel() / channels if norms.counted and channels else 0.0
    if count:
        mean = wide.mean(axes)
        squares = (wide - _spread(mean, x)).square_().sum(axes)
    else:
        mean = squares = wide.new_zeros(channels)
    total, joint, variance = norms.moments(count, _to_wire(mean), _to_wire(squares))
    return total, _from_wire(joint, wide), _from_wire(variance, wide)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias; the moments depend on every worker's x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        total: float,
        norms: BatchNorms,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.total, ctx.norms, ctx.counted = total, norms, norms.counted
        scale, shift = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        return nn.functional.batch_norm(_wide(x), mean, variance, scale, shift, False, 0.0, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        axes, dy = _axes(x), gradient.to(mean.dtype)
        centred = _wide(x) - _spread(mean, x)
        sums = torch.stack([dy.sum(axes), (dy * centred).sum(axes)])
        d_weight = (sums[1] * inverse).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = sums[0].to(weight.dtype) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            wire = _to_wire(sums.reshape(-1) if ctx.counted else torch.zeros_like(sums).reshape(-1))
            ctx.norms.add_up(wire)
            if ctx.counted:  # the joint moments depend on x
                of_mean, of_variance = _from_wire(wire.reshape(2, -1) / ctx.total, dy)
                dy = dy - _spread(of_mean, x) - centred.mul_(_spread(of_variance * inverse.square(), x))
            scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
            dx = (dy * _spread(scale, x)).to(x.dtype)
        return dx, d_weight, d_bias, None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, because sums are computed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _spread(channels: Tensor, x: Tensor) -> Tensor:
    """(channels,) -> (1, channels, 1, ...), to broadcast with x."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))


def _to_wire(values: Tensor) -> NDArray[Any]:
    return values.detach().to("cpu", torch.float64, copy=True).numpy()


def _from_wire(values: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)


class _Ferry:
    """Runs a backward pass in a separate thread, and its communication with other virtual ranks outside that thread.

    torch's autograd engine keeps one queue per thread: a virtual rank that waited inside its backward pass would be
    given work of the next one. Only one of the two threads runs at a time, so the run stays deterministic.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._answered: SimpleQueue[BaseException | None] = SimpleQueue()
        self._errors: list[BaseException] = []

    def run(self, function: Callable[[], Any]) -> None:
        """`function()`, in a thread; re-raises its exception."""
        thread = threading.Thread(target=self._body, args=(function,), daemon=True)
        thread.start()
        while (action := self._asked.get()) is not None:
            try:
                action()
            except BaseException as error:  # raised by this rank, or by the end of its world
                self._answered.put(error)
                thread.join()
                raise
            self._answered.put(None)
        thread.join()
        if self._errors:
            raise self._errors.pop()

    def _body(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            self._errors.append(error)
        self._asked.put(None)

    def carry(self, action: Callable[[], None]) -> None:
        """Called in that thread: run `action` where virtual ranks may wait."""
        self._asked.put(action)
        error = self._answered.get()
        if error is not None:
            raise RuntimeError("the other virtual ranks have ended") from error
