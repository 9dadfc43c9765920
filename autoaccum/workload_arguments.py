"""Accept the forms in which people give a Workload's arguments.

An optimizer in a list, as Lightning returns it, or by its name; a scaler as `True`; a precision as a torch type; a
DataLoader, or one item of a dataset, as the sample. What stands for something else raises before anything is trained.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UsageError

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "bf16", "fp16")
_OTHER_PRECISIONS = {
    "float32": "fp32", "float": "fp32", "32": "fp32", "32-true": "fp32", "no": "fp32",
    "bfloat16": "bf16", "bf16-mixed": "bf16",
    "float16": "fp16", "half": "fp16", "16": "fp16", "16-mixed": "fp16",
}  # fmt: skip
_AN_OPTIMIZER = "Give an optimizer, or a function of the parameters: optimizer=lambda p: torch.optim.SGD(p, lr=0.1)."


class Optimization(NamedTuple):
    """An optimizer, its scheduler, and how often that is stepped."""

    optimizer: Any
    scheduler: Any = None
    interval: str = "step"


def check_model(model: Any) -> None:
    """Refuse what is no module, and one without anything to train.

    Raises:
        UsageError: It is a class, a function, or has no parameter that requires a gradient.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        made = f"Call it: {model.__name__}(...)." if callable(model) and hasattr(model, "__name__") else ""
        raise UsageError(
            f"The model is {_described(model)}, not a torch.nn.Module.", "", made or "Workload(model, sample, ...)"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"No parameter of {type(model).__name__} requires a gradient, so there is nothing to train.",
            hint="Set requires_grad=True on the parameters to train.",
        )


def read_precision(given: Any) -> str | None:
    """Return a precision's name here, however a trainer or torch spells it.

    Raises:
        UsageError: It is not known.
    """
    if given is None or given in PRECISIONS:
        return given  # type: ignore[no-any-return]
    name = str(given).removeprefix("torch.").lower()
    if name in _OTHER_PRECISIONS:
        return _OTHER_PRECISIONS[name]
    raise UsageError(
        f"precision {given!r} is not known.",
        hint=f"Use one of {', '.join(PRECISIONS)}, or leave it out for the model's own.",
    )


def make_scaler(given: Any, model: nn.Module) -> Any:
    """Return the gradient scaler that `True` asks for, or the given one."""
    if given is None or given is False:
        return None
    if given is True:
        import torch

        return torch.amp.GradScaler(next(model.parameters()).device.type)
    if not hasattr(given, "scale") or not hasattr(given, "update"):
        raise UsageError(
            f"scaler is {_described(given)}, not a torch.amp.GradScaler.",
            hint='Give scaler=True, or scaler=torch.amp.GradScaler("cuda").',
        )
    return given


def read_optimization(given: Any, scheduler: Any) -> Optimization:
    """Return the optimizer and the scheduler that were given in any form.

    Args:
        given: An optimizer; a function of the parameters; the name of one of torch's; or what Lightning's
            `configure_optimizers` may return: a list of one, a pair of lists, a dictionary.
        scheduler: The workload's own; None to take the one that comes with the optimizer.

    Raises:
        UsageError: It is none of these, or several optimizers.
    """
    found = _optimization(given)
    if scheduler is not None:
        if found.scheduler is not None:
            raise UsageError(
                "A scheduler came with optimizer=, and scheduler= is given, too.", hint="Leave out one of them."
            )
        own = _scheduler(scheduler)
        return Optimization(found.optimizer, own.scheduler, own.interval)
    return found


def _optimization(given: Any) -> Optimization:
    import torch

    if given is None or isinstance(given, torch.optim.Optimizer):
        return Optimization(given)
    if isinstance(given, str):
        return Optimization(_by_name(given))
    if isinstance(given, Mapping):
        if "optimizer" not in given:
            raise UsageError(f"optimizer= is a dictionary of {', '.join(map(str, given))}.", hint=_AN_OPTIMIZER)
        return Optimization(*_optimization(given["optimizer"])[:1], *_scheduler(given.get("lr_scheduler"))[1:])
    if isinstance(given, (list, tuple)):
        return _of_list(given)
    if not callable(given):
        raise UsageError(f"optimizer= is {_described(given)}.", hint=_AN_OPTIMIZER)
    return Optimization(*_optimization(given())) if _takes_nothing(given) else Optimization(given)


def _of_list(given: Any) -> Optimization:
    """Return the one optimizer of a list or a pair."""
    if len(given) == 2 and isinstance(given[0], (list, tuple)) and isinstance(given[1], (list, tuple)):
        first = _of_list(given[0])
        return Optimization(first.optimizer, *_scheduler([*given[1]], interval="epoch")[1:]) if given[1] else first
    if len(given) == 1:
        return _optimization(given[0])
    names = ", ".join(type(each).__name__ for each in given) or "none"
    raise UsageError(
        f"optimizer= holds {len(given)} optimizers ({names}), and a window ends with one optimizer's step.",
        "Which of them steps, and on which loss, is a matter of the method.",
        "For a GAN make one Workload for each network, and step their Runners in turn; for two optimizers of one loss "
        "give one that steps both: docs/two-optimizers.md has the code.",
    )


def _scheduler(given: Any, interval: str = "step") -> Optimization:
    """Return a scheduler out of a list, or of Lightning's dictionary."""
    if isinstance(given, (list, tuple)) and given:
        if len(given) > 1 and hasattr(given[1], "step"):
            raise UsageError(
                f"scheduler= holds {len(given)} schedulers.",
                "A window ends with one step of one scheduler.",
                "Combine them: torch.optim.lr_scheduler.SequentialLR or ChainedScheduler.",
            )
        return _scheduler(given[0], interval)  # timm's create_scheduler_v2 returns its epochs beside it
    if isinstance(given, Mapping):
        return Optimization(None, given.get("scheduler"), str(given.get("interval", "epoch")))
    if given is not None and not callable(given) and not hasattr(given, "step"):
        raise UsageError(
            f"scheduler= is {_described(given)}.",
            hint="Give a scheduler, or a function of the optimizer: "
            "scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=1000).",
        )
    return Optimization(None, given, interval)


def _by_name(name: str) -> Callable[[Any], Any]:
    """Return the class of torch.optim with that name, in any case."""
    import torch

    known = {
        kind.lower(): getattr(torch.optim, kind)
        for kind in dir(torch.optim)
        if isinstance(getattr(torch.optim, kind), type)
        and issubclass(getattr(torch.optim, kind), torch.optim.Optimizer)
    }
    del known["optimizer"]
    wanted = name.lower().removesuffix("_torch")
    if wanted in known:
        return known[wanted]  # type: ignore[no-any-return]
    near = difflib.get_close_matches(wanted, known, n=1)
    raise UsageError(
        f"optimizer {name!r} is not one of torch.optim.",
        f"By name there are {', '.join(sorted(known))}, with torch's defaults.",
        f"Did you mean {near[0]!r}?" if near else _AN_OPTIMIZER,
    )


def _takes_nothing(function: Any) -> bool:
    """Return whether a function has no parameter for the parameters."""
    try:
        return not inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def check_functions(**functions: Any) -> None:
    """Refuse what is no function; None passes.

    Raises:
        UsageError: It can't be called.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise UsageError(
                f"{name}= is {_described(function)}, which cannot be called.", hint=f"Give {name}=lambda ..."
            )


def check_number(name: str, value: Any) -> None:
    """Refuse anything but a positive number; None passes.

    Raises:
        UsageError: It is something else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):
        raise UsageError(f"{name} is {value!r}: a number above 0.", hint=f"Give {name}=1.0, say.")


def read_whole(name: str, value: Any) -> Any:
    """Return a whole number of another library (numpy's, a tensor's) as Python's.

    Raises:
        UsageError: It is no whole number.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UsageError(f"{name} is {value!r}: a whole number.", hint=f"Give {name}=8, say.")


def read_lengths(given: Any, loader: Any = None) -> Any:
    """Return the samples' lengths as a sequence of whole numbers.

    Args:
        given: A list, an array, a tensor, a column of a table; None for none.
        loader: The loader, whose dataset has to have as many samples.

    Raises:
        UsageError: They are something else, negative, or too few.
    """
    if given is None:
        return None
    hint = "Give a list with a whole number for each sample: lengths=[len(sample) for sample in dataset]."
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise UsageError(f"lengths= is {_described(given)}.", hint=hint)
    if not (isinstance(values, (list, tuple)) and all(type(each) is int for each in values)):
        values = [_length(each, index, hint) for index, each in enumerate(values)]
    if values and min(values) < 0:
        raise UsageError(f"lengths= has {min(values)}, at {values.index(min(values))}.", hint=hint)
    samples = _samples_of(loader)
    if values and samples is not None and len(values) < samples:
        raise UsageError(
            f"lengths= has {len(values)} entries, and the loader's dataset {samples} samples.",
            "Samples are put in order by their index in the dataset.",
            hint,
        )
    return values


def _length(value: Any, index: int, hint: str) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"lengths= has {value!r} at {index}, which is no whole number.", hint=hint) from None


def read_largest(given: Any, loader: Any) -> Any:
    """Return the index of the largest sample.

    Raises:
        UsageError: It is none of the loader's dataset.
    """
    largest, samples = read_whole("largest", given), _samples_of(loader)
    if largest is not None and samples is not None and not -samples <= largest < samples:
        raise UsageError(
            f"largest is {largest}, and the loader's dataset has {samples} samples.",
            hint=f"Give the index of one: largest=0 to {samples - 1}.",
        )
    return largest


def check_names(**names: Any) -> None:
    """Refuse names of a batch's entries in a form that holds none.

    Raises:
        UsageError: They are no strings.
    """
    for argument, value in names.items():
        if isinstance(value, str) or (isinstance(value, Collection) and all(isinstance(each, str) for each in value)):
            continue
        raise UsageError(f"{argument} is {_described(value)}.", hint=f"Give names of entries: {argument}={{'mask'}}.")


def _samples_of(loader: Any) -> int | None:
    """Return the number of samples of a loader's dataset, if known."""
    dataset = getattr(loader, "dataset", None)
    try:
        return len(dataset) if hasattr(dataset, "__getitem__") else None  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def read_sample(sample: Any, loader: Any) -> tuple[Any, Any]:
    """Return the sample and the loader, whichever was given.

    A dataset's item becomes a batch of one, by the loader's own collate function where there is a DataLoader.

    Returns:
        The sample, None where the loader's data are to be the sample; and the loader.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

    if isinstance(sample, (DataLoader, IterableDataset)):
        return None, sample if loader is None else loader
    if isinstance(sample, Dataset) and not isinstance(sample, torch.Tensor):
        return None, DataLoader(sample, batch_size=1, shuffle=True) if loader is None else loader
    if not is_item(sample):
        return sample, loader
    collate = loader.collate_fn if isinstance(loader, DataLoader) else default_collate
    try:
        return collate([_in_tensors(sample)]), loader
    except (TypeError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"The sample is one item of a dataset, which could not be made a batch: {error}",
            hint="Give a batch: sample=next(iter(loader)).",
        ) from error


def is_item(sample: Any) -> bool:
    """Return whether a sample is one item of a dataset.

    Its class is then a single number, or its tokens have no dimension for samples.
    """
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return _is_number(sample[1]) and not _is_number(sample[0])
    if not isinstance(sample, Mapping):
        return False
    if any(_is_number(sample.get(name)) for name in ("label", "labels", "target", "targets", "class")):
        return True
    ids = sample.get("input_ids")
    return getattr(ids, "ndim", None) == 1 or (isinstance(ids, list) and bool(ids) and isinstance(ids[0], int))


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or getattr(value, "ndim", None) == 0


def _in_tensors(item: Any) -> Any:
    """Return an item whose lists of numbers are tensors, as collating needs."""
    import torch

    if not isinstance(item, Mapping):
        return item
    return {k: torch.tensor(v) if isinstance(v, list) and v and isinstance(v[0], int) else v for k, v in item.items()}


def _described(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"
