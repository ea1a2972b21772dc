"""Laws of depthwise convolutions that learn in float32: the same network, and nothing else of it changes."""

import copy

import pytest
import torch
from torch import nn

from captioner.encoder import Encoder
from training.depthwise import learn_depthwise_in_float32


def gradients(encoder, pixels, *, bfloat16):
    encoder.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        grid = encoder(pixels)
    grid.float().square().mean().backward()
    return grid.detach().float(), {name: value.grad.clone() for name, value in encoder.named_parameters()}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(backbone="mobilenet_v3_small", side_px=64).train()


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_in_float32_nothing_changes(encoder, pixels):
    changed = copy.deepcopy(encoder)
    learn_depthwise_in_float32(changed)
    assert changed.state_dict().keys() == encoder.state_dict().keys()
    expected, found = (gradients(each, pixels, bfloat16=False) for each in (encoder, changed))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def test_depthwise_convolutions_alone_are_changed(encoder):
    before = {name: type(module) for name, module in encoder.named_modules()}
    learn_depthwise_in_float32(encoder)
    changed = {name for name, module in encoder.named_modules() if type(module) is not before[name]}
    depthwise = {
        name for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    assert changed == depthwise != set()
    assert all(isinstance(encoder.get_submodule(name), nn.Conv2d) for name in changed)


def test_with_autocast_they_compute_in_float32_while_they_learn(encoder, pixels):
    learn_depthwise_in_float32(encoder)
    seen = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, given, result: seen.append((module.groups > 1, result.dtype)))
    gradients(encoder, pixels, bfloat16=True)
    assert set(seen) == {(True, torch.float32), (False, torch.bfloat16)}
    seen.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(pixels)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}


def test_gradients_with_autocast_are_as_near_to_float32_as_before(encoder, pixels):
    changed = copy.deepcopy(encoder)
    learn_depthwise_in_float32(changed)
    _, exact = gradients(encoder, pixels, bfloat16=False)

    def error(network):
        _, found = gradients(network, pixels, bfloat16=True)
        return sum(float((found[name] - value).norm() / (value.norm() + 1e-12)) for name, value in exact.items())

    assert error(changed) < 1.2 * error(encoder)


def test_a_copy_has_weights_of_its_own(encoder, pixels):
    learn_depthwise_in_float32(encoder)
    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        for value in encoder.parameters():
            value.zero_()
    assert all(value.abs().sum() > 0 for name, value in copied.named_parameters() if name.endswith("0.weight"))
    grid, _ = gradients(copied, pixels, bfloat16=True)
    assert grid.abs().sum() > 0
