"""Arenas in GPU memory, and how their contents reach other ranks. Not yet run on a GPU."""
