"""Draws detections onto a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from hpctrain.vision.predict import Detection

# Okabe and Ito's colours, which people with impaired colour vision can tell apart; by class, in turn.
PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
DARK = ("#D55E00", "#0072B2", "#009E73", "#000000")  # with white letters
LINE, LETTERS = 1 / 250, 1 / 40  # width of lines and height of letters, as shares of the picture's longer side
LEAST_LINE, LEAST_LETTERS = 1, 9  # pixels


def drawn(picture: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of the picture with a box, the class and the score of each detection, the best on top."""
    copy = picture.convert("RGB")
    draw = ImageDraw.Draw(copy)
    line = max(LEAST_LINE, round(LINE * max(copy.size)))
    font = ImageFont.load_default(max(LEAST_LETTERS, round(LETTERS * max(copy.size))))
    for found in sorted(detections, key=lambda each: each.score):
        colour = PALETTE[found.number % len(PALETTE)]
        draw.rectangle(found.box, outline=colour, width=line)
        _label(draw, found, colour, font, copy.size)
    return copy


def _label(
    draw: ImageDraw.ImageDraw,
    found: Detection,
    colour: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """A filled label above the box, or inside it where it would leave the picture."""
    text = f"{found.label} {found.score:.2f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right + left, bottom + top
    x = max(0.0, min(found.box[0], size[0] - width))
    y = found.box[1] - height if found.box[1] >= height else found.box[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x, y), text, fill="white" if colour in DARK else "black", font=font)
