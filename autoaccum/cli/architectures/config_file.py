"""Read a transformers configuration, which comes from anywhere. No torch.

Such a file may name code: a class to download (`auto_map`), a kernel of the Hub (`attn_implementation`), weights to
fetch. Nothing of it runs here: what names code or data elsewhere is refused or dropped, at any depth.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import UsageError

MOST_BYTES = 1 << 20  # a configuration has some kilobytes
MOST_LAYERS = 2048
_LAYERS = re.compile(r"(^|_)(n|num|number).*(layers?|blocks?|depth)$|^depth$|^n_layers?$")
_DROPPED = re.compile(r"^_|_implementation$|^(use_kernels|kernel_config|transformers_version|trust_remote_code)$")
_REFUSED = {
    "auto_map": "It names Python code to download and run, which a guard in front of a launch must not do",
    "custom_pipelines": "It names Python code to download and run",
    "quantization_config": "Quantized weights are laid out by their own library, and are not planned here",
    "use_pretrained_backbone": "It asks for weights from the network",
    "use_timm_backbone": "Its backbone is another library's",
    "adapter_path": "It asks for weights",
}
_FOREIGN = ("timm_wrapper", "timm_backbone")


def read_config(place: Path) -> dict[str, Any]:
    """Read `config.json`, or a folder's.

    Returns:
        Its content, without what chooses code.

    Raises:
        UsageError: It can't be read, is no such configuration, or names code to run.
    """
    file = place / "config.json" if place.is_dir() else place
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
        data = json.loads(content.decode())
    except OSError as error:
        raise _unreadable(file, f"The system says: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"It is not JSON: {error}.") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise _unreadable(file, 'It has no "model_type", by which transformers chooses the architecture.')
    kept: dict[str, Any] = _without_code(data, str(file))
    return kept


def _without_code(value: Any, file: str, depth: int = 0) -> Any:
    """Drop entries that choose code; refuse those that name it."""
    if depth > 32:
        raise _unreadable(Path(file), "It is nested more than 32 deep.")
    if isinstance(value, list):
        return [_without_code(each, file, depth + 1) for each in value]
    if not isinstance(value, dict):
        return value
    for key, each in value.items():
        if key in _REFUSED and each not in (None, False, {}, []):
            raise UsageError(f"{file} has {key!r}.", f"{_REFUSED[key]}.", _INSTEAD)
        if isinstance(each, int) and each > MOST_LAYERS and _LAYERS.search(key):
            raise UsageError(f"{file} has {key} = {each}, more than {MOST_LAYERS}.", "Every layer is built to plan it.")
    if value.get("model_type") in _FOREIGN:
        raise UsageError(
            f"{file} is a {value['model_type']}: an architecture of timm's.", hint="autoaccum fits --timm NAME"
        )
    return {key: _without_code(each, file, depth + 1) for key, each in value.items() if not _DROPPED.search(key)}


_INSTEAD = "Write a workload of your own, which you trust: autoaccum plan --gpu NAME --workload FILE.py:FUNCTION"


def _unreadable(file: Path, why: str) -> UsageError:
    return UsageError(
        f"{str(file)!r} is not a configuration that can be planned.", why, "Name a model's config.json, or its folder."
    )
