"""Writes a run's tables as CSV or Parquet files, streamed. Columns are those of the frames of `hpctrain.trace.Run`.

Events have both their JSON and their sentence. Steps that a resumed run repeated appear twice, with different values of
`attempt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.errors import HpctrainError
from hpctrain.filenames import METRICS
from hpctrain.output import make_folder, output_file, output_text
from hpctrain.text import escaped
from hpctrain.trace import Run
from hpctrain.trace.files import event_of
from hpctrain.trace.schema import KINDS, OUTCOMES, TABLES
from hpctrain.views.export.selection import Rows, Selection
from hpctrain.views.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

EXPORTED = ("spans", "steps", "events", "resources")
NAMES = {("spans", "kind"): KINDS, ("device", "kind"): KINDS, ("steps", "outcome"): OUTCOMES}


def export_csv(run: Run, selection: Selection, folder: Path, progress: Progress) -> None:
    """Write `folder`/spans.csv, steps.csv ..., each with a header line."""
    make_folder(folder)
    for table in _exported(run):
        with output_text(folder / f"{table}.csv") as file:
            for number, frame in enumerate(_frames(run, selection, table, progress)):
                frame.to_csv(file, index=False, header=number == 0, lineterminator="\n")
    metrics = _metrics(run, selection)
    if len(metrics):
        with output_text(folder / METRICS) as file:
            metrics.to_csv(file, index=False, lineterminator="\n")


def export_parquet(run: Run, selection: Selection, folder: Path, progress: Progress) -> None:
    """Write `folder`/spans.parquet, steps.parquet ..., with a row group per block of the trace."""
    arrow, parquet = find_pyarrow()
    make_folder(folder)
    for table in _exported(run):
        with output_file(folder / f"{table}.parquet") as path, ExitStack() as stack:
            writer: Any = None
            for frame in _frames(run, selection, table, progress):
                rows = arrow.Table.from_pandas(frame, preserve_index=False)
                writer = writer or stack.enter_context(parquet.ParquetWriter(path, rows.schema, compression="zstd"))
                writer.write_table(rows)
    metrics = _metrics(run, selection)
    if len(metrics):
        with output_file(folder / "metrics.parquet") as path:
            parquet.write_table(arrow.Table.from_pandas(metrics, preserve_index=False), path, compression="zstd")


def _exported(run: Run) -> tuple[str, ...]:
    """The tables to export: the device's only if a device computed."""
    return (*EXPORTED, "device") if any(run.rows("device").values()) else EXPORTED


def find_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises HpctrainError if they are not installed."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise HpctrainError(
            "--format parquet needs pyarrow, which is not installed: pip install 'hpctrain[parquet]', "
            "or export with --format csv"
        ) from None


def _frames(run: Run, selection: Selection, table: str, progress: Progress) -> Iterator[pd.DataFrame]:
    """Yield a table's frames. The first is empty, so that the columns are known even if the table has no rows."""
    progress.begin(f"writing {table}", sum(n for (rank, _), n in run.rows(table).items() if rank in selection.ranks))
    yield _frame(run, table, 0, 0, np.zeros(0, TABLES[table]))
    for rank, attempt, rows in run.blocks(table, selection.ranks):
        inside = selection.cut(attempt, rows)
        if len(inside):
            yield _frame(run, table, rank, attempt, inside)
        progress.advance(len(rows))


def _frame(run: Run, table: str, rank: int, attempt: int, rows: Rows) -> pd.DataFrame:
    import pandas as pd

    columns: dict[str, Any] = {
        "rank": np.full(len(rows), rank, np.int32),
        "attempt": np.full(len(rows), attempt, np.int16),
    }
    seconds = {}
    for name in rows.dtype.names or ():
        if (table, name) == ("events", "json"):  # also add the sentence for people
            columns["text"] = pd.array([str(event_of(*row)) for row in rows[["kind", "json"]].tolist()], dtype="str")
        columns[name] = _values(rows[name], NAMES.get((table, name)))
        if name.endswith("_ns"):
            seconds[f"{name.removesuffix('_ns')}_s"] = (rows[name] - run.start_ns) / 1e9
    return pd.DataFrame(columns | seconds)


def _values(column: Rows, names: tuple[str, ...] | None) -> Any:
    import pandas as pd

    if names is not None:
        codes = np.where(column <= len(names), column.astype(np.int64) - 1, -1)
        return pd.Categorical.from_codes(codes, categories=pd.Index(list(names)))
    if column.dtype.kind == "S":
        return pd.array([escaped(value.decode(errors="replace")) for value in column], dtype="str")
    return column


def _metrics(run: Run, selection: Selection) -> pd.DataFrame:
    """The evaluations after the selected steps. metrics.csv has the number of steps done, counted from 1."""
    metrics = run.metrics()
    if selection.steps is None or "step" not in metrics:
        return metrics
    return metrics[metrics["step"].sub(1).between(selection.steps.start, selection.steps.stop - 1)]
