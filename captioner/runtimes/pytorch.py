"""PyTorch: the reference, for training and for GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captioner.config import ModelConfig
from captioner.decoders.protocol import StepDecoder
from captioner.errors import ConfigError
from captioner.model import CaptionModel
from captioner.preprocessing import normalise
from captioner.threads import checked_threads


class TorchRuntime:
    """A model in PyTorch; see `Runtime`.

    Args:
        model: taken as it is, to the device and into evaluation mode.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        threads: of the CPU, for the whole process, as PyTorch has one pool; None leaves them as they are.

    Raises:
        ConfigError: for a device that is not there, or an impossible number of threads.
    """

    name = "torch"
    variant = ""

    def __init__(self, model: CaptionModel, *, device: str = "auto", threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(checked_threads(threads))
        self._device = find_device(device)
        self.model = model.to(self._device).eval()
        self.grid_hw = model.encoder.grid_hw
        # As it is in use: convolutions are up to twice as fast with channels last, and without batch norms.
        self._encoder = model.encoder.folded().to(memory_format=torch.channels_last)

    @property
    def config(self) -> ModelConfig:
        """The settings of the model."""
        return self.model.config

    @property
    def decoder(self) -> StepDecoder:
        """The live decoder of the model."""
        return self.model.decoder

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self._device)

    def encode(self, squares_u8: npt.NDArray[np.uint8]) -> Tensor:
        """Look at pictures; see `Runtime.encode`."""
        pixels_u8 = torch.from_numpy(squares_u8).to(self._device)
        with torch.inference_mode():
            pixels = normalise(pixels_u8, self.config.preprocessing)
            grid_BPC: Tensor = self._encoder(pixels.contiguous(memory_format=torch.channels_last))
        return grid_BPC

    def strangeness(self, grid_BPC: Tensor) -> Sequence[float | None]:
        """Return how strange each picture is to the model; see `Runtime.strangeness`."""
        if self.model.familiarity is None:
            return [None] * len(grid_BPC)
        with torch.inference_mode():
            found: list[float | None] = self.model.familiarity(grid_BPC).tolist()
        return found

    def weights(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the weights; see `Runtime.weights`."""
        for name, value in sorted(self.model.state_dict().items()):
            stored = value.detach().cpu().contiguous()
            yield name, (stored.float() if stored.is_floating_point() else stored).numpy()


def find_device(name: str) -> torch.device:
    """Return a device by its name.

    Args:
        name: "auto" is a GPU if there is one.

    Returns:
        The device.

    Raises:
        ConfigError: when it is not there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without storage, such as "meta", fails here
    except Exception as err:  # every backend that is missing says so in its own way
        raise ConfigError(f"device {name!r} is not there; use 'auto', 'cpu' or a GPU of this machine") from err
    return device
