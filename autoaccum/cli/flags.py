"""Translate what texts advise from Python arguments to flags."""

from __future__ import annotations

import re

_FLAGS = {
    "budget": "--memory",
    "headroom": "--headroom",
    "malloc": "--malloc",
    "max_micro_batch": "--max-micro-batch",
    "objective": "--objective",
    "target_batch": "--target-batch",
    "timing_seconds": "--timing",
}
_ARGUMENT = re.compile(rf"\b({'|'.join(_FLAGS)})=(\"[^\"]*\"|'[^']*'|[\w.%-]*\w)?")


def in_flags(text: str) -> str:
    """Return a text with flags in place of `fit_plan`'s arguments.

    `budget="2GiB"` becomes `--memory 2GiB`, and `verify=False` becomes `--no-verify`.
    """

    def flag(match: re.Match[str]) -> str:
        value = (match[2] or "").strip("\"'")
        return f"{_FLAGS[match[1]]} {value}" if value else _FLAGS[match[1]]

    return _ARGUMENT.sub(flag, text.replace("verify=False", "--no-verify"))
