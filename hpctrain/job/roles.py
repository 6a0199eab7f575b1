"""Which ranks are workers and which are servers in each phase of a job."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.cluster import Roles, assign_roles
from hpctrain.errors import ClusterError
from hpctrain.job.job import Job, check_ranks


def roles_of(job: Job, nodes: Sequence[int]) -> list[Roles]:
    """The roles in each phase, on ranks whose node indices are `nodes`.

    Raises ClusterError or JobError if the job cannot run on these ranks.
    """
    check_ranks(job, len(nodes))
    found = []
    for index, phase in enumerate(job.schedule):
        strategy, options = phase.strategy.resolve(), phase.strategy.options
        try:
            roles = assign_roles(nodes, *strategy.roles(options))
            strategy.check(options, roles)
        except ClusterError as error:
            raise ClusterError(str(error).replace("strategy.", job.key(index, "strategy") + ".")) from None
        found.append(roles)
    return found
