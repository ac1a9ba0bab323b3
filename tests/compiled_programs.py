"""The programs that a piece of code compiles, against those that preflight lists."""

import contextlib
import re

import jax

from causalfusion_jax.config import slices
from causalfusion_jax.evaluation import programs


@contextlib.contextmanager
def compiled_modules(folder):
    """Fills a list with the modules that multiply matrices and are compiled meanwhile; `folder` is for their text."""
    found = []
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield found
    finally:
        jax.config.update("jax_dump_ir_to", "")
    found += filter(multiplies, (path.read_text() for path in sorted(folder.glob("*_compile.mlir"))))


def multiplies(module: str) -> bool:
    """Whether a program has a matrix product or a convolution, and is not what measures a CPU's peak rate."""
    return re.search("dot_general|convolution", module) is not None and name_of(module) != "jit__lambda"


def name_of(module: str) -> str:
    """The jitted function's name."""
    return re.search(r"module @(\S+)", module).group(1)


def content(module: str) -> str:
    """Everything but where in the source it comes from."""
    text = re.sub(r' ?loc\((?:#\w+|unknown|callsite\([^()]*\)|"[^"]*"(?:\(#\w+\))?)\)', "", module)
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("#loc"))


def listed_modules(spec, monkeypatch, devices, *beginnings: str) -> dict[str, str]:
    """Programs that multiply matrices of a run on `devices`, by name, of which it begins so."""
    for module in (slices, programs):
        monkeypatch.setattr(module, "devices", lambda topology: devices)
    listed = (p for p in programs.run_programs(spec).programs if p.name.startswith(beginnings))
    modules = {p.name: p.lower().as_text() for p in listed}
    return {name: module for name, module in modules.items() if multiplies(module)}
