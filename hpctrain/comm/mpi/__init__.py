"""Real ranks, over mpi4py: the only package that imports it. Importing one of its modules initialises MPI."""
