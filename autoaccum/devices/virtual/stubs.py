"""Write C functions for what the sources do not model.

So that a gap is seen.

Each returns its library's "not supported", but for those that PyTorch imports from cuBLAS, and for cuDNN's batch norm
and recurrent nets: they are kernels, which do nothing here and succeed. All are weak: what `source/*.c` defines takes
their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .elf import read_symbols

# "not supported" of each library, and of the driver: their headers' enumerations
NOT_SUPPORTED = {
    "cudart": 801,
    "cuda": 801,
    "cublas": 15,
    "cublasLt": 15,
    "cudnn": 3000,
    "cusparse": 10,
    "cufft": 16,
    "cusolver": 9,
}
_KERNELS = ("cudnnBatchNorm", "cudnnRNNForward", "cudnnRNNBackward")
_LIBRARY = re.compile(r"lib([A-Za-z]+)\.so")
_PUBLIC = re.compile(r"(__)?(cuda[A-Z]|cublas|cudnn[A-Z]|cusparse|cufft|cusolver)\w+")
_DRIVER = re.compile(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(")
_RENAMED = re.compile(r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(cu[A-Z]\w+)\s*$", re.MULTILINE)

_HEAD = """\
#pragma GCC optimize("O0") /* thousands of functions: half the compiler's time */
#include <stdio.h>
#include <stdlib.h>
static int stub(const char *name, int code, char *traced) {
  if (code && !*traced && getenv("AUTOACCUM_GPU_TRACE")) {
    *traced = 1;
    fprintf(stderr, "virtual GPU: %s is not modelled\\n", name);
  }
  return code;
}
#define STUB(name, code) \\
  __attribute__((weak, visibility("default"))) int name(void) { static char traced; return stub(#name, code, &traced); }
"""


def write_stubs(torch_lib: Path, cuda_libs: Iterable[Path], cuda_header: Path) -> str:
    """Return the C source of all stubs.

    Args:
        torch_lib: torch's `lib` folder, whose libraries say what PyTorch imports.
        cuda_libs: The folders with CUDA's own libraries, which say what else there is.
        cuda_header: cuda.h, since the driver's own library isn't on a machine without a GPU.
    """
    codes = {name: NOT_SUPPORTED["cuda"] for name in _driver_functions(cuda_header.read_text(encoding="utf-8"))}
    for folder in cuda_libs:
        for path in sorted(folder.glob("lib*.so.*")):
            library = _library_of(path.name)
            if library in NOT_SUPPORTED:
                names = read_symbols(path).exported
                codes |= {name: NOT_SUPPORTED[library] for name in names if _PUBLIC.fullmatch(name)}
    for path in sorted(torch_lib.glob("lib*.so")):
        codes |= _imports(read_symbols(path).imported)
    return _HEAD + "".join(f"STUB({name}, {code})\n" for name, code in sorted(codes.items()))


def _library_of(name: str) -> str:
    match = _LIBRARY.match(name)
    return match[1] if match else ""


def _imports(imported: Mapping[str, str]) -> dict[str, int]:
    codes = {}
    for name, version in imported.items():
        library = _library_of(version)
        if library in NOT_SUPPORTED:
            is_kernel = library in ("cublas", "cublasLt") or name.startswith(_KERNELS)
            codes[name] = 0 if is_kernel else NOT_SUPPORTED[library]
    return codes


def _driver_functions(header: str) -> set[str]:
    """Return the functions that cuda.h declares.

    Under their names, and under the names that replace them.
    """
    renamed = _RENAMED.findall(header)
    return set(_DRIVER.findall(header)) | {name for pair in renamed for name in pair}
