"""The documentation: links, pictures, and the files and functions that it names; and the scripts that check words."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import badges

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|c|js))(?::([\w.]+))?`")
EXAMPLES = {"mine.py", "train.py", "FILE.py", "ends.py", "datasets.py", "random.py", "json.py"}  # a user's own files


def script(name: str) -> ModuleType:
    """Import a script that has no suffix."""
    loader = importlib.machinery.SourceFileLoader(f"script_{name}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Return the names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def named(source: str) -> set[str]:
    """Return functions, classes, methods and constants of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= (
                {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
                if (isinstance(node, ast.ClassDef))
                else set()
            )
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            found |= {target.id} if isinstance(target, ast.Name) else set()
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_and_functions_named_in_the_docs_exist(page: Path) -> None:
    missing = []
    for name, function in PLACE.findall(page.read_text()):
        if name in EXAMPLES:
            continue
        places = [ROOT / name, ROOT / "autoaccum" / name, ROOT / "tests" / name, *ROOT.glob(f"autoaccum/*/{name}")]
        places += ROOT.glob(f"autoaccum/devices/*/{name}")
        path = next((each for each in places if each.is_file()), None)
        if path is None or (function and function not in named(path.read_text())):
            missing.append(f"{name}:{function}" if function else name)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    files = {name for name in re.findall(r"\b(tests/[\w/]+\.py|scripts/\w+|benchmarks/[\w/]+\.py)\b", text)}
    modules = {name.replace(".", "/") for name in re.findall(r"python -m (benchmarks(?:\.\w+)*|tests\.\w+)", text)}
    missing = [name for name in files if not (ROOT / name).is_file()]
    missing += [name for name in modules if not ((ROOT / f"{name}.py").is_file() or (ROOT / name).is_dir())]
    assert not missing


def test_the_readmes_badges_state_what_is_so() -> None:
    readme = (ROOT / "README.md").read_text()
    for file, (name, value) in badges.badges().items():
        picture = f"docs/pictures/badge-{file}.svg"
        assert f"[![{name.replace('python', 'Python')} {value}]({picture})]" in readme
        assert (ROOT / picture).read_text() == badges.draw(name, value), "python -m benchmarks.badges"


def test_every_script_says_how_it_is_used_and_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]
    assert len(scripts) > 5
    for path in scripts:
        head = path.read_text().splitlines()[:2]
        assert head[0].startswith("#!") and head[1].startswith(("# ", '"""')) and os.access(path, os.X_OK), path.name
        assert f"| `scripts/{path.name}` |" in table, path.name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It was told so.", [1]),
        ("def _told_of(x): ...", [1]),
        ("a = 1\n# the budget was reckoned", [2]),
        ("It is gone for\n# good.", [1]),
        ("That can't be. Nor this", [1]),
        ("marshalled, shallow, untold, for goods", []),
    ],
)
def test_banned_words_are_found(text: str, found: list[int]) -> None:
    assert [line for line, _, _ in script("words").findings(text)] == found


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""Short."""', None),
        ('"""One two three four five six seven eight nine ten eleven twelve thirteen."""', "13 words"),
        ('def f():\n    """No period"""', "period"),
        ("def f():\n" + "    x = 1\n" * 60, "61 lines"),
        ("x = 1\n" * 401, "401 lines"),
    ],
)
def test_shapes_that_exceed_a_limit_are_found(source: str, fault: str | None) -> None:
    found = [text for _, text in script("shape").faults(source)]
    assert (fault is None) == (not found) and (fault is None or fault in found[0])


def test_the_map_leaves_out_arrows_that_follow_from_others() -> None:
    graph: dict[str, Any] = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}
    assert script("map").reduced(graph) == {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset()}
