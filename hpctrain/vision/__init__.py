"""What people do with trained models of pictures: `hpctrain predict`, `hpctrain caption`, `hpctrain features`."""
