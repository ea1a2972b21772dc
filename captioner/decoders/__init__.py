"""Three decoders behind one protocol, from no attention to many heads.

`mean` (Show and Tell) sees the picture as one fixed-length vector; `additive` (Show, Attend and Tell) as a
learned linear combination of all grid positions, chosen anew for every word; `multihead` (transformer) as
many such combinations at once, with queries, keys and values.
"""

from typing import TYPE_CHECKING, Any

from captioner.decoders.protocol import Decoder, DecoderState, StepDecoder

if TYPE_CHECKING:
    from captioner.decoders.additive import AdditiveDecoder
    from captioner.decoders.mean import MeanDecoder
    from captioner.decoders.multihead import MultiheadDecoder

__all__ = ["AdditiveDecoder", "Decoder", "DecoderState", "MeanDecoder", "MultiheadDecoder", "StepDecoder"]

# These are torch modules, which come in when they are first asked for: a search on other decoders needs no torch.
_LATER = {
    "AdditiveDecoder": "captioner.decoders.additive",
    "MeanDecoder": "captioner.decoders.mean",
    "MultiheadDecoder": "captioner.decoders.multihead",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value
