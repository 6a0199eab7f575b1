"""One strategy, one file. `hpctrain.job.registry.STRATEGIES` lists them."""
