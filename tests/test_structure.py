"""The structure of the repository: layers, layout, size and style of files."""

import ast
import graphlib
import subprocess

import pytest
from helpers import ROOT

PACKAGE = ROOT / "causalfusion_jax"
LAYERS = (
    ("common",),
    ("core", "metrics"),
    ("models", "data"),
    ("config", "prepare", "checkpoints"),
    ("training", "sampling", "sweeps"),
    ("cli", "evaluation", "compile_ahead"),
    ("train", "sample", "edit", "caption", "evaluate", "probe", "encode", "convert", "preflight"),
)
"""Rooms of the package, lowest layer first: a module imports only from rooms in lower layers, or its own room."""
SUBPACKAGES = ("models/attention",)
COMMANDS = LAYERS[-1]


def layer(room):
    return next(level for level, rooms in enumerate(LAYERS) if room in rooms)


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path):
    """Dotted names of what a module imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.removeprefix("causalfusion_jax.") for name in names if name.startswith("causalfusion_jax."))


def modules_imported(path, known):
    """The modules of the package that a module imports, of those `known` by dotted name."""
    for name in imported_names(path):
        yield name if name in known else name.rpartition(".")[0]


def test_all_ways_to_import_a_module_are_seen(tmp_path):
    (tmp_path / "module.py").write_text(
        "import causalfusion_jax.train, os\nfrom causalfusion_jax.common import files\n"
        "def late():\n    from causalfusion_jax.models.text import TextTokens\n"
    )
    known = {"train", "common.files", "models.text"}
    assert set(modules_imported(tmp_path / "module.py", known)) == known


def test_rooms_are_those_of_the_layers():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in modules()}
    rooms = {room for rooms in LAYERS for room in rooms}
    assert {room_of(path) for path in modules()} == rooms
    assert {folder for folder in folders if "/" in folder} == set(SUBPACKAGES)
    assert len(LAYERS) <= 7 and len(rooms) + len(SUBPACKAGES) <= 24
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*COMMANDS, "__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_import_from_lower_layers_only(path):
    room = room_of(path)
    for imported in {name.partition(".")[0] for name in imported_names(path)} - {room}:
        assert layer(imported) < layer(room), f"{room} imports {imported}, which is not in a lower layer"


def test_modules_do_not_import_each_other_in_a_cycle():
    names = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in modules()}
    graph = {name: set(modules_imported(path, names)) & set(names) for name, path in names.items()}
    # static_order raises CycleError, which names the modules of a cycle.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small_and_public_names_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_flags_only_in_commands():
    for path in modules():
        if room_of(path) not in (*COMMANDS, "cli"):
            assert "DEFINE_" not in path.read_text(), path


def source_files():
    return sorted(path for folder in (PACKAGE, ROOT / "configs", ROOT / "launch") for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short_and_calls_have_few_positional_arguments(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {node.name for node in functions if node.end_lineno - node.lineno >= 60} == set()
    calls = [node for node in nodes if isinstance(node, ast.Call) and len(node.args) > 6]
    assert {f"line {node.lineno}: {ast.unparse(node.func)}" for node in calls} == set()


TEST_HELPERS = sorted(path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("path", TEST_HELPERS, ids=lambda path: path.name)
def test_names_of_test_helpers_tell_that_they_assert(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    asserting = {node.name for node in functions if any(isinstance(child, ast.Assert) for child in ast.walk(node))}
    assert {name for name in asserting if not name.startswith("assert_")} == set()


ALWAYS_TRUE = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.GeneratorExp, ast.ListComp, ast.Lambda, ast.JoinedStr)


def always_true(tree):
    """Assertions that cannot fail: of a tuple, a generator, a tree of results."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assert)):
        called = ast.unparse(node.test.func) if isinstance(node.test, ast.Call) else ""
        same = (
            isinstance(node.test, ast.Compare)
            and len({ast.unparse(side) for side in (node.test.left, *node.test.comparators)}) == 1
        )
        if isinstance(node.test, (*ALWAYS_TRUE, ast.Constant)) or called in ("jax.tree.map", "map", "zip") or same:
            yield ast.unparse(node)


def test_every_assertion_can_fail():
    for wrong in ("(x, y)", "(x for x in y)", "jax.tree.map(f, a, b)", "x == x", "[f(x) for x in y]", "'x'"):
        assert len(list(always_true(ast.parse(f"assert {wrong}")))) == 1, wrong
    assert not list(always_true(ast.parse("assert all(x for x in y)\nassert x == y, (x, y)")))
    assertions = {path.name: list(always_true(ast.parse(path.read_text()))) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: wrong for name, wrong in assertions.items() if wrong} == {}


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    allowed = {
        "causalfusion_jax",
        "configs",
        "launch",
        "tests",
        "setup.cfg",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        ".gitignore",
        ".ci",
    }
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= allowed
