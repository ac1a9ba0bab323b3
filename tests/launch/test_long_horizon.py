"""The benchmark of long clips: counted FLOPs agree with the paper's formula."""

import json

import pytest
from helpers import run_python


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    picture = tmp_path_factory.mktemp("picture") / "picture.png"
    flags = ("--frames=3", "--hidden=64", "--layers=2", "--batch=2", "--window=2", "--rounds=1", f"--picture={picture}")
    done = run_python("launch/bench/long_horizon.py", *flags)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))["rows"]
    return {row["frames"]: row for row in rows}, done.stdout


def test_counted_products_are_the_formulas(output):
    rows, text = output
    assert list(rows) == [1, 2, 3] and "counted against the formula" in text
    for row in rows.values():
        assert abs(row["full / formula"] - 1) < 0.05 and abs(row["cache less commits / formula"] - 1) < 0.05


def test_costs_of_the_ways(output):
    rows, text = output
    one, long = rows[1], rows[3]
    flops = {way: long[f"{way} MFLOPs"] for way in ("full sequence", "no cache", "cache", "rolling window")}
    assert len({one[f"{way} MFLOPs"] for way in flops}) == 1, "a single frame costs the same in every way"
    assert flops["rolling window"] < flops["cache"] < flops["full sequence"] < flops["no cache"]
    # hidden 64, R = 25: commits pay from theta / (h 24) = 32 tokens on, which is a block; so from the second on.
    assert "above 32 tokens, 1 frames; counted from 2 frames" in text
    assert long["rolling window MB"] == rows[2]["cache MB"] < long["cache MB"] < long["full sequence MB"]
    assert all(row[f"{way} ms"] > 0 for row in rows.values() for way in flops)
