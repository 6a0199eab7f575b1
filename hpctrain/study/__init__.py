"""Studies: many runs of one job, each with another strategy, on virtual ranks; what they sent; tables of results."""
