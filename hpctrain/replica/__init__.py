"""A worker's model in flat arenas: their layout, what updates them, and the state that crosses phases.

`state` loads no torch; the other modules do. So nothing is imported here.
"""
