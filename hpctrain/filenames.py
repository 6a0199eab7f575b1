"""What the files in a run folder are called."""

JOB = "job.toml"  # resolved
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"  # a folder
MODEL = "model.safetensors"  # of a run that has come to its end
BEST = "best.safetensors"  # the model of the best evaluation, and what it reached
BEST_ABOUT = "best.toml"
EXAMPLES = "examples.json"  # what the latest evaluation shows of samples
MOST_EXAMPLES, MOST_BOXES = 16, 200  # in that file, and of each example
REPORT = "report.html"
RUN = "run.toml"  # what distinguishes this run from others: its Slurm job, the overrides it was started with
HISTORY = "history.jsonl"  # what was changed when it was resumed, a line each
LOCK = "run.lock"  # while a process uses the folder
LATEST = "latest"  # instead of a run folder: the newest unfinished run with an equal job
