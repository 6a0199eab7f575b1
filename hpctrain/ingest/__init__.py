"""`hpctrain ingest`: pictures and their annotations become one HDF5 file, read by many processes.

Importing this package, or what the reading processes use of it, loads neither torch nor MPI.
"""
