"""The I3D of FVD: its shapes, its padding, and all of it against plain numpy on the released names."""

import i3d_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax import nnx
from helpers import command

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models import i3d
from causalfusion_jax.models.inception import resize_bilinear
from causalfusion_jax.models.inception_layers import Conv, ConvUnit, Pool
from causalfusion_jax.prepare import names
from causalfusion_jax.prepare.released_i3d import RELEASES, i3d_table, ignored_names, recognise


@pytest.fixture(scope="module")
def weights():
    return i3d_weights.pytorch_i3d()


@pytest.fixture(scope="module")
def params(weights):
    return names.from_released(i3d_table(), weights, i3d.abstract_i3d()[1])


def test_shapes_and_number_of_parameters():
    """Sizes as in arXiv 1705.07750, figure 3; 12,697,264 parameters as pytorch-i3d counts them, statistics aside."""
    graph, shapes = i3d.abstract_i3d()
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert sum(leaf.size for path, leaf in leaves if path[-1].key not in ("mean", "var")) == 12_697_264
    head = sum(leaf.size for leaf in jax.tree.leaves(shapes["logits"]))
    assert head == 1024 * 400 + 400 and len(i3d_weights.units()) == 57

    def outputs(params, videos):
        return dict(nnx.merge(graph, params).run(i3d.LAYERS, videos))

    found = jax.eval_shape(outputs, shapes, jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32))
    for name, shape in {
        "Conv3d_1a_7x7": (8, 112, 112, 64),
        "MaxPool3d_2a_3x3": (8, 56, 56, 64),
        "Conv3d_2c_3x3": (8, 56, 56, 192),
        "MaxPool3d_3a_3x3": (8, 28, 28, 192),
        "Mixed_3c": (8, 28, 28, 480),
        "MaxPool3d_4a_3x3": (4, 14, 14, 480),
        "Mixed_4f": (4, 14, 14, 832),
        "MaxPool3d_5a_2x2": (2, 7, 7, 832),
        "Mixed_5c": (2, 7, 7, 1024),
    }.items():
        assert found[name].shape[1:] == shape, name


def pad_same(x, size, stride, value):
    """TensorFlow's SAME: as little as makes ceil(in / stride) out, the odd one behind."""
    widths = [(0, 0)]
    for length, k, s in zip(x.shape[1:4], size, stride, strict=True):
        total = max((-(-length // s) - 1) * s + k - length, 0)
        widths.append((total // 2, total - total // 2))
    return np.pad(x, [*widths, (0, 0)], constant_values=value)


def windows(x, size, stride, value):
    """[batch, T, H, W, channels, *size] of a padded video."""
    view = np.lib.stride_tricks.sliding_window_view(pad_same(x, size, stride, value), size, axis=(1, 2, 3))
    return view[:, :: stride[0], :: stride[1], :: stride[2]]


def plain_conv(x, weight, stride):
    """PyTorch's weight [out, in, t, h, w]."""
    size = weight.shape[2:]
    return np.tensordot(windows(x, size, (stride,) * 3, 0.0), weight, axes=((4, 5, 6, 7), (1, 2, 3, 4)))


def plain_pool(x, size, stride):
    return windows(x, size, stride, -np.inf).max(axis=(5, 6, 7))


def looped(x, weight, stride):
    """A convolution, or with no weight a 3-cube's maximum, by loops over everything."""
    size = 3 if weight is None else weight.shape[2]
    out_shape = [-(-length // stride) for length in x.shape[1:4]]
    channels = x.shape[4] if weight is None else weight.shape[0]
    out = np.full((len(x), *out_shape, channels), -np.inf if weight is None else 0.0)
    before = [max((o - 1) * stride + size - n, 0) // 2 for o, n in zip(out_shape, x.shape[1:4], strict=True)]
    for place in np.ndindex(*out_shape):
        for offset in np.ndindex(size, size, size):
            at = [p * stride + o - b for p, o, b in zip(place, offset, before, strict=True)]
            if all(0 <= a < n for a, n in zip(at, x.shape[1:4], strict=True)):
                seen = x[(slice(None), *at)]
                where = (slice(None), *place)
                if weight is None:
                    out[where] = np.maximum(out[where], seen)
                else:
                    out[where] += seen @ weight[(slice(None), slice(None), *offset)].T
    return out


@pytest.mark.parametrize(("shape", "side", "stride"), [((4, 5, 6), 3, 1), ((5, 4, 7), 3, 2), ((4, 6, 5), 4, 2)])
def test_padding_is_tensorflows(shape, side, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *shape, 3)).astype(np.float32)
    weight = rng.standard_normal((5, 3, side, side, side)).astype(np.float32)
    unit = ConvUnit(3, Conv(5, (side,) * 3, stride))
    unit.kernel[...] = jnp.asarray(weight.transpose(2, 3, 4, 1, 0))
    expected = np.maximum(looped(x, weight, stride), 0) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(unit(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain_conv(x, weight, stride), looped(x, weight, stride), rtol=1e-4, atol=1e-4)
    pooled = Pool("max", stride, "SAME", (3, 3, 3))(jnp.asarray(x))
    np.testing.assert_array_equal(pooled, looped(x, None, stride).astype(np.float32))
    np.testing.assert_array_equal(pooled, plain_pool(x, (3, 3, 3), (stride,) * 3))


def plain_unit(weights, name, x, stride=1):
    w = {part: weights[f"{name}.{part}"] for part in ("conv3d.weight", "bn.weight", "bn.bias")}
    mean, var = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
    y = plain_conv(x, w["conv3d.weight"], stride)
    return np.maximum((y - mean) / np.sqrt(var + 1e-3) * w["bn.weight"] + w["bn.bias"], 0)


def plain_i3d(weights, x):
    """The network as the paper draws it, on weights by their released names."""
    unit = lambda name, x, stride=1: plain_unit(weights, name, x, stride)
    x = plain_pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = plain_pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    for name in i3d_weights.MIXED:
        m = f"Mixed_{name}"
        if name in ("4b", "5b"):
            size = 3 if name == "4b" else 2
            x = plain_pool(x, (size,) * 3, (2, 2, 2))
        pooled = plain_pool(x, (3, 3, 3), (1, 1, 1))
        branches = [
            unit(f"{m}.b0", x),
            unit(f"{m}.b1b", unit(f"{m}.b1a", x)),
            unit(f"{m}.b2b", unit(f"{m}.b2a", x)),
            unit(f"{m}.b3b", pooled),
        ]
        x = np.concatenate(branches, axis=-1)
    pairs = [x[:, t : t + 2].mean(axis=(1, 2, 3)) for t in range(x.shape[1] - 1)]
    logits = [pair @ weights["logits.conv3d.weight"][:, :, 0, 0, 0].T + weights["logits.conv3d.bias"] for pair in pairs]
    return np.mean(logits, axis=0)


def test_logits_are_those_of_plain_numpy(weights, params):
    """17 frames are three steps in time at the end, of which two at a time are averaged."""
    videos = np.random.default_rng(1).integers(0, 256, (1, 17, 12, 20, 3)).astype(np.uint8)
    found = i3d.i3d_logits(params, videos, side=16)
    resized = np.asarray(resize_bilinear(videos, (16, 16), half_pixel=False))
    expected = plain_i3d(weights, resized * 2 / 255 - 1)
    assert found.shape == expected.shape == (1, 400) and expected.std() > 0.1
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4
    # The resize that is asked for is the one that is done, and it matters.
    other = i3d.i3d_logits(params, videos, "half_pixel", side=16)
    assert np.linalg.norm(found - other) / np.linalg.norm(expected) > 1e-3


def test_resizes():
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None], (2, 4, 1))
    tf1 = resize_bilinear(ramp, (2, 8), half_pixel=False)[0, :, 0]
    half = resize_bilinear(ramp, (2, 8), half_pixel=True)[0, :, 0]
    np.testing.assert_allclose(tf1, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_allclose(half, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


@pytest.mark.parametrize(
    ("videos", "words"),
    [(np.zeros((1, 8, 4, 4, 3), np.uint8), "frames >= 9"), (np.zeros((1, 9, 4, 4, 1), np.uint8), "must be"),
     (np.zeros((1, 9, 4, 4, 3), np.float32), "must be uint8")],
)  # fmt: skip
def test_what_is_no_video(videos, words):
    with pytest.raises(InputError, match=words):
        i3d.i3d_logits({}, videos)
    with pytest.raises(InputError, match="must be one of tf1, half_pixel"):
        i3d.i3d_logits({}, np.zeros((1, 9, 4, 4, 3), np.uint8), "bicubic")


def test_every_layout_gives_the_same_network(weights, params):
    ones = {name: np.ones_like(array) if name.endswith("bn.weight") else array for name, array in weights.items()}
    for layout, released in {
        "pytorch-i3d": weights,
        "kinetics_i3d_pytorch": i3d_weights.kinetics_i3d_pytorch(weights),
        "tensorflow": i3d_weights.tensorflow(ones),
    }.items():
        shapes = {name: array.shape for name, array in released.items()}
        assert recognise(shapes) == layout
        table = i3d_table(layout)
        names.check_shapes(table, shapes, ignored_names(layout))
        assert names.unfilled(table, i3d.abstract_i3d()[1]) == []
        found = names.from_released(table, released, i3d.abstract_i3d()[1])
        expected = params if layout != "tensorflow" else names.from_released(i3d_table(), ones, i3d.abstract_i3d()[1])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        back = names.to_released(table, found)
        assert set(back) == set(released) - set(ignored_names(layout))
        for name, array in back.items():
            np.testing.assert_array_equal(array, released[name], err_msg=name)
    assert set(RELEASES) == {"pytorch-i3d", "kinetics_i3d_pytorch", "tensorflow"}


def test_convert_reads_a_torchscript_file_and_writes_back(weights, tmp_path):
    torch_format.save_script(tmp_path / "i3d.pt", i3d_weights.kinetics_i3d_pytorch(weights))
    out = tmp_path / "converted"
    done = command("convert", "--kind=fvd_i3d", f"--checkpoint={tmp_path / 'i3d.pt'}", f"--out={out}")
    assert done.returncode == 0 and "fvd_i3d: 287 arrays" in done.stdout, done.stderr
    assert "57 arrays not used" in done.stdout
    back = tmp_path / "back.safetensors"
    done = command("convert", "--reverse", f"--checkpoint={out}", f"--out={back}")
    assert done.returncode == 0, done.stderr
    from safetensors.numpy import load_file

    found = load_file(back)
    assert set(found) == {name for name in weights if not name.endswith("num_batches_tracked")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("Mixed_4d.b1b.bn.bias"), "Mixed_4d.b1b.bn.bias.*missing"),
        (lambda w: w.update({"Mixed_9z.b0.conv3d.weight": np.zeros(3)}), "Mixed_9z.*unknown use"),
        (lambda w: w.update({"logits.conv3d.weight": np.zeros((157, 1024, 1, 1, 1))}), r"has shape \[157, 1024"),
        (lambda w: w.pop("Conv3d_1a_7x7.conv3d.weight"), "not a checkpoint of fvd_i3d"),
    ],
)
def test_other_checkpoints_are_refused(weights, change, words):
    from causalfusion_jax.prepare.conversion import make_plan

    changed = dict(weights)
    change(changed)
    shapes = {name: array.shape for name, array in changed.items()}
    with pytest.raises(InputError, match=words):
        make_plan("fvd_i3d", shapes, {}, {}, None)
    with pytest.raises(InputError, match="--frames=2: has no meaning"):
        make_plan("fvd_i3d", shapes, {}, {"frames": 2}, None)
