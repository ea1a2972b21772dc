"""Texts for the tests of the metrics and for benchmarks/ptb.py, and the reference tools, where they are.

`python tests/metrics_texts.py` records tests/data/metrics_*.json anew; it needs Java and pycocoevalcap.
"""

import importlib.util
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def _pieces(text: str) -> list[str]:
    # Not str.split(): some pieces are blanks of another kind.
    return re.split("[ \n]+", text.strip(" \n"))


# What tokenizers disagree on, by kind. Generated texts are these, joined with and without blanks.
PIECES_OF = {
    "words": _pieces(
        """
        a A the The b c dog man red ball woman grass running . . ? ! ?! !! ??? ; : ;; yes!no end.Start
        """
    ),
    "quotes": _pieces(
        """
        " ' '' ` `` “ ” ‘ ’ ‚ „ ‛ « » ‹ › &quot; &apos; &#39; "hi" 'hi' ``hi'' “hi” ‘hi’ «hi» "No," "Stop!" '"Go"' 'tis"
        "'90s 5'10" dogs' s'
        """
    ),
    "abbreviations": _pieces(
        """
        C. U.S. U.S.-U.K. non-U.S. Mr. Mrs dr. Dr St. inc. Inc. Co. co. ltd limited no. No. 5 a.m. e.g. i.e. etc. vs.
        Jan. Sept. Ph.D. fig. 3 pp. op. ca. 1900 Mt. ft. in. Calif. Wash. Ill. La. Blvd. Sr. jr. II IV a.b a!b Yahoo!
        C.D.s M. D. J. Vitamin The It In
        """
    ),
    "numbers": _pieces(
        """
        5 12 1999 1,000 3.5 -4 +7 1/2 3/4 ½ ¼ ⅓ 10-11-2012 5/6/98 12:30 5pm 5th 1st '90s 90s '90 1990's 24/7 555-1234
        (555) 123 4567 800.555.1234 +1 $ $5 US$5 £ £5 € €10 ¢ ¥ # #1 50% 98°F ² 7-Eleven 1.5-liter 3-year-old 2x4 1,2
        #3. 0.5. 1\u00a01/2 ① ٣
        """
    ),
    "contractions": _pieces(
        """
        it's It's IT'S don't Don't dont can't cannot Cannot won't they're we've I'm he'll y'all o'clock O'Neil
        d'Artagnan l'eau 'n' 'em ol' Dunkin' 'tis 'twas gonna gotta wanna lemme gimme c'mon cont'd ma'am don’t it’s 's
        n't 's. A's TV's dogs' y' cap'n nor'easter shouldn't've it`s doesn&apos;t 'till 'cause rock'n'roll Don'T
        """
    ),
    "hyphens": _pieces(
        """
        - -- --- ----- – — \u2010 \u2011 ― t-shirt well-known mother-in-law 3-year-old x-ray e-mail pre- pro-life A-B
        a_b __ co\u00adop \u00ad black-and-white mid-U.S. 10-15 non-stop. -ish a--b a-b,c and/or w/ his/her-own &mdash;
        """
    ),
    "emoji": _pieces(
        """
        😀 🐶 ❤ ❤\ufe0f ★ 👍\U0001f3fd 👨\u200d👩\u200d👧 \U0001f1eb\U0001f1f7 1\ufe0f\u20e3 ☕ ☺ ☺\ufe0f dog🐶 😀😀
        🏄\u200d♀\ufe0f 🏴\U000e0067\U000e0062\U000e007f :) :-) ;) :D =) ^_^ <3 :( :'( :P
        """
    ),
    "marks": _pieces(
        """
        … ... .. .... ..... & &amp; AT&T R&D M&M's S&AMP;L &lt; &gt; &nbsp; caf&eacute; #dog @user http://a.example/b
        https://x.example/?q=1&b=2 www.example.com example.com/x me@example.com <me@example.org> file.txt photo.jpg
        IMG_0001.jpg a.py, <b> </b> <br/> <a href="x"> << >> < > <= ( ) [ ] { } -LRB- * ** // / s**t + c++ C# = == ~ ^ |
        \\ § © ® ° × ÷ ™ • é naïve café Zoë Москва 東京 한국 العربية ΟΔΟΣ \u3000 \u00a0
        """
    ),
}
PIECES = [piece for pieces in PIECES_OF.values() for piece in pieces]
JOINTS = [" ", " ", " ", " ", " ", "", "", ".", ",", "-", "'", ". ", ", ", "  ", "/"]
# Texts that fuzzing once found to be split otherwise than by the jar, and their like.
FOUND = [
    # An entity in capitals inside capitals.
    "S&AMP;LSED.D",
    "R+DS&AMP;LSMR.",
    "an AT&AMP;T sign, R&AMP;DS&amp;L",
    "AT&AMP; T",
    # Java's final sigma: a word goes on after digits and after a hyphen before letters, and ends before accents of
    # their own.
    "\u039f\u0394\u039f\u03a3-90s \u0391\u03a3'\u0391 \u0391\u03a31,2\u0391 \u0391\u03a31-2\u0391",
    "\u039f\u0394\u039f\u03a3-\u0391\u0392",
    "\u0391\u03a31\u0391 \u0391\u03a3\u02d8\u0391 \u0391\u03a3\ud55c\u0391 \u0391\u03a3\u00ad\u0391",
    "\u0391\u02d8\u03a3 \u03911\u03a3 1\u03a3 \u03a3 \u0391\u4e2d\u03a3 \u00aa\u03a3",
    "http://\u0391\u03a3.\u0391/\u039f\u03a3 x",
]

# A small world for whole captions; nothing of it is anybody's data.
SUBJECTS = ["a brown cow", "two painters", "an old tram", "the baker's cat", "a girl in a green hat", "three kites"]
VERBS = ["waits beside", "leans on", "passes", "looks at", "is reflected in", "sleeps under"]
OBJECTS = ["a stone bridge", "the market hall", "a row of poplars", "an empty bench", "a bus-stop", "some wet cobbles"]
ENDS = ["", " at dusk", " in the rain", ", and nobody minds", " -- twice", " near no. 7", " (again)", " for $2.50"]


def caption(rng: random.Random) -> str:
    """A whole caption of the small world."""
    parts = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS)]
    return (" ".join(parts) + rng.choice(ENDS) + rng.choice(["", ".", " .", "!"])).capitalize()


def captions(seed: int, pictures: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions and references of the small world; each prediction shares words with its references."""
    rng = random.Random(seed)
    references = {f"{i:03}.jpg": [caption(rng) for _ in range(rng.randint(1, 5))] for i in range(pictures)}
    predictions = {
        name: rng.choice([caption(rng), many[0], many[0].rsplit(" ", 2)[0], many[0] + " " + many[0]])
        for name, many in references.items()
    }
    return predictions, references


def texts(seed: int, count: int) -> list[str]:
    """Texts of the pieces."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        chosen = rng.choices(PIECES, k=rng.randint(1, 9))
        made.append("".join(piece + rng.choice(JOINTS) for piece in chosen))
    return made


def sentences(kind: str, seed: int, count: int) -> list[str]:
    """Captions of the small world with pieces of one kind among their words."""
    rng = random.Random(f"{kind} {seed}")
    made = []
    for _ in range(count):
        words = caption(rng).split(" ")
        for _ in range(rng.randint(1, 4)):
            words.insert(rng.randint(0, len(words)), rng.choice(PIECES_OF[kind]))
        joints = [rng.choice(JOINTS) if rng.random() < 0.3 else " " for _ in words]
        made.append("".join(word + joint for word, joint in zip(words, joints, strict=True)))
    return made


# Characters to fuzz with; no halves of a pair, which have no UTF-8, and no line breaks, which part captions there.
ASCII = [chr(i) for i in range(32, 127)]
PUNCTUATION = [char for char in ASCII if not char.isalnum()]
UNICODE = [chr(i) for i in range(1, 0x110000) if not 0xD800 <= i < 0xE000 and chr(i) not in "\n\r\v\f\u2028\u2029"]
UNICODE_16 = [char for char in UNICODE if ord(char) < 0x10000]


def mutated(captions: list[str], alphabet: list[str], seed: int, count: int) -> list[str]:
    """Captions with 1 to 4 characters put in, replaced or taken away."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        chars = list(rng.choice(captions))
        for _ in range(rng.randint(1, 4)):
            place = rng.randint(0, len(chars))
            taken = rng.choice([0, 0, 0, 1])
            chars[place : place + taken] = rng.choices(alphabet, k=rng.choice([0, 1, 1, 1]))
        made.append("".join(chars))
    return made


def random_texts(alphabet: list[str], seed: int, count: int) -> list[str]:
    """Texts of up to 30 characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]


def lacks_the_jar() -> str | None:
    """Why the Stanford tokenizer cannot run here; None if it can."""
    if shutil.which("java") is None:
        return "no java on the PATH"
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return "pycocoevalcap is not installed"
    folder = Path(spec.submodule_search_locations[0]) / "tokenizer"
    return None if os.access(folder, os.W_OK) else f"{folder} is read-only, and pycocoevalcap writes its input there"


def jar_tokens(lines: list[str], *, apart: bool = True) -> list[list[str]]:
    """The tokens that coco-caption takes, in one run of the jar; apart: with a neutral line between neighbours."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    every = 2 if apart else 1
    spread = [part for line in lines for part in (line, "zz")[:every]]
    found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(spread)})
    return [found[every * i][0].split() for i in range(len(lines))]


def words(tokens: list[str]) -> list[str]:
    """Tokens as coco-caption's scorers read them: at any white space, so that a no-break space parts a token."""
    return " ".join(tokens).split()


def reference_scores(found: list[list[str]], truth: list[list[list[str]]]) -> dict[str, dict[str, Any]]:
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


def record() -> None:
    """Write the recorded values."""
    from pycocoevalcap.meteor.meteor import Meteor

    lines = [*FOUND, *texts(seed=1, count=400), *(caption(random.Random(i)) for i in range(60))]
    lines += [line for kind in PIECES_OF for line in sentences(kind, seed=1, count=40)]
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
