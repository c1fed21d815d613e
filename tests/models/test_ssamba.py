"""SSAMBA against the public model's arithmetic in PyTorch float64, its checkpoints, its pre-training."""

from __future__ import annotations

import math
import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pcgjax.bench.ssamba import Peer, ssamba_suite, ssamba_summary
from pcgjax.models import ssamba
from pcgjax.models.ssamba import SSAMBA, Mixer, load_torch_checkpoint, save_torch_checkpoint

torch = pytest.importorskip("torch")

FRAMES, GRID, PATCHES = 48, (8, 3), 24
SMALL: dict[str, Any] = {"width": 16, "depth": 4, "frames": FRAMES, "d_state": 4}


def drawn(make):
    """A model or mixer with every value drawn: its own start has much that is all the same and would hide a mix-up."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(scale=0.3, size=a.shape), a.dtype), state))


def bank(batch=2, frames=FRAMES, seed=1):
    return np.random.default_rng(seed).normal(scale=0.5, size=(batch, frames, ssamba.MEL_BINS)).astype(np.float32)


def double(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def worst(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


# Compiled in half the time, and run for microseconds.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
apply = jit(lambda model, x: model(x))
encode = jit(lambda model, x, masked=None: model.encode(x, masked))


@pytest.fixture(scope="module")
def model():
    return drawn(partial(SSAMBA, **SMALL, classes=3))


@pytest.fixture(scope="module")
def pretrained():
    return drawn(partial(SSAMBA, **SMALL, pretraining=True))


@pytest.fixture(scope="module")
def peer64(model):
    peer = Peer(model)
    peer.weights = {name: w.detach().double().requires_grad_() for name, w in peer.weights.items()}
    return peer


# -------------------------------------------------------------------------------------------------------- the mixer


def test_pieces_of_a_causal_mixer_equal_the_whole():
    mixer = drawn(partial(Mixer, 12, d_state=5, bidirectional=False))
    x = jax.random.normal(jax.random.key(0), (2, 37, 12))
    stream = jit(lambda mixer, x, state: mixer.stream(x, state))
    whole, state, pieces = apply(mixer, x), mixer.initial_state(2), []
    for begin, end in ((0, 1), (1, 2), (2, 3), (3, 20), (20, 37)):
        y, state = stream(mixer, x[:, begin:end], state)
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)
    late = apply(mixer, x.at[:, 20:].add(1.0))
    np.testing.assert_allclose(late[:, :20], whole[:, :20], atol=1e-6)
    assert np.abs(late[:, 20] - whole[:, 20]).min() > 0


def test_directions_mirror_each_other():
    mixer = drawn(partial(Mixer, 12, d_state=5))
    x = jax.random.normal(jax.random.key(0), (2, 37, 12))
    graphdef, state = nnx.split(mixer)
    # Parameters with a leading axis of 2 are the directions'.
    swapped = nnx.merge(graphdef, jax.tree.map(lambda a: a[::-1] if a.shape[0] == 2 else a, state))
    np.testing.assert_allclose(apply(swapped, x[:, ::-1])[:, ::-1], apply(mixer, x), atol=2e-5)
    assert np.abs(apply(swapped, x) - apply(mixer, x)).max() > 1e-2


def test_mixer_starts_as_published():
    mixer = Mixer(64, rngs=nnx.Rngs(0))
    step = jax.nn.softplus(mixer.dt_bias[...])
    assert mixer.dt_proj.shape == (2, 4, 128)
    assert 9e-4 < step.min() < 3e-3
    assert 3e-2 < step.max() < 0.11
    np.testing.assert_allclose(jnp.exp(mixer.A_log[...][1, 7]), np.arange(1, 17), rtol=1e-5)
    assert (mixer.D[...] == 1).all()


def test_mixer_refuses():
    with pytest.raises(ValueError, match="bidirectional=False"):
        drawn(partial(Mixer, 8)).stream(jnp.zeros((1, 3, 8)), None)
    with pytest.raises(ValueError, match="d_conv=0"):
        Mixer(8, d_conv=0, rngs=nnx.Rngs(0))


# -------------------------------------------------------------------------------------------------------- the model


def test_equals_the_public_model(model, peer64):
    """Float32 to what its rounding allows."""
    want = peer64.encode(bank().astype(np.float64))
    assert want.shape == (2, 1 + PATCHES, 16)
    assert worst(encode(model, bank()), want) < 1e-5
    assert worst(apply(model, bank()), peer64.logits(bank().astype(np.float64)).detach()) < 1e-5
    half = encode(model, jnp.asarray(bank(), jnp.bfloat16))
    assert 1e-4 < worst(half, want) < 0.05


def test_value_and_every_gradient_in_float64(model, peer64, tmp_path):
    """Gradients go where the public checkpoint has that parameter, so that the export sorts them for us."""
    weights = np.random.default_rng(3).normal(size=(2, 3))
    x = bank().astype(np.float64)
    logits = peer64.logits(x)
    for weight in peer64.weights.values():
        weight.grad = None
    (logits * torch.tensor(weights)).sum().backward()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    with jax.enable_x64(True):

        def objective(params):
            return (nnx.merge(graphdef, params, rest)(jnp.asarray(x)) * weights).sum()

        value, gradient = jit(jax.value_and_grad(objective))(double(params))
        assert abs(value - (logits.detach().numpy() * weights).sum()) < 1e-9
    save_torch_checkpoint(nnx.merge(graphdef, gradient, rest), tmp_path / "gradient.pth")
    gradients = torch.load(tmp_path / "gradient.pth", weights_only=True)
    largest = max(weight.grad.abs().max() for weight in peer64.weights.values())
    assert set(gradients) == {"module." + name for name in peer64.weights}
    for name, weight in peer64.weights.items():
        # Written as float32; a gradient that ends in nothing is held against the largest one.
        error = (gradients["module." + name] - weight.grad).abs().max()
        assert error < 1e-6 * max(weight.grad.abs().max(), 1e-3 * largest), name


def test_pooling_and_remat(model, tmp_path):
    save_torch_checkpoint(model, tmp_path / "model.pth")
    other = load_torch_checkpoint(tmp_path / "model.pth", FRAMES, pooling="cls", remat=True)
    tokens = encode(model, bank())
    np.testing.assert_allclose(apply(other, bank()), model.head(model.head_norm(tokens[:, 0])), atol=1e-5)
    np.testing.assert_allclose(apply(model, bank()), model.head(model.head_norm(tokens[:, 1:].mean(1))), atol=1e-5)
    for one, again in ((model, False), (other, True)):
        assert ("remat" in str(jax.make_jaxpr(one.encode)(bank()))) == again


def test_patches_overlap_and_go_frequency_first():
    model = drawn(partial(SSAMBA, 8, 2, 40, (10, 4), d_state=2))
    x = bank(1, 40)
    assert model.grid == (12, 7)
    unfold = torch.nn.functional.unfold(torch.tensor(x).transpose(1, 2)[:, None], 16, stride=(10, 4))
    np.testing.assert_array_equal(model.patches(x), unfold.transpose(1, 2))
    assert encode(model, x).shape == (1, 1 + 84, 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 3}, "depth=3"), ({"pooling": "max"}, "pooling='max'"), ({"stride": 17}, "stride="),
        ({"frames": 15}, "frames=15"), ({"stride": (10,)}, "stride="),
    ],
)  # fmt: skip
def test_model_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        SSAMBA(**{**SMALL, **changes}, rngs=nnx.Rngs(0))


def test_calls_refuse(model, pretrained):
    with pytest.raises(ValueError, match=r"\(2, 47, 128\); needs \(B, 48, 128\)"):
        model(bank(frames=47))
    with pytest.raises(ValueError, match="no head"):
        pretrained(bank())
    with pytest.raises(ValueError, match="no predictors"):
        ssamba.pretrain_losses(model, bank(), jax.random.key(0), 10)


# -------------------------------------------------------------------------------------------------------- checkpoints


def fine_tuned(model, path, change=lambda state: None):
    """A checkpoint as the public code writes it, with the classifier of Vision Mamba that no output depends on."""
    save_torch_checkpoint(model, path)
    state = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    state |= {"module.v.head.weight": torch.randn(7, 16), "module.v.head.bias": torch.randn(7)}
    change(state)
    torch.save(state, path)
    return state


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trips_are_exact(model, pretrained, tmp_path):
    written = fine_tuned(model, tmp_path / "fine.pth")
    save_torch_checkpoint(load_torch_checkpoint(tmp_path / "fine.pth", FRAMES), tmp_path / "again.pth")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True), written)
    assert "module.v.layers.3.mixer.A_b_log" in written

    save_torch_checkpoint(pretrained, tmp_path / "pre.pth")
    written = torch.load(tmp_path / "pre.pth", weights_only=True)
    assert written["module.p_input_tdim"] == FRAMES
    assert written["module.gpredlayer.2.weight"].shape == (256, 16)
    back = load_torch_checkpoint(tmp_path / "pre.pth", FRAMES)
    save_torch_checkpoint(back, tmp_path / "again.pth")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True), written)
    np.testing.assert_array_equal(encode(back, bank()), encode(pretrained, bank()))


def test_import_without_prefix_and_with_a_new_head(model, pretrained, tmp_path):
    state = fine_tuned(model, tmp_path / "fine.pth")
    torch.save({name.removeprefix("module."): value for name, value in state.items()}, tmp_path / "bare.pth")
    bare = load_torch_checkpoint(tmp_path / "bare.pth", FRAMES)
    np.testing.assert_array_equal(apply(bare, bank()), apply(model, bank()))
    # What no output depends on is no parameter: an optimizer leaves it as it is.
    assert {leaf.shape for leaf in jax.tree.leaves(nnx.state(bare, ssamba.Unused))} == {(7, 16), (7,)}
    save_torch_checkpoint(pretrained, tmp_path / "pre.pth")
    assert jax.eval_shape(load_torch_checkpoint(tmp_path / "pre.pth", FRAMES, classes=5), bank()).shape == (2, 5)
    with pytest.raises(ValueError, match=r"fine\.pth: has a head"):
        load_torch_checkpoint(tmp_path / "fine.pth", FRAMES, classes=5)


def _drop(name):
    return lambda state: state.pop("module." + name)


def _put(name, *shape):
    return lambda state: state.update({"module." + name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_put("v.surprise", 2), r"unknown v\.surprise"),
        (_put("v.layers.90.norm.weight", 16), r"unknown v\.layers\.90\.norm\.weight"),
        (_drop("v.layers.2.mixer.A_b_log"), r"missing v\.layers\.2\.mixer\.A_b_log"),
        (_drop("v.layers.3.mixer.in_proj.weight"), r"missing v\.layers\.3\.mixer\.in_proj\.weight"),
        (_drop("v.pos_embed"), r"missing v\.pos_embed"),
        (_drop("v.head.bias"), r"missing v\.head\.bias"),
        (_drop("mlp_head.0.weight"), r"missing mlp_head\.0\.weight"),
        (_put("v.layers.0.mixer.A_log", 3, 3), r"v\.layers\.0\.mixer\.A_log has shape \(3, 3\), needs \(32, 4\)"),
        (_put("v.layers.0.norm.weight", 5), r"v\.layers\.0\.norm\.weight has shape \(5,\), needs \(16,\)"),
        (_put("v.pos_embed", 2, 2), r"v\.pos_embed has shape \(2, 2\)"),
        (_put("v.cls_token"), r"v\.cls_token has shape \(\), needs \(1, 1, 16\)"),
        (_put("mask_embed", 1, 1, 16), r"missing cpredlayer\.0\.weight.*and 2 more"),
        (lambda state: state.clear(), "needs a state dict"),
        (lambda state: state.update(epoch=3), "'epoch' is not an array"),
        (lambda state: [state.pop(k) for k in [*state] if "layers" in k], "not a checkpoint of SSAMBA"),
    ],
)
def test_import_is_strict(model, tmp_path, change, says):
    fine_tuned(model, tmp_path / "bad.pth", change)
    with pytest.raises(ValueError, match=says) as caught:
        load_torch_checkpoint(tmp_path / "bad.pth", FRAMES)
    assert "bad.pth" in str(caught.value)


def test_R6_parameters_wrapped_state_dicts_and_half_precision_load(model, tmp_path):
    state = fine_tuned(model, tmp_path / "fine.pth")
    parameters = {f"module.{name}": torch.nn.Parameter(x) for name, x in state.items()}
    for theirs in ({"state_dict": parameters, "epoch": 3}, {name: x.bfloat16() for name, x in state.items()}):
        torch.save(theirs, tmp_path / "theirs.pth")
        save_torch_checkpoint(load_torch_checkpoint(tmp_path / "theirs.pth", FRAMES), tmp_path / "again.pth")
        again = torch.load(tmp_path / "again.pth", weights_only=True)
        assert all(torch.allclose(again[name], state[name], rtol=0.01) for name in again)


def test_R6_what_cannot_be_a_weight_is_named(model, tmp_path):
    def refused(says, change):
        fine_tuned(model, tmp_path / "bad.pth", change)
        with pytest.raises(ValueError, match=says):
            load_torch_checkpoint(tmp_path / "bad.pth", FRAMES)

    name = "v.layers.1.mixer.D"
    nan = torch.full((32,), float("nan"))
    refused(r"bad\.pth: v\.layers\.1\.mixer\.D holds a NaN or an infinity", lambda s: s.update({f"module.{name}": nan}))
    refused(r"v\.layers\.1\.mixer\.D cannot be read", lambda s: s.update({f"module.{name}": torch.eye(2).to_sparse()}))
    refused("'epoch' is not an array", lambda s: s.update(epoch=3, model={}, state_dict={}))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_in_a_file_is_run(tmp_path):
    flag = tmp_path / "ran"
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Touch(str(flag)), protocol=2))
    torch.save({"v": Touch(str(flag))}, tmp_path / "zipped.pth")
    (tmp_path / "text.pth").write_text("weights, I promise")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("code", "zipped", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}.pth: not a PyTorch checkpoint of arrays alone"):
            load_torch_checkpoint(tmp_path / f"{name}.pth", FRAMES)
    assert not flag.exists()
    with pytest.raises(FileNotFoundError):
        load_torch_checkpoint(tmp_path / "none.pth", FRAMES)


@pytest.mark.parametrize(("frames", "stride"), [(FRAMES, 10), (32, 16), (80, 16), (80, (16, 2))])
def test_position_embedding_for_another_length_or_stride(pretrained, tmp_path, frames, stride):
    save_torch_checkpoint(pretrained, tmp_path / "pre.pth")
    model = load_torch_checkpoint(tmp_path / "pre.pth", frames, stride)
    image = torch.tensor(np.array(pretrained.position[...]))[:, 1:].transpose(1, 2).reshape(1, 16, *GRID)
    rows, columns = model.grid
    if columns < GRID[1]:
        begin = GRID[1] // 2 - columns // 2
        image = image[..., begin : begin + columns]
    else:
        image = torch.nn.functional.interpolate(image, (8, columns), mode="bilinear")
    image = torch.nn.functional.interpolate(image, (rows, columns), mode="bilinear").flatten(2).transpose(1, 2)
    np.testing.assert_allclose(model.position[...][:, 1:], image, atol=1e-6)
    np.testing.assert_array_equal(model.position[...][:, :1], pretrained.position[...][:, :1])
    assert jax.eval_shape(model.encode, bank(frames=frames)).shape == (2, 1 + rows * columns, 16)


def test_a_fine_tuned_grid_is_guessed_only_where_it_is_certain(tmp_path):
    certain = drawn(partial(SSAMBA, 8, 2, 96, 10, classes=2, d_state=2))  # 12 x 9
    save_torch_checkpoint(certain, tmp_path / "certain.pth")
    longer = load_torch_checkpoint(tmp_path / "certain.pth", 116, 10)
    assert longer.grid == (12, 11)
    rows = np.asarray(certain.position[...])[0, 1:].reshape(12, 9, 8)
    got = np.asarray(longer.position[...])[0, 1:].reshape(12, 11, 8)
    np.testing.assert_array_equal(got[:, [0, 5, 10]], rows[:, [0, 4, 8]])
    ambiguous = drawn(partial(SSAMBA, 8, 2, 48, 16, classes=2, d_state=2))  # 8 x 3 or 12 x 2
    save_torch_checkpoint(ambiguous, tmp_path / "ambiguous.pth")
    with pytest.raises(ValueError, match=r"ambiguous\.pth: v\.pos_embed has 24 patches.*\(8, 4\)"):
        load_torch_checkpoint(tmp_path / "ambiguous.pth", 64, 16)


def test_export_refuses_a_stride_that_pretraining_lacks(tmp_path):
    model = drawn(partial(SSAMBA, 8, 2, 48, 10, pretraining=True, d_state=2))
    with pytest.raises(ValueError, match=r"x\.pth: stride=\(10, 10\)"):
        save_torch_checkpoint(model, tmp_path / "x.pth")


# ------------------------------------------------------------------------------------------------------- pre-training


def test_masks_are_squares():
    grid = (8, 64)
    draw = jit(ssamba.masked_patches, static_argnums=(1, 2, 3))
    masks = np.asarray(draw(jax.random.key(0), 64, grid, 400))
    assert masks.shape == (64, 400)
    assert (np.diff(masks, axis=1) > 0).all()
    assert masks.min() > 0
    assert masks.max() == 511
    assert len(np.unique(masks, axis=0)) == 64
    # Of a single square, the first patch is a corner and the next ones lie in its row: runs of 3, 4 or 5.
    first = np.asarray(draw(jax.random.key(1), 300, grid, 5))
    inside = first[(first[:, 0] > 1) & (first[:, 0] < 400) & (first[:, -1] - first[:, 0] <= 65)]
    runs = np.array([1 + int(np.argmax(np.diff(row, append=1000) != 1)) for row in inside])
    assert set(runs) == {3, 4, 5}
    assert min(np.bincount(runs)[3:]) > len(runs) / 6
    for row, run in zip(inside, runs, strict=True):
        assert set(row) <= {row[0] + 64 * i + j for i in range(run) for j in range(run)}
    for count in (0, 512):
        with pytest.raises(ValueError, match=f"mask_patches={count}"):
            ssamba.masked_patches(jax.random.key(0), 2, grid, count)


def test_losses_are_the_published_ones(pretrained):
    masked = ssamba.masked_patches(jax.random.key(2), 2, GRID, 11)
    got = jit(ssamba.masked_losses)(pretrained, bank(), masked)
    flags = np.zeros((2, PATCHES), bool)
    np.put_along_axis(flags, np.asarray(masked), True, 1)
    tokens = np.asarray(encode(pretrained, bank(), flags), np.float64)
    patches = np.asarray(pretrained.patches(bank()), np.float64)
    infonce, mse, correct = [], [], []
    for i, patches_of_clip in enumerate(np.asarray(masked)):
        target, seen = patches[i, patches_of_clip], jnp.asarray(tokens[i, 1 + patches_of_clip], jnp.float32)
        scores = target @ np.asarray(pretrained.contrast(seen), np.float64).T
        probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        infonce += [-math.log(probabilities[j, j]) for j in range(11)]
        correct += [probabilities[:, j].argmax() == j for j in range(11)]
        mse.append(((np.asarray(pretrained.reconstruction(seen)) - target) ** 2).mean())
    np.testing.assert_allclose(got, (np.mean(infonce), np.mean(mse), np.mean(correct)), rtol=2e-5)


def test_a_masked_patch_is_unseen(pretrained):
    masked = np.zeros((2, PATCHES), bool)
    masked[:, 7] = True  # row 2, column 1
    one, other = bank(), bank()
    other[:, 16:32, 32:48] += 1
    np.testing.assert_array_equal(encode(pretrained, one, masked), encode(pretrained, other, masked))
    assert np.abs(encode(pretrained, one) - encode(pretrained, other)).max() > 1e-3


def test_pretraining_learns(pretrained):
    graphdef, params, rest = nnx.split(pretrained, nnx.Param, ...)  # type: ignore[misc]

    def loss(params, key):
        losses = ssamba.pretrain_losses(nnx.merge(graphdef, params, rest), bank(), key, 11)
        return losses.infonce + ssamba.RECONSTRUCTION_WEIGHT * losses.mse

    descend = jit(jax.value_and_grad(loss))
    values = []
    for key in jax.random.split(jax.random.key(0), 30):
        value, gradient = descend(params, key)
        params = jax.tree.map(lambda p, g: p - 0.003 * np.asarray(g), params, gradient)
        values.append(value)
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


# ---------------------------------------------------------------------------------------------------------- the bench


def test_bench_measures_equal_work(model):
    """Its gradients are compared above."""
    peer = Peer(model)
    assert worst(encode(model, bank()), peer.encode(bank())) < 1e-5
    before = peer.logits(bank()).detach()
    peer.step(bank(), np.array([0, 2]))
    assert 0 < (peer.logits(bank()) - before).abs().max() < 0.1


@pytest.mark.slow
def test_bench_runs():
    result = ssamba_suite(pairs=1, width=16, depth=2, frames=16, d_state=4)
    assert (result["tokens"], result["encoder"]["pairs"], result["train"]["pairs"]) == (9, 5, 1)
    assert result["encoder"]["floor_s"] > 0
    for part in ("encoder", "train"):
        assert result[part]["ours_s"] > 0
        assert f"{result[part]['ratio']:.2f}x" in ssamba_summary(result)
