"""Numbers from traces: where the time of a run went, which ranks waited for which, what was sent, how it converged.

`Analysis(open_run(path))` computes each pandas frame on first access. docs/metrics.md defines every term.
Importing this package loads neither pandas nor h5py.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis.course import Course
    from hpctrain.trace.reader import Run


class Analysis:
    """A run and the results computed from its traces. Every frame is computed once; `run.notes` says what was missing.

    Ranks are numbered within the whole run, phases as in the job. Times are corrected to rank 0's clock. Steps that a
    resumed run repeated count in times and waits, but not in convergence.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def course(self) -> Course:
        """All ranks' spans, by phase; a sample of them if there are too many."""
        from hpctrain.analysis.course import read_course

        return read_course(self.run, self.phases)

    @cached_property
    def phases(self) -> pd.DataFrame:
        """Columns attempt, phase, strategy, rank, role, start_ns, end_ns: each rank's training in each phase."""
        from hpctrain.analysis.phases import find_phases

        return find_phases(self.run)

    @cached_property
    def times(self) -> pd.DataFrame:
        """Columns phase, strategy, rank, lane, role, the span kinds, useful_s, communication_s, paused_s, total_s."""
        from hpctrain.analysis.efficiency import sum_by_phase

        return sum_by_phase(self.course, self.phases)

    @cached_property
    def device_times(self) -> pd.DataFrame:
        """Columns phase, strategy, rank, kind, steps, device_s, host_s, device_ms_per_step, host_ms_per_step, error_us:
        see `device.device_times`. Empty for a run on CPUs."""
        from hpctrain.analysis.device import device_times

        return device_times(self.run, self.phases, self.times)

    @cached_property
    def efficiency(self) -> pd.DataFrame:
        """Columns phase, strategy, workers, seconds, parallel_efficiency, load_balance, communication_efficiency."""
        from hpctrain.analysis.efficiency import pop

        return pop(self.times)

    @cached_property
    def waits(self) -> pd.DataFrame:
        """Columns phase, step, rank, lane, start_ns, end_ns, seconds, peer, root, doing: see `waiting.attribute`."""
        from hpctrain.analysis.waiting import attribute

        return attribute(self.course)

    def waiting_matrix(self, phase: int | None = None) -> pd.DataFrame:
        """Seconds that each rank (rows) waited for each rank (columns; -1: unknown)."""
        from hpctrain.analysis.waiting import matrix

        return matrix(self.waits, self.run.size, phase)

    @cached_property
    def critical_path(self) -> pd.DataFrame:
        """Columns phase, rank, steps, share, compute_s, exchange_s: see `waiting.critical_path`."""
        from hpctrain.analysis.waiting import critical_path

        return critical_path(self.course, self.phases, set(self.staleness["phase"]))

    @cached_property
    def traffic(self) -> pd.DataFrame:
        """Columns source, destination, messages, bytes, seconds, bytes_per_s: see `communication.traffic`."""
        from hpctrain.analysis.communication import traffic

        return traffic(self.course, self.phases)

    @cached_property
    def volumes(self) -> pd.DataFrame:
        """Columns rank, node, sent, received, sent_between, received_between, collective, collective_received: see
        `communication.volumes`."""
        from hpctrain.analysis.communication import volumes

        nodes = {rank: int(self.run.attributes(rank).get("node", 0)) for rank in self.run.ranks}
        return volumes(self.course, nodes)

    @cached_property
    def links(self) -> pd.DataFrame:
        """Columns rank, peer, same_node, latency_s, bytes_per_s: measured at the start of the run."""
        from hpctrain.analysis.communication import links

        return links(self.run)

    @cached_property
    def overlap(self) -> pd.DataFrame:
        """Columns phase, rank, in_flight_s, blocked_s, hidden: see `communication.overlap`."""
        from hpctrain.analysis.communication import overlap

        return overlap(self.course)

    @cached_property
    def convergence(self) -> pd.DataFrame:
        """Columns step, samples, t_s, seconds, bytes, loss, phase: see `convergence.losses`."""
        from hpctrain.analysis.convergence import losses

        return losses(self.run, self.phases)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The evaluations of metrics.csv on the clocks of `convergence`."""
        from hpctrain.analysis.convergence import evaluations

        return evaluations(self.run, self.convergence)

    @cached_property
    def logged(self) -> pd.DataFrame:
        """Columns rank, attempt, t_s, step, samples, name, value: what programs logged by `Session.log`."""
        from hpctrain.analysis.convergence import logged

        return logged(self.run)

    @cached_property
    def staleness(self) -> pd.DataFrame:
        """Columns phase, rank, step, t_s, staleness_min, staleness_max."""
        from hpctrain.analysis.convergence import staleness

        return staleness(self.run)

    @cached_property
    def rules(self) -> pd.DataFrame:
        """Columns t_s, samples, rule, statistic, threshold, unready, fired, text."""
        from hpctrain.analysis.convergence import rules

        return rules(self.run)

    @cached_property
    def usage(self) -> pd.DataFrame:
        """Columns node, host, rank, attempt, device, t_s, cpu_percent, resident_bytes, net_in_bytes_per_s,
        net_out_bytes_per_s, gpu_percent, gpu_memory_bytes."""
        from hpctrain.analysis.usage import usage

        return usage(self.run)

    @cached_property
    def headline(self) -> str:
        """One sentence that says where the time went."""
        from hpctrain.analysis.headline import headline

        return headline(self)


def analyse(path: Path | str) -> Analysis:
    """Open a run folder and return its analysis. Raises TraceError."""
    from hpctrain.trace.reader import open_run

    return Analysis(open_run(path))
