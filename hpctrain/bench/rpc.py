"""The rival of the asynchronous parameter server: one built on torch.distributed.rpc.

The model is cut into chunks. A worker sends all chunks of its gradient at once; the server updates each as it arrives
and replies with the chunk's parameters, so that both directions of a link are busy. Unlike ours, it promises nothing
about versions: a worker may receive chunks of different versions, or one that another worker's update is changing.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.distributed import rpc

from hpctrain.bench.rivals import CHUNKS, rendezvous
from hpctrain.bench.workload import Load
from hpctrain.comm.base import Communicator

RATE = 1e-4
SERVER = "server"


class ChunkServer:
    """Owns the parameters, chunk by chunk."""

    def __init__(self, length: int) -> None:
        self.chunks = list(torch.zeros(length).tensor_split(CHUNKS))
        self.chunks = [chunk.clone() for chunk in self.chunks]  # torch would copy a part of a tensor before sending it

    def update(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """One step of SGD on a chunk; returns its parameters."""
        return self.chunks[index].add_(gradient, alpha=-RATE)


@cache
def served(length: int) -> ChunkServer:
    """The server's parameters, the same for all workers. (What a worker names in a call must be a function.)"""
    return ChunkServer(length)


def update(length: int, index: int, gradient: torch.Tensor) -> torch.Tensor:
    """What a worker asks the server for."""
    return served(length).update(index, gradient)


class ChunkWorker:
    """A worker's model, with its parameters and gradients in one tensor each."""

    def __init__(self, load: Load) -> None:
        torch.manual_seed(0)
        self.load, self.model = load, load.build()
        self.inputs = torch.randn(load.batch, *load.inputs)
        self.targets = torch.randint(0, 10, (load.batch,))
        parameters = list(self.model.parameters())
        self.length = sum(parameter.numel() for parameter in parameters)
        self.values, self.gradient = torch.zeros(self.length), torch.zeros(self.length)
        low = 0
        for parameter in parameters:
            part = slice(low, low + parameter.numel())
            self.values[part].copy_(parameter.detach().flatten())
            parameter.data = self.values[part].view_as(parameter)
            parameter.grad = self.gradient[part].view_as(parameter)
            low = part.stop

    def compute(self) -> None:
        """Forward and backward."""
        self.gradient.zero_()
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()

    def trip(self) -> None:
        """Send the gradient, receive the parameters."""
        calls = [
            rpc.rpc_async(SERVER, update, args=(self.length, index, part))
            for index, part in enumerate(self.gradient.tensor_split(CHUNKS))
        ]
        for call, part in zip(calls, self.values.tensor_split(CHUNKS), strict=True):
            part.copy_(call.wait())


@contextmanager
def agents(comm: Communicator, server: int) -> Iterator[None]:
    """An RPC agent on every rank, for the duration of this context: agents of one host look for messages all the time.
    Leaving waits for all calls. Collective."""
    name = SERVER if comm.rank == server else f"worker{comm.rank}"
    options = rpc.TensorPipeRpcBackendOptions(init_method=rendezvous(comm))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself calls something that it warns about
        rpc.init_rpc(name, rank=comm.rank, world_size=comm.size, rpc_backend_options=options)
    try:
        yield
        rpc.shutdown()
    finally:
        served.cache_clear()
        gc.collect()
