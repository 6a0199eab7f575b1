"""Put measurements of a GPU into docs/gpu.md.

    hpctrain bench device -n 2 --json gpu.json
    python analysis/gpu_page.py gpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.bench.markdown import table_lines

DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- measured: python analysis/gpu_page.py gpu.json -->\n", "<!-- end -->\n"


def tables(measured: Mapping[str, Any]) -> Iterator[str]:
    """The lines of all tables of `hpctrain bench device`, in Markdown."""
    yield "`hpctrain bench device -n 2`: medians (quartiles)."
    for name, table in measured.items():
        if name.startswith("device_"):
            yield ""
            yield from table_lines(table)


def put_in(page: str, measured: Mapping[str, Any]) -> str:
    """The page with these measurements in place of the former ones."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(tables(measured)) + "\n" + END + after


def main() -> None:
    """Read the file that the command line names, and rewrite docs/gpu.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="what `hpctrain bench device --json` wrote")
    measured = json.loads(parser.parse_args().json.read_text())
    DOCUMENT.write_text(put_in(DOCUMENT.read_text(), measured))


if __name__ == "__main__":
    main()
