"""Hold the options of a tuning, checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..devices.cpu.page_cache import MALLOCS
from ..errors import UsageError
from ..units import MAX_SEED, check_count, check_memory, check_samples, check_seconds
from .space import SearchSpace

SAMPLERS = ("tpe", "random", "grid")
_SQLITE_MAGIC = b"SQLite format 3\0"  # the first bytes of every database (sqlite.org/fileformat.html)
_OTHER_STUDY = "Name another file: --study FILE.db"


@dataclass(frozen=True)
class TuningRequest:
    """The options of a tuning.

    Attributes:
        target_batch: Samples in an optimizer step.
        space: The choices to search.
        trials: The most configurations to try, answers from the study not counted; None for 40, or all of them with
            sampler="grid".
        timeout: Seconds after which no further trial starts; None for no limit.
        device: "cpu" or "cuda".
        gpu: Name of the GPU that a virtual one replaces; None for this machine's devices.
        memory: Memory limit of the whole process, such as "2GiB"; None for what the machine has free.
        headroom: How much of the memory to keep free, as a size or a percentage.
        malloc: "cached", "fixed" or "default", as for `fit_plan`.
        study: A SQLite file that stores the trials, so that an interrupted tuning continues; None for none.
        sampler: "tpe": the plain configuration first, then those that differ from the best in one choice, then
            optuna's tree-structured Parzen estimator; "random"; or "grid": all configurations in order.
        pareto: Search for the Pareto front of time and peak memory, and mark it.
        seed: Seed of the sampler.

    Raises:
        UsageError: An option is invalid.
    """

    target_batch: int
    space: SearchSpace
    trials: int | None = None
    timeout: float | None = None
    device: str = "cpu"
    gpu: str | None = None
    memory: str | int | None = None
    headroom: str | int | None = None
    malloc: str = "cached"
    study: str | None = None
    sampler: str = "tpe"
    pareto: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target_batch is None:
            raise UsageError("No target batch is given.", hint="Give target_batch=512, for example.")
        check_samples("target_batch", self.target_batch)
        check_count("trials", self.trials, example=20)
        check_count("seed", self.seed, least=0, most=MAX_SEED)
        check_seconds("timeout", self.timeout, zero=False)
        check_memory(self.memory, self.headroom)
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"The device {self.device!r} is not supported.", hint="Use 'cpu' or 'cuda'.")
        if self.gpu is not None and self.device == "cpu":
            raise UsageError("gpu cannot be combined with device 'cpu'.", hint="Leave the device out, or gpu.")
        if self.malloc not in MALLOCS:
            raise UsageError(f"malloc must be one of {', '.join(MALLOCS)}, not {self.malloc!r}.")
        if self.sampler not in SAMPLERS:
            names = ", ".join(SAMPLERS)
            raise UsageError(f"The sampler {self.sampler!r} is not known.", hint=f"Use one of: {names}.")
        if self.study is not None:
            _check_study(Path(self.study))

    @property
    def on_cuda(self) -> bool:
        """Whether it plans for CUDA."""
        return self.device == "cuda"

    @property
    def virtual(self) -> bool:
        """Whether the device is a virtual GPU, without times."""
        return self.gpu is not None

    def planning_values(self) -> dict[str, Any]:
        """Return the options that planning one configuration needs, as JSON values."""
        names = ("target_batch", "memory", "headroom", "malloc", "device", "gpu")
        return {name: getattr(self, name) for name in names}

    def to_values(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"space": self.space.to_values()}

    @staticmethod
    def from_values(values: dict[str, Any]) -> TuningRequest:
        """Read what `to_values` returned."""
        return TuningRequest(**(values | {"space": SearchSpace.from_values(values["space"])}))


def _check_study(file: Path) -> None:
    """Refuse a path that can't become a study."""
    if not file.resolve().parent.is_dir():
        raise UsageError(f"There is no folder {file.parent}.", hint="Create it first, or name another file.")
    try:
        if file.is_dir():
            raise UsageError(f"The study {str(file)!r} is a folder.", "A study is one SQLite file.", _OTHER_STUDY)
        with file.open("r+b") as opened:
            start = opened.read(len(_SQLITE_MAGIC)) if file.is_file() else b"?"
    except FileNotFoundError:  # Path.exists() hides other errors from Python 3.14 on
        return
    except OSError as error:
        why = f"The system reports: {error.strerror}."
        raise UsageError(f"The study {str(file)!r} can't be written.", why, _OTHER_STUDY) from None
    if start not in (b"", _SQLITE_MAGIC):
        raise UsageError(f"The study {str(file)!r} can't be used.", "It is not a SQLite file.", _OTHER_STUDY)


def refuse_groups(samples_per_group: int, command: str) -> None:
    """Refuse samples in groups.

    Raises:
        UsageError: There are such.
    """
    if samples_per_group > 1:
        raise UsageError(
            f"The workload's samples come in groups of {samples_per_group}, which {command} doesn't support.",
            "It tries micro-batches of any number of samples, and those cut groups apart.",
            "Plan it, whose micro-batches are whole groups: autoaccum plan.",
        )
