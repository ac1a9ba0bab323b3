"""The house stays in order: floors, layout, style."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "causalfusion_jax"
FLOORS = (
    ("errors", "files", "lock", "npz", "hardware", "distributed", "factorization", "layouts", "diffusion", "sharding"),
    ("models", "data", "released"),
    ("experiment", "training", "sampling", "evaluation", "encoding", "compile_ahead"),
    (
        "cli", "sampling_flags", "video_flags", "probe_flags", "train", "sample", "edit", "caption", "evaluate",
        "encode", "convert", "preflight", "sweeps",
    ),
)


def floor(room):
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (module.split(".")[1] for module in modules if module.startswith("causalfusion_jax."))


def test_all_ways_to_import_a_room_are_seen(tmp_path):
    (tmp_path / "module.py").write_text(
        "import causalfusion_jax.train, os\nfrom causalfusion_jax import files\n"
        "def late():\n    from causalfusion_jax.models.text import TextTokens\n"
    )
    assert sorted(rooms_imported(tmp_path / "module.py")) == ["files", "models", "train"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_the_floors(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in rooms_imported(path):
        assert floor(imported) <= floor(room), f"{room} imports {imported} from a floor above"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small_and_public_names_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_flags_only_in_the_commands():
    for path in modules():
        if floor(path.relative_to(PACKAGE).parts[0].removesuffix(".py")) < 3:
            assert "DEFINE_" not in path.read_text(), path


ALWAYS_TRUE = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.GeneratorExp, ast.ListComp, ast.Lambda, ast.JoinedStr)


def always_true(tree):
    """Assertions of what is never empty or false: a tuple, a generator, a tree of results."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assert)):
        called = ast.unparse(node.test.func) if isinstance(node.test, ast.Call) else ""
        same = isinstance(node.test, ast.Compare) and len(
            {ast.unparse(side) for side in (node.test.left, *node.test.comparators)}
        ) == 1
        if isinstance(node.test, (*ALWAYS_TRUE, ast.Constant)) or called in ("jax.tree.map", "map", "zip") or same:
            yield ast.unparse(node)


def test_every_assertion_can_fail():
    for wrong in ("(x, y)", "(x for x in y)", "jax.tree.map(f, a, b)", "x == x", "[f(x) for x in y]", "'x'"):
        assert len(list(always_true(ast.parse(f"assert {wrong}")))) == 1, wrong
    assert not list(always_true(ast.parse("assert all(x for x in y)\nassert x == y, (x, y)")))
    found = {path.name: list(always_true(ast.parse(path.read_text()))) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    allowed = {
        "causalfusion_jax", "configs", "launch", "tests", "setup.cfg", "README.md", "LICENSE", "pyproject.toml",
        ".gitignore", ".ci",
    }
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= allowed


def test_lint():
    done = subprocess.run([sys.executable, "-m", "flake8", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
