"""Runs a job on virtual ranks over a described cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path

import torch

from hpctrain.clock.samples import run_total
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.flows import FlowNetwork, MessageCosts
from hpctrain.comm.virtual.world import World
from hpctrain.comm.waiting import takes_naps
from hpctrain.data.order import Order
from hpctrain.data.splits import load_data, make_order
from hpctrain.errors import ClusterError, JobError
from hpctrain.hosts import Description, nodes
from hpctrain.job import Job, check_ranks
from hpctrain.job.roles import roles_of
from hpctrain.run.folder import PhaseSummary
from hpctrain.run.prepare import Measurable, Prepared
from hpctrain.run.session import Session
from hpctrain.simulate.attention import WaitingRanks
from hpctrain.simulate.calibration import Calibration, LinkCosts, codec_name
from hpctrain.simulate.cores import Machine
from hpctrain.simulate.curve import Curve
from hpctrain.simulate.depth import Costs, Depth, Followed, Gradients
from hpctrain.simulate.flops import CountedPasses, count, parameters_of
from hpctrain.simulate.opened import collected_rarely, opened
from hpctrain.simulate.passes import Processor, Spells, TimedPasses
from hpctrain.simulate.pauses import PauseCosts, Pauses, stages
from hpctrain.simulate.recording import TallyRecorder, TimeTally
from hpctrain.simulate.window import Moment, Stretch, Window

TRACED = 64  # ranks, at most, that write traces
BY_MESSAGES = 16  # ranks, at most, whose collectives are simulated message by message
FREE = frozenset(["forward", "backward", "data", "evaluate", "switch", "checkpoint", "trace"])  # or counted elsewhere


@dataclass(frozen=True)
class Simulated:
    """What came out. `tallies`: of each rank; `workers`: the ranks that took steps; `stretch`: what shares and bytes
    come from; `begun`: when the first batch came (virtual nanoseconds); `total`: samples of the job; `left`: of these,
    those that were not simulated; `seconds`: virtual, of everything that was; `loops`: whether collectives were
    computed as loops; `from_flops`: whether the calibration is of another model, so that flops say what the passes
    take; `phases`: of the simulated part; `pauses`: of the whole job, none of which is in the simulated time."""

    tallies: list[TimeTally]
    workers: list[int]
    stretch: Stretch
    begun: int
    total: int
    left: int
    seconds: float
    folder: Path
    loops: bool
    from_flops: bool
    phases: list[PhaseSummary]
    pauses: Pauses


class Simulation:
    """A job on a cluster. `ranks`: None: as many as the cluster has places for. `learn`: really compute gradients;
    otherwise only costs count; `curve`: and the losses of an earlier run. `steps`: rounds, None: as many as the job
    has. Raises HpctrainErrors if the job cannot
    be simulated there."""

    def __init__(
        self,
        job: Job,
        cluster: Description,
        ranks: int | None = None,
        learn: bool = False,
        steps: int | None = None,
        curve: Curve | None = None,
    ) -> None:
        self.cluster = cluster
        self.hosts = cluster.each()
        self.places = nodes(self.hosts, ranks)
        check_ranks(job, len(self.places))
        self._depth: Depth = Gradients() if learn else Costs() if curve is None else Followed(curve)
        self._note = f", with the losses of {curve.source}" if curve is not None else ""
        if steps is not None and len(job.schedule) > 1:
            raise JobError("--steps: the job has several phases, which would no longer be what they are; leave it out")
        self._splits = load_data(job)
        self._order: Order | None = None
        self._left = 0
        self._train = job.train
        self.job = self._simulated(job, steps)
        self._codecs = [codec_name(phase.strategy.options) for phase in self.job.schedule]
        self.calibration: Calibration
        self._world: World
        self._stretch: Stretch | None = None
        self._begun = 0
        self._ended: Session | None = None  # on rank 0
        self._counted: CountedPasses | None = None
        self._from_flops = False
        self._processors: list[Processor] = []

    def _look(self, parts: Measurable) -> None:
        """Count what the job's model does, the first time. Raises ClusterError if it must be known and is not."""
        if self._counted is not None or self.calibration.model.work is None:
            return
        try:
            self._counted = count(parts)
        except ClusterError:
            if parameters_of(parts.model) != self.calibration.model.parameters:
                raise

    def _take_costs(self, prepared: Prepared) -> None:
        """Take the calibration for the job's model; if it is of another one, what flops say. Raises ClusterError if
        that is not known, and for batches far from those measured."""
        if self._from_flops:
            return
        known, batch, layout = self.calibration.model, self.job.train.batch_size, prepared.replica.layout
        same = layout.parameters == known.parameters and max(known.order) < len(layout.slots)
        counted, work = self._counted, known.work
        if counted is not None and work is not None and (not same or counted.differs(work)):
            costs = counted.costs(known, work, self.job.model.name, layout)
            self.calibration, self._from_flops = self.calibration.model_copy(update={"model": costs}), True
        elif not same:
            raise ClusterError(
                f"the calibration ({self.calibration.source}) is of a model with {known.parameters:,} parameters, but "
                f"this job's has {layout.parameters:,}, and it does not say how many floating-point operations its own "
                "takes; calibrate with this job, or again with that one: hpctrain calibrate --measure JOB"
            )
        elif not known.forward.knows(batch):
            raise ClusterError(
                f"train.batch_size = {batch}: the calibration ({self.calibration.source}) has measured batches of "
                f"{known.forward.least:g} to {known.forward.most:g} samples, and what others cost is not known; "
                "calibrate with this batch size"
            )

    def _simulated(self, job: Job, steps: int | None) -> Job:
        """The job as it is run here: at most all of it."""
        if steps is not None:
            size = job.train.batch_size * job.train.accumulate * len(roles_of(job, self.places)[0].workers)
            length = make_order(self._splits.train).length
            total = run_total(job.train, length or 2**62, size)
            steps = steps if steps * size < total else None
            self._left = total - steps * size if steps is not None else 0
        job = self._depth.shortened(job, steps)
        if any(host.devices for host in self.hosts):  # models on accelerators share no memory
            job = job.override(["communicator.shared=false"])
        return job.override([f"name={job.name}-simulated", "train.checkpoint_every=default"])

    def run(self, calibration: Calibration) -> Simulated:
        """Run it, with what the calibration says of computing. Raises HpctrainErrors as training does, and ClusterError
        where the calibration does not say what something costs."""
        self.calibration, size, depth = calibration, len(self.places), self._depth
        recorders = [self._recorder(rank) for rank in range(size)]
        self._flows = network = self._network()
        loops = size > BY_MESSAGES
        self._world = world = World(
            size, self.places, network, self._span_cost, recorders,
            isolate_torch=depth.computes, collectives="loop" if loops else "messages",
            phantom=not depth.computes, simulates=self.cluster.summary() + self._note,
        )  # fmt: skip
        self._tallies = [recorder.tally for recorder in recorders]
        self._processors = self._make_processors(world)
        world.attention = WaitingRanks(world, self._processors, calibration.handling, self._naps())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with collected_rarely():
                folders = world.run(self._body)
        except Exception as error:
            explained = depth.explained(error, self.job)
            if explained is error:
                raise
            raise explained from error
        finally:
            torch.set_num_threads(threads)
        assert self._stretch is not None and self._ended is not None
        workers = [rank for rank, tally in enumerate(self._tallies) if tally.steps]
        seconds = world.time / 1e9
        total = self._ended.prepared.total + self._left
        return Simulated(
            self._tallies, workers, self._stretch, self._begun, total, self._left, seconds, folders[0], loops,
            self._from_flops, self._ended.totals.summaries, self._pauses(self._ended),
        )  # fmt: skip

    def _body(self, comm: Communicator) -> Path:
        with opened(self.job, comm, self._build) as running:
            inner, processor = self._depth.begin(running), self._processors[comm.rank]
            running.prepared.coupling = passes = TimedPasses(self.calibration, processor, running.replica, inner)
            window, tally = Window(running.prepared.total), self._tallies[comm.rank]
            for batch in running.batches():
                if comm.rank == 0 and not tally.rounds:
                    self._begun = self._world.time
                elif comm.rank == 0 and tally.rounds[-1]:
                    window.round_ended(running.totals.cursor, self._moment)
                passes.forward(batch.size)
                self._depth.step(running, batch)
            if comm.rank == 0:
                self._stretch = window.close(self._moment)
                self._ended = running
        return running.folder

    def _pauses(self, ended: Session) -> Pauses:
        """What the job's evaluations and checkpoints take, which are not simulated."""
        made, ends = ended.prepared, list(accumulate(phase.samples for phase in ended.totals.summaries))
        ends[-1] += self._left
        costs = PauseCosts(self.calibration, self.places, self._make_processors)
        return costs.of(self._train, self._splits, made, stages(made, made.total + self._left, ends))

    def _moment(self) -> Moment:
        return Moment.now(self._world.time, self._tallies, self._flows)

    def _build(self, job: Job, comm: Communicator) -> Prepared:
        """A rank's parts. Data are loaded once for all ranks, and the order of samples is drawn once."""
        made = self._depth.build(job, comm, self._splits, self._look)
        if made.order.length is not None:  # else each rank finds the end of its stream by itself
            made.order = self._order = self._order or made.order
        self._take_costs(made)
        return made

    def _recorder(self, rank: int) -> TallyRecorder:
        kind: type[TallyRecorder] = self._depth.recorder if rank < TRACED and self.job.trace.enabled else TallyRecorder
        return kind(lambda: self._world.time)

    def _make_processors(self, world: World) -> list[Processor]:
        """Of each rank: ranks of a host share its cores, or its accelerators in turn."""
        seed = self.job.seed
        count, turns = self.cluster.machine_cores, self.calibration.turns
        shared = Machine(world, count, seed, turns) if count is not None else None
        alone = [Machine(world, None, f"{seed}/{host.number}", turns) for host in self.hosts]
        cores = [(shared or own).host(host.cores) for host, own in zip(self.hosts, alone, strict=True)]
        devices = [[Machine(world, None).host(1.0) for _ in range(host.devices)] for host in self.hosts]
        spells = [Spells(host, seed) for host in self.hosts]
        found, before = [], dict.fromkeys(range(len(self.hosts)), 0)
        for rank, place in enumerate(self.places):
            host, local = self.hosts[place], before[place]
            before[place] += 1
            own = devices[place][local % host.devices] if host.devices else cores[place]
            found.append(Processor(world, host, own, spells[place], seed, rank))
        return found

    def _naps(self) -> bool:
        """Whether waiting ranks nap: as real ones, if any has less than a core."""
        ranks = Counter(self.places)
        limits = [(host.cores, ranks[index]) for index, host in enumerate(self.hosts) if ranks[index]]
        shares = [cores / count for cores, count in limits if cores is not None]
        return takes_naps(self.job.communicator.wait, min(shares, default=1.0))

    def _network(self) -> FlowNetwork:
        costs = self.calibration
        return FlowNetwork(
            self.cluster,
            message_costs(costs.between),
            message_costs(costs.within),
            goodput=costs.between.efficiency,
        )

    def _span_cost(self, rank: int, kind: str, nbytes: int, flops: float) -> int:
        """Lets a span's time pass on its rank's processor; nothing is left for the communicator to add."""
        if kind in FREE or not nbytes:
            return 0
        codec = self._codecs[self._tallies[rank].phase]
        self._processors[rank].serve(self.calibration.span(kind, codec).seconds(nbytes))
        return 0


def message_costs(link: LinkCosts) -> MessageCosts:
    """As the network of virtual ranks takes them."""
    overhead = round(link.overhead_s * 1e9)
    bandwidth = inf if link.bytes_per_s is None else link.bytes_per_s
    return MessageCosts(round(link.latency_s * 1e9), bandwidth, overhead, overhead, link.eager_bytes, link.seniority)
