"""Plan files, checkpoints and command lines as nobody would write them; `scripts/fuzz` runs this for as long as asked.

Each is made from a seed, so that what fails can be made again: `scripts/fuzz plans --seed N --count 1`.
"""

from __future__ import annotations

import copy
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plan_fields import changed_json
from strategies import made_up_plan

from autoaccum.errors import AutoaccumError, PlanFileError
from autoaccum.plan import Plan
from autoaccum.reporting import SUFFIXES, render, what_if
from autoaccum.reporting.explain import summary

MOST_SECONDS = 5.0  # that rendering anything read may take; a busy machine is slower
TEXTS = ("", "\x1b[2J", "a\nexactness   exact", "\u202e", "\ud800", "x" * 5000, "[bold]", "<script>", "=1+1", "{{7*7}}",
         "pickled:gASVAAAA", "digits", "cpu", "fastest", "nan", "1e999", "../../etc/passwd")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**40, -(10**40), 0.0, -0.0, 0.5, 1e-320, 1e308,
           -1e308, 1e12, float("inf"), float("-inf"), float("nan"))  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [0], {"": 0}, [None], "0", "1", "1.0")


def plan_texts() -> list[dict[str, Any]]:
    """Plans to begin with, as JSON: a verified one for a CPU, one of a GPU, and one with as little as there can be."""
    bare = made_up_plan(
        target_batch=1, world_size=1, micro_batch=1, accumulation_steps=1, split=(1,), measured_peak_bytes=None,
        resident_peak_bytes=None, peaks=(), timed_sizes=(), timeline=(), composition={}, configuration={}, notes=(),
        malloc_overhead=0.0, phases={"first": 1}, max_micro_batch=None, window_seconds=None, is_virtual=False,
    )  # fmt: skip
    gpu = made_up_plan(device_name="NVIDIA A100", is_virtual=False, objective="fewest-steps")
    return [json.loads(plan.to_json()) for plan in (made_up_plan(), gpu, bare)]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    for key in data if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from places(data[key])


def change(data: Any, rng: random.Random) -> None:
    """Changes one place of some JSON."""
    where, key = rng.choice(list(places(data)))
    old = where[key]
    kind = rng.randrange(8)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, list):
        where += [copy.deepcopy(old)] * rng.choice((1, 2, 100))
    elif kind == 2 and isinstance(old, int | float) and not isinstance(old, bool):
        where[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 10**9, old // 3 if old else 1, float(old)))
    elif kind == 3 and isinstance(where, dict):
        where[rng.choice(TEXTS)] = where.pop(key)
    elif kind == 4:
        other, name = rng.choice(list(places(data)))
        where[key] = copy.deepcopy(other[name])
    else:
        same = NUMBERS if isinstance(old, int | float) else TEXTS
        where[key] = copy.deepcopy(rng.choice(same if kind < 7 else (*NUMBERS, *TEXTS, *OTHERS)))


def resize(data: dict[str, Any], rng: random.Random) -> None:
    """Another split, all that has to agree with it included."""
    steps = rng.choice((1, 2, 7, 300))
    share = steps * rng.choice((1, 3, 1000, 2**40)) + rng.randrange(steps)
    size, more = divmod(share, steps)
    split = [size + 1] * more + [size] * (steps - more)
    ranks = rng.choice((1, 3))
    data["schedule"] |= {"split": split, "accumulation_steps": steps, "micro_batch": split[0]}
    data["request"] |= {"world_size": ranks, "target_batch": share * ranks, "max_micro_batch": None}
    data["request"]["min_micro_batch"] = rng.choice((1, 2, split[0]))


def plan_text(seed: int, beginnings: list[dict[str, Any]]) -> str:
    """A plan file's text."""
    rng = random.Random(seed)
    data = copy.deepcopy(rng.choice(beginnings))
    if rng.random() < 0.2:
        resize(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change(data, rng)
    text = json.dumps(data)
    if rng.random() < 0.05:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(("", "\x00", "}", '"', "9" * 5000)) + text[place + rng.randrange(3) :]
    return text


def check_plan(text: str) -> bool:
    """Whether it is a plan; then it can be rendered in every form, safely and soon.

    Raises:
        AssertionError: It is accepted and can't be rendered, or is refused in another way than in three parts.
    """
    try:
        plan = Plan.from_json(text)
    except PlanFileError as error:
        assert error.what and error.why and error.hint
        return False
    started = time.monotonic()
    tellers: list[Callable[[Plan], str]] = [summary, Plan.explain, Plan._repr_html_, Plan.to_json]
    tellers += [lambda plan, suffix=suffix: render(plan, suffix) for suffix in SUFFIXES]  # type: ignore[misc]
    for tell in tellers:
        message = tell(plan)
        message.encode()
        assert not set(message) & set("\x1b\x07\x00\u202e"), tell
    for message in (plan.to_json(), render(plan, ".json")):
        json.loads(message, parse_constant=_no_number)
    assert Plan.from_json(plan.to_json()) == plan
    table = what_if.table_of(plan)
    if table is not None:
        for target, memory in (("1", "2GiB"), ("512", "1KiB"), ("9999999", "80GiB")):
            what_if.ask(table, target, memory, "5%")
    assert time.monotonic() - started < MOST_SECONDS, f"it took {time.monotonic() - started:.0f} s"
    return True


def _no_number(name: str) -> Any:
    raise AssertionError(f"a bare {name}")


def check_checkpoint(seed: int, content: bytes, path: Path) -> None:
    """Spoils a checkpoint: it is refused in three parts.

    Raises:
        AssertionError: It isn't.
    """
    from autoaccum.runner.checkpoint import read_checkpoint

    rng, spoilt = random.Random(seed), bytearray(content)
    kind, place = rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        spoilt[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del spoilt[place:]
    elif kind == 2:
        spoilt[place:place] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 3:
        spoilt[place : place + 40] = rng.randbytes(40)
    else:
        del spoilt[place : place + rng.randrange(1, 40)]
    if spoilt == content:
        return
    path.write_bytes(spoilt)
    try:
        read_checkpoint(path)
    except AutoaccumError as error:
        assert error.what and error.why and error.hint
    else:
        raise AssertionError(f"seed {seed}: a spoilt checkpoint is read")


def sealed_state(seed: int, state: dict[str, Any]) -> bytes:
    """A checkpoint that is whole and odd: one place of its state is otherwise."""
    import torch

    from autoaccum.runner.checkpoint import _Sealed

    rng, data = random.Random(seed), copy.deepcopy(state)
    change(data, rng)
    out = io.BytesIO()
    writer = _Sealed(out)
    torch.save(data, writer)  # type: ignore[arg-type]
    writer.end()
    return out.getvalue()


class Begun(AutoaccumError):
    """The command line was accepted: work would begin."""


WORDS = (
    *("0", "1", "-1", "512", "1000000000000", "9" * 400, "1e3", "nan", "inf", "-inf", "2GiB", "5%", "-5%", "110%", ""),
    *(" ", "\x1b[2J", "\udcff", "x" * 300, "cpu", "cuda", "a100-40gb", "digits", "chargpt", "fastest", "tpe", "grid"),
    *("fixed", "default", "precision=fp32,bf16", "micro_batch=0", "plan.json", "odd.json", "missing.json", "folder"),
    *("out.json", "out.html", "out.md", "missing/out.json", "work.py:workload", "work.py:", "work.py:none"),
)


def command_line(seed: int) -> list[str]:
    """Words after `autoaccum`: a command of ours, its options and arguments, and values of all sorts."""
    import typer.main

    from autoaccum.cli import app

    rng = random.Random(seed)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = rng.choice(sorted(commands))
    words = [name]
    for parameter in commands[name].params:
        is_argument = parameter.param_type_name == "argument"
        if is_argument and rng.random() < 0.9:
            words.append(rng.choice(("plan.json", "plan.json", *WORDS)))
        elif not is_argument and rng.random() < 0.25:
            words.append(rng.choice(parameter.opts))
            if not parameter.is_flag:
                words.append(rng.choice(WORDS))
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(("--", "--help", "--none", *WORDS)))
    return words


def command_folder(folder: Path) -> None:
    """What the words of a command line name."""
    beginnings = plan_texts()
    (folder / "plan.json").write_text(json.dumps(changed_json(beginnings[0], workload="digits")))
    (folder / "odd.json").write_text(plan_text(3, beginnings))
    (folder / "folder").mkdir()
    (folder / "work.py").write_text("def workload(): ...\n")


def check_command(words: list[str]) -> bool:
    """Whether a command line is accepted; called in a `command_folder`. No work is done.

    Raises:
        AssertionError: It ends in something else than work, a refusal in words, or an answer.
    """
    import contextlib
    from unittest.mock import patch

    import typer
    import typer.main

    from autoaccum.cli import app

    def begins(task: str, arguments: Any, **how: Any) -> Any:
        json.dumps(arguments)
        raise Begun(f"{task} begins", "why", "hint")

    command, out = typer.main.get_command(app), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("autoaccum.processes.child.call", begins))
        stack.enter_context(patch("autoaccum.tuning.compare.comparison.call", begins))
        stack.enter_context(patch("autoaccum.devices.virtual.launch.built_library", lambda: Path("/x/library.so")))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        try:
            command.main(words, prog_name="autoaccum", standalone_mode=False)
        except Begun:
            return True
        except AutoaccumError as error:
            assert error.what and error.exit_code in (1, 2), words
            return False
        except Exception as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}  # typer brings a click of its own, or not
            assert kinds & {"ClickException", "Exit", "Abort"}, f"{words}: {type(error).__name__}: {error}"
            return False
    return True
