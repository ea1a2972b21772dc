"""A captioner whose every word points at a known cell of the grid."""

import numpy as np

from captioner import Caption, ImageError, SearchError, SearchOptions, Word
from captioner.geometry import Geometry
from captioner.images import open_picture

GRID_HW = (7, 7)
# Corner, edge and middle cells; the last two words are what a careless page would run or break on.
HOSTILE = ("<b>middle</b>", "`${1+1}`{{x}}")
CELLS = {
    "north-west": (0, 0),
    "east": (3, 6),
    "south": (6, 2),
    HOSTILE[0]: (3, 3),
    HOSTILE[1]: (5, 5),
}


FIRST_READING = ("some", "first", "reading")
LAYERS, HEADS = 2, 3


def head_cell(cell, layer, head):
    """Where a single head looks: never where the summary does."""
    return ((cell[0] + layer + 1) % GRID_HW[0], (cell[1] + head + 1) % GRID_HW[1])


def _map(seed, cell):
    # Uneven everywhere, so that a map which is turned or shifted is another map; the peak stands out all the same.
    weights = 0.5 * np.random.default_rng(seed).random(GRID_HW, dtype=np.float32)
    weights[cell] = 1
    return weights / weights.sum()


def pointing_word(text, cell, probability=0.42):
    heads = [[_map(layer + head, head_cell(cell, layer, head)) for head in range(HEADS)] for layer in range(LAYERS)]
    return Word(
        text=text, probability=probability, attention=_map(len(text), cell), attention_heads=np.array(heads, np.float32)
    )


def pointing_words(texts):
    return tuple(pointing_word(text, CELLS[text]) for text in texts)


class PointingCaptioner:
    """Reads real pictures and real options, and says always the same.

    Args:
        confidence: of every caption.
        gate: called with the picture before each word of a stream and before a caption; it may wait.
    """

    def __init__(self, *, confidence=None, gate=lambda picture: None):
        self.confidence = confidence
        self.gate = gate

    def _caption(self, picture, words, *, number, text, alternatives=()):
        size_hw_px = open_picture(picture).full_hw_px
        return Caption(
            text=text,
            score=-0.5 - number,
            words=words,
            end_probability=0.9,
            finished=number != 3,
            confidence=self.confidence,
            geometry=Geometry(picture_hw_px=size_hw_px, input_hw_px=(224, 224), grid_hw=GRID_HW),
            alternatives=alternatives,
        )

    def open(self, picture, *, name=None, side_px=None):
        return open_picture(picture, name=name, side_px=side_px)

    def caption(self, picture, **options):
        chosen = SearchOptions.from_dict(options)
        self.gate(picture)

        def caption(number, alternatives=()):
            texts = [*CELLS][number - 1 :] + [*CELLS][: number - 1]  # each begins with another word
            text = f"<i>Caption</i> {number}."
            return self._caption(picture, pointing_words(texts), number=number, text=text, alternatives=alternatives)

        return caption(1, tuple(caption(number) for number in range(2, chosen.n_best + 1)))

    def caption_batch(self, pictures, *, on_error="raise", **options):
        for picture in pictures:
            try:
                yield self.caption(picture, **options)
            except ImageError as err:
                if on_error == "raise":
                    raise
                yield err

    def stream(self, picture, **options):
        SearchOptions.from_dict(options)
        for index, text in enumerate(FIRST_READING):
            self.gate(picture)
            yield pointing_word(text, (index, index))

    def score(self, picture, sentence):
        for word in sentence.split():
            if "zebra" in word:
                raise SearchError(f"sentence: this model does not know {word!r}; choose another word")
        words = tuple(pointing_word(text, (1, 5)) for text in sentence.split())
        return self._caption(picture, words, number=6, text=sentence)
