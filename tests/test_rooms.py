"""The rooms of the package: what each may import, and which must not import torch. Files are read, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import autoaccum

ROOT = Path(autoaccum.__file__).parent
# A file imports from its own room and from those before it. A name without a folder is a file at the top.
ROOMS = (
    "errors", "units", "files", "phases", "budget", "process_memory", "torch_compat", "criterion",
    "workload_arguments", "workload", "configuration",
    "plan", "simulation", "data", "state", "ranks", "processes", "devices", "window", "exactness",
    "planning",
    "runner", "integrations", "reporting", "tuning", "cli",
)  # fmt: skip
PURE = (
    "errors", "units", "files", "phases", "budget", "configuration", "plan", "simulation",
    "reporting",
)  # fmt: skip
FACE = ("__init__", "__main__")  # import from anywhere
MOST_FILES_AT_THE_TOP = 12


class Import(NamedTuple):
    module: str
    imported: str
    line: int
    while_typing: bool


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """What a module imports from the package, wherever the statement stands, and what else by its first name."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    if path.parent == ROOT:
        package = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name.removeprefix("autoaccum.") for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])]).removeprefix("autoaccum.")
            within = [f"{base}.{each.name}" if base else each.name for each in node.names]
            names = [name if name in MODULES else base or "__init__" for name in within]
        for name in names:
            yield Import(module, name, getattr(node, "lineno", 0), id(node) in typing)


IMPORTS = [each for module, path in MODULES.items() for each in imports_of(module, path)]
INNER = [each for each in IMPORTS if each.imported in MODULES and each.module not in FACE]


def test_every_file_is_in_a_room_and_every_room_says_what_it_is_for() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, *FACE}
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES_AT_THE_TOP
    for path in ROOT.rglob("__init__.py"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first.endswith(".") and (len(first.split()) <= 12 or path.parent == ROOT), f"{path}: {first!r}"


def test_rooms_import_in_one_direction() -> None:
    backwards = [
        f"{each.module}:{each.line} imports {each.imported}"
        for each in INNER
        if each.imported not in FACE and ROOMS.index(room_of(each.imported)) > ROOMS.index(room_of(each.module))
    ]
    assert not backwards, "\n".join(backwards)


def test_no_file_imports_itself_by_way_of_others() -> None:
    above = {
        module: {
            each.imported
            for each in INNER
            if each.module == module and not each.while_typing and each.imported not in (module, *FACE)
        }
        for module in MODULES
    }
    left = dict(above)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"among these is a circle: {', '.join(left)}"


def test_pure_rooms_do_not_import_torch() -> None:
    impure = [
        f"{each.module}:{each.line}"
        for each in IMPORTS
        if room_of(each.module) in PURE and each.imported.partition(".")[0] == "torch"
    ]
    assert not impure, "\n".join(impure)


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("from ..cli import plan", "cli.plan"),
        ("def f():\n    from ..tuning.result import Trial", "tuning.result"),
        ("import torch.nn", "torch.nn"),
        ("from . import solver", "simulation.solver"),
    ],
)
def test_the_reader_of_imports_sees(tmp_path: Path, text: str, imported: str) -> None:
    path = tmp_path / "made_up.py"
    path.write_text(text)
    assert [each.imported for each in imports_of("simulation.made_up", path)] == [imported]
