"""Figure 3: what maps, probabilities and scores cost over captions alone.

Captioner has no switch that turns maps off, so captions alone are made here: the same encoder and the same search over
a decoder that has no maps to give, and of what the search finds nothing is kept but the sentence. In PyTorch that
decoder is a copy whose attention over the grid is PyTorch's fused one, which never holds the weights; in ONNX Runtime
its step is the same graph without the outputs for maps and what only they need. Beam search needs the words'
probabilities itself.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from benchmarks.contestants import FORCED, load_captioner, missing, model_folder, onnx_session
from benchmarks.figure import Figure, Settings, Value, cpu_ratio_of, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import take_turns
from captioner import Captioner
from captioner.api import search_vocabulary
from captioner.attention import MultiHeadAttention
from captioner.decoders import MultiheadDecoder
from captioner.model_folder import STEP_GRAPH, WEIGHTS
from captioner.prepared import PreparedPicture
from captioner.search import search

TITLE = "3. Maps, probabilities and scores over captions alone"
BATCH = 32


class MaplessAttention(MultiHeadAttention):
    """Attention that reads the same and returns weights of no cells."""

    def read(self, queries: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        """Read the grid with PyTorch's fused attention; see `MultiHeadAttention.read`."""
        query = queries.view(memory.keys.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)
        read = functional.scaled_dot_product_attention(query, memory.keys, memory.values)
        return read.transpose(1, 2).reshape(queries.shape), query.new_empty(*query.shape[:3], 0)


def torch_without_maps(decoder: MultiheadDecoder) -> MultiheadDecoder:
    """Return a copy of a decoder that writes the same words and returns maps of no cells.

    Args:
        decoder: in evaluation mode; it is not changed.

    Returns:
        The copy.
    """
    copied = copy.deepcopy(decoder)
    for module in copied.modules():
        if isinstance(module, MultiHeadAttention):
            module.__class__ = MaplessAttention
    return copied


def onnx_without_maps(decoder: Any, folder: Path, *, threads: int) -> Any:
    """Return the decoder of ONNX Runtime with a step that has no maps.

    Args:
        decoder: of a captioner; it is not changed.
        folder: of its model.
        threads: of ONNX Runtime.

    Returns:
        A decoder that writes the same words and returns maps of no cells.
    """
    import onnx

    model = onnx.load(folder / STEP_GRAPH, load_external_data=False)
    kept = [output for output in model.graph.output if output.name not in ("attention", "heads")]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(folder / WEIGHTS, name)  # where the graph looks for its weights
        onnx.save(model, Path(name, STEP_GRAPH))
        session = onnx_session(Path(name, STEP_GRAPH), threads=threads, spinning_between=False)

    def step(feed: dict[str, Any]) -> list[Any]:
        log_probs_NV, *new = session.run(None, feed)
        rows = len(log_probs_NV)
        return [log_probs_NV, np.empty((rows, 0), np.float32), np.empty((rows, 1, 1, 0), np.float32), *new]

    copied = copy.copy(decoder)
    copied._step = step
    return copied


class CaptionsAlone:
    """Sentences and nothing else, from the parts of a captioner.

    Args:
        captioner: whose model it is.
        settings: how it was loaded.
    """

    def __init__(self, captioner: Captioner, settings: Settings) -> None:
        self._runtime, self._tokenizer = captioner.runtime, captioner.tokenizer
        decoder: Any = captioner.runtime.decoder
        if captioner.runtime.name != "torch":
            self._decoder = onnx_without_maps(decoder, model_folder(settings), threads=settings.threads)
        else:
            self._decoder = torch_without_maps(decoder)
        self._vocabulary = search_vocabulary(captioner.tokenizer)
        self._options = captioner.search_options(**FORCED)

    def __call__(self, pictures: Sequence[PreparedPicture]) -> list[str]:
        """Write the sentences of decoded pictures."""
        grid_BPC = self._runtime.encode(np.stack([picture.pixels_u8 for picture in pictures]))
        found = search(self._decoder, grid_BPC, vocabulary=self._vocabulary, options=self._options)
        return [self._tokenizer.sentence(best.token_ids) for best, *_ in found]


def measure(settings: Settings) -> Figure:
    """Measure the share of the time that captions with everything take over captions alone.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    captioner = load_captioner(settings)
    absent = None if captioner.config.decoder == "multihead" else "only the transformer is known without maps here"
    absent = absent or (missing("onnx") if captioner.runtime.name != "torch" else None)
    if absent:
        return Figure(title=TITLE, absent=absent)
    alone = CaptionsAlone(captioner, settings)
    batch = settings.pick(BATCH, 2)
    with photo_files(batch) as photos:
        pictures = [captioner.prepare(photo) for photo in photos]
        one = pictures[:1]
        texts = [caption.text for caption in captioner.caption_batch(pictures, **FORCED)]  # type: ignore[union-attr]
        differ = sum(text != other for text, other in zip(texts, alone(pictures), strict=True))
        how: dict[str, Any] = {"repetitions": settings.pick(15, 1), "least_s": 0.0 if settings.quick else 0.3}
        # Each size by itself, so that one picture does not come after another's batch.
        series = take_turns(
            {
                f"captions alone, batches of {batch}": lambda: alone(pictures),
                f"all of it, batches of {batch}": lambda: list(captioner.caption_batch(pictures, **FORCED)),
            },
            **how,
        ) | take_turns(
            {
                "captions alone, one picture": lambda: alone(one),
                "all of it, one picture": lambda: captioner.caption(one[0], **FORCED),
            },
            **how,
        )
    sizes = (f"batches of {batch}", "one picture")
    cost, cpu_cost = (
        {size: 100 * (ratio(series, f"all of it, {size}", f"captions alone, {size}") - 1) for size in sizes}
        for ratio in (ratio_of, cpu_ratio_of)
    )
    return Figure(
        title=TITLE,
        values=(
            *(Value(name=f"cost, {size}", value=cost[size], unit="%", most=10) for size in sizes),
            *(Value(name=f"cost by processor time, {size}", value=cpu_cost[size], unit="%") for size in sizes),
        ),
        series=series,
        notes=(
            f"runtime {captioner.runtime.name}, 12 words, 3 beams",
            "from decoded pictures, which makes the share larger than it is from files",
            f"{differ} of {batch} sentences differ between the two",
        ),
    )
