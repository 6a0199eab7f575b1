"""Data sets by name, the order of their samples, and the loader that fetches them in threads."""
