"""The parts of a model that are not trained: frozen parameters and buffers. Strategies do not see them.

All ranks start with rank 0's. After that each worker has its own buffers (its running means); `train.buffers` says
which ones evaluation and the saved model use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.comm.alike import Topic, check_alike
from hpctrain.comm.base import Communicator
from hpctrain.errors import ModelError
from hpctrain.job.tables import Policy
from hpctrain.models.wrappers import named_parameters, plain_name
from hpctrain.text import shown

STATISTICS = ("running_mean", "running_var")
OTHERS = "*"  # the pattern for all buffers that are not running statistics
LONGEST = 2**30  # maximum bytes in one message


@dataclass(frozen=True)
class TensorKind:
    """A tensor's type, without its values. `pieces`: dtype and shape of the dense tensors that hold the values."""

    dtype: str
    shape: tuple[int, ...]
    layout: str
    pieces: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorKind:
        """The kind of `tensor`."""
        pieces = tuple((_name(piece.dtype), tuple(piece.shape)) for piece in _pieces(tensor))
        return cls(_name(tensor.dtype), tuple(tensor.shape), _name(tensor.layout), pieces)

    def fits(self, tensor: Tensor) -> bool:
        """Whether values of this kind can be copied into `tensor`."""
        return (self.dtype, self.shape, self.layout) == (_name(tensor.dtype), tuple(tensor.shape), _name(tensor.layout))


class Untrained:
    """Frozen parameters and buffers of `model`. `policies`: for patterns of buffer names, what to do with the buffers.

    "mean": the mean over the workers (for buffers that have one; otherwise as "rank0"). "rank0": rank 0's values.
    "own": each worker evaluates with its own, and rank 0's are saved. The first matching pattern applies; "*" matches
    all buffers that are not running statistics of batch norm. Without a matching pattern, running statistics are
    averaged and all other buffers are rank 0's. Raises ModelError for a pattern that matches nothing.
    """

    def __init__(self, model: nn.Module, policies: Mapping[str, Policy] | None = None) -> None:
        self.model = model
        self._given = dict(policies or {})
        self._frozen = [name for name, p in named_parameters(model) if not p.requires_grad]
        places = [(path, name) for path, module in model.named_modules() for name, _ in module._buffers.items()]
        names = [plain_name(_join(path, name)) for path, name in places]
        for pattern in self._given:
            if pattern != OTHERS and not any(fnmatchcase(name, pattern) for name in names):
                known = shown(", ".join(names), 400) or "none"
                raise ModelError(f'train.buffers: "{pattern}" matches no buffer of the model; it has {known}')

    # -- which tensors -------------------------------------------------------------------------------------
    def frozen(self) -> dict[str, Tensor]:
        """Parameters that were frozen from the start, by name."""
        own = dict(named_parameters(self.model))
        return {name: own[name] for name in self._frozen}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that are saved with the model, by name; each worker has its own."""
        saved = self.model.state_dict(keep_vars=True)
        return {plain_name(name): b for name, b in self.model.named_buffers() if name in saved}

    def rest(self) -> dict[str, Tensor]:
        """Tensors not kept per worker and not seen by strategies: frozen parameters, and buffers that are not saved."""
        saved = self.buffers()
        return {**self.frozen(), **{name: b for name, b in self._all_buffers().items() if name not in saved}}

    def _all_buffers(self) -> dict[str, Tensor]:
        return {plain_name(name): buffer for name, buffer in self.model.named_buffers()}

    def policies(self) -> dict[str, Policy]:
        """The policy of each saved buffer, for evaluation and the saved model."""
        norms = [path for path, module in self.model.named_modules() if _normalises(module)]
        statistics = {plain_name(_join(path, name)) for path in norms for name in STATISTICS}
        return {name: self._policy(name, name in statistics) for name in self.buffers()}

    def _policy(self, name: str, statistic: bool) -> Policy:
        for pattern, policy in self._given.items():
            if fnmatchcase(name, pattern) and (pattern != OTHERS or not statistic):
                return policy
        return "mean" if statistic else "rank0"

    # -- sharing rank 0's values ---------------------------------------------------------------------------
    def share(self, comm: Communicator, ranks: Iterable[int] | None = None) -> None:
        """Give `ranks` (default: all) rank 0's tensors. Collective over `comm`; equal tensors are not sent."""
        tensors = {**self.frozen(), **self._all_buffers()}
        wanted = set(range(comm.size) if ranks is None else ranks)
        if wanted:
            _broadcast(comm, tensors, wanted, self.put)

    def has_place_for(self, name: str) -> bool:
        """Whether the model has the module that this parameter or buffer belongs to."""
        path = name.rpartition(".")[0]
        paths = (plain_name(f"{other}.") for other, _ in self.model.named_modules(remove_duplicate=False) if other)
        return not path or f"{path}." in paths

    def put(self, name: str, value: Tensor) -> Callable[[], None]:
        """Set a parameter or buffer; the function returned restores the old value.

        A saved buffer of another shape is replaced. A tensor that is not saved keeps its shape; if shapes differ, it
        keeps its values too.
        """
        with torch.no_grad():
            old = self._find(name)
            if old is not None and value.layout is torch.strided and TensorKind.of(value).fits(old):
                kept = old.clone()
                old.copy_(value)
                return lambda: _copy(old, kept)
            if old is not None and old.shape != value.shape and name not in self.buffers():
                return lambda: None
            places = self._places(name, old)
            _place(places, value.to(old.device) if old is not None else value)
        return lambda: _place(places, old)

    def _find(self, name: str) -> Tensor | None:
        path, _, last = name.rpartition(".")
        module = self._module(path)
        own = module._buffers if last in module._buffers else module._parameters  # not a dict in scripted modules
        return own[last] if last in own else None  # noqa: SIM401

    def _places(self, name: str, buffer: Tensor | None) -> list[tuple[nn.Module, str]]:
        """The module and attribute name for every name that the buffer has."""
        if buffer is not None:
            return [(m, key) for m in self.model.modules() for key, b in m._buffers.items() if b is buffer]
        path, _, last = name.rpartition(".")
        return [(self._module(path), last)]

    def _module(self, path: str) -> nn.Module:
        """The module by its plain name; for one wrapped by torch.compile, the module inside."""
        module = self.model
        for part in path.split(".") if path else []:
            module = getattr(module, part)  # scripted modules have no get_submodule
        while "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        return module

    # -- evaluating and saving -----------------------------------------------------------------------------
    @contextmanager
    def agreed(self, comm: Communicator) -> Iterator[None]:
        """Apply the policies to the saved buffers inside the context; restore them afterwards. Collective over the
        workers."""
        with ExitStack() as undo:
            for put_back in self._agree(comm):
                undo.callback(put_back)
            yield

    def settle(self, workers: Communicator | None, comm: Communicator) -> None:
        """Apply the policies permanently; all ranks of `comm` get the same values. Collective."""
        if workers is not None:
            for _ in self._agree(workers):
                pass
        self.share(comm)

    def _agree(self, comm: Communicator) -> Iterator[Callable[[], None]]:
        if comm.size == 1:
            return
        buffers, policies = self.buffers(), self.policies()
        means = {n: b for n, b in buffers.items() if policies[n] == "mean" and _has_mean(b)}
        facts = {f"buffer {name}": f"of shape {tuple(buffer.shape)}" for name, buffer in means.items()}
        advice = 'buffers whose shapes differ have no mean; set train.buffers to "rank0" or "own" for it'
        check_alike(comm, [Topic(" is ", advice, ModelError, facts, "not there")], everywhere=False)
        for name, buffer in means.items():
            yield self.put(name, _mean(comm, buffer))
        shared = {n: b for n, b in buffers.items() if n not in means and policies[n] != "own"}
        undone: list[Callable[[], None]] = []
        _broadcast(comm, shared, set(range(comm.size)), lambda name, value: undone.append(self.put(name, value)))
        yield from undone


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors' names, kinds and bytes."""
    return hashlib.sha256(json.dumps(_rows(tensors)).encode()).hexdigest()[:32]


def _has_mean(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _mean(comm: Communicator, buffer: Tensor) -> Tensor:
    """The mean over the ranks, summed in float64. Collective."""
    real = torch.view_as_real(buffer.detach().resolve_conj()) if buffer.is_complex() else buffer.detach()
    sums = real.to("cpu", torch.float64).reshape(-1).numpy().copy()
    comm.all_reduce(sums)
    mean = torch.from_numpy(sums / comm.size).view(real.shape)
    return (torch.view_as_complex(mean) if buffer.is_complex() else mean).to(buffer.device, buffer.dtype)


def _broadcast(
    comm: Communicator, tensors: Mapping[str, Tensor], ranks: set[int], put: Callable[[str, Tensor], Any]
) -> None:
    """Call `put` with rank 0's values on those of `ranks` that differ. Collective; sends only a hash if none do."""
    rows = _rows(tensors)
    code = hashlib.sha256(json.dumps(rows).encode()).digest()[:8]
    table = comm.gather_rows(np.frombuffer(code, np.int64))
    if (table[sorted(ranks)] == table[0]).all():
        return
    first = comm.broadcast_json(rows)
    differs = [name for name, row in first.items() if rows.get(name) != row] if comm.rank in ranks else []
    wanted = set().union(*comm.gather_json(differs))
    for name in [name for name in first if name in wanted]:
        kind = _kind(first[name])
        pieces = [raw(piece) for piece in _pieces(tensors[name])] if comm.rank == 0 else None
        pieces = _send_all(comm, kind, pieces)
        if name in differs:
            put(name, _put_together(kind, pieces))


def _send_all(comm: Communicator, kind: TensorKind, pieces: list[NDArray[np.uint8]] | None) -> list[NDArray[np.uint8]]:
    sizes = [int(np.prod(shape, dtype=np.int64)) * _dtype(dtype).itemsize for dtype, shape in kind.pieces]
    arrays = [np.empty(size, np.uint8) for size in sizes] if pieces is None else pieces
    for array in arrays:
        for start in range(0, array.size, LONGEST):
            comm.broadcast(array[start : start + LONGEST])
    return arrays


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """By name: the tensor's kind and a hash of its bytes, as plain values for sending."""
    rows = {}
    for name, tensor in tensors.items():
        code = hashlib.sha256()
        for piece in _pieces(tensor):
            code.update(raw(piece).data)
        kind = TensorKind.of(tensor)
        pieces = [[dtype, list(shape)] for dtype, shape in kind.pieces]
        rows[name] = [kind.dtype, list(kind.shape), kind.layout, pieces, code.hexdigest()[:32]]
    return rows


def _kind(row: list[Any]) -> TensorKind:
    dtype, shape, layout, pieces, _ = row
    return TensorKind(dtype, tuple(shape), layout, tuple((name, tuple(size)) for name, size in pieces))


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold the values: the tensor itself, or the components of a sparse one."""
    tensor = tensor.detach()
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    places = [tensor.crow_indices(), tensor.col_indices()] if by_row else [tensor.ccol_indices(), tensor.row_indices()]
    return [*places, tensor.values()]


def _put_together(kind: TensorKind, pieces: list[NDArray[np.uint8]]) -> Tensor:
    dense = [from_raw(array, *piece) for array, piece in zip(pieces, kind.pieces, strict=True)]
    if kind.layout == "strided":
        return dense[0]
    if kind.layout == "sparse_coo":
        return torch.sparse_coo_tensor(dense[0], dense[1], kind.shape, is_coalesced=True)
    layout = getattr(torch, kind.layout)
    return torch.sparse_compressed_tensor(dense[0], dense[1], dense[2], size=kind.shape, layout=layout)


def raw(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a dense tensor of any dtype; not copied if it is contiguous on the CPU."""
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array: NDArray[np.uint8] = whole.reshape(-1).view(torch.uint8).numpy()
    return array


def from_raw(array: NDArray[np.uint8], dtype: str, shape: Sequence[int]) -> Tensor:
    """A tensor over these bytes."""
    if not array.size:  # NumPy gives empty arrays a stride that torch cannot view
        return torch.empty(tuple(shape), dtype=_dtype(dtype))
    return torch.from_numpy(array).view(_dtype(dtype)).view(tuple(shape))


def _place(places: Sequence[tuple[nn.Module, str]], buffer: Tensor | None) -> None:
    for module, name in places:
        module._buffers[name] = buffer


def _copy(into: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        into.copy_(values)


def _normalises(module: nn.Module) -> bool:
    """Whether its buffers are running statistics. A scripted module keeps only the name of its class."""
    scripted = str(getattr(module, "original_name", ""))
    return isinstance(module, _NormBase) or scripted.startswith(("BatchNorm", "SyncBatchNorm", "InstanceNorm"))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(thing: torch.dtype | torch.layout) -> str:
    return str(thing).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
