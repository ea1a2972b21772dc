"""Three decoders behind one protocol, from no attention to many heads.

`mean` (Show and Tell) sees the picture as one fixed-length vector; `additive` (Show, Attend and Tell) as a
learned linear combination of all grid positions, chosen anew for every word; `multihead` (transformer) as
many such combinations at once, with queries, keys and values.
"""

from captioner.decoders.additive import AdditiveDecoder
from captioner.decoders.mean import MeanDecoder
from captioner.decoders.multihead import MultiheadDecoder
from captioner.decoders.protocol import Decoder, DecoderState

__all__ = ["AdditiveDecoder", "Decoder", "DecoderState", "MeanDecoder", "MultiheadDecoder"]
