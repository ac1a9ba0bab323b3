"""The papers' tables: their figures, the runs behind them, the rule of the claims, the commands."""

import json
import shutil
import sys

import pytest
from helpers import ROOT, run_python

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.sweeps import sweep as sweeps

sys.path.insert(0, str(ROOT / "launch" / "tables"))
import page
import tables
from tables import Cell, Claim

CLAIM = Claim("a beats b", Cell("a", 1), Cell("b", 1))
RUNS = {
    # table: runs of a seed, on digits and on ImageNet
    "gamma": (5, 5), "order": (4, 5), "fixed_steps": (6, 6), "ar_weight": (5, 5), "condition_tokens": (5, 5),
    "t_sharing": (4, 4), "baseline": (5, 6), "block_size": (3, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", tables.TABLES)
def test_claims_are_what_the_papers_figures_say(name):
    table = tables.TABLES[name]
    for claim in table.claims:
        better, worse = page.figures_of(table, claim)
        assert better < worse, claim.text
        assert not claim.immaterial or worse / better < 1.02, claim.text
    assert len({(claim.better, claim.worse) for claim in table.claims}) == len(table.claims)


@pytest.mark.parametrize("on", tables.DATA)
@pytest.mark.parametrize("name", tables.TABLES)
def test_rows_of_runs_are_those_of_the_figures(name, on):
    table, entries = tables.TABLES[name], tables.entries(tables.TABLES[name], on, 1)
    rows = [entry.row for entry in entries]
    assert len(set(rows)) == len(rows) == RUNS[name][on == "imagenet"]
    cells = {(entry.row, s) for entry in entries for s in entry.ar_steps}
    if table.figures:
        assert cells <= {(row, s) for row, figures in table.figures.items() for s in figures}
    run = [claim for claim in table.claims if {claim.better, claim.worse} <= cells]
    # Blocks of 4x4 need a grid of more than 4x4 tokens; ACDiT's blocks are a half or a quarter of either grid.
    left_out = {("order", "digits"): 1, ("block_size", "digits"): 1, ("block_size", "imagenet"): 1}
    assert len(table.claims) - len(run) == left_out.get((name, on), 0)


def test_common_runs_appear_once():
    (shared,) = [names for folder, names in tables.groups(list(tables.TABLES), "digits").items() if folder == "digits"]
    sweep = tables.joined(shared, "digits", seeds=2)
    runs = sweeps.expand(sweep, tables.base_of(sweep.config))
    by_name = {run.name: run for run in runs}
    # 5 decays; 3 other orders; 5 fixed S, of which S = 1 is the baseline's last row; 4 weights; 2 other counts of
    # condition tokens, 2 of repeated ones; t for each AR step, 4 and 8 draws; 4 more rows of the baseline.
    assert len(by_name) == len(runs) == 2 * (5 + 3 + 5 + 4 + 4 + 3 + 4)
    # The chosen decay, without weight: in the tables of decay, order and weight; the default: of weight, tokens and t.
    assert by_name["weight=none,seed=1"].ar_steps == (1, 2, 4, 8) and by_name["seed=1"].ar_steps == (1, 2, 4)
    again = tables.joined(["gamma"], "digits", seeds=1)
    names = {run.name for run in sweeps.expand(again, tables.base_of(again.config))}
    assert names <= set(by_name), "a table of its own finds the runs of all"
    assert again.num_samples == 1000 and tables.joined(["gamma"], "imagenet").num_samples == 10_000


def test_wrong_arguments():
    for arg, words in (
        ("gamma", "must begin with digits"), ("digits,gama", "did you mean gamma"), ("digits,seeds=x", "an integer"),
        ("digits,gamma,block_size", "different configs"), ("digits,seeds=0", "seeds=0"), ("digits,sead=1", "sead"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            tables.get_sweep(arg)


@pytest.mark.parametrize(
    ("better", "worse", "immaterial", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], False, "agrees"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], False, "disagrees"),
        ([1.0, 1.1, 0.9], [1.1, 1.2, 1.0], False, "within the spread"),
        ([1.0, 1.1, 0.9], [1.1, 1.2, 1.0], True, "agrees"),
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], True, "disagrees"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], True, "disagrees"),
        ([1.0], [2.0, 2.0, 2.0], False, "one seed"),
        ([], [2.0], False, "not run"),
    ],
)
def test_verdicts(better, worse, immaterial, word):
    claim = Claim(CLAIM.text, CLAIM.better, CLAIM.worse, immaterial)
    assert page.verdict(claim, better, worse).word == word


def test_the_margin_is_students_t_times_the_pooled_standard_error():
    verdict = page.verdict(CLAIM, [1.0, 1.2, 0.8], [1.5, 1.6, 1.4])
    # s² = (0.04 + 0.01) / 2, standard error sqrt(s² 2 / 3), t of 4 degrees of freedom 2.776.
    assert verdict.difference == pytest.approx(0.5) and verdict.margin == pytest.approx(2.7764 * 0.12910, rel=1e-4)


def made_up(root, score):
    """A workdir of the decay's runs on digits, two seeds, with fd = score(gamma, seed, S)."""
    sweep = tables.joined(["gamma"], "digits", seeds=2)
    for run in sweeps.expand(sweep, tables.base_of(sweep.config)):
        for s in run.ar_steps:
            folder = run.samples_folder(root / "digits", s, sweep.num_samples)
            folder.mkdir(parents=True)
            fd = score(run.config.factorization.gamma, run.config.train.seed, s)
            (folder / "evaluation.json").write_text(json.dumps({"num": 1000, "fd": fd, "accuracy": 0.5}))
        files.write_json(root / "digits" / run.name / "config.json", experiment.to_dict(run.config))


def test_page_of_made_up_scores(tmp_path):
    made_up(tmp_path, lambda gamma, seed, s: 1.0 + gamma + 0.02 * seed)
    text = page.render(page.collect(tmp_path, ["gamma", "order"], "digits", 2, 0), "digits", 2, 0, "made up")
    lines = text.splitlines()
    assert "made up" in lines
    assert "| γ = 0.9 | 12.89 | 1.91 ± 0.01 (0.500) | 15.57 | 1.91 ± 0.01 (0.500) |" in text
    (line,) = [line for line in lines if "γ = 0.9 beats γ = 1 at S_eval = 1" in line]
    assert "**agrees** (paper 12.89 against 21.31; ours 1.91 against 2.01, Δ = 0.100, margin 0.061)" in line
    (line,) = [line for line in lines if "γ = 0.9 beats γ = 0.8 at S_eval = 4" in line]
    assert "**disagrees** (paper 18.83 against 19.38; ours 1.91 against 1.81, Δ = -0.100, margin 0.061)" in line
    (line,) = [line for line in lines if "better at S_eval = 1 than at 8" in line]
    assert "**within the spread** (paper 12.89 against 22.72; ours 1.91 against 1.91" in line
    # Of the orders only random is there, as γ = 0.9; of the others nothing is said.
    assert "| random | 12.89 | 1.91 ± 0.01 (0.500) |" in text and "| dilated | 15.54 |  |" in text
    assert "| block-raster, 4x4 blocks | 14.62 | — |" in text
    assert "random beats raster at S_eval = 1: **not run** (paper 12.89 against 14.46)" in text
    assert "Of all claims, agrees: 4, disagrees: 2, not run: 4, within the spread: 2." in text


def test_scores_of_other_settings_are_not_collected(tmp_path):
    made_up(tmp_path, lambda gamma, seed, s: gamma)
    path = next((tmp_path / "digits").glob("*/config.json"))
    values = json.loads(path.read_text())
    values["train"]["batch_size"] = 16
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"other settings \(train.batch_size 16, now 48\)"):
        page.collect(tmp_path, ["gamma"], "digits", 2, 0)
    shutil.rmtree(path.parent)
    overridden = {"train.batch_size": 16}
    with pytest.raises(InputError, match=r"other settings \(train.batch_size 48, now 16\)"):
        page.collect(tmp_path, ["gamma"], "digits", 2, 0, overridden)
    for path in (tmp_path / "digits").glob("*/config.json"):
        values = json.loads(path.read_text())
        values["train"]["batch_size"] = 16
        path.write_text(json.dumps(values))
    scores = page.collect(tmp_path, ["gamma"], "digits", 2, 0, overridden)
    assert sum(len(place.get("fd", [])) for place in scores["gamma"].values()) == 2 * 5 * 4 - 4
    text = page.render(scores, "digits", 2, 0, overrides=["train.batch_size=16"])
    assert "--parallel=2 --override=train.batch_size=16`" in text


def test_imagenet_is_the_same_command(tmp_path):
    done = run_python(
        "launch/tables/run.py",
        "--table=gamma,order",
        "--on=imagenet",
        "--seeds=2",
        f"--workdir={tmp_path / 'tables'}",
        "--dry_run",
        "--",
        "--override=data.path=/data/latents",
        "--sample_flags=--vae=/data/vae",
        "--evaluate_flags=--inception=/data/inception --reference=/data/reference.npz",
        '--launcher=submit {index} --command="{command}"',
    )
    assert done.returncode == 0, done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith("submit ")]
    assert len(jobs) == 2 * (5 + 4)
    assert all("--config=configs/imagenet_causalfusion.py:L,ablation" in job for job in jobs)
    assert all("--num=10000 --ar_steps=1 --vae=/data/vae" in job for job in jobs)
    assert sum("--ar_steps=8" in job for job in jobs) == 2 * 5
    assert sum("--config.factorization.order=raster" in job for job in jobs) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_and_renders(tmp_path):
    tiny = (
        "--override=train.steps=4,model.hidden=32,model.layers=1,optimizer.warmup_steps=1,sampling.solver_steps=2,"
        "checkpoint.every=4"
    )
    args = ("--table=t_sharing", "--seeds=1", "--num=20", f"--workdir={tmp_path}")
    done = run_python("launch/tables/run.py", *args, "--", "--parallel=2", tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "page.md"
    refused = run_python("launch/tables/render.py", *args, f"--out={out}")
    assert refused.returncode == 2 and "trained by other settings" in refused.stderr and not out.exists()
    rendered = run_python("launch/tables/render.py", *args, tiny, f"--out={out}", "--header=here, today")
    assert rendered.returncode == 0, rendered.stderr
    scores = [json.loads(path.read_text())["fd"] for path in tmp_path.glob("digits/*/samples_ar1_n20/evaluation.json")]
    text = out.read_text()
    assert len(scores) == 4 and all(page.number(score) in text for score in scores)
    assert "here, today" in text and "**one seed**" in text
    again = run_python("launch/tables/run.py", *args, "--", "--parallel=2", tiny)
    assert again.stdout.count("was there already") == 4
