"""Checkpoints and the final model: safetensors files, written beside and renamed, nothing pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpctrain.errors import CheckpointError
from hpctrain.filenames import CHECKPOINTS, MODEL
from hpctrain.replica import as_array, as_tensor
from hpctrain.state import State

FORMAT = "hpctrain-checkpoint-1"


@dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    `parameters`: flat tensor of the arena, cut by name in the file; `workers[i]`: worker i's own tensors
    (buffers, random state); `progress`: plain values (cursor, phase, rule, metrics).
    """

    fingerprint: str
    parameters: dict[str, Tensor]
    state: State
    workers: list[dict[str, Tensor]]
    progress: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write it to checkpoints/ under its cursor; then remove all but the newest `keep`. On rank 0 alone."""
    tensors = {f"parameter/{name}": value for name, value in checkpoint.parameters.items()}
    for index, own in enumerate(checkpoint.workers):
        tensors |= {f"worker/{index}/{name}": value for name, value in own.items()}
    state = checkpoint.state
    tensors |= {f"state/{path}": as_tensor(array) for path, array in state.arrays()}
    head = {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "workers": len(checkpoint.workers),
        "state": {"high": state.high, "groups": state.groups, "counters": state.counters, "rule": state.rule},
        "progress": checkpoint.progress,
    }
    path = checkpoint_path(folder, checkpoint.progress["cursor"])
    _write(path, tensors, {"hpctrain": json.dumps(head)})
    with suppress(OSError):  # what cannot be removed harms nobody
        for old in list_checkpoints(folder)[:-keep]:
            old.unlink(missing_ok=True)
    return path


def checkpoint_path(folder: Path, cursor: int) -> Path:
    """Where a run folder has the checkpoint of that cursor."""
    return folder / CHECKPOINTS / f"{cursor:012d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Those of a run folder, oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("*.safetensors") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def load_checkpoint(path: Path, fingerprint: str, names: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Read one, checking that it is whole and of this model (`names`: parameter shapes). CheckpointError if not."""
    head, tensors = _read(path)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of hpctrain (or one of another version of it); remove it")
    parameters = _below(tensors, "parameter/")
    try:
        if head["fingerprint"] != fingerprint:
            raise CheckpointError(f"{path} is a checkpoint of another model: {_difference(parameters, names)}")
        numbers = head["state"]
        state = State(0, numbers["high"], {}, {}, numbers["groups"], numbers["counters"], numbers["rule"])
        for name, tensor in _below(tensors, "state/").items():
            state.place(name, as_array(tensor))
        workers = [_below(tensors, f"worker/{index}/") for index in range(head["workers"])]
        return Checkpoint(fingerprint, parameters, state, workers, head["progress"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of hpctrain: its header lacks {error}; remove it") from None


def save_model(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """model.safetensors: the state_dict, loadable without hpctrain. On rank 0 alone."""
    path = folder / MODEL
    _write(path, tensors, dict(metadata))
    return path


def load_model(path: Path) -> dict[str, Tensor]:
    """The tensors of a model.safetensors. Raises CheckpointError."""
    return _read(path)[1]


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
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); remove it") from None
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
        beside.chmod(mode)  # safetensors lets nobody else read it, whatever the umask says
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        _settle(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error}); free space or mend permissions") from None


def _settle(folder: Path) -> None:
    """Have the new name on the disk as well: else a file of the old name may be gone after a power cut."""
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
            return f"its {name} is {tuple(found[name].shape)}, this model's {tuple(shape)}"
    extra = [name for name in found if name not in wanted]
    if extra:
        return f"its parameter {extra[0]} is not in this model"
    return "the precision, or the order or groups of the optimizer's parameters, differ"
