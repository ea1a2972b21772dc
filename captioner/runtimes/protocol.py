"""What a `Captioner` asks of the thing that computes: pixels → grid, and a decoder over that grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captioner.arrays import Array
from captioner.config import ModelConfig
from captioner.decoders.protocol import StepDecoder


class Runtime(Protocol):
    """A model, loaded and ready. Safe to call from many threads.

    Attributes:
        name: "torch", "onnx" or "onnx-int8".
        variant: what features depend on besides the weights: empty, or the checksums of the graphs in 8 bits.
        grid_hw: rows and columns of the grid.
    """

    name: str
    variant: str
    grid_hw: tuple[int, int]

    @property
    def config(self) -> ModelConfig:
        """The settings of the model."""
        ...

    @property
    def decoder(self) -> StepDecoder:
        """The stepwise protocol, over arrays of the runtime's kind."""
        ...

    @property
    def device(self) -> str:
        """Where it computes, such as "cpu" or "cuda:0"."""
        ...

    def encode(self, squares_u8: npt.NDArray[np.uint8]) -> Array:
        """Look at pictures.

        Args:
            squares_u8: [B, 3, side, side], as `captioner.prepared.prepare` makes them.

        Returns:
            grid_BPC, features of the grid cells, row by row; of the runtime's kind, on its device.
        """
        ...

    def strangeness(self, grid_BPC: Array) -> Sequence[float | None]:
        """Return how strange each picture is to the model; None where that was not calibrated."""
        ...

    def weights(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the weights by name, in the order of their names; floating ones as float32."""
        ...
