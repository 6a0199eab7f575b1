"""Arenas in GPU memory, and the ways in which their contents reach other ranks. Not yet run on a GPU."""
