"""Text for messages: suggestions for mistyped words, and foreign text made safe to show."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word closest to `word` as " (did you mean ...?)"; "" if none is close."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:100].lower(), lowered, n=1, cutoff=0.6)
    return f" (did you mean {lowered[near[0]]}?)" if near else ""


def shown(name: str, most: int = 80) -> str:
    """`name` for a message: at most `most` characters, on one line, control characters escaped."""
    text = name if len(name) <= most else name[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def escaped(text: str) -> str:
    """`text` from a file, safe for a terminal: control and unprintable characters escaped. Line ends are kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shown_path(path: object) -> str:
    """A path for a message, not shortened, so that the user can find the file."""
    return shown(str(path), 4096)
