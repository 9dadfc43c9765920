"""Run trials within the card's memory and a deadline."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import windows
from .job import ROW, Job
from .process import Command, Ended
from .rows import DONE, FAILED, FINAL, SKIPPED, STOPPED, Rows
from .schedule import CARD_SHARE, MEASURED, VIRTUAL_SLOWNESS, Trial

ROOT = Path(__file__).resolve().parents[2]
LEAST_SHARE = 0.6  # of the guess: with less time left a trial isn't begun


@dataclass
class Driver:
    """Runs trials, and keeps their rows.

    Attributes:
        rows: Where rows go.
        facts: About the card (card.py).
        workers: How many trials may use the card side by side.
        ends: When all has to be over, by the monotonic clock.
        quiet: Whether to print no line for each trial.
    """

    rows: Rows
    facts: Mapping[str, Any]
    workers: int
    ends: float = float("inf")
    quiet: bool = False
    _free_bytes: float = field(default=0, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _running: list[Command] = field(default_factory=list, init=False)
    _stopping: bool = field(default=False, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self._free_bytes = CARD_SHARE * self.facts["total bytes"]
        self._scratch = tempfile.TemporaryDirectory(prefix="on-gpu-")

    def run(self, trials: Sequence[Trial]) -> None:
        """Run trials side by side, then those that run alone."""
        pending = [each for each in trials if not self.rows.is_done(each.part, each.model)]
        alone = [each for each in pending if each.alone and not each.skip]
        kept = sum(each.seconds for each in alone if each.rank < MEASURED) if self.ends < float("inf") else 0.0
        card = [each for each in pending if not each.alone and (each.card_bytes or each.skip)]
        host = [each for each in pending if not each.alone and not each.card_bytes and not each.skip]
        try:
            self._side_by_side([(card, self.workers), (host, max(1, self.workers // 3))], self.ends - kept)
            self._side_by_side([([each for each in pending if each.alone], 1)], self.ends)
        except BaseException:
            self._stop()
            for trial in pending:  # nothing is left out without a word
                if FINAL not in self.rows.steps(trial.part, trial.model):
                    self._finish(trial, SKIPPED, "interrupted")
            raise
        finally:
            self._scratch.cleanup()

    def _side_by_side(self, lanes: Sequence[tuple[list[Trial], int]], ends: float) -> None:
        threads = [
            threading.Thread(target=self._work, args=(pending, ends), daemon=True)
            for pending, workers in lanes
            for _ in range(min(workers, len(pending)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # with a timeout, so that Ctrl-C comes through
                    thread.join(0.5)
        except BaseException:
            self._stop()
            for thread in threads:
                thread.join(10)
            raise

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            running = list(self._running)
            self._changed.notify_all()
        for command in running:
            command.stop()

    def _work(self, pending: list[Trial], ends: float) -> None:
        while (trial := self._next(pending)) is not None:
            try:
                self._try(trial, ends)
            finally:
                with self._changed:
                    self._free_bytes += trial.card_bytes
                    self._changed.notify_all()

    def _next(self, pending: list[Trial]) -> Trial | None:
        """Take the first trial that the card has room for."""
        with self._changed:
            while pending and not self._stopping:
                for trial in pending:
                    if trial.skip or trial.card_bytes <= self._free_bytes:
                        pending.remove(trial)
                        self._free_bytes -= trial.card_bytes
                        return trial
                self._changed.wait()
        return None

    def _try(self, trial: Trial, ends: float) -> None:
        left = ends - time.monotonic()
        if trial.skip:
            self._finish(trial, SKIPPED, trial.skip)
        elif left < LEAST_SHARE * trial.seconds:
            self._finish(trial, SKIPPED, f"no time left: about {trial.seconds:.0f} s needed, {max(0, left):.0f} s left")
        else:
            slowness = VIRTUAL_SLOWNESS if self.facts["virtual"] else 1
            limit = min(slowness * trial.limit_seconds, left)
            ended, answered = self._run(trial, limit)
            if ended.was_stopped:
                if not self._stopping:
                    self._finish(trial, STOPPED, f"killed after {ended.seconds:.0f} s, its time limit", ended)
            elif not answered:
                why = (ended.said.strip().splitlines() or ["without a word"])[-1]
                self._finish(trial, FAILED, f"exit code {ended.code}: {why[:400]}", ended)

    def _run(self, trial: Trial, limit_seconds: float) -> tuple[Ended, bool]:
        """Run a trial's process.

        Returns:
            How it ended, and whether it said so itself.
        """
        known = {step: row for step, row in self.rows.steps(trial.part, trial.model).items() if step != FINAL}
        ends = time.monotonic() + limit_seconds  # CLOCK_MONOTONIC is the machine's: a child reads the same
        job = Job(trial.part, trial.model, dict(self.facts), known, ends)
        answered = False

        def on_line(line: str) -> None:
            nonlocal answered
            if line.startswith(ROW):
                row = self.rows.add(json.loads(line.removeprefix(ROW)))
                answered = answered or row["step"] == FINAL
                self._say(f"{trial.name} {short(row)}")

        command = Command(
            [sys.executable, "-m", "benchmarks.on_gpu.trial", job.to_json()],
            environment(self._scratch.name) | {windows.FOLDER_VARIABLE: str(self.rows.path.parent / "windows")},
            on_line,
        )
        with self._changed:
            self._running.append(command)
        try:
            return command.run(limit_seconds), answered
        finally:
            with self._changed:
                self._running.remove(command)

    def _finish(self, trial: Trial, status: str, why: str, ended: Ended | None = None) -> None:
        row = {"part": trial.part, "model": trial.model, "step": FINAL, "status": status, "why": why}
        row |= {"seconds": ended.seconds, "trace": ended.said[-1500:]} if ended else {}
        self.rows.add(row)
        self._say(f"{trial.name} {status}: {why}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self._started:6.0f} s  {text}"[:240], file=sys.stderr, flush=True)


def environment(scratch: str) -> dict[str, str]:
    """Return the variables of a trial's process."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # of a process that forks: a fork would wait for threads that it hasn't
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() must not open the GPU before the fork
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
    }


def short(row: dict[str, object]) -> str:
    """Return a row's step and its plain figures, for the progress."""
    if row["step"] == FINAL:
        return DONE if row["status"] == DONE else f"{row['status']}: {row.get('why', '')}"
    keys = (
        "largest", "complete", "predicted", "measured", "reserved", "ooms", "retries", "error", "ratio", "chosen",
        "code", "refused", "why", "seconds",
    )  # fmt: skip
    return f"{row['step']}: " + ", ".join(f"{key} {row[key]}" for key in keys if key in row)
