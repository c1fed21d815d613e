"""The image nets: against the same nets in PyTorch under the published names, with padding, over devices, trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_train import lines_of
from torch import nn

from pcgjax import predict
from pcgjax.models import image
from pcgjax.models.image import ImageClassifier, load_imagenet
from pcgjax.models.imagenet import _STEMS, _positions
from pcgjax.tasks.base import split_model
from pcgjax.training.answers import load_model
from pcgjax.training.loop import train

RNG = np.random.default_rng(0)
F, T = 45, 70  # pixels, odd at one or another of the strides
SIZES = {"resnet": (4, (2, 1, 1, 1)), "mobilenet_v3": (0.5, 3), "vit": (128, 2)}
# Of each kind of MobileNetV3's blocks one: kernel, expanded, out, squeeze and excite, hard swish, stride.
KINDS = ((3, 16, 16, False, False, 1), (5, 72, 40, True, False, 2), (3, 80, 40, False, True, 1))


@pytest.fixture
def few_kinds(monkeypatch):
    monkeypatch.setattr(image, "MOBILENET", KINDS)


def compiled(function):
    """Quicker than `jax.jit` for what runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def make(name, n_mels=F, frames=T, blocks=None):
    """A model as after some training; drawn here, since a first value of each shape takes long to compile."""
    width, published = SIZES[name]
    model = nnx.eval_shape(lambda: ImageClassifier(name, n_mels, frames, width, blocks or published, rngs=nnx.Rngs(0)))
    drawn = []
    for place, variable in nnx.to_flat_state(nnx.state(model)):
        positive = place[-1] in ("scale", "var")
        value = RNG.uniform(0.7, 1.3, variable.shape) if positive else RNG.normal(0, 0.1, variable.shape)
        drawn.append((place, variable.replace(jnp.asarray(value, jnp.float32))))
    nnx.update(model, nnx.from_flat_state(drawn))
    return model


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# --------------------------------------------------------------------------------- the same nets, in PyTorch's modules


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(h)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                layers.append(Bottleneck(inputs, width << stage, 2 if stage and not i else 1))
                inputs = 4 * (width << stage)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, 1000)  # not ours

    def forward(self, x):
        h = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(h)))).mean((2, 3))


def conv_norm(inputs, outputs, act, size=1, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, 1e-3, 0.01), act())


class Squeeze(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class Inverted(nn.Module):
    def __init__(self, inputs, expanded, outputs, size, stride, excite, swish):
        super().__init__()
        act = nn.Hardswish if swish else nn.ReLU
        layers = [conv_norm(inputs, expanded, act)] if expanded != inputs else []
        layers.append(conv_norm(expanded, expanded, act, size, stride, expanded))
        layers += [Squeeze(expanded, eighths(expanded // 4))] if excite else []
        self.block = nn.Sequential(*layers, conv_norm(expanded, outputs, nn.Identity))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return self.block(x) + x if self.residual else self.block(x)


def eighths(channels):
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 * (rounded < 0.9 * channels)


class MobileNetV3(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        outputs = eighths(16 * width)
        layers = [conv_norm(3, outputs, nn.Hardswish, 3, 2)]
        for size, expanded, out, excite, swish, stride in KINDS[:blocks]:
            inputs, outputs = outputs, eighths(out * width)
            layers.append(Inverted(inputs, eighths(expanded * width), outputs, size, stride, excite, swish))
        self.features = nn.Sequential(*layers, conv_norm(outputs, 6 * outputs, nn.Hardswish))
        last = eighths(1280 * width)
        self.classifier = nn.Sequential(
            nn.Linear(6 * outputs, last), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(last, 1000)
        )

    def forward(self, x):
        return self.classifier[:2](self.features(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        heads = (y.unflatten(-1, (-1, 64)).transpose(1, 2) for y in self.attn["qkv"](self.norm1(x)).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](h)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width, blocks, patches=9):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks, self.norm = nn.Sequential(*map(Block, [width] * blocks)), nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x):
        h = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos_embed
        return self.norm(self.blocks(h)[:, 0])


def make_oracle(name):
    torch.manual_seed(0)
    net = {"resnet": ResNet, "mobilenet_v3": MobileNetV3, "vit": ViT}[name](*SIZES[name])
    with torch.no_grad():  # as after some training
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
    return net


def on_paper(model, train_):
    """A pure (params, rest, x, mask) -> features, running averages of the model's trunk."""
    graphdef = split_model(model.trunk)[0]

    def answer(params, rest, x, mask):
        trunk = nnx.merge(graphdef, params, rest)
        return trunk(x, mask, train_, image.one_share), split_model(trunk)[2]

    return answer


def assert_near(values, expected, tolerance=1e-3):
    values, expected = np.asarray(values), np.asarray(expected)
    np.testing.assert_allclose(values, expected, atol=tolerance * max(np.abs(expected).max(), 1e-2), rtol=0)


@pytest.mark.usefixtures("few_kinds")
@pytest.mark.parametrize("name", image.NETS)
def test_net_equals_pytorch_s(name, tmp_path):
    """Features, their gradients and running averages, with weights through a file."""
    f, t = (48, 48) if name == "vit" else (F, T)
    net, model = make_oracle(name), make(name, f, t)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    load_imagenet(model, tmp_path / "net.pth")
    x, weights = RNG.random((3, f, t), np.float32), normal(3, model.trunk.outputs)
    scaled = 2 * x - 1 if name == "vit" else (x - 0.449) / 0.226
    picture = torch.tensor(scaled)[:, None].repeat(1, 3, 1, 1)
    _, params, rest = split_model(model.trunk)
    ones = jnp.ones((3, t))
    with torch.no_grad():
        assert_near(compiled(on_paper(model, False))(params, rest, x, ones)[0], net.eval()(picture), 1e-5)

    def loss(params):
        h, after = on_paper(model, True)(params, rest, x, ones)
        return (h * weights).sum(), (h, after)

    grads, (h, after) = compiled(jax.grad(loss, has_aux=True))(params)
    features = net.train()(picture)
    (features * torch.tensor(np.asarray(weights))).sum().backward()
    assert_near(h, features.detach())
    # Their gradients go the weights' way, through a file; a channel of the stem has a third of ours.
    state = net.state_dict() | {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    stem = next(key for key in _STEMS if key in state)
    torch.save(state | {stem: state[stem] / 3}, tmp_path / "gradients.pth")
    wanted, averages = split_model(load_imagenet(model, tmp_path / "gradients.pth").trunk)[1:]
    for (_, ours), expected in zip(leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert_near(ours, expected)  # a bias that the next batch norm takes off has none
    for (place, ours), expected in zip(leaves(after), jax.tree.leaves(averages), strict=True):
        # PyTorch's variance is the unbiased one: up to a sixth more in the last layers, a tenth of which counts.
        assert_near(ours, expected, 1e-4 if place.endswith("['mean']") else 0.03)


def leaves(tree):
    return [(jax.tree_util.keystr(place), x) for place, x in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    ("size", "stride", "depthwise"),
    [(1, 2, False), (3, 1, False), (7, 2, False), (3, 2, True), (5, 1, True), (5, 2, True)],
)
def test_convolution_equals_the_library_s(size, stride, depthwise):
    conv = image.Conv(4, 4 if depthwise else 5, size, stride, depthwise, rngs=nnx.Rngs(0))
    graphdef, params, rest = split_model(conv)

    def library(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (stride, stride), [(size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4 if depthwise else 1,
        )  # fmt: skip

    def answer(function):
        def loss(params, x):
            y = function(params, x)
            return jnp.sin(y).sum(), y

        return compiled(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    x = normal(2, 7, 10, 4)
    ours, theirs = answer(lambda params, x: nnx.merge(graphdef, params, rest)(x)), answer(library)
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-5), ours, theirs)


@pytest.mark.parametrize(
    ("name", "sizes", "count"),
    [
        ("resnet", (64, (3, 4, 6, 3)), 25_557_032 - 1000 * 2049 - 2 * 64 * 49),
        ("mobilenet_v3", (1.0, 15), 5_483_032 - 1000 * 1281 - 2 * 16 * 9),
        ("vit", (384, 12), 22_050_664 - 1000 * 385 - (2 * 256 + 196 - 8 * 16) * 384),
    ],
)
def test_published_sizes(name, sizes, count):
    """As torchvision and timm count them, but for the head, two of the stem's channels, and the positions."""
    model = nnx.eval_shape(lambda: ImageClassifier(name, 128, 251, *sizes, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model.trunk, nnx.Param))) == count


# ---------------------------------------------------------------------------------------------- padding and devices


@pytest.mark.usefixtures("few_kinds")
@pytest.mark.parametrize("name", ["mobilenet_v3", "vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_padding_changes_nothing(name):
    """Clips with 37 frames of 70 real give what their 37 frames alone give; a row without a clip is not there."""
    model, short = make(name), make(name, F, 37)
    state = nnx.state(model)
    if name == "vit":  # the positions of the first three of five columns
        table = model.trunk.pos_embed[...]
        columns = table[0, 1:].reshape(3, 5, -1)[:, :3].reshape(1, 9, -1)
        state["trunk"]["pos_embed"] = state["trunk"]["pos_embed"].replace(jnp.concatenate([table[:, :1], columns], 1))
    nnx.update(short, state)
    x = jnp.asarray(RNG.random((4, F, T)), jnp.float32)
    mask = jnp.broadcast_to(jnp.arange(T) < 37, (4, T)).at[3].set(False).astype(jnp.float32)
    answer, (_, params, rest) = compiled(on_paper(model, True)), split_model(model.trunk)
    padded, averages = answer(params, rest, jnp.where(mask[:, None] > 0, x, 0), mask)
    alone, expected = compiled(on_paper(short, True))(*split_model(short.trunk)[1:], x[:3, :, :37], jnp.ones((3, 37)))
    assert_near(padded[:3], alone, 1e-4)
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-4), averages, expected)
    whole, _ = answer(params, rest, x, jnp.ones((4, T)))
    assert np.abs(whole[:3] - alone).max() > 1e-3


@pytest.mark.usefixtures("few_kinds")
def test_batch_norm_of_shares_is_that_of_the_whole():
    model = make("mobilenet_v3", 20, 30, 2)
    x = jnp.asarray(RNG.random((4, 20, 30)), jnp.float32)
    mask = jnp.asarray(np.arange(30) < np.array([[30], [17], [30], [0]]), jnp.float32)
    graphdef, params, rest = split_model(model)

    def logits(params, x, mask, total):
        return nnx.merge(graphdef, params, rest)(x, mask, jax.random.key(0), total)

    def shares(params):
        def each(x, mask):
            return logits(params, x, mask, lambda x: jax.lax.psum(x, "groups"))

        return jnp.sin(jax.vmap(each, axis_name="groups")(x.reshape(2, 2, 20, 30), mask.reshape(2, 2, 30))).sum()

    def together(params):
        return jnp.sin(logits(params, x, mask, image.one_share)).sum()

    (whole, expected), (value, grads) = (compiled(jax.value_and_grad(f))(params) for f in (together, shares))
    assert float(value) == pytest.approx(float(whole), rel=1e-4, abs=1e-5)
    jax.tree.map(lambda a, b: assert_near(a, b, 2e-3), grads, expected)


def test_dropout_is_of_training_only():
    model, x, mask = make("vit", 16, 16, 1), jnp.asarray(RNG.random((2, 16, 16)), jnp.float32), jnp.ones((2, 16))
    evaluated, without_dropout = compiled(lambda: (model(x, mask, dropout=0.5), model(x, mask)))()
    np.testing.assert_array_equal(evaluated, without_dropout)
    dropped = compiled(lambda key: model(x, mask, key, dropout=0.5))
    assert np.abs(dropped(jax.random.key(0)) - dropped(jax.random.key(1))).max() > 1e-3


# ------------------------------------------------------------------------------------------------------ files


def test_positions_are_interpolated_as_images_are():
    torch.manual_seed(0)
    table = torch.randn(1, 1 + 36, 8)
    grid = table[:, 1:].reshape(1, 6, 6, 8).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, (3, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    positions = _positions(table.numpy(), (3, 8))
    assert_near(positions[:, 1:], wanted.reshape(1, 24, 8), 1e-5)
    np.testing.assert_array_equal(positions[:, :1], table[:, :1])


def test_safetensors_in_bfloat16_and_a_grey_stem(tmp_path):
    from safetensors.torch import save_file

    state = {
        name: x.bfloat16() if x.is_floating_point() else x for name, x in make_oracle("resnet").state_dict().items()
    }
    save_file(state, tmp_path / "net.safetensors")
    model = load_imagenet(make("resnet"), tmp_path / "net.safetensors")
    np.testing.assert_array_equal(model.trunk.bn1.scale[...], state["bn1.weight"].float())
    state["conv1.weight"] = state["conv1.weight"].float().sum(1, keepdim=True)
    save_file(state, tmp_path / "grey.safetensors")
    grey = load_imagenet(make("resnet"), tmp_path / "grey.safetensors")
    # R6: parameters, wrapped; a NaN.
    torch.save({"model": {f"module.{k}": torch.nn.Parameter(x, False) for k, x in state.items()}}, tmp_path / "a.pth")
    again = load_imagenet(make("resnet"), tmp_path / "a.pth")
    np.testing.assert_array_equal(again.trunk.conv1.kernel[...], grey.trunk.conv1.kernel[...])
    state["bn1.bias"][0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors: bn1\.bias holds a NaN or an infinity"):
        load_imagenet(make("resnet"), tmp_path / "nan.safetensors")
    assert_near(grey.trunk.conv1.kernel[...], model.trunk.conv1.kernel[...], 1e-6)


@pytest.mark.usefixtures("few_kinds")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resnet", lambda s: s.pop("layer2.0.conv3.weight"), r"net.pth: missing layer2.0.conv3.weight; model.name"),
        ("resnet", lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
        ("resnet", lambda s: s.update({"bn1.bias": torch.zeros(5)}), r"bn1.bias has shape \(5,\), which is not this"),
        ("resnet", lambda s: s.update({"conv1.weight": torch.zeros(4)}), r"conv1.weight has shape \(4,\)"),
        ("vit", lambda s: s.update(pos_embed=torch.zeros(1, 9, 128)), r"pos_embed has shape \(1, 9, 128\)"),
        ("mobilenet_v3", lambda s: s.clear() or s.update(a=torch.zeros(1)), r"missing .*; and \d+ more; model.name"),
        ("vit", lambda s: s.clear() or s.update(a=[1]), "'a' is not an array"),
    ],
)
def test_another_file_is_refused(name, change, message, tmp_path):
    state = make_oracle(name).state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=message):
        load_imagenet(make(name), tmp_path / "net.pth")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"net.safetensors: not a .safetensors file"):
        load_imagenet(make("vit"), tmp_path / "net.safetensors")
    with pytest.raises(FileNotFoundError):
        load_imagenet(make("vit"), tmp_path / "no.safetensors")


# ------------------------------------------------------------------------------------------------------ trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("vit", {}), ("resnet50", {}), ("mobilenet_v3", {"model.bfloat16": True, "train.remat": "full"})],
    ids=["vit", "resnet50", "mobilenet_v3"],
)
def test_trains_and_is_judged(name, changes, make_config, tmp_path):
    results = train(make_config(changes, name), tmp_path)
    losses = [line["loss"] for line in lines_of(tmp_path) if line["split"] == "train"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert results["test"]["recordings"] > 0
    rows = [row.split(",") for row in (tmp_path / "predictions.csv").read_text().splitlines()[1:]]
    answered = predict.predict(str(tmp_path), [rows[0][8]], str(tmp_path / "answers.csv"))
    assert float(answered[0]["probability"]) == pytest.approx(float(rows[0][5]), abs=2e-2 if changes else 1e-3)


@pytest.mark.slow
def test_training_starts_from_a_file(make_config, tmp_path):
    torch.manual_seed(0)
    net = ViT(64, 1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    changes = {"model.checkpoint": str(tmp_path / "net.pth"), "model.blocks": 1, "train.epochs": 1}
    train(make_config({**changes, "optimizer.learning_rate": 1e-9}, "vit"), tmp_path / "run")
    trunk = load_model(tmp_path / "run")[3]["trunk"]
    assert_near(trunk["cls_token"], net.cls_token.detach(), 1e-5)
    with pytest.raises(ValueError, match=r"net.pth: missing blocks.1.*model.blocks must be the file's"):
        train(make_config({**changes, "model.blocks": 2}, "vit"), tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"model.name": "swin"}, "model.name='swin': choose one of resnet, mobilenet_v3, vit"),
        ("vit", {"model.width": 100}, "model.width=100: must be a multiple of 64"),
        ("vit", {"model.blocks": (3, 4)}, r"model.blocks=\(3, 4\): must be a whole number"),
        ("vit", {"model.dropout": 1.0}, "model.dropout=1.0"),
        ("vit", {"features.hop": 2000}, "features.window_s=1.0: 1000 samples are too few for features.hop=2000$"),
        ("resnet50", {"model.blocks": 50}, "model.blocks=50: must be a tuple"),
        ("resnet50", {"model.width": 0.5}, "model.width=0.5: must be a whole number"),
        ("mobilenet_v3", {"model.blocks": 16}, "model.blocks=16: must be at most 15"),
        ("mobilenet_v3", {"model.width": 0}, r"model.width=0(.0)?: must be above 0"),
    ],
    ids=str,
)
def test_bad_config_names_the_field(name, changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(make_config(changes, name), tmp_path)
