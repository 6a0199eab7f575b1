"""A run's clock, which counts samples: what it converts, what ends a phase, what is asked after a step, rates."""
