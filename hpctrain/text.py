"""Words for messages: what a mistyped word may have meant, and foreign text made fit to be shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word nearest to `word` as " (did you mean ...?)"; "" where none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:100].lower(), lowered, n=1, cutoff=0.6)
    return f" (did you mean {lowered[near[0]]}?)" if near else ""


def shown(name: str, most: int = 80) -> str:
    """`name` for a message: at most `most` characters, on one line, control characters escaped."""
    text = name if len(name) <= most else name[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def escaped(text: str) -> str:
    """`text` from a file, for a terminal: what would steer it, or cannot be shown, as escapes. Line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shown_path(path: object) -> str:
    """A file for a message, whole: it is to be found by that."""
    return shown(str(path), 4096)
