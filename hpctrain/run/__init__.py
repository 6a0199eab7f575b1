"""A run in progress: how it begins, walks through its phases, and ends."""
