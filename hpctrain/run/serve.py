"""A dedicated server's part in one phase."""

from __future__ import annotations

from hpctrain.errors import ClusterError
from hpctrain.run.active import ActiveRun
from hpctrain.strategies.base import Server
from hpctrain.strategies.phase import Phase


def serve(run: ActiveRun, phase: Phase) -> None:
    """Serve until all workers have left the phase. Collective over all ranks of the phase."""
    spec = run.job.schedule[phase.index].strategy
    kind: type[Server] | None = spec.resolve().Server
    if kind is None:
        raise ClusterError(f"strategy {spec.name} has servers but no Server class")
    server = kind(spec.options)
    server.join(phase, run.take_state())
    server.serve()
    run.saving()  # the workers may write a last checkpoint
