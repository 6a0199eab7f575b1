"""The figures of hpctrain.views.figures as images inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from markupsafe import Markup

from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hpctrain.analysis import Analysis

LARGEST_SVG = 100_000  # bytes; a larger figure is smaller as a PNG
PIXELS_PER_INCH = 120
INTERACTIVE = "timeline"  # left out, because the page has an interactive one


@dataclass(frozen=True)
class Picture:
    """A figure of the page. `url`: a data URL with the image; `width`: in CSS pixels; `caption`: how to read it."""

    name: str
    url: str
    width: int
    title: str
    caption: str
    command: str


def draw_pictures(
    analysis: Analysis, folder: str, notify: Callable[[str], None]
) -> tuple[list[Picture], list[tuple[str, str]]]:
    """(pictures, (name, reason) of those that cannot be drawn). `folder`: the run, for the commands to redraw them."""
    from hpctrain.views.figures import FIGURES

    pictures, left_out = [], []
    for name in FIGURES:
        if name == INTERACTIVE:
            continue
        notify(f"report: drawing {name}")
        try:
            module = import_module(f"hpctrain.views.figures.{name}")
            url, width = embed(module.draw(analysis))
        except HpctrainError as error:
            left_out.append((name, str(error)))
        except Exception as error:  # a failing figure must not break the others
            left_out.append((name, f"it could not be drawn ({type(error).__name__}: {error})"))
        else:
            command = f"python analysis/{name}.py {folder} -o {name}.png"
            pictures.append(Picture(name, url, width, *describe(module.__doc__ or name), command))
    return pictures, left_out


def embed(figure: Figure) -> tuple[str, int]:
    """(data: URL, width in CSS pixels) of the figure: SVG if that is small, else PNG."""
    picture, kind = _save(figure, "svg"), "svg+xml"
    if len(picture) > LARGEST_SVG:
        picture, kind = _save(figure, "png"), "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}", round(figure.get_figwidth() * 96)


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=PIXELS_PER_INCH)
    return buffer.getvalue()


def describe(docstring: str) -> tuple[str, str]:
    """Split a figure's docstring into (title: the first line up to the command, caption: the rest)."""
    first, _, rest = docstring.partition("\n\n")
    return first.split(": python ", 1)[0], " ".join(rest.split())


def inline(name: str) -> Markup:
    """The content of a file of this package, to be put into the page unchanged."""
    from importlib.resources import files

    return Markup(files("hpctrain.views.report").joinpath(name).read_text(encoding="utf-8"))
