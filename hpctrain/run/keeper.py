"""Saves and restores a run: checkpoints, from which it continues as if it had never stopped, and the final model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator
from hpctrain.data.generators import Generators, restore_texts
from hpctrain.errors import CheckpointError, NanError
from hpctrain.filenames import BEST, CHECKPOINTS, MODEL
from hpctrain.models.wrappers import named_parameters, plain_name, plain_state
from hpctrain.replica.blocks import is_finite
from hpctrain.replica.layout import Layout
from hpctrain.replica.state import OPTIMIZER, Own, Section, State, recv_state, send_state
from hpctrain.replica.tensors import as_array
from hpctrain.run import folder as runfolder
from hpctrain.run.agreement import agreed
from hpctrain.run.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    load_own,
    save_checkpoint,
    save_model,
    save_own,
)
from hpctrain.run.files import RunFiles
from hpctrain.run.prepare import Prepared
from hpctrain.run.untrained import from_raw, raw
from hpctrain.strategies.phase import Phase
from hpctrain.trace.events import CheckpointWritten


@dataclass
class Keeper:
    """Saves and restores the run of `prepared` over `comm` in `folder`. `files`: on rank 0 only."""

    prepared: Prepared
    comm: Communicator
    folder: Path
    files: RunFiles | None

    # -- checkpoints ---------------------------------------------------------------------------------------
    def save(self, phase: Phase, state: State | None, own_state: Own, account: dict[str, Any], cursor: int) -> None:
        """Write a checkpoint. `state`: from Strategy.state; `own_state`: from Strategy.own; `account`: the session's
        plain values.

        Collective over the phase's workers. If a file cannot be written, a warning is issued and training continues.
        """
        workers = phase.workers
        assert workers is not None
        numbers, files, failure = self._save_own(phase, own_state, cursor)
        own = self._own()
        if workers.rank != 0:
            send_state(workers, own, 0)
            return
        pieces = [own] + [recv_state(workers, rank) for rank in range(1, workers.size)]
        assert state is not None and self.files is not None
        head = {
            "cursor": cursor,
            "account": account,
            "size": self.comm.size,
            "schedule": self._schedule(),
            "workers": list(phase.roles.workers),
            "length": self.prepared.order.length,
            "optimizer": self._optimizer(),
        }
        layout, values = self.prepared.replica.layout, self.prepared.replica.values
        checkpoint = Checkpoint(
            layout.fingerprint(),
            {s.name: values[s.offset : s.offset + s.size].view(s.shape) for s in layout.slots},
            state,
            [unpacked(piece) for piece in pieces],
            head,
            self.prepared.untrained.rest(),
            numbers,
            files,
        )
        keep = self.prepared.job.train.keep_checkpoints
        save = partial(self._save_finite, checkpoint, keep, failure)
        if self.files.write(CHECKPOINTS, save, "training continues without this checkpoint"):
            self.comm.recorder.event(CheckpointWritten(checkpoint_path(self.folder, cursor).name))

    def _save_own(self, phase: Phase, own: Own, cursor: int) -> tuple[list[dict[str, Any]], bool, str | None]:
        """Save this worker's own arrays, also if only others have some. Returns every worker's plain numbers, whether
        there are files of arrays, and the first error or None. Collective over the workers."""
        failure, files = None, any(phase.worker_comm.gather_json(bool(own.arrays)))
        if files:
            try:
                save_own(self.folder, cursor, phase.worker_index, own)
            except CheckpointError as error:
                failure = f"rank {self.comm.rank}: {error}"
        rows = phase.worker_comm.gather_json([own.numbers, failure])
        failures = [row[1] for row in rows if row[1] is not None]
        return [row[0] for row in rows], files, failures[0] if failures else None

    def _save_finite(self, checkpoint: Checkpoint, keep: int, failure: str | None) -> None:
        """Save the checkpoint. Refuses parameters that are not finite, because no run could continue from them and the
        file would displace a usable one, and a checkpoint that lacks a worker's arrays (`failure`)."""
        if failure is not None:
            raise CheckpointError(failure)
        if (name := self._not_finite()) is not None:
            path = checkpoint_path(self.folder, checkpoint.progress["cursor"])
            raise CheckpointError(f"{path} is not written because parameter {name} is not finite; older ones are kept")
        save_checkpoint(self.folder, checkpoint, keep)

    def _not_finite(self) -> str | None:
        """The first parameter that is not finite, or None."""
        replica = self.prepared.replica
        if is_finite(replica.values):
            return None
        return replica.layout.slots[replica.layout.first_not_finite(replica.values) - 1].name

    def check_model(self) -> list[str]:
        """The saved buffers that contain NaN, as batch norm's running statistics may after a bad batch. Raises NanError
        if a parameter is not finite. Not collective."""
        if (name := self._not_finite()) is not None:
            raise NanError(
                f"parameter {name} is not finite at the end of the run, so no model is saved; lower optimizer.lr, or "
                f"continue from an earlier checkpoint, if there is one: hpctrain train --resume {self.folder}"
            )
        buffers = self.prepared.untrained.buffers().items()
        return [name for name, buffer in buffers if buffer.is_floating_point() and bool(buffer.isnan().any())]

    def restore(self, optimizer: Literal["keep", "reset"] = "keep") -> tuple[dict[str, Any], State | None, Own]:
        """Load the folder's newest checkpoint: (its head, state as from Strategy.state, own state as from
        Strategy.own). Collective.

        `optimizer`: whether to keep its state or start with a fresh one. Raises CheckpointError, on all ranks, if the
        checkpoint is for another model, schedule, data set, optimizer or number of ranks.
        """
        comm = self.comm
        checkpoint: Checkpoint | None = agreed(comm, lambda: self._load(optimizer) if comm.rank == 0 else None)
        head = comm.broadcast_json(checkpoint.progress if checkpoint is not None else None)
        agreed(comm, lambda: self._check_resumable(head))
        if head["length"] is not None and self.prepared.order.length is None:
            self.prepared.order.learn(head["length"])
            self.prepared.order.common = True
        if checkpoint is not None:
            self._adopt_parameters(checkpoint.parameters)
            for name, value in checkpoint.rest.items():
                self.prepared.untrained.put(name, value)
        self.prepared.untrained.share(comm)
        kept = [checkpoint.numbers, checkpoint.files] if checkpoint is not None else None
        numbers, files = comm.broadcast_json(kept)
        if optimizer == "reset":
            files, numbers = False, [{k: v for k, v in own.items() if k != OPTIMIZER} for own in numbers]
        own_state = agreed(comm, lambda: self._load_own(head, numbers, files))
        if checkpoint is None:
            if comm.rank in head["workers"]:
                self._adopt_own(unpacked(recv_state(comm, 0)))
            return head, None, own_state
        for rank, own in zip(head["workers"], checkpoint.workers, strict=True):
            if rank == 0:
                self._adopt_own(own)
            else:
                send_state(comm, packed(own), rank)
        return head, checkpoint.state, own_state

    def _load_own(self, head: dict[str, Any], numbers: list[dict[str, Any]], files: bool) -> Own:
        """This rank's own state if it is a worker. `files`: whether to load its arrays from a file."""
        if self.comm.rank not in head["workers"]:
            return Own()
        worker = head["workers"].index(self.comm.rank)
        return Own(load_own(self.folder, head["cursor"], worker) if files else {}, numbers[worker])

    def _own(self) -> State:
        """This worker's own state: buffers and random state."""
        own = {"random": torch.get_rng_state()}
        if self.prepared.device.type == "cuda":
            own["random_gpu"] = torch.cuda.get_rng_state(self.prepared.device)
        own |= {f"buffer/{name}": b for name, b in self.prepared.untrained.buffers().items()}
        own |= {name: torch.from_numpy(text) for name, text in Generators.now().texts().items()}
        return packed(own)

    def _load(self, optimizer: Literal["keep", "reset"]) -> Checkpoint:
        layout, rest = self.prepared.replica.layout, self.prepared.untrained.rest()
        path = runfolder.newest_checkpoint(self.folder)
        shapes, wrapped = {slot.name: slot.shape for slot in layout.slots}, self._wrapped_layout().fingerprint()
        found = load_checkpoint(path, layout.fingerprint(), shapes, rest, wrapped)
        for name in [n.removeprefix("buffer/") for own in found.workers for n in own if n.startswith("buffer/")]:
            if not self.prepared.untrained.has_place_for(name):
                raise CheckpointError(f"{path} is a checkpoint of another model: this one has no buffer {name}")
        if optimizer == "reset":
            found.state.optimizer.forget()
        else:
            self._fit_moments(found)
        return found

    def _optimizer(self) -> dict[str, Any]:
        """The description of the optimizer that is saved in a checkpoint."""
        choice, layout = self.prepared.optimizer, self.prepared.replica.layout
        moments = choice.moments(layout, self.prepared.device)
        return {"name": choice.cls.__name__, "elementwise": choice.elementwise, "moments": moments}

    def _fit_moments(self, checkpoint: Checkpoint) -> None:
        """Refuse another optimizer's state, or state that lacks moments this one keeps; drop those it does not keep."""
        now, state = self._optimizer(), checkpoint.state
        then = checkpoint.progress.get("optimizer") or _guessed_optimizer(state, now)
        instead = (
            "resume with the original optimizer, or reset it with --reset-optimizer "
            '(in Python resume=hpctrain.Resume(folder, optimizer="reset"))'
        )
        if then["name"] != now["name"]:
            raise CheckpointError(
                f"{self.folder}: its checkpoint holds the state of {then['name']}, but the job names {now['name']}; "
                + instead
            )
        if then["elementwise"] != now["elementwise"]:
            was, given = (str(end["elementwise"]).lower() for end in (then, now))
            raise CheckpointError(
                f"{self.folder}: its checkpoint was made with optimizer.elementwise = {was}, but the job has {given}; "
                + instead
            )
        for index, (had, keeps) in enumerate(zip(then["moments"], now["moments"], strict=True)):
            if lacks := [key for key in keeps if key not in had]:
                group = f" of parameter group {index}" if len(now["moments"]) > 1 else ""
                raise CheckpointError(
                    f"{self.folder}: its checkpoint holds no {' and no '.join(lacks)}{group}, which "
                    f"{self.prepared.optimizer.words} keeps; {instead}"
                )
        if now["elementwise"]:
            state.optimizer.forget(but=set().union(*now["moments"]))

    def _wrapped_layout(self) -> Layout:
        """The layout with the names that the model itself uses, which torch.compile changes."""
        layout = self.prepared.replica.layout
        own = {plain_name(name): name for name, _ in self.prepared.model.named_parameters()}
        return replace(layout, slots=tuple(replace(slot, name=own[slot.name]) for slot in layout.slots))

    def _check_resumable(self, head: dict[str, Any]) -> None:
        if head["size"] != self.comm.size:
            raise CheckpointError(
                f"{self.folder}: the run used {head['size']} ranks and is resumed on {self.comm.size}; "
                f"start {head['size']}"
            )
        length = self.prepared.order.length
        if length is not None and head["length"] not in (None, length):
            raise CheckpointError(
                f"{self.folder}: the run had {head['length']:,} training samples, but the data set now has "
                f"{length:,}; resume with the original data"
            )
        if head["schedule"] != self._schedule():
            raise CheckpointError(
                f"{self.folder}: its checkpoint is for other phases ({head['schedule']}) than this job's "
                f"({self._schedule()}); resume with the job in the run folder"
            )

    def _schedule(self) -> str:
        return ", then ".join(runfolder.name_of(phase.strategy) for phase in self.prepared.job.schedule)

    def _adopt_parameters(self, parameters: dict[str, Tensor]) -> None:
        with torch.no_grad():
            own = dict(named_parameters(self.prepared.model))
            for name, value in parameters.items():
                own[name].copy_(value)

    def _adopt_own(self, own: dict[str, Tensor]) -> None:
        own = dict(own)
        torch.set_rng_state(own.pop("random"))
        if (on_gpu := own.pop("random_gpu", None)) is not None and self.prepared.device.type == "cuda":
            torch.cuda.set_rng_state(on_gpu, self.prepared.device)
        python, numpy = own.pop("random_python", None), own.pop("random_numpy", None)
        if python is not None and numpy is not None:  # older checkpoints have none
            restore_texts(python.numpy(), numpy.numpy())
        for name, value in own.items():
            self.prepared.untrained.put(name.removeprefix("buffer/"), value)

    # -- the final model -----------------------------------------------------------------------------------
    def settle_model(self, phase: Phase) -> None:
        """Give all ranks the final model: workers get the final buffers, servers the whole model. Collective."""
        self.prepared.untrained.settle(phase.workers, self.comm)
        if len(phase.roles.workers) < self.comm.size:
            self.comm.broadcast(as_array(self.prepared.replica.values))

    def save_model(self) -> None:
        """Write model.safetensors from rank 0's model. Not collective."""
        if self.files is not None:
            tensors = _untied(plain_state(self.prepared.model))
            self.files.write_model(lambda folder: save_model(folder / MODEL, tensors, _KEYS))

    def save_best(self, about: Mapping[str, Any]) -> None:
        """Write best.safetensors from rank 0's model, and what it reached. Not collective."""
        if self.files is not None:
            tensors = _untied(plain_state(self.prepared.model))
            self.files.write_best(lambda folder: save_model(folder / BEST, tensors, _KEYS), about)


# One key: safetensors writes several keys in varying order, and equal runs must give equal files.
_KEYS = {"format": "pt"}


def packed(tensors: dict[str, Tensor]) -> State:
    """Copies of the tensors' bytes, of any dtype, to be sent with `send_state`."""
    kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    arrays = {name: raw(t).copy() for name, t in tensors.items()}
    return State(0, 0, {"own": Section(named={"own": arrays})}, counters=kinds)


def unpacked(piece: State) -> dict[str, Tensor]:
    """The inverse of `packed`."""
    own = piece.section("own").named.get("own", {})
    return {name: from_raw(own[name], dtype, shape) for name, (dtype, shape) in piece.counters.items()}


def _guessed_optimizer(state: State, now: dict[str, Any]) -> dict[str, Any]:
    """The optimizer of a checkpoint that does not name it, guessed from its moments. `now`: this job's optimizer."""
    found, keeps = state.optimizer.keys(), set().union(*now["moments"])
    if found:
        now = {**now, "elementwise": not state.optimizer.named}
    if found <= keeps:
        return {**now, "moments": [sorted(found)] * len(now["moments"])}
    if not now["elementwise"] and found & keeps:  # the moments of such an optimizer may depend on the parameter's shape
        return now
    return {**now, "name": f"an optimizer that keeps {', '.join(sorted(found))}"}


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that tied tensors can be saved under all their names."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
