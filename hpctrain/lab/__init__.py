"""`hpctrain lab`: several hosts on one machine, with limited networks and processors, to measure traffic between hosts.

A host is a network namespace with its own address and name, joined to the others by a bridge. tc limits its link, a
control group its share of the processors. MPI runs across the hosts over TCP. Linux only; needs root.
"""
