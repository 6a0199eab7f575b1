"""What the files in a run folder are called."""

JOB = "job.toml"  # resolved
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"  # a folder
MODEL = "model.safetensors"  # of a run that has come to its end
REPORT = "report.html"
