"""A worker's model in flat arenas: their layout, the optimizer update, and the state kept across phases.

`state` does not import torch; the other modules do. So this file imports nothing.
"""
