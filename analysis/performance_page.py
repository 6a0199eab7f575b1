"""Measure what docs/performance.md shows, and write the page.

    python analysis/performance_page.py                 # all sections that docs/performance/ does not have yet
    python analysis/performance_page.py --only NAME     # one section, measured again
    python analysis/performance_page.py --write         # only write the page

Each section is a `hpctrain bench` of at most seven minutes; those in the laboratory need root. The page has only what
has been measured, each section with its command, time and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.bench.markdown import table_lines
from hpctrain.bench.plot import draw

ROOT = Path(__file__).parent.parent
DOCUMENT, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
KEPT = ROOT / "docs" / "performance"  # what each section measured
TWO, FOUR = ("--cluster", "clusters/lan2.toml"), ("--cluster", "clusters/lan4.toml")
SECTIONS: dict[str, tuple[str, ...]] = {
    "limits": ("limits", "-n", "2"),
    "step_mlp": ("step_mlp", "-n", "2"),
    "step_resnet18": ("step_resnet18", "-n", "2"),
    "all_reduce": ("all_reduce", "-n", "2"),
    "pushes": ("pushes", "-n", "3"),
    "start": ("start",),
    "codecs": ("codecs",),
    "limits_lan2": ("limits", *TWO),
    "step_mlp_lan2": ("step_mlp", *TWO),
    "step_resnet18_lan2": ("step_resnet18", *TWO),
    "all_reduce_lan2": ("all_reduce", *TWO),
    "pushes_lan2": ("pushes", *TWO),
    "traffic_lan4": ("traffic", *FOUR),
}
LIMIT = 420.0  # seconds per section
HEAD = """# Measured performance

Remade by `python analysis/performance_page.py` (as root, for the laboratory's hosts). Medians (quartiles) over blocks;
what is compared ran in turn, block by block, in the same processes. The intervals are 95 %: delete-one-block jackknife
with Student's t, of the mean logarithm for ratios. Processor time is that of all threads, per rank and step. The hosts
of `clusters/*.toml` are network namespaces on the same machine, with half a core each (`hpctrain lab`).

![comparisons with intervals and targets](performance.png)
"""


def measure(name: str) -> None:
    """Run a section and keep its figures."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path, words = KEPT / f"{name}.json", SECTIONS[name]
    fresh = path.with_suffix(".new")
    argv = [sys.executable, "-m", "hpctrain", "bench", *words, "--json", str(fresh)]
    subprocess.run(argv, cwd=ROOT, timeout=LIMIT, check=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = {"command": f"hpctrain bench {' '.join(words)}", "measured": now, "commit": _commit()}
    path.write_text(json.dumps({**about, **json.loads(fresh.read_text())}, indent=1) + "\n")
    fresh.unlink()


def _commit() -> str:
    """The commit of the code that was measured."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    edited = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "hpctrain", "clusters"], cwd=ROOT).returncode
    return head.stdout.strip() + (" with edits" if edited else "")


def page(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    for figures in found.values():
        yield f"## `{figures['command']}`"
        yield ""
        machine = figures["machine"].replace("; median (quartiles) of interleaved repetitions", "")
        yield f"{figures['measured']}, commit {figures['commit']}, {machine}."
        for table in figures.values():
            if isinstance(table, Mapping):
                yield ""
                yield from table_lines(table)
        yield ""


def write() -> None:
    """Write the page and its picture from what has been kept."""
    files = {name: KEPT / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    DOCUMENT.write_text("\n".join(page(found)).rstrip("\n") + "\n")
    compared = [
        {**each, "what": f"{name}: {each['what']}"}
        for name, figures in found.items()
        for table in figures.values() if isinstance(table, Mapping)
        for each in table["comparisons"]
    ]  # fmt: skip
    draw(compared, str(PICTURE))


def main() -> None:
    """Measure as the command line says, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, help="measure this section, again if need be")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    missing = [name for name in SECTIONS if not (KEPT / f"{name}.json").exists()]
    for name in [] if options.write else [options.only] if options.only else missing:
        print(f"performance: {name}", file=sys.stderr, flush=True)
        measure(name)
    write()


if __name__ == "__main__":
    main()
