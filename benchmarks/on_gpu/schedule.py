"""List the trials, with their memory and their time."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import finders, gradients, libraries, times
from .models import MODELS

TITLES = {
    "a": "the plan's peak and largest micro-batch, against the truth",
    "b": "the same plans by --gpu, on the virtual GPU",
    "c": "context and libraries, against what budgets assume",
    "d": "gradients, and a window after a real out-of-memory",
    "e": "Runner.step and the loop by hand; the knee; pinned copies",
    "f": "Accelerate's finder and halving",
    "g": "the command line",
    "h": "cuDNN's workspaces, call by call",
}
NEW, NOT_AS_PREDICTED, MEASURED = range(3)  # ranks of a trial, by earlier runs on real cards
CONTEXT_BYTES = 3 << 29  # 1.5 GiB: allowed to each process for its context and libraries, above its memory fraction
CARD_SHARE = 0.9  # of the card for all trials that run side by side
CONTEXT_MODELS = ("resnet50-fp32", "gpt2-bf16", "lstm-fp32")
VIRTUAL_SLOWNESS = 40  # a virtual GPU on a shared core may take this much longer than a guess for a real one


@dataclass(frozen=True)
class Trial:
    """What one process is asked for.

    Attributes:
        part: A key of `TITLES`.
        model: A model's name; for the command line a word.
        card_bytes: What it may hold on the card, its context included; 0 where it only uses the host.
        seconds: What an H200 and 16 cores took, side by side; a guess for what hasn't run there.
        alone: Whether nothing may run beside it, since times or the card's free memory are read.
        skip: Why it can't run here; "" if it can.
        rank: Whether a real card has measured it, and as predicted (earlier.py).
    """

    part: str
    model: str
    card_bytes: int
    seconds: float
    alone: bool = False
    skip: str = ""
    rank: int = NEW

    @property
    def name(self) -> str:
        """Part and model, as `--only` takes them."""
        return f"{self.part}:{self.model}"

    @property
    def limit_seconds(self) -> float:
        """After which it is killed."""
        return 2.5 * self.seconds + 30

    def ranked(self, rank: int) -> Trial:
        """Return it with a rank."""
        return replace(self, rank=rank)


def trials(facts: Mapping[str, Any], only: Collection[str] = ()) -> list[Trial]:
    """Return the trials for a card, the most important first.

    Args:
        facts: Of the card.
        only: Parts, models, or PART:MODEL; left out, all.
    """
    found = [_memory(name, facts) for name in MODELS]
    stand_ins = [Trial("b", name, 0, 25) for name in MODELS]
    exact = [Trial("d", name, gradients.LIMIT_BYTES + CONTEXT_BYTES, 25) for name in gradients.OOM_SAMPLES]
    peers = [Trial("f", name, MODELS[name].limit_bytes + CONTEXT_BYTES, 45) for name in finders.START]
    # where NVML doesn't list this process (in a container), --memory counts what others hold as its context
    commands = [Trial("g", "commands", (6 << 30) + CONTEXT_BYTES, 110, alone=not facts["nvml lists processes"])]
    contexts = [Trial("c", name, MODELS[name].limit_bytes + CONTEXT_BYTES, 15, alone=True) for name in CONTEXT_MODELS]
    timed = [Trial("e", name, MODELS[name].limit_bytes + CONTEXT_BYTES, 55, alone=True) for name in times.SIZES]
    calls = [Trial("h", "cudnn", libraries.LIMIT_BYTES + CONTEXT_BYTES, 30)]
    half = len(found) // 2
    ordered = [*calls, *found[:half], *commands, *exact, *peers, *found[half:], *stand_ins, *contexts, *timed]
    return [each for each in ordered if not only or {each.part, each.model, each.name} & set(only)]


def _memory(name: str, facts: Mapping[str, Any]) -> Trial:
    model = MODELS[name]
    skip = ""
    if model.is_compiled and not facts["virtual"]:
        skip = missing_for_compiling()
    if model.limit_bytes + CONTEXT_BYTES > CARD_SHARE * facts["total bytes"]:
        skip = f"needs {model.limit_gib:g} GiB and a context, of {facts['total bytes'] / 2**30:.1f} GiB"
    return Trial("a", name, model.limit_bytes + CONTEXT_BYTES, model.seconds, skip=skip)


def missing_for_compiling() -> str:
    """Return what torch.compile lacks here; "" where nothing is missing."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "torch.compile needs a C compiler, and there is none here"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "torch.compile needs Python.h, and there is none here"
    return ""
