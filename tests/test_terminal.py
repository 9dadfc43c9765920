"""What `autoaccum plan` shows: a card of a few lines, in any width, with and without colours; and the shell's help."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from strategies import made_up_plan

from autoaccum.cli.completion import choices, gpus, workloads
from autoaccum.cli.flags import in_flags
from autoaccum.cli.terminal import look_of
from autoaccum.devices.cuda.gpu_specs import find_gpu
from autoaccum.plan import Plan
from autoaccum.reporting.card import Look, card

COLOURS = re.compile(r"\x1b\[[\d;]*m")
NEXT = "-o plan.json keeps it for autoaccum run and autoaccum explain"


def shown(plan: Plan, **look: Any) -> list[str]:
    return card(plan, Look(**look), NEXT, in_flags).split("\n")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("colours", [True, False])
def test_a_plan_fits_the_terminal_and_says_the_same_with_colours(columns: int, colours: bool) -> None:
    lines = shown(made_up_plan(), columns=columns, colours=colours)
    plain = [COLOURS.sub("", line) for line in lines]
    assert plain == shown(made_up_plan(), columns=columns) and (lines != plain) == colours
    assert all(len(line) <= columns for line in plain)
    assert len(plain) <= 10
    labels = [line[:12].strip() for line in plain if line[:12].strip()]
    assert labels == ["device", "plan", "peak", "exactness", "note", "next"]


@pytest.mark.parametrize(("part", "filled"), [(0.5, 0.5), (0.97, 0.97), (1.2, 1.0)])
def test_the_bar_is_the_peak_as_a_part_of_the_budget(part: float, filled: float) -> None:
    plan = made_up_plan(predicted_peak_bytes=int(part * made_up_plan().budget_bytes))
    (line,) = [line for line in shown(plan, columns=100) if line.startswith("peak")]
    assert abs(line.count("█") / (line.count("█") + line.count("░")) - filled) < 0.03
    assert line.endswith(f" {part:.0%}")
    (painted,) = [line for line in shown(plan, columns=100, colours=True) if line.startswith("peak")]
    assert ("\x1b[31m" in painted) == (part > 1)


def test_nothing_is_wrapped_in_a_file_and_a_narrow_or_plain_terminal_is_served() -> None:
    lines = shown(made_up_plan())
    assert NEXT in lines[-1] and not any(COLOURS.search(line) for line in lines)
    assert (
        "#" in "".join(shown(made_up_plan(), blocks=False)) and "".join(shown(made_up_plan(), blocks=False)).isascii()
    )
    assert all(len(line) <= 40 for line in shown(made_up_plan(), columns=40))


def test_a_note_is_shown_by_its_first_sentence_with_flags() -> None:
    plan = made_up_plan(notes=('Memory grows: less with budget="2GiB". More of it is in explain.',))
    (line,) = [line for line in shown(plan) if line.startswith("note")]
    assert line == "note        Memory grows: less with --memory 2GiB."


@pytest.mark.parametrize(
    ("verdict", "code"),
    [("exact (tested on 8 samples)", "32"), ("unknown: no test", "33"), ("not exact: off by 3%", "31")],
)
def test_the_colour_says_whether_it_is_exact(verdict: str, code: str) -> None:
    (line,) = [line for line in shown(made_up_plan(exactness=verdict), colours=True) if line.startswith("exactness")]
    assert f"\x1b[{code}m{verdict}" in line


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    terminal: Any = SimpleNamespace(isatty=lambda: True, encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "97")
    assert look_of(terminal) == Look(97, colours=True, blocks=True)
    assert look_of(SimpleNamespace(isatty=lambda: False, encoding="ascii")) == Look(None, colours=False, blocks=False)  # type: ignore[arg-type]
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert not look_of(terminal).colours


WITHOUT_TORCH = """
import sys
sys.path.insert(0, {tests!r})
from strategies import made_up_plan
from autoaccum.cli.plan import _print
_print(made_up_plan(), None, {{"origin": "on Monday; --refresh plans anew", "not_kept": ""}}, verbose={verbose})
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_the_card_on_a_terminal_and_verbose(verbose: bool) -> None:
    read, write = pty.openpty()
    code = WITHOUT_TORCH.format(tests=str(Path(__file__).parent), verbose=verbose)
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", code], stdout=write, env=env, check=True)
    os.close(write)
    text = b""
    while part := _read(read):
        text += part
    out = text.decode()
    assert ("\x1b[1m" in out) != verbose and ("baseline" in out) == verbose and "next" in out
    assert "on Monday; --refresh plans anew" in out


def _read(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except OSError:  # the other end is closed
        return b""


# --- completion


def test_values_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices("cpu", "cuda")("cu") == ["cuda"]
    assert gpus("rtx-409") == ["rtx-4090"] and gpus("409") == ["4090"] and "a100-80gb" in gpus("a100")
    (tmp_path / "train.py").write_text(
        "from autoaccum import Workload\ndef build(): return Workload(1)\ndef other(): ...\n"
    )
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "inner").mkdir()
    assert all(name.endswith(find_gpu(name).name.removeprefix("rtx-")) for name in gpus("4"))
    monkeypatch.chdir(tmp_path)
    assert workloads("tr") == ["train.py:"] and workloads("dig") == ["digits"] and workloads("inn") == ["inner/"]
    assert workloads("train.py:") == ["train.py:build"] and workloads("train.py:x") == []
    assert workloads("broken.py:") == [] and workloads("nowhere.py:") == []


def test_the_shell_completes_commands_and_options() -> None:
    for words, expected in (
        ("autoaccum pl", "plan"),
        ("autoaccum plan --gpu h2", "h200"),
        ("autoaccum plan --verb", "--verbose"),
        ("autoaccum fits --gpu 407", "4070-ti-super"),
        ("autoaccum export plan.json --to deep", "deepspeed"),
    ):
        env = {
            **os.environ,
            "_AUTOACCUM_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        out = subprocess.run([sys.executable, "-m", "autoaccum"], env=env, capture_output=True, text=True)
        assert expected in out.stdout.split(), out
