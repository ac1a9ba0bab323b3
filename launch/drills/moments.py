"""Named moments of a run, at which a drill has its process killed or its disk filled.

Most are what Python's audit events announce: that a file is about to be opened, renamed or
removed. The code under test needs no hooks for that, and the moments stay what they are when
it changes. The others are calls of a function.
"""

import functools
import importlib
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """What a process is about to do.

    Attributes:
      event: an audit event (`open` is for writing), or `call`.
      target: pattern that the end of the event's path matches (the new one of a rename); of `call`
        a function, as module:name.
      files_removed: of `shutil.rmtree`: files of the folder that are removed before.
      half: leave the first half of the file that is renamed.
    """

    event: str
    target: str
    files_removed: int = 0
    half: bool = False


FIRED = "drill: the moment has come"
"""What the process prints."""

ARRAYS = Moment("os.mkdir", r"/checkpoints/\d+\.orbax-checkpoint-tmp[^/]*/state[^/]*/array_metadatas")
COMMIT = Moment("os.rename", r"/checkpoints/\d+")
MANIFEST = Moment("open", r"/manifests/\S+")
HALF_MANIFEST = Moment("os.rename", r"/manifests/\S+\.json", half=True)
DELETION = Moment("shutil.rmtree", r"/checkpoints/\d+", files_removed=4)
GRID = Moment("call", "causalfusion_jax.sampling.preview:Preview.__call__")
GRID_FILE = Moment("open", r"/samples/\.?\d+\.png\S*")
EVALUATION = Moment("call", "causalfusion_jax.evaluation.periodic:Evaluator.__call__")
METRICS = Moment("call", "causalfusion_jax.training.metric_log:MetricsLog.write")
CONFIG = Moment("open", r"/\.?config\.json\S*")


def kill(number: int) -> None:
    """Sends this process a signal."""
    os.kill(os.getpid(), number)


def limit_file_size(size: int) -> None:
    """Makes every write beyond `size` bytes of a file fail (EFBIG, "File too large")."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_disk(folder: pathlib.Path, leave: int = 0) -> None:
    """Writes `folder`/ballast until there is no space left, but for `leave` bytes."""
    file = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(file, bytes(4096))
    except OSError:
        os.truncate(file, max(0, os.fstat(file).st_size - leave))
    finally:
        os.close(file)


def at(moment: Moment, count: int, act: Callable[[], None]) -> Callable[[], None]:
    """What makes this process call `act` when a moment comes for the `count`th time, right before it."""

    def fire(source: str = ""):
        os.write(1, f"{FIRED}\n".encode())
        if moment.half:
            os.truncate(source, os.stat(source).st_size // 2)
        act()

    if moment.event == "call":
        return functools.partial(_patch, moment.target, _countdown(count, fire))
    return lambda: sys.addaudithook(_hook(moment, count, fire))


def _countdown(count: int, fire: Callable[..., None]) -> Callable[..., None]:
    """A function that calls `fire`, with its arguments, at its `count`th call."""
    left = count

    def tick(*args):
        nonlocal left
        left -= 1
        if left == 0:
            fire(*args)

    return tick


def _patch(target: str, before: Callable[[], None]) -> None:
    """Has `before()` called before every call of a function."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args, **kwargs):
        before()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _hook(moment: Moment, count: int, fire: Callable[..., None]) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook of a moment; it calls `fire` with the event's first path."""
    pattern, is_deleting = re.compile(rf".*{moment.target}"), False
    come = _countdown(count, fire)
    removed = _countdown(moment.files_removed, come)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal is_deleting
        if is_deleting and event == "os.remove":
            removed()
        if event != moment.event or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, (str, os.PathLike)) or not pattern.fullmatch(os.fspath(path)):
            return
        if moment.files_removed:
            is_deleting = True
        else:
            come(args[0])

    return hook
