"""Runs messages in SimGrid: `python3 simgrid_times.py PLATFORM [--buffered] < programs.json`, with a Python that can
import simgrid.

`programs[r]` are the steps of rank r, on host `h<r>`: [(dest, bytes) or None, source or None]. The send and the receive
of a step take place together. With --buffered messages go at once, and their senders do not wait. Prints the time at
which each rank has ended, in seconds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from simgrid import Actor, Comm, Engine, Host, Mailbox


def rank(number: int, steps: list[Any], ends: dict[int, float]) -> None:
    """One rank's program."""
    buffered, sent = "--buffered" in sys.argv, []
    for source in {source for _, source in steps if source is not None and buffered}:
        Mailbox.by_name(f"{source}-{number}").set_receiver(Actor.self())  # messages go before they are received
    for send, source in steps:
        if send is not None:
            dest, nbytes = send
            sent.append(Mailbox.by_name(f"{number}-{dest}").put_async(0, nbytes))
        if source is not None:
            Mailbox.by_name(f"{source}-{number}").get()
        if not buffered:
            Comm.wait_all(sent)
            sent = []
    ends[number] = Engine.clock
    Comm.wait_all(sent)


def main() -> None:
    """The program."""
    factors = ("bandwidth-factor:1", "latency-factor:1", "weight-S:0", "TCP-gamma:0", "crosstraffic:0")
    options = ["network/model:CM02", "contexts/factory:thread", *(f"network/{factor}" for factor in factors)]
    engine = Engine([sys.argv[0], "--log=root.thresh:error", *(f"--cfg={option}" for option in options)])
    engine.load_platform(sys.argv[1])
    programs, ends = json.load(sys.stdin), dict[int, float]()
    for number, steps in enumerate(programs):
        Actor.create(f"rank{number}", Host.by_name(f"h{number}"), rank, number, steps, ends)
    engine.run()
    print(json.dumps([ends[number] for number in range(len(programs))]))


if __name__ == "__main__":
    main()
