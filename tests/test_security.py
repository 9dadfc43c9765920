"""Nothing from elsewhere is executed: plans, checkpoints, and files that happen to lie in a folder."""

from __future__ import annotations

import ast
import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from strategies import made_up_plan

import autoaccum
from autoaccum import UsageError
from autoaccum.cli import tasks
from autoaccum.processes import function_pipe
from autoaccum.processes.child import call
from autoaccum.processes.workload_source import check_source, load_function, module_name

PACKAGE = Path(autoaccum.__file__).parent


class Marks:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# --- pickles -------------------------------------------------------------------------------------------------------


def as_text(payload: Any) -> str:
    return base64.b64encode(pickle.dumps(payload)).decode()


@pytest.mark.parametrize("form", ["pickled:{}", "pickle:{}", "handed:{}", "{}", "pickled:{}.py:workload"])
def test_no_text_of_a_plan_or_an_option_is_unpickled(form: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = form.format(as_text((Marks(marker), pickle.dumps(Marks(marker)))))
    plan = made_up_plan(workload=text)
    for attempt in (
        lambda: check_source(text),
        lambda: load_function(text),
        lambda: tasks.run(say=print, plan=plan.to_json(), epochs=1, steps=None, checkpoint=None,
                             checkpoint_seconds=30.0),
        lambda: tasks.check(say=print, workload=text),
        lambda: autoaccum.tune(text, target_batch=8),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"neither a built-in workload|There is no file"):
            attempt()
    assert not marker.exists()


def test_nothing_means_a_function_that_was_not_handed_over() -> None:
    assert function_pipe.workload_function() is None and not function_pipe.to_hand_on()
    with pytest.raises(UsageError, match="handed no workload"):
        load_function(None)


def test_what_is_pickled_comes_through_a_pipe_and_back() -> None:
    content = function_pipe.pickled(os.getcwd)
    reading, writing = os.pipe()
    function_pipe.send(content, writing)
    try:
        function_pipe.receive(reading)
        assert function_pipe.workload_function() is os.getcwd
    finally:
        function_pipe._received = b""
    with pytest.raises(UsageError, match="can't be given to another process"):
        function_pipe.pickled(lambda: None)


def test_only_these_unpickle_or_execute() -> None:
    """Whoever adds another has to say in docs/security.md what comes in there."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if name.endswith(("pickle.load", "pickle.loads", "exec_module")) or name in ("eval", "exec", "compile"):
                    found.add((path.name, name))
                if name == "torch.load" and not weights_only:
                    found.add((path.name, name))
    pipes = {("function_pipe.py", "pickle.loads"), ("fork.py", "pickle.loads")}
    assert found == pipes | {("workload_source.py", "spec.loader.exec_module")}


# --- the current folder --------------------------------------------------------------------------------------------

WORKLOAD = """
import torch
from autoaccum import Workload
import config  # beside this file

def loss(model, batch):
    import later  # when it is called, not when the workload is loaded
    return later.loss(model, batch)

def workload():
    return Workload(torch.nn.Linear(4, 2), torch.randn(8, 4), loss=loss)
"""
LATER = """
def loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a workload of two modules, and a module for every name that a command imports.

    But for those that Python's own `-m` imports from there before it comes to autoaccum: nobody can help that.
    """
    folder = tmp_path_factory.mktemp("trap")
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, runpy, pkgutil; print(*sys.modules)"], capture_output=True, text=True
    )
    before = listed.stdout.split()
    for name in (*sys.stdlib_module_names, "numpy", "optuna", "pandas", "pydantic", "rich", "torch", "typer", "sympy"):
        if name not in before:
            (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'a').write({name!r} + ' ')\n")
    (folder / "work.py").write_text(WORKLOAD)
    (folder / "config.py").write_text("")
    (folder / "later.py").write_text(LATER)
    return folder


def executed(folder: Path) -> str:
    marker = folder / "executed"
    return marker.read_text() if marker.exists() else ""


def test_no_module_of_the_current_folder_stands_in_for_another(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trap)
    assert "torch threads" in call("cli.tasks:doctor", {})
    assert executed(trap) == ""


def test_nor_with_python_m_while_a_workload_imports_its_own(trap: Path) -> None:
    root = str(PACKAGE.parent)
    command = [sys.executable, "-m", "autoaccum", "check", "--workload", "work.py:workload"]
    done = subprocess.run(command, cwd=trap, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("exact"), done.stderr
    assert executed(trap) == ""


def test_a_workloads_file_may_be_named_like_a_module(tmp_path: Path) -> None:
    for name in ("random", "json", "torch", "pytest"):
        assert module_name(tmp_path / f"{name}.py") != name
    assert module_name(tmp_path / "train.py") == "train"
    (tmp_path / "json.py").write_text("def workload(): ...\n")
    try:
        assert load_function(f"{tmp_path / 'json.py'}:workload").__module__ != "json"
        import json

        assert json.loads("1") == 1
    finally:
        sys.path.remove(str(tmp_path))


def test_a_file_that_an_installed_module_goes_before_is_named(tmp_path: Path) -> None:
    (tmp_path / "this.py").write_text("")
    (tmp_path / "work.py").write_text("import this\ndef workload(): ...\n")
    sys.modules.pop("this", None)
    try:
        with pytest.warns(UserWarning, match="`import this` gives .*, which is installed, not .*this.py"):
            load_function(f"{tmp_path / 'work.py'}:workload")
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("this", "work"):
            sys.modules.pop(name, None)
