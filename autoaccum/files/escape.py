r"""Escape text from elsewhere: one line, no control characters.

Nothing in it moves the cursor or reverses a line's direction.

Plans, studies, checkpoints and exceptions of the user's hold text that anybody may have written. Shown raw, an escape
sequence repaints the terminal, a newline forges a line of ours, and an override of the writing direction has a line
read as another. So whatever prints such text, or puts it into a page, makes it `one_line` where it is put together.
"""

from __future__ import annotations

import logging
import re

MAX_CHARACTERS = 2000  # of one line; the longest sentence of a plan has some 400

# What isn't seen and yet does something (Unicode's categories Cc, Zl, Zp and Cs, and the marks of Cf): control
# characters, soft hyphen, marks, embeddings, overrides and isolates of direction (UAX 9), what has no width, tags.
# The joiners of Persian, of Indic scripts and of emoji stay where they join something that isn't ASCII.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_JOINS = "[^\x00-\x7f\u200c\u200d]"
_STRAY_JOINER = re.compile(f"(?<!{_JOINS})[\u200c\u200d]|[\u200c\u200d](?!{_JOINS})")


def one_line(text: object, most: int = MAX_CHARACTERS) -> str:
    r"""Return the text in one line, invisible characters escaped, cut to length."""
    whole = str(text)
    shown = _STRAY_JOINER.sub(_escaped, _UNSEEN.sub(_escaped, whole[:most]))[:most]
    return shown if len(whole) <= most else f"{shown}... (cut: {len(whole):,} characters)"


def lines(text: str, most: int = 1000) -> str:
    """Return several lines, each made `one_line`: a traceback, a compiler's output."""
    found = text.split("\n")
    kept = found if len(found) <= most else [*found[:most], f"... (cut: {len(found):,} lines)"]
    return "\n".join(map(one_line, kept))


def finalize(value: object) -> object:
    """Escape a value for Jinja's `finalize`, unless it is our markup."""
    return one_line(value) if type(value) is str else value


class OneLine(logging.Filter):
    """Make each record's message one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Insert the arguments into the record; let every record pass."""
        record.msg, record.args = one_line(record.getMessage()), ()
        return True


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
