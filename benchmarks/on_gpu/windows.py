"""Keep what planning records, to be replayed elsewhere.

Each window is a file: NAME.NUMBER.SAMPLES.json.xz in the folder "windows" beside the rows, with the allocations and
frees by phase as `simulation.recording.Recording` holds them. A card is lent for minutes; why a prediction was off is
found later, from these.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoaccum.devices.cuda import recorder
from autoaccum.simulation.recording import Recording

FOLDER_VARIABLE = "ON_GPU_WINDOWS"


@contextlib.contextmanager
def kept(name: str) -> Iterator[None]:
    """Write each window that is recorded until exit."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    number, record = 0, recorder.record

    def recorded(*args: Any, **kwargs: Any) -> Recording:
        nonlocal number
        found = record(*args, **kwargs)
        number += 1
        path = Path(folder) / f"{name}.{number}.{found.micro_batch}.json.xz"
        path.write_bytes(lzma.compress(json.dumps(as_data(found), separators=(",", ":")).encode(), preset=1))
        return found

    recorder.record = recorded
    try:
        yield
    finally:
        recorder.record = record


def as_data(recording: Recording) -> dict[str, Any]:
    """Return a recording as data, streams only where not the first."""
    phases = [
        [phase.name, [[e.block, e.bytes, e.stream] if e.stream else [e.block, e.bytes] for e in phase.events]]
        for phase in recording.phases
    ]
    return {
        "micro_batch": recording.micro_batch,
        "phases": phases,
        "passes": recording.passes,
        "workspaces": sorted(recording.workspaces),
        "reserved at start": recording.start.reserved_bytes if recording.start else None,
    }
