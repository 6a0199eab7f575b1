"""A run's clock, which counts samples: conversions, rules that end a phase, decisions after a step, rates."""
