"""Models that a job can name; any other by "package.module:function"."""
