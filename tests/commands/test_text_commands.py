"""Texts and images, through the commands as a user runs them."""

import json

import numpy as np
import pytest
from helpers import command
from PIL import Image

from causalfusion_jax.data.digit_pairs import digit_pairs

SMALL = (
    "--config.model.hidden=32", "--config.model.heads=2", "--config.model.layers=2", "--config.train.steps=8",
    "--config.train.batch_size=8", "--config.optimizer.warmup_steps=3", "--config.checkpoint.every=8",
    "--config.logging.every=4", "--config.sampling.solver_steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = command(
        "train", "--config=configs/digit_pairs.py", f"--workdir={folder / 'run'}", *SMALL,
        "--config.logging.sample_every=8", "--config.logging.num_samples=4",
        "--config.evaluation.eval_every=8", "--config.evaluation.num_images=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "evaluated step 8: accuracy" in done.stdout
    scalars, scores = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()[-2:])
    assert {"diffusion", "cross_entropy", "mse/text_to_image", "ce/image_to_text", "captions_cut"} <= set(scalars)
    assert {"evaluation/accuracy", "evaluation/left", "evaluation/right"} <= set(scores)
    assert (folder / "run" / "samples" / "00000008.png").is_file()
    return folder / "run"


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    for word in ("error: ", *words):
        assert word in line, (word, line)


def test_prompts_to_images_and_scores(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text("three seven\n\nnine zero\n")
    done = command(
        "sample", f"--workdir={workdir}", f"--prompts={tmp_path / 'prompts.txt'}", "--num=5", "--cfg_scale=2",
        f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 16, 1)
        assert arrays["prompts"].tolist() == ["three seven", "nine zero"] * 2 + ["three seven"]
        assert arrays["arr_1"].tolist() == [100] * 5
    assert json.loads((tmp_path / "out" / "request.json").read_text())["prompts"][1] == "nine zero"
    scored = command("evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'out' / 'samples.npz'}")
    assert set(json.loads(scored.stdout)) == {"samples", "num", "accuracy", "left", "right"}, scored.stderr


def test_real_pairs_are_read_right(workdir, tmp_path):
    source = digit_pairs("train")
    chosen = np.random.default_rng(0).choice(len(source), 100)
    examples = [source[int(i)] for i in chosen]
    images = np.stack([np.clip(127.5 * e["image"] + 128, 0, 255) for e in examples]).astype(np.uint8)
    labels = np.array([e["label"] for e in examples])
    np.savez(tmp_path / "real.npz", images, labels, prompts=[e["caption"] for e in examples])
    scored = command("evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'real.npz'}")
    assert json.loads(scored.stdout)["accuracy"] > 0.93, scored.stderr
    np.savez(tmp_path / "wrong.npz", images, labels[::-1])
    scored = command("evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'wrong.npz'}")
    assert json.loads(scored.stdout)["accuracy"] < 0.2, scored.stderr


def test_prompts_edit_images(workdir, tmp_path):
    """The left digits stay bit for bit; result k of image i was asked for by prompt i."""
    source = digit_pairs("held_out")
    images = np.stack([np.clip(127.5 * source[i]["image"] + 128, 0, 255) for i in (0, 500)]).astype(np.uint8)
    np.savez(tmp_path / "pairs.npz", images)
    (tmp_path / "prompts.txt").write_text("zero one\none nine\n")
    edit = ("edit", f"--workdir={workdir}", f"--image={tmp_path / 'pairs.npz'}", "--mask=right", "--cfg_scale=2")
    several = ("--num=2", f"--prompts={tmp_path / 'prompts.txt'}")
    done = command(*edit, *several, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        results = arrays["arr_0"]
        assert arrays["prompts"].tolist() == ["zero one"] * 2 + ["one nine"] * 2
        assert arrays["arr_1"].tolist() == [100] * 4
    np.testing.assert_array_equal(results[:, :, :8], images.repeat(2, axis=0)[:, :, :8])
    done = command(*edit, *several[:1], "--prompt=nine nine", f"--out={tmp_path / 'other'}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "other" / "samples.npz") as arrays:
        # The same noise, another text.
        assert (arrays["arr_0"] != results)[:, :, 8:].mean() > 0.1
    nowhere = f"--out={tmp_path / 'nowhere'}"
    refused(command(*edit, nowhere, "--label=3"), "--label", "was trained without classes")
    refused(command(*edit, nowhere), "--prompt", "is required")
    refused(command(*edit, nowhere, "--prompt=three dogs and cats"), "--prompt", "three dogs and cats")
    (tmp_path / "prompts.txt").write_text("zero one\n")
    refused(command(*edit, nowhere, f"--prompts={tmp_path / 'prompts.txt'}"), "--prompts", "must be 2 lines")
    refused(command("sample", f"--workdir={workdir}", "--labels=3", nowhere), "--labels", "was trained without classes")
    assert not (tmp_path / "nowhere").exists()


def test_images_to_captions_and_scores(workdir, tmp_path):
    (tmp_path / "starts.txt").write_text("three\n\nthree seven\n")
    done = command(
        "caption", f"--workdir={workdir}", "--images=held_out", "--num=3", f"--prompts={tmp_path / 'starts.txt'}",
        "--num_beams=2", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert len(records) == 3 and records[0]["caption"].startswith("three")
    assert records[2]["caption"].startswith("three seven") and records[1]["log_prob"] < 0
    scored = command("evaluate", f"--workdir={workdir}", f"--captions={tmp_path / 'out' / 'captions.jsonl'}")
    assert set(json.loads(scored.stdout)) == {"captions", "num", "exact_match", "cider"}, scored.stderr
    done = command(
        "caption", f"--workdir={workdir}", "--images=held_out", "--num=3", "--score", f"--out={tmp_path / 'scores'}"
    )
    assert json.loads(done.stdout.splitlines()[0])["bits_per_token"] > 0, done.stderr
    assert f"weights: ema of step 8 of {workdir}\n" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert all(record["tokens"] == len(record["caption"]) + 1 and record["log_prob"] < 0 for record in records)


def test_image_files_and_folders(workdir, tmp_path):
    pixels = np.clip(127.5 * digit_pairs("held_out")[0]["image"][..., 0] + 128, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "pair.png")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "pair.png", "caption": "zero one"}\n')
    for images, name in ((tmp_path / "pair.png", "file"), (tmp_path, "folder")):
        done = command("caption", f"--workdir={workdir}", f"--images={images}", f"--out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "folder" / "captions.jsonl").read_text())
    assert record["image"] == "pair.png" and record["references"] == ["zero one"]


def test_bad_input_is_one_clear_line(workdir, tmp_path):
    out = f"--out={tmp_path / 'out'}"

    def sample(*args):
        return command("sample", f"--workdir={workdir}", out, *args)

    def caption(*args):
        return command("caption", f"--workdir={workdir}", out, *args)

    refused(sample("--prompt=one two three four"), "--prompt='one two three four'", "has 20 tokens", "takes 13")
    refused(sample("--prompt=one two", "--prompts=x"), "not both")
    refused(sample("--prompts=nothing.txt"), "--prompts", "no such file")
    refused(caption("--images=nothing.png"), "--images", "no such file")
    Image.new("L", (8, 8)).save(tmp_path / "square.png")
    refused(caption(f"--images={tmp_path / 'square.png'}"), "square.png", "is 8x8", "takes 16x8")
    np.savez(tmp_path / "wrong.npz", np.zeros((2, 8, 8, 1), np.uint8))
    refused(caption(f"--images={tmp_path / 'wrong.npz'}"), "wrong.npz", "[num, 8, 16, 1]")
    (tmp_path / "folder").mkdir()
    refused(caption(f"--images={tmp_path / 'folder'}"), "holds no images")
    Image.new("L", (16, 8)).save(tmp_path / "folder" / "a.png")
    refused(caption(f"--images={tmp_path / 'folder'}", "--score"), "needs captions", "a.png has none")
    refused(caption("--images=held_out", "--prompt=one two three four"), "--prompt", "has 19 tokens")
    refused(caption("--images=held_out", "--temperature=1", "--num_beams=2"), "--num_beams=2", "temperature")
    run = f"--workdir={tmp_path / 'run'}"
    done = command("train", "--config=configs/digits.py", "--config.text.tokenizer=bytes", run)
    refused(done, "config.data.source", "has no captions")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()
