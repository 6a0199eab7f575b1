"""Real ranks, over mpi4py: the only package that imports it. Importing a module of it initialises MPI."""
