"""Checkpoints and the final model as safetensors files, written to a temporary name and renamed. Nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpctrain.comm.base import Buffer
from hpctrain.errors import CheckpointError
from hpctrain.filenames import CHECKPOINTS
from hpctrain.models.wrappers import plain_name
from hpctrain.replica.state import OPTIMIZER, Own, State
from hpctrain.replica.tensors import as_array, as_tensor
from hpctrain.run.untrained import digest

FORMAT = "hpctrain-checkpoint-2"
FORMAT_0_1 = "hpctrain-checkpoint-1"  # can be read, too


@dataclass
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped.

    `parameters`: the arena's flat tensor, split by name in the file. `workers[i]`: worker i's own tensors (buffers,
    random state). `numbers[i]`: its strategy's plain values (`Own.numbers`). `files`: whether each worker has also
    written a file of arrays. `progress`: plain values (cursor, phase, rule, metrics). `rest`: the model's other tensors
    (`Untrained.rest`); they rarely change, so they are written once, to a file of their own. After loading, `rest` is
    empty if the model just built has the same tensors, or if the checkpoint is older than that file.
    """

    fingerprint: str
    parameters: dict[str, Tensor]
    state: State
    workers: list[dict[str, Tensor]]
    progress: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    files: bool = False


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write it to checkpoints/, named by its cursor, then remove all but the newest `keep`. On rank 0 only."""
    rest = _dense(checkpoint.rest)
    code = digest(rest) if rest else None
    if code is not None and not (file := _rest_file(folder / "checkpoints", code)).exists():
        _write(file, {name: _storable(tensor) for name, tensor in rest.items()}, {})
    tensors = {f"parameter/{name}": value for name, value in checkpoint.parameters.items()}
    for index, own in enumerate(checkpoint.workers):
        tensors |= {f"worker/{index}/{name}": value for name, value in own.items()}
    state = checkpoint.state
    tensors |= {f"state/{path}": as_tensor(array) for path, array in state.arrays()}
    head = {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "workers": len(checkpoint.workers),
        "rest": code,
        "state": state.head(),
        "own": {"numbers": checkpoint.numbers, "files": checkpoint.files},
        "progress": checkpoint.progress,
    }
    path = checkpoint_path(folder, checkpoint.progress["cursor"])
    _write(path, tensors, {"hpctrain": json.dumps(head)})
    with suppress(OSError):  # a leftover file does no harm
        for old in list_checkpoints(folder)[:-keep]:
            old.unlink(missing_ok=True)
    _forget_rests(folder)
    _forget_own(folder)
    return path


def save_own(folder: Path, cursor: int, worker: int, own: Own) -> None:
    """Write a worker's own arrays next to the checkpoint with that cursor; they count once that checkpoint exists. On
    that worker only. Raises CheckpointError."""
    tensors = {quote(name, safe=""): as_tensor(array) for name, array in own.arrays.items()}
    _write(_own_file(folder, cursor, worker), tensors, {"worker": str(worker)})


def load_own(folder: Path, cursor: int, worker: int) -> dict[str, Buffer]:
    """The arrays that `save_own` wrote. Raises CheckpointError."""
    path = _own_file(folder, cursor, worker)
    if not path.exists():
        raise CheckpointError(
            f"{path}, which holds the state of worker {worker} in that checkpoint, is missing; restore it, or remove "
            f"{checkpoint_path(folder, cursor).name} to resume from the previous checkpoint"
        )
    return {unquote(name): as_array(tensor) for name, tensor in _read(path)[1].items()}


def _own_file(folder: Path, cursor: int, worker: int) -> Path:
    return folder / CHECKPOINTS / f"{cursor:012d}.worker_{worker:05d}.safetensors"


def _forget_own(folder: Path) -> None:
    """Remove the workers' files of checkpoints that no longer exist or were never finished."""
    with suppress(OSError):
        kept = {path.stem for path in list_checkpoints(folder)}
        for file in (folder / CHECKPOINTS).glob("*.worker_*.safetensors"):
            if file.name.partition(".")[0] not in kept:
                file.unlink(missing_ok=True)


def _forget_rests(folder: Path) -> None:
    """Remove the `rest` files that no remaining checkpoint uses; if a checkpoint cannot be read, keep all."""
    with suppress(OSError, CheckpointError):
        heads = [_head(path) for path in list_checkpoints(folder)]
        needed = {_rest_file(folder / "checkpoints", str(head.get("rest"))) for head in heads}
        for file in set((folder / "checkpoints").glob(_rest_file(Path(), "*").name)) - needed:
            file.unlink(missing_ok=True)


def _rest_file(folder: Path, code: str) -> Path:
    return folder / f"untrained-{code}.safetensors"


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.layout is torch.strided}


def _storable(tensor: Tensor) -> Tensor:
    """The tensor in a form that safetensors supports: it has no complex128."""
    known = tensor.dtype not in (torch.complex128, torch.complex32)
    return tensor.detach() if known else torch.view_as_real(tensor.detach().resolve_conj())


def _stored(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_storable`. A copy, because a file aligns tensors for the stored dtype, not for this one."""
    return torch.view_as_complex(tensor.clone()) if like.is_complex() and not tensor.is_complex() else tensor


def checkpoint_path(folder: Path, cursor: int) -> Path:
    """The path of a run folder's checkpoint with that cursor."""
    return folder / CHECKPOINTS / f"{cursor:012d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("*.safetensors") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def load_checkpoint(
    path: Path,
    fingerprint: str,
    names: Mapping[str, tuple[int, ...]],
    rest: Mapping[str, Tensor] | None = None,
    wrapped: str = "",
) -> Checkpoint:
    """Load a checkpoint. Raises CheckpointError unless it is complete and belongs to this model (`names`: parameter
    shapes; `rest`: the other tensors of the model as built now).

    `wrapped`: the model's fingerprint with the names that torch.compile gives, which older versions used for saving.
    """
    head, saved = _read(path)
    tensors = {plain_name(name): tensor for name, tensor in saved.items()}
    if not isinstance(head, dict) or head.get("format") not in (FORMAT, FORMAT_0_1):
        raise CheckpointError(f"{path} is not an hpctrain checkpoint, or is one of another version; remove it")
    parameters = _below(tensors, "parameter/")
    try:
        if head["fingerprint"] not in (fingerprint, wrapped):
            raise CheckpointError(f"{path} is a checkpoint of another model: {_difference(parameters, names)}")
        if head["format"] == FORMAT_0_1:
            head = _of_0_1(head)
        state = State.of_head(head["state"])
        kept = state.optimizer
        kept.numbers = {plain_name(name): numbers for name, numbers in kept.numbers.items()}
        for name, tensor in _below(tensors, "state/").items():
            state.place(name, as_array(tensor))
        own = head["own"]
        workers = [_below(tensors, f"worker/{index}/") for index in range(head["workers"])]
        found = _load_rest(path, head.get("rest"), _dense(rest or {}))
        progress = head["progress"]
        return Checkpoint(fingerprint, parameters, state, workers, progress, found, own["numbers"], bool(own["files"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not an hpctrain checkpoint: its header lacks {error}; remove it") from None


def _of_0_1(head: dict[str, Any]) -> dict[str, Any]:
    """The header of a version 0.1 checkpoint, converted to the current format."""
    state, workers = head["state"], range(head["workers"])
    counters = dict(state["counters"])
    clips = [counters.pop(f"clip of worker {worker}", None) for worker in workers]
    numbers = [{} if clip is None else {"clip": clip} for clip in clips]
    bounds, kept = [0, state["high"]], {OPTIMIZER: state["groups"]}
    now = {"bounds": bounds, "numbers": kept, "counters": counters, "rule": state["rule"]}
    return {**head, "state": now, "own": {"numbers": numbers, "files": False}}


def _load_rest(path: Path, code: str | None, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if code is None or code == digest(own):
        return {}
    file = _rest_file(path.parent, code)
    if not file.exists():
        raise CheckpointError(
            f"{file}, which holds the frozen parameters of {path.name}, is missing; restore it, or train without "
            "--resume"
        )
    found = _read(file)[1]
    for name in [*own, *found]:
        if name not in own or name not in found:
            raise CheckpointError(f"{path} is a checkpoint of another model: only one of them has a frozen {name}")
    return {name: _stored(tensor, own[name]) for name, tensor in found.items()}


def save_model(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state_dict, which loads without hpctrain. On rank 0 only. Raises CheckpointError."""
    _write(path, tensors, dict(metadata))


def load_model(path: Path) -> dict[str, Tensor]:
    """The tensors of a model that `save_model` wrote. Raises CheckpointError."""
    return _read(path)[1]


def _head(path: Path) -> dict[str, Any]:
    """A checkpoint's header; does not read the tensors. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get("hpctrain", "{}"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    return head if isinstance(head, dict) else {}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); remove it") from None
    try:
        return json.loads(metadata.get("hpctrain", "{}")), tensors
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} was not written by hpctrain: its header cannot be read") from None


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        beside.touch()
        mode = beside.stat().st_mode & 0o777
        save_file(whole, beside, metadata)
        beside.chmod(mode)  # safetensors makes the file private to its owner, whatever the umask
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        _settle(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error}); free space or fix permissions") from None


def _settle(folder: Path) -> None:
    """Flush the folder, so that the new name also survives a power failure; otherwise a replaced file could be lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> str:
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no parameter {name}, which this model has"
        if tuple(found[name].shape) != tuple(shape):
            return f"its {name} has shape {tuple(found[name].shape)}, this model's {tuple(shape)}"
    extra = [name for name in found if name not in wanted]
    if extra:
        return f"its parameter {extra[0]} is not in this model"
    return "the precision, or the order or groups of the optimizer's parameters, differ"
