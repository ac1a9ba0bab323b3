"""The programs that a piece of code compiles, and those that preflight lists."""

import contextlib
import re

import jax

from causalfusion_jax.config import slices
from causalfusion_jax.evaluation import programs


@contextlib.contextmanager
def compiled_modules(folder):
    """Fills a list with the modules with matrix products that are compiled inside; their text goes to `folder`."""
    modules = []
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield modules
    finally:
        jax.config.update("jax_dump_ir_to", "")
    modules += filter(multiplies, (path.read_text() for path in sorted(folder.glob("*_compile.mlir"))))


def multiplies(module: str) -> bool:
    """Whether a program has a matrix product or a convolution, and does not measure the peak rate of a CPU."""
    return re.search("dot_general|convolution", module) is not None and name_of(module) != "jit__lambda"


def name_of(module: str) -> str:
    """Name of the jitted function."""
    return re.search(r"module @(\S+)", module).group(1)


def content(module: str) -> str:
    """A module without the locations in the source."""
    text = re.sub(r' ?loc\((?:#\w+|unknown|callsite\([^()]*\)|"[^"]*"(?:\(#\w+\))?)\)', "", module)
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("#loc"))


def listed_modules(job, monkeypatch, devices, *prefixes: str) -> dict[str, str]:
    """The programs with matrix products of a run on `devices`, by name; names start with one of `prefixes`."""
    for module in (slices, programs):
        monkeypatch.setattr(module, "devices", lambda topology: devices)
    listed = (p for p in programs.run_programs(job).programs if p.name.startswith(prefixes))
    modules = {p.name: p.lower().as_text() for p in listed}
    return {name: module for name, module in modules.items() if multiplies(module)}
