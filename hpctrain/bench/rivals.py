"""Other libraries on the same ranks: torch.distributed's process group, and the training steps built on it.

Each rival lives in the ranks that measure hpctrain, so that blocks of both alternate in the same processes, with the
same model, data and threads. A rival that is not installed is left out. Real ranks only; all functions are collective.
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import nn

from hpctrain.bench.workload import Load
from hpctrain.comm.base import Communicator

BUCKETS_MB = (4, 25)  # bucket sizes that tuned DDP is tried with; 25 is its default
CHUNKS = 10  # that a parameter server of torch RPC cuts the model into (hpctrain.bench.rpc)
LEARNING: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9}


def rendezvous(comm: Communicator) -> str:
    """The URL at which all ranks can find each other: a port of rank 0's host that was free a moment ago."""
    url = None
    if comm.rank == 0:
        host = socket.gethostname() if len(set(comm.nodes)) > 1 else "127.0.0.1"
        with socket.socket() as free:
            free.bind(("", 0))
            url = f"tcp://{host}:{free.getsockname()[1]}"
    return str(comm.broadcast_json(url))


@contextmanager
def process_group(comm: Communicator) -> Iterator[None]:
    """torch's default process group over the ranks of `comm`, with gloo."""
    url = rendezvous(comm)
    torch.distributed.init_process_group("gloo", init_method=url, rank=comm.rank, world_size=comm.size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class PlainTraining:
    """A model trained the way that torch's users write it: forward, backward, optimizer."""

    def __init__(self, load: Load) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = load.build()
        self.inputs = torch.randn(load.batch, *load.inputs)
        self.targets = torch.randint(0, 10, (load.batch,))
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), **LEARNING)

    def step(self) -> None:
        """One step. Collective where the model or the optimizer is."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()


def ddp(load: Load) -> PlainTraining:
    """DistributedDataParallel as it comes."""
    training = PlainTraining(load)
    training.model = nn.parallel.DistributedDataParallel(training.model)
    return training


def tuned_ddp(load: Load, bucket_mb: float) -> PlainTraining:
    """DistributedDataParallel with all that makes it faster here, and torch's fused optimizer."""
    training = PlainTraining(load)
    training.model = nn.parallel.DistributedDataParallel(
        training.model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, static_graph=True
    )
    training.optimizer = torch.optim.SGD(training.model.parameters(), **LEARNING, fused=True)
    return training


def zero_ddp(load: Load) -> PlainTraining:
    """DistributedDataParallel whose optimizer's state is split over the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    training = tuned_ddp(load, BUCKETS_MB[-1])
    training.optimizer = ZeroRedundancyOptimizer(training.model.parameters(), torch.optim.SGD, **LEARNING)
    return training


def horovod(load: Load) -> PlainTraining:
    """Horovod, on the MPI library of these ranks."""
    hvd: Any = importlib.import_module("horovod.torch")
    hvd.init()
    training = PlainTraining(load)
    hvd.broadcast_parameters(training.model.state_dict(), root_rank=0)
    training.optimizer = hvd.DistributedOptimizer(training.optimizer, training.model.named_parameters())
    return training


def trainings() -> dict[str, Callable[[Load], PlainTraining]]:
    """The rivals of a synchronous step that are installed, by name, without tuned DDP."""
    found: dict[str, Callable[[Load], PlainTraining]] = {
        "DDP as it comes": ddp,
        "DDP with ZeroRedundancyOptimizer": zero_ddp,
    }
    if importlib.util.find_spec("horovod") is not None:
        found["Horovod"] = horovod
    return found
