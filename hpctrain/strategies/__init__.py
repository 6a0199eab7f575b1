"""The strategies, one per file. `hpctrain.job.registry.STRATEGIES` lists them."""
