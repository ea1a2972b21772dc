"""What captions of a set of photos are like, with and without references."""

import dataclasses
import json

import pytest
from training_runs import command, error_line, write_table

from captioner import Captioner, DataError
from training.survey import survey


@pytest.fixture(scope="module")
def model(tiny_captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_captioner.save(folder)
    return folder


def test_the_figures_are_those_of_the_captions(tiny_captioner, example_photos):
    caption = tiny_captioner.caption(example_photos[0])
    made = [
        dataclasses.replace(caption, text=text, confidence=sure)
        for text, sure in (
            ("A man in a hat.", 0.2),
            ("A man in a hat.", 0.4),
            ("A man is in a hat.", 0.6),
            ("Two dogs run.", 0.8),
        )
    ]
    found = survey(made, failed=1)
    assert (found.pictures, found.failed, found.distinct, found.man_in_a) == (4, 1, 0.75, 0.5)
    assert found.mean_confidence == pytest.approx(0.5)
    assert found.unsure == 0.25
    assert found.vocabulary == len({"a", "man", "in", "hat", "is", "two", "dogs", "run"})
    assert found.openings[0] == ("a man in", 0.5)
    assert survey([dataclasses.replace(caption, confidence=None)]).mean_confidence is None
    with pytest.raises(DataError, match="no picture could be captioned"):
        survey([])


def test_a_folder_is_surveyed_with_its_captions_and_without(model, tmp_path, capsys, monkeypatch):
    from captioner.metrics import java

    monkeypatch.setattr(java, "missing", lambda metric: "left out")
    root = write_table(tmp_path / "data")
    (root / "bad.jpg").write_bytes(b"no picture")
    assert command("survey", root, "--model", model, "-o", tmp_path / "captions.jsonl") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["pictures"], report["failed"]) == (12, 1)
    assert "scores" not in report
    assert "bad.jpg" in err
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    captioner = Captioner.load(model, device="cpu")
    assert records[0]["caption"] == captioner.caption(root / records[0]["image"]).text
    assert command("survey", root, "--model", model, "--captions", root / "captions.csv") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 4  # the dev pictures
    assert "CIDEr-D" in report["scores"]


def test_what_is_no_folder_of_photos_is_named(model, tmp_path, capsys):
    assert command("survey", tmp_path / "nowhere", "--model", model) == 1
    assert "nowhere: no such folder" in error_line(capsys)
    assert command("survey", tmp_path, "--model", model) == 1
    assert "holds no photo" in error_line(capsys)
