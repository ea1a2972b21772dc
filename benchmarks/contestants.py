"""Who runs against whom: Captioner, Hugging Face's `generate`, and the encoder alone in ONNX Runtime.

Shapes: B pictures, S side of the model's square, P grid cells.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.figure import Settings
from captioner import Captioner
from captioner.config import ModelConfig, MultiheadConfig
from captioner.model import build_model
from captioner.model_folder import BUNDLED, ENCODER_GRAPH

WORDS = 12
"""Of a caption, where all contestants write as many: `min_words` and `max_words` of ours, new tokens of theirs."""
FORCED: dict[str, Any] = {"method": "beam", "beam_size": 3, "min_words": WORDS, "max_words": WORDS}


def missing(*packages: str) -> str | None:
    """Return what to say of the first package that is not installed; None when all are."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install -e '.[bench]'"
    return None


# --- Captioner ---


def load_captioner(settings: Settings, *, device: str = "cpu") -> Captioner:
    """Load the model that is measured.

    Args:
        settings: which, and how it runs.
        device: where.

    Returns:
        The captioner.
    """
    torch.set_num_threads(settings.threads)
    return Captioner.load(settings.model, device=device, runtime=settings.runtime, threads=settings.threads)


def model_folder(settings: Settings) -> Path:
    """Return the folder of the model; one from the hub has none here."""
    return BUNDLED if settings.model is None else Path(settings.model)


# --- Hugging Face: the encoder in torch, and `generate` of BART's decoder ---


class HuggingFaceCaptioner:
    """What one writes with torch and transformers: CNN features, a projection, `generate` with beams.

    The weights are random, as they do not change the time: every caption has the same number of tokens. What
    generate gives are ids: no sentence, no probability, no map.

    Args:
        config: of the model it stands beside; the sizes are the same.
        device: where.
        dtype: of the weights.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import BartConfig, BartForConditionalGeneration

        sizes = config.decoder_settings
        if not isinstance(sizes, MultiheadConfig):
            raise SystemExit(f"the baseline is a transformer; this model's decoder is {config.decoder!r}")
        self._preprocessing = config.preprocessing
        self._device, self._dtype = torch.device(device), dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Our model's encoder before anything is folded: its layers as they come.
            encoder = build_model(config).encoder
            project = nn.Linear(encoder.feature_dim, sizes.dim)
            bart = BartForConditionalGeneration(
                BartConfig(
                    vocab_size=config.vocabulary_size,
                    d_model=sizes.dim,
                    encoder_layers=1,  # never run: the grid takes its place
                    encoder_attention_heads=sizes.heads,
                    encoder_ffn_dim=sizes.feedforward_dim,
                    decoder_layers=sizes.layers,
                    decoder_attention_heads=sizes.heads,
                    decoder_ffn_dim=sizes.feedforward_dim,
                    max_position_embeddings=config.max_tokens,
                    forced_eos_token_id=None,
                )
            )
        self._encoder = encoder.eval().to(device, dtype).to(memory_format=torch.channels_last)
        self._project = project.eval().to(device, dtype)
        self._bart: Any = bart.train(False).to(device, dtype)

    def square(self, path: Path) -> Tensor:
        """Open a file as one does with PIL and torch; uint8 [3, S, S]."""
        side_px = self._preprocessing.side_px
        image = Image.open(path).convert("RGB").resize((side_px, side_px), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    def from_squares(self, squares_u8: Tensor, *, beams: int = 3, tokens: int = WORDS) -> Tensor:
        """Caption decoded pictures.

        Args:
            squares_u8: uint8 [B, 3, S, S], anywhere.
            beams: number of them.
            tokens: of every caption.

        Returns:
            int64 [B, tokens and the start], on the CPU.
        """
        from transformers.modeling_outputs import BaseModelOutput

        mean, std = (
            torch.tensor(values, device=self._device).view(1, 3, 1, 1)
            for values in (self._preprocessing.mean, self._preprocessing.std)
        )
        with torch.inference_mode():
            pixels = (squares_u8.to(self._device, non_blocking=True).float() / 255 - mean) / std
            grid_BPC = self._encoder(pixels.to(self._dtype).contiguous(memory_format=torch.channels_last))
            ids: Tensor = self._bart.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._project(grid_BPC)),
                num_beams=beams,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        return ids.cpu()

    def from_files(self, paths: Sequence[Path], *, batch_size: int = 32) -> list[Tensor]:
        """Caption files, batch after batch."""
        batches = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
        return [self.from_squares(torch.stack([self.square(path) for path in batch])) for batch in batches]


DIFFERENCES = (
    f"both write {WORDS} words with 3 beams. Ours takes one step more, which scores the end, repeats no pair of words "
    "if the model's search options say so, and gives sentence, probabilities, scores and maps; generate gives ids "
    "alone",
    "the baseline decodes one file after the other, the whole of it; ours those of a batch side by side, and lets "
    "libjpeg decode at half the side",
    "the baseline's batch norms are not folded; its weights are random",
)


# --- ONNX Runtime: the encoder alone ---


def onnx_session(path: Path, *, threads: int, spinning_between: bool = True) -> Any:
    """Open an ONNX file on the CPU.

    Args:
        path: of the file.
        threads: within an operator.
        spinning_between: whether threads keep asking for work between two runs too, as they do by default: best
            while nothing else runs. Captioner's do not.

    Returns:
        The session.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "0" if spinning_between else "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def encoder_alone(path: Path, *, batch: int, side_px: int, threads: int) -> Callable[[], object]:
    """Return how to run an encoder on a batch in memory.

    Args:
        path: of an encoder with one input, pictures [B, 3, S, S], float32 or uint8.
        batch: number of pictures.
        side_px: of the pictures.
        threads: of ONNX Runtime.

    Returns:
        What runs it once.
    """
    session = onnx_session(path, threads=threads)
    (pixels,) = session.get_inputs()
    dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[pixels.type]
    batch_B3SS = (np.random.default_rng(0).random((batch, 3, side_px, side_px)) * 255).astype(dtype)
    if dtype == np.float32:
        batch_B3SS = batch_B3SS / np.float32(127.5) - 1
    return lambda: session.run(None, {pixels.name: batch_B3SS})


def encoder_file(settings: Settings, config: ModelConfig, folder: Path) -> tuple[Path, str]:
    """Return an ONNX file of the model's encoder: the model's own, or else one that is exported now.

    Args:
        settings: which model.
        config: of the model.
        folder: for the export.

    Returns:
        The file, and where it is from.
    """
    own = model_folder(settings) / ENCODER_GRAPH
    if own.is_file():
        return own, f"{ENCODER_GRAPH} of the model's folder, from 8-bit pixels"
    side_px, path = config.preprocessing.side_px, folder / "encoder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs a package more
        torch.onnx.export(
            build_model(config).encoder.eval(),
            (torch.zeros(2, 3, side_px, side_px),),
            path,
            input_names=["pixels"],
            output_names=["grid"],
            dynamic_axes={"pixels": {0: "pictures"}, "grid": {0: "pictures"}},
            dynamo=False,
        )
    return path, f"torchvision's {config.encoder.backbone}, exported for this run"
