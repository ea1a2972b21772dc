"""Scores equal the reference scorers' on the same tokens, and the command line reports them."""

import json
import random

import pytest
from typer.testing import CliRunner

from captioner import MetricError
from captioner.cli import app
from captioner.metrics import evaluate
from captioner.metrics.ptb import tokenize

WORDS = [
    "a",
    "the",
    "dog",
    "man",
    "girl",
    "ball",
    "red",
    "blue",
    "runs",
    "jumps",
    "plays",
    "with",
    "in",
    "on",
    "water",
    "grass",
]


def sentence(rng, words=WORDS):
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 12)))


@pytest.fixture
def captions():
    rng = random.Random(7)
    references = {f"{n}.jpg": [sentence(rng) for _ in range(rng.randint(1, 5))] for n in range(40)}
    predictions = {name: sentence(rng) if n % 5 else texts[0] for n, (name, texts) in enumerate(references.items())}
    return predictions, references


def test_scores_equal_the_reference_scorers(captions):
    scorers = {
        "bleu": pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4),
        "rouge": pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge(),
        "cider": pytest.importorskip("pycocoevalcap.cider.cider").Cider(),
    }
    predictions, references = captions
    found = {name: [" ".join(tokenize(text))] for name, text in predictions.items()}
    truth = {name: [" ".join(tokenize(text)) for text in texts] for name, texts in references.items()}
    scores = evaluate(predictions, references).scores
    bleu, _ = scorers["bleu"].compute_score(truth, found, verbose=0)
    for order, value in enumerate(bleu, start=1):
        assert scores[f"BLEU-{order}"] == pytest.approx(100 * value, abs=1e-7)
    assert scores["ROUGE-L"] == pytest.approx(100 * scorers["rouge"].compute_score(truth, found)[0], abs=1e-7)
    assert scores["CIDEr-D"] == pytest.approx(100 * scorers["cider"].compute_score(truth, found)[0], abs=1e-4)


def test_the_order_of_the_pictures_does_not_matter(captions):
    predictions, references = captions
    turned = dict(reversed(predictions.items()))
    assert evaluate(turned, references).scores == pytest.approx(evaluate(predictions, references).scores)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ('He said "two dogs" -- and left!', "he said two dogs and left"),
        ("A t-shirt, size 12.5; it's $3.", "a t-shirt size 12.5 it 's $ 3"),
    ],
)
def test_words_are_split_as_by_the_penn_treebank(text, tokens):
    assert " ".join(tokenize(text)) == tokens


def test_a_picture_without_a_prediction_is_named(captions):
    predictions, references = captions
    del predictions["7.jpg"]
    with pytest.raises(MetricError, match=r"7\.jpg"):
        evaluate(predictions, references)


def test_the_command_line_gives_the_same_scores(captions, tmp_path):
    predictions, references = captions
    files = tmp_path / "predictions.jsonl", tmp_path / "references.jsonl"
    for path, key, records in zip(files, ("caption", "captions"), (predictions, references), strict=True):
        path.write_text("".join(json.dumps({"image": name, key: value}) + "\n" for name, value in records.items()))
    done = CliRunner().invoke(app, ["evaluate", *map(str, files), "--json"])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    for metric, value in evaluate(predictions, references).scores.items():
        assert scores[metric] == pytest.approx(value)
    files[0].write_text(files[0].read_text().replace("3.jpg", "three.jpg"))
    wrong = CliRunner().invoke(app, ["evaluate", *map(str, files)])
    assert wrong.exit_code == 1
    assert "error: " in wrong.stderr
    assert "Traceback" not in wrong.stderr
