"""Read a workload's file before it is run.

Is its function there, and does the file train when it is imported?

A script that trains at its top level would first be trained to its end, since importing a file runs it.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator

from ..errors import UsageError

_TRAINS = frozenset({"backward", "fit"})  # methods: loss.backward(), trainer.fit(model)
_TRAINS_WITHOUT_ARGUMENTS = frozenset({"train"})  # trainer.train(), but not model.train() of a torch module


def check_text(text: str, file: str, function: str) -> None:
    """Refuse a file without the function, or one that trains.

    Args:
        text: The file's source.
        file: Its name, for messages.
        function: The function's name.

    Raises:
        UsageError: With the line at fault, and what to write.
    """
    module = _parsed(text, file)
    names = set(_bound(module.body))
    line = _training_line(module)
    if function not in names and "*" not in names and "__getattr__" not in names:
        raise UsageError(
            f"{file} has no function {function!r}.",
            f"It was read, not run: it trains when it is imported (line {line})." if line else "",
            _hint(module, file, function),
        )
    if line:
        raise UsageError(
            f"{file} trains when it is imported: line {line} is not in a function.",
            "To call a function of a file, Python first runs the rest of the file, and so the whole training.",
            f'Put the training under `if __name__ == "__main__":`; then {file}:{function} can be called alone.',
        )


def _hint(module: ast.Module, file: str, function: str) -> str:
    makers = _makers(module)
    known = [each.name for each in module.body if isinstance(each, ast.FunctionDef)]
    near = makers[:1] or difflib.get_close_matches(function, known, n=1)
    if near:
        return f"Did you mean {file}:{near[0]}?"
    return f"Add one that makes what is trained: def {function}(): return autoaccum.Workload(model, sample, ...)"


def workload_functions(text: str) -> list[str]:
    """Return the functions of a file that make a workload.

    Raises:
        UsageError: It isn't Python.
    """
    return _makers(_parsed(text, "the file"))


def _makers(module: ast.Module) -> list[str]:
    return [each.name for each in module.body if isinstance(each, ast.FunctionDef) and _makes_workload(each)]


def _parsed(text: str, file: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else error
        raise UsageError(f"{type(error).__name__}: {said}", f"In {file}{line}.", "Mend that line.") from None


def _makes_workload(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Call) and (getattr(node.func, "id", None) or getattr(node.func, "attr", "")) == "Workload"
        for node in ast.walk(function)
    )


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that a module's statements bind; "*" for any."""
    for node in _at_top_level(statements):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((each.asname or each.name).partition(".")[0] for each in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Name) and node.id in ("globals", "exec", "setattr", "vars"):
            yield "*"


def _at_top_level(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported."""
    waiting: list[ast.AST] = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and _is_main_guard(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def _is_main_guard(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test))


def _training_line(module: ast.Module) -> int | None:
    """Return the first line that trains when the module is imported."""
    lines = [node.lineno for node in _at_top_level(module.body) if isinstance(node, ast.Call) and _trains(node)]
    return min(lines, default=None)


def _trains(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr in _TRAINS_WITHOUT_ARGUMENTS:
        return "trainer" in ast.unparse(call.func.value).lower()
    return call.func.attr in _TRAINS
