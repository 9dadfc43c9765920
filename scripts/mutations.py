#!/usr/bin/env python
"""Breaks the source on purpose, once per line of the list, and prints what no test notices: `scripts/mutations.py`.

Each mutation is applied to a copy of the working tree, and the tests named beside it must turn red. `--check` only looks
whether each still applies. Prints the survivors, and exits with 1 where there are any. Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# file, what is there, what it becomes, the tests that must notice
# ruff: noqa: E501
MUTATIONS: list[tuple[str, str, str, str]] = [
    ("autoaccum/step.py", "total is not None and not bool(total)", "False", "tests/test_step.py"),
    (
        "autoaccum/loss_terms.py",
        "torch.where(there, out, torch.zeros_like(out))",
        "out",
        "tests/test_step.py -k nothing",
    ),
    (
        "autoaccum/loss_terms.py",
        "out.sum / total + out.extra * share",
        "out.sum / total + out.extra",
        "tests/test_step.py -k apart",
    ),
    (
        "autoaccum/hugging_face.py",
        "labels[..., 1:] if self.shifted",
        "labels if self.shifted",
        "tests/test_hugging_face.py",
    ),
    (
        "autoaccum/step.py",
        "loss_terms.nonzero(total) * share",
        "loss_terms.nonzero(total)",
        "tests/test_hugging_face.py",
    ),
    (
        "autoaccum/counting.py",
        "            put_rng(rng)\n",
        "            pass\n",
        "tests/test_hugging_face.py -k dropout",
    ),
    (
        "autoaccum/counting.py",
        "return 0  # all labels",
        "return None  # all labels",
        "tests/test_hugging_face.py -k no_step",
    ),
    ("autoaccum/optimizer_step.py", 'finite or parts.on_nonfinite == "warn"', "True", "tests/test_step.py -k finite"),
    (
        "autoaccum/runner.py",
        "            return self.plan.split  # which",
        "            pass  # which",
        "tests/test_runner.py -k planned",
    ),
    ("autoaccum/drift.py", "peak <= self._before_bytes or ", "", "tests/test_runner.py -k told"),
    ("autoaccum/drift.py", "peak - self._shared_bytes()", "peak", "tests/test_runner.py -k shared"),
    ("autoaccum/oom.py", "return cpu_is_short()", "return True", "tests/test_oom.py -k short"),
    ("autoaccum/oom.py", "< SHORT_SHARE * limit", "< 0.05 * limit", "tests/test_oom.py -k short"),
    ("autoaccum/windows.py", "    if loader.persistent_workers:", "    if False:", "tests/test_windows.py -k persist"),
    ("autoaccum/windows.py", "persistent_workers=loader.persistent_workers,", "", "tests/test_windows.py -k persist"),
    (
        "autoaccum/batchnorm.py",
        "deviations = deviations + apart.square() * (one.count * other.count / count)",
        "pass",
        "tests/test_batchnorm.py",
    ),
    (
        "autoaccum/batchnorm.py",
        "found.count if found.of_instances else found.count - 1",
        "found.count",
        "tests/test_batchnorm.py",
    ),
    ("autoaccum/batchnorm.py", "            merging.calls = 0", "            pass", "tests/test_batchnorm.py"),
    (
        "autoaccum/batchnorm.py",
        "        if not self.window.collecting:\n            return\n",
        "",
        "tests/test_batchnorm.py",
    ),
    ("autoaccum/batchnorm.py", "merging.end(commit=done)", "merging.end(commit=True)", "tests/test_batchnorm.py"),
    (
        "autoaccum/batchnorm.py",
        "module.training = False\n        if self.merges",
        "pass\n        if self.merges",
        "tests/test_batchnorm.py",
    ),
    (
        "autoaccum/batchnorm.py",
        "                module.training = True",
        "                pass",
        "tests/test_batchnorm.py",
    ),
    ("autoaccum/batchnorm.py", "if self.norms.spectral and not", "if False and not", "tests/test_batchnorm.py"),
    (
        "autoaccum/batchnorm.py",
        "for module, before in self._iterated:",
        "for module, before in ():",
        "tests/test_batchnorm.py",
    ),
    ("autoaccum/batchnorm.py", "module.num_batches_tracked.copy_(self.tracked)", "pass", "tests/test_batchnorm.py"),
    (
        "autoaccum/batchnorm.py",
        "return 2 if norms.batch and how != FROZEN else 1",
        "return 1",
        "tests/test_batchnorm.py",
    ),
    (
        "autoaccum/batchnorm.py",
        "        module.momentum = self.momentum\n",
        "        pass\n",
        "tests/test_batchnorm.py",
    ),
    ("autoaccum/precision.py", "parameter.grad_dtype = torch.float32", "pass", "tests/test_precision.py"),
    (
        "autoaccum/precision.py",
        "            if parameter.grad_dtype != parameter.dtype:\n                _set(parameter, None)",
        "            pass",
        "tests/test_precision.py",
    ),
    ("autoaccum/precision.py", " and p.grad_dtype == p.dtype", "", "tests/test_precision.py"),
    (
        "autoaccum/optimizer_step.py",
        "parts.clip_grad_norm is not None or wide",
        "parts.clip_grad_norm is not None",
        "tests/test_precision.py",
    ),
    ("autoaccum/optimizer_step.py", "    precision.narrow(wide)\n", "", "tests/test_precision.py"),
    (
        "autoaccum/cached.py",
        "        states.append(take_rng())",
        "        states.append(take_rng() if not states else states[0])",
        "tests/test_cached.py",
    ),
    ("autoaccum/step.py", "            cache.after.restore()", "            pass", "tests/test_cached.py"),
    ("autoaccum/step.py", "norms.forward(again=True)", "norms.forward()", "tests/test_cached.py"),
    (
        "autoaccum/cached.py",
        "        with torch.no_grad():\n            encoded",
        "        with torch.enable_grad():\n            encoded",
        "tests/test_cached.py",
    ),
    (
        "autoaccum/refuse.py",
        "inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]",
        "inner = []",
        "tests/test_refuse.py -k backward",
    ),
    (
        "autoaccum/refuse.py",
        "inner = [value.__self__, value.__func__]",
        "inner = [value.__func__]",
        "tests/test_refuse.py -k backward",
    ),
    (
        "autoaccum/refuse.py",
        "inner = [value.func, *value.args, *value.keywords.values()]",
        "inner = [value.func]",
        "tests/test_refuse.py -k backward",
    ),
    ("autoaccum/refuse.py", 'instruction.opname == "STORE_ATTR"', "False", "tests/test_refuse.py -k backward"),
    ("autoaccum/refuse.py", "    if steps < 2:\n        return\n", "", "tests/test_refuse.py -k backward"),
    (
        "autoaccum/refuse.py",
        "value.__globals__[name] for name in value.__code__.co_names",
        "value.__globals__[name] for name in ()",
        "tests/test_refuse.py -k backward",
    ),
    ("autoaccum/refuse.py", "yield name, optimizer", "pass", "tests/test_refuse.py -k backward"),
    (
        "autoaccum/runner.py",
        "if refuse.steps_in_backward(self.parts.model):",
        "if False:",
        "tests/test_refuse.py -k not_repeated",
    ),
    ("autoaccum/runner.py", "self._changes_looked_at = True", "pass", "tests/test_refuse.py -k counts_its_own"),
    (
        "autoaccum/refuse.py",
        "prefix + statistic for prefix in prefixes",
        "prefix for prefix in prefixes",
        "tests/test_refuse.py -k known",
    ),
    ("autoaccum/refuse.py", '    if parts.device.type == "cuda":\n', "    if True:\n", "tests/test_refuse.py -k graph"),
    (
        "autoaccum/refuse.py",
        'if isinstance(options, dict) and options.get("triton.cudagraphs"):',
        "if options:",
        "tests/test_refuse.py -k compiling",
    ),
    ("autoaccum/refuse.py", "closure.default is inspect.Parameter.empty", "False", "tests/test_refuse.py -k closure"),
    (
        "autoaccum/tokens.py",
        "key=lambda index: -lengths[index]",
        "key=lambda index: lengths[index]",
        "tests/test_tokens.py",
    ),
    (
        "autoaccum/tokens.py",
        "most_tokens // max(1, lengths[start])",
        "most_tokens // max(1, lengths[-1])",
        "tests/test_tokens.py",
    ),
    ("autoaccum/tokens.py", "if len(sizes) > 1 and sizes[-1] < least:", "if False:", "tests/test_tokens.py"),
    ("autoaccum/windows.py", "        rest = iter(ordered)", "        rest = iter(of_window)", "tests/test_tokens.py"),
    ("autoaccum/runner.py", "            before.restore()", "            pass", "tests/test_reproducible.py"),
    (
        "autoaccum/runner.py",
        "                before = restore.take(model",
        "                before = None if retries else restore.take(model",
        "tests/test_reproducible.py",
    ),
    (
        "autoaccum/optimizer_step.py",
        "    if parts.scheduler is not None and stepped:\n        parts.scheduler.step()\n",
        "    if parts.scheduler is not None and stepped:\n        parts.scheduler.step()\n        parts.scheduler.step()\n",
        "tests/test_reproducible.py",
    ),
    (
        "autoaccum/solve.py",
        "    return balanced(samples, min(steps, max(1, samples // least)))",
        "    m = min(micro_batch, samples)\n    return (m,) * (samples // m) + ((samples % m,) if samples % m else ())",
        "tests/test_reproducible.py -k compiles",
    ),
    ("autoaccum/refuse.py", 'and "step" in _names(hook)', "", "tests/test_refuse.py -k only_reads"),
    ("autoaccum/refuse.py", "names |= ", "names & ", "tests/test_refuse.py -k backward"),
    ("autoaccum/runner.py", "if longest > known:", "if False:", "tests/test_tokens.py -k longer"),
    (
        "autoaccum/optimizer_step.py",
        "    return nn.utils.clip_grad_norm_(_trained(parts), parts.clip_grad_norm)",
        "    return nn.utils.clip_grad_norm_(_trained(parts)[:1], parts.clip_grad_norm)",
        "tests/test_step.py -k clipping",
    ),
    (
        "autoaccum/loss_terms.py",
        "        mean: torch.Tensor = out * share",
        "        mean: torch.Tensor = out / 3",
        "tests/test_step.py -k split_of_64",
    ),
    (
        "autoaccum/runner.py",
        "        self._drop_gradients()\n        if before",
        "        if before",
        "tests/test_oom.py",
    ),
]


def survives(tree: Path, mutation: tuple[str, str, str, str]) -> bool:
    """Whether the tests pass all the same."""
    name, old, new, tests = mutation
    path = tree / name
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=600).returncode != 1
    finally:
        path.write_text(text)


def main() -> int:
    """Tries all, or those of the files named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="only mutations of these files")
    parser.add_argument("--check", action="store_true", help="only whether each still applies")
    asked = parser.parse_args()
    chosen = [m for m in MUTATIONS if not asked.files or m[0] in asked.files]
    stale = [m for m in chosen if m[1] not in (ROOT / m[0]).read_text()]
    for name, old, *_ in stale:
        print(f"no longer applies: {name}: {old.strip()[:70]!r}")
    if asked.check or stale:
        return 1 if stale else 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "*.pyc"))
        for index, mutation in enumerate(chosen, 1):
            print(f"{index} of {len(chosen)}: {mutation[0]}", file=sys.stderr)
            if survives(tree, mutation):
                survivors += 1
                print(f"survives: {mutation[0]}: {mutation[1].strip()[:60]!r} -> {mutation[2].strip()[:60]!r}")
    print(f"{survivors} of {len(chosen)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
