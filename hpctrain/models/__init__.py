"""Models that a job can name; others by "package.module:function"."""
