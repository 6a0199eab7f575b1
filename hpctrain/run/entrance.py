"""How a run enters its phases: sets up each phase's communicators, arenas and conductor."""

from __future__ import annotations

from hpctrain.clock.decisions import Conductor
from hpctrain.cluster import Roles
from hpctrain.comm.base import Communicator
from hpctrain.replica.arenas import Placement
from hpctrain.run import folder as runfolder
from hpctrain.run.active import ActiveRun
from hpctrain.run.phase import split_by_role, updating
from hpctrain.strategies.base import Strategy
from hpctrain.strategies.phase import Dealing, Members, Phase, Watching
from hpctrain.trace.events import PhaseEntered


class Entrance:
    """Enters one phase after another, and keeps what can be reused until the run ends."""

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._before: Roles | None = None  # of the previous phase
        self._split: dict[Roles, tuple[Communicator, Communicator | None]] = {}

    def enter(self) -> Phase:
        """Enter the phase that the run's totals name. Collective over all ranks."""
        run, index, prepared = self._run, self._run.totals.phase, self._run.prepared
        members = self._place(prepared.roles[index], prepared.strategy(index))
        if self._before is not None:
            self._agree_on_scale(members.comm)
        self._before = members.roles
        conductor = self._conductor(members.comm)
        job, pace = run.job, prepared.pace(index, run.totals.phase_start)
        phase = Phase(
            index,
            members,
            prepared.replica,
            updating(
                prepared.optimizer,
                prepared.replica.layout,
                rate=pace.rate,
                momentum=pace.momentum_factor,
                per_update=pace.per_update,
                clip_norm=job.train.clip_norm,
                nan=job.train.nan,
                scaled=run.loss_scale is not None,
            ),
            Dealing(
                batch=prepared.batch,
                queue="static" if job.data.queue == "static" else "shared",
                epoch=prepared.order.length,
                ahead=prepared.ahead,
            ),
            conductor,
            run.totals.cursor,
            Watching(run.tick, run.saving),
            seed=job.seed,
        )
        self._announce(phase)
        return phase

    def release(self) -> None:
        """Free the communicators of all phases. Collective over all ranks."""
        for comm, workers in self._split.values():
            if workers is not None:
                workers.free()
            comm.free()

    def _place(self, roles: Roles, strategy: Strategy) -> Members:
        """Place the replica's arenas, and couple the workers' models. Collective over all ranks."""
        run, prepared, before = self._run, self._run.prepared, self._before
        comm, workers = self._communicators(roles)
        placement = self._placement(comm, strategy)
        with comm.span("switch"):
            prepared.replica.place(comm, placement)
            if workers is not None:
                prepared.coupling.join(workers)
        if before is not None:
            prepared.untrained.share(run.comm, set(roles.workers) - set(before.workers))
        equal = before is not None and len(before.workers) == comm.size and len(set(comm.nodes)) == 1
        return Members(comm, workers, roles, placement, equal)

    def _communicators(self, roles: Roles) -> tuple[Communicator, Communicator | None]:
        """Of all ranks and of the workers; kept for later phases with equal roles, as a split takes milliseconds."""
        if roles not in self._split:
            self._split[roles] = split_by_role(self._run.comm, roles)
        return self._split[roles]

    def _placement(self, comm: Communicator, strategy: Strategy) -> Placement:
        """Where the phase's arenas lie: as the strategy needs, if memory may and can be shared. The same on all ranks;
        collective."""
        prepared = self._run.prepared
        placement, replica = strategy.needs.placement(comm.nodes), prepared.replica
        in_host_memory = prepared.device.type in ("cpu", "meta")
        allowed = self._run.job.communicator.shared and in_host_memory and prepared.optimizer.elementwise
        if placement == "rank" or not allowed:
            return "rank"
        if replica.keeps_shared(comm, placement):
            return placement
        why = comm.can_share(replica.layout.length * replica.layout.dtype.itemsize * 2)
        if why is not None:
            self._run.out.say(f"not sharing memory between the ranks of a node: {why}")
        return "rank" if comm.gather_json(why is None).count(False) else placement

    def _conductor(self, comm: Communicator) -> Conductor:
        """The phase's conductor; in a resumed phase its rule continues. Collective over all ranks."""
        totals, state = self._run.totals, self._run.state
        conductor = self._run.prepared.conductor(totals.phase, totals.phase_start, comm.recorder.event)
        known = comm.broadcast_json(state.rule if state is not None else None)
        if known and conductor.rule is not None:
            conductor.rule.load(known)
        return conductor

    def _agree_on_scale(self, comm: Communicator) -> None:
        """All workers begin the next phase with rank 0's loss scale; in the previous one each may have had its own, and
        servers none. Collective over all ranks."""
        scale = self._run.loss_scale
        if scale is not None:
            scale.take(comm.broadcast_json(scale.plain()))

    def _announce(self, phase: Phase) -> None:
        schedule = self._run.job.schedule
        name = runfolder.name_of(schedule[phase.index].strategy)
        phase.comm.recorder.event(PhaseEntered(phase.index, phase.roles.of(phase.comm.rank).value, name))
        if len(schedule) > 1:
            self._run.out.say(f"phase {phase.index}: {name}, {runfolder.describe_roles(phase.roles)}")
