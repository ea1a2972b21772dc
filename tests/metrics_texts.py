"""Texts for the tests of the metrics, and the reference tools, where they are.

`python tests/metrics_texts.py` records tests/data/metrics_*.json anew; it needs Java and pycocoevalcap.
"""

import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

DATA = Path(__file__).parent / "data"

# What tokenizers disagree on, one piece per blank: generated texts are these, joined with and without blanks.
PIECES = [
    "a",
    "A",
    "the",
    "The",
    "b",
    "C.",
    "c",
    "U.S.",
    "U.S.-U.K.",
    "Mr.",
    "Mrs",
    "dr.",
    "Dr",
    "St.",
    "inc.",
    "Inc.",
    "Co.",
    "co.",
    "ltd",
    "limited",
    "no.",
    "No.",
    "5",
    "12",
    "1999",
    "1,000",
    "3.5",
    "-4",
    "+7",
    "1/2",
    "3/4",
    "½",
    "¼",
    "⅓",
    "10-11-2012",
    "5/6/98",
    "12:30",
    "5pm",
    "5th",
    "'90s",
    "90s",
    "'90",
    "555-1234",
    "(555)",
    "123",
    "4567",
    "800.555.1234",
    "+1",
    "$",
    "$5",
    "US$5",
    "£",
    "£5",
    "€",
    "€10",
    "¢",
    "¥",
    "#",
    "#1",
    "#dog",
    "@user",
    "50%",
    "&",
    "&amp;",
    "AT&T",
    "R&D",
    "&lt;",
    "&gt;",
    "&quot;",
    "&apos;",
    "&nbsp;",
    "&mdash;",
    "caf&eacute;",
    "&#39;",
    "it's",
    "It's",
    "IT'S",
    "don't",
    "Don't",
    "dont",
    "can't",
    "cannot",
    "Cannot",
    "won't",
    "they're",
    "we've",
    "I'm",
    "he'll",
    "y'all",
    "o'clock",
    "O'Neil",
    "d'Artagnan",
    "l'eau",
    "'n'",
    "'em",
    "ol'",
    "Dunkin'",
    "'tis",
    "'twas",
    "gonna",
    "gotta",
    "wanna",
    "lemme",
    "gimme",
    "c'mon",
    "cont'd",
    "ma'am",
    "''",
    "'",
    "``",
    "`",
    '"',
    "“",
    "”",
    "‘",
    "’",
    "don’t",
    "it’s",
    "«",
    "»",
    "‹",
    "›",
    "‚",
    "„",
    "…",
    "...",
    "..",
    "....",
    ".....",
    ".",
    ".",
    "-",
    "--",
    "---",
    "-----",
    "–",
    "—",
    "t-shirt",
    "well-known",
    "mother-in-law",
    "3-year-old",
    "x-ray",
    "e-mail",
    "pre-",
    "pro-life",
    "A-B",
    "a_b",
    "__",
    "http://a.example/b",
    "https://x.example/?q=1&b=2",
    "www.example.com",
    "example.com/x",
    "me@example.com",
    "<me@example.org>",
    "file.txt",
    "photo.jpg",
    "IMG_0001.jpg",
    "a.py,",
    "!",
    ":)",
    ":-)",
    ";)",
    ":D",
    "=)",
    "^_^",
    "<3",
    "<b>",
    "</b>",
    "<br/>",
    "<a",
    'href="x">',
    "<<",
    ">>",
    "<",
    ">",
    "<=",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "-LRB-",
    "*",
    "**",
    "//",
    "/",
    "and/or",
    "w/",
    "24/7",
    "+",
    "c++",
    "C#",
    "=",
    "==",
    "~",
    "^",
    "|",
    "\\",
    "§",
    "©",
    "®",
    "°",
    "²",
    "×",
    "÷",
    "™",
    "•",
    "98°F",
    "😀",
    "🐶",
    "❤",
    "❤️",
    "★",
    "é",
    "naïve",
    "café",
    "Zoë",
    "Москва",
    "東京",
    "한국",
    "العربية",
    "\xad",
    "co\xadop",
    "\u3000",
    "\xa0",
    "?",
    "?!",
    "!!",
    "???",
    ";",
    ":",
    ";;",
    "a.m.",
    "e.g.",
    "i.e.",
    "etc.",
    "vs.",
    "Jan.",
    "Sept.",
    "Ph.D.",
    "fig.",
    "3",
    "pp.",
    "op.",
    "ca.",
    "1900",
    "Yahoo!",
    "'s",
    "s'",
    "n't",
    "'s.",
    "Mt.",
    "ft.",
    "in.",
    "Calif.",
    "Wash.",
    "Ill.",
    "La.",
    "Blvd.",
    "Sr.",
    "jr.",
    "II",
    "IV",
    "y'",
    "7-Eleven",
    "1st",
    "1990's",
    "A's",
    "TV's",
    "dogs'",
    "s**t",
    "a.b",
    "a!b",
    "yes!no",
    "end.Start",
    "M&M's",
    "non-U.S.",
    "1.5-liter",
    "cap'n",
    "nor'easter",
    "dog",
    "man",
    "red",
    "ball",
    "woman",
    "grass",
    "running",
]
JOINTS = [" ", " ", " ", " ", " ", "", "", ".", ",", "-", "'", ". ", ", ", "  ", "/"]

# A small world for whole captions; nothing of it is anybody's data.
SUBJECTS = ["a brown cow", "two painters", "an old tram", "the baker's cat", "a girl in a green hat", "three kites"]
VERBS = ["waits beside", "leans on", "passes", "looks at", "is reflected in", "sleeps under"]
OBJECTS = ["a stone bridge", "the market hall", "a row of poplars", "an empty bench", "a bus-stop", "some wet cobbles"]
ENDS = ["", " at dusk", " in the rain", ", and nobody minds", " -- twice", " near no. 7", " (again)", " for $2.50"]


def texts(seed, count):
    """Texts of the pieces."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        chosen = rng.choices(PIECES, k=rng.randint(1, 9))
        made.append("".join(piece + rng.choice(JOINTS) for piece in chosen))
    return made


def caption(rng):
    """A whole caption of the small world."""
    parts = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS)]
    return (" ".join(parts) + rng.choice(ENDS) + rng.choice(["", ".", " .", "!"])).capitalize()


def captions(seed, pictures):
    """Predictions and references of the small world; each prediction shares words with its references."""
    rng = random.Random(seed)
    references = {f"{i:03}.jpg": [caption(rng) for _ in range(rng.randint(1, 5))] for i in range(pictures)}
    predictions = {
        name: rng.choice([caption(rng), many[0], many[0].rsplit(" ", 2)[0], many[0] + " " + many[0]])
        for name, many in references.items()
    }
    return predictions, references


def lacks_the_jar():
    """Why the Stanford tokenizer cannot run here; None if it can."""
    if shutil.which("java") is None:
        return "no java on the PATH"
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        return "pycocoevalcap is not installed"
    folder = Path(spec.submodule_search_locations[0]) / "tokenizer"
    return None if os.access(folder, os.W_OK) else f"{folder} is read-only, and pycocoevalcap writes its input there"


def jar_tokens(lines):
    """The tokens that coco-caption takes, in one run of the jar; a neutral line keeps neighbours apart."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    spread = [line for text in lines for line in (text, "zz")]
    found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(spread)})
    return [found[2 * i][0].split() for i in range(len(lines))]


def reference_scores(found, truth):
    """What pycocoevalcap says of tokenised captions: the scores, and those per picture."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    res = {i: [" ".join(tokens)] for i, tokens in enumerate(found)}
    gts = {i: [" ".join(tokens) for tokens in many] for i, many in enumerate(truth)}
    bleu, bleu_each = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouge_each = Rouge().compute_score(gts, res)
    cider, cider_each = Cider().compute_score(gts, res)
    return {
        "scores": {**{f"BLEU-{n + 1}": bleu[n] for n in range(4)}, "ROUGE-L": float(rouge), "CIDEr-D": float(cider)},
        "each": {
            **{f"BLEU-{n + 1}": bleu_each[n] for n in range(4)},
            "ROUGE-L": rouge_each.tolist(),
            "CIDEr-D": cider_each.tolist(),
        },
    }


def record():
    """Write the recorded values."""
    from pycocoevalcap.meteor.meteor import Meteor

    lines = texts(seed=1, count=400) + [caption(random.Random(i)) for i in range(60)]
    pairs = [[line, " ".join(tokens)] for line, tokens in zip(lines, jar_tokens(lines), strict=True)]
    (DATA / "metrics_ptb.json").write_text(json.dumps(pairs, ensure_ascii=True, indent=0) + "\n")

    predictions, references = captions(seed=2, pictures=40)
    found = jar_tokens(list(predictions.values()))
    truth = [jar_tokens(many) for many in references.values()]
    values = reference_scores(found, truth)
    gts = {i: [" ".join(tokens) for tokens in many] for i, many in enumerate(truth)}
    res = {i: [" ".join(tokens)] for i, tokens in enumerate(found)}
    values["scores"]["METEOR"] = Meteor().compute_score(gts, res)[0]
    content = {"predictions": predictions, "references": references, **values}
    (DATA / "metrics_scores.json").write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    record()
