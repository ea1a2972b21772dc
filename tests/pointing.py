"""A captioner whose every word points at a known cell of the grid."""

import numpy as np

from captioner import Caption, SearchOptions, Word
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


def pointing_word(text, cell):
    # Uneven everywhere, so that a map which is turned or shifted is another map; the peak stands out all the same.
    attention = 0.5 * np.random.default_rng(len(text)).random(GRID_HW, dtype=np.float32)
    attention[cell] = 1
    attention /= attention.sum()
    return Word(text=text, probability=0.42, attention=attention, attention_heads=attention[None, None])


class PointingCaptioner:
    """Reads real pictures and real options, and says always the same."""

    def caption(self, picture, **options):
        chosen = SearchOptions.from_dict(options)
        geometry = Geometry(picture_hw_px=open_picture(picture).full_hw_px, input_hw_px=(224, 224), grid_hw=GRID_HW)
        words = tuple(pointing_word(text, cell) for text, cell in CELLS.items())

        def caption(number, alternatives=()):
            return Caption(
                text=f"<i>Caption</i> {number}.",
                score=-0.5 - number,
                words=words,
                end_probability=0.9,
                finished=True,
                geometry=geometry,
                alternatives=alternatives,
            )

        return caption(1, tuple(caption(number) for number in range(2, chosen.n_best + 1)))
