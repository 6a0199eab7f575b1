"""One strategy, one file. `hpctrain.registry.STRATEGIES` lists them."""
