"""Predictions and references are read from every stated format, and what is wrong is named with file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import MetricError
from captioner.metrics import References, read_predictions, read_references

CAPTIONS = {"a.jpg": ["A dog.", "One dog."], "b.jpg": ["A cat."]}
KARPATHY = {
    "images": [
        {
            "filename": name,
            "cocoid": 7 + i,
            "split": "test" if i < 2 else "train",
            "sentences": [{"raw": text, "tokens": []} for text in texts],
        }
        for i, (name, texts) in enumerate([*CAPTIONS.items(), ("c.jpg", ["A cow."])])
    ]
}
COCO = {
    "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(CAPTIONS)],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A dog."},
        {"id": 2, "image_id": 8, "caption": "A cat."},
        {"id": 3, "image_id": 7, "caption": "One dog."},
    ],
}
FLICKR = "a.jpg#0\tA dog.\na.jpg#1\tOne dog.\nb.jpg#0\tA cat.\n"
JSONL = "".join(json.dumps({"image": name, "captions": texts}) + "\n" for name, texts in CAPTIONS.items())
RECORD = {"image": "a.jpg", "caption": "x", "score": -1.0, "words": [], "alternatives": [], "error": None}


@pytest.fixture
def file(tmp_path):
    def write(content, name="file"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("content", [KARPATHY, COCO])
def test_json_references_are_read_however_they_are_indented(file, content, indent):
    references = read_references(file(json.dumps(content, indent=indent)))
    assert dict(references.captions) == CAPTIONS
    assert references.name_of("8") == "b.jpg"


@pytest.mark.parametrize("content", [FLICKR, FLICKR.replace("\n", "\r\n"), JSONL, "\ufeff" + JSONL, JSONL.rstrip()])
def test_line_references_are_read(file, content):
    assert dict(read_references(file(content)).captions) == CAPTIONS


def test_one_line_of_jsonl_is_jsonl(file):
    assert dict(read_references(file({"image": "a", "captions": ["x"]})).captions) == {"a": ["x"]}


def test_coco_annotations_may_come_without_pictures(file):
    assert dict(read_references(file({"annotations": COCO["annotations"]})).captions) == {
        "7": ["A dog.", "One dog."],
        "8": ["A cat."],
    }


def test_the_split_of_karpathy_can_be_chosen_and_is_named(file):
    references = read_references(file(KARPATHY), split="train")
    assert dict(references.captions) == {"c.jpg": ["A cow."]}
    assert "split train" in references.source
    with pytest.raises(MetricError, match="no split 'val'; it has test, train"):
        read_references(file(KARPATHY), split="val")
    with pytest.raises(MetricError, match="has no splits"):
        read_references(file(FLICKR), split="test")


def test_a_list_of_names_leaves_the_others_out(file):
    names = file("b.jpg\n\n", "names.txt")
    references = read_references(file(FLICKR), only=names)
    assert dict(references.captions) == {"b.jpg": ["A cat."]}
    assert "names.txt" in references.source
    with pytest.raises(MetricError, match=r"1 pictures are not in .*\(z\.jpg\)"):
        read_references(file(FLICKR), only=file("z.jpg", "names.txt"))


def test_predictions_are_read_from_records_and_from_coco_results(file):
    references = read_references(file(COCO))
    records = json.dumps(RECORD | {"image": "photos/a.jpg"}) + "\n" + json.dumps({"image": "b.jpg", "caption": "y"})
    assert read_predictions(file(records, "p"), references) == {"a.jpg": "x", "b.jpg": "y"}
    results = [{"image_id": 7, "caption": "x"}, {"image_id": 8, "caption": "y"}]
    assert read_predictions(file(results, "p"), references) == {"a.jpg": "x", "b.jpg": "y"}
    windows = json.dumps(RECORD | {"image": "C:\\photos\\a.jpg"})
    assert read_predictions(file(windows, "p"), references) == {"a.jpg": "x"}


def test_records_with_an_error_are_listed(file):
    records = [
        RECORD | {"error": {"type": "ImageReadError", "message": "b.jpg: damaged"}, "caption": None, "image": "b.jpg"}
    ]
    with pytest.raises(MetricError, match=r"1 records hold an error instead of a caption \(b\.jpg: .*damaged"):
        read_predictions(file("\n".join(map(json.dumps, [RECORD, *records]))), References(CAPTIONS))


def test_a_picture_predicted_twice_is_listed(file):
    twice = [RECORD, RECORD | {"image": "other/a.jpg"}]
    with pytest.raises(MetricError, match=r"1 pictures are predicted twice \(a\.jpg\)"):
        read_predictions(file("\n".join(map(json.dumps, twice))), References(CAPTIONS))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"image": "a", "caption": "x"}\n{"image": "b", "caption": }', r"p:2: not JSON: Expecting value"),
        ('[{"image_id": 1, "caption": "x"},\n{"image_id": 2 "caption": "x"}]', r"p:2: not JSON"),
        ('{"image": "a"}', r"p:1: 'caption' must be text, got None"),
        ('{"caption": "x"}', r"p:1: no 'image'"),
        ('{"image": true, "caption": "x"}', r"p:1: no 'image'"),
        ('\n"text"', r"p:2: expected an object"),
        ('[{"image_id": 1}]', r"p: entry 1: 'caption' must be text"),
        ("[3]", r"p: entry 1: no 'image_id'"),
        ("[" * 100_000, r"p:1: not JSON"),
    ],
)
def test_a_bad_prediction_is_named_with_its_line(file, content, fault):
    with pytest.raises(MetricError, match=fault):
        read_predictions(file(content, "p"), References(CAPTIONS))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "no picture with captions"),
        ("a.jpg\tA dog.\n", r"r:1: no reference line"),
        ("a.jpg#0\tA dog.\nb.jpg#x\tA cat.\n", r"r:2: no reference line"),
        ('{"images": [\n{"filename": "a"\n"split": "test"}]}', r"r:3: not JSON"),
        ('{"images": [{"filename": "a", "split": "test", "sentences": []}]}', r"'sentences' must be a list"),
        ('{"images": [{"filename": "a", "split": "test", "sentences": [{}]}]}', r"'raw' must be text"),
        ('{"annotations": [{"image_id": 3}]}', r"annotation 1: 'caption' must be text"),
        ('{"annotations": []}', r"'annotations' must be a list with at least one entry"),
        ('{"other": 1}', r"'images' must be a list"),
        ('{"image": "a", "captions": []}\n', r"r:1: 'captions' must be a list"),
        ('{"image": "a", "captions": [3]}\n', r"r:1: 'captions' must be texts"),
        ('{"a":' * 100_000, r"r:1: not JSON"),
        (JSONL + JSONL, r"r:3: picture a.jpg comes twice"),
    ],
)
def test_a_bad_reference_is_named_with_its_place(file, content, fault):
    with pytest.raises(MetricError, match=fault):
        read_references(file(content, "r"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    for path, fault in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin", "UTF-8"),
    ):
        with pytest.raises(MetricError, match=fault):
            read_references(path)
        with pytest.raises(MetricError, match=fault):
            read_predictions(path, References(CAPTIONS))


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.text(max_size=20), min_size=1, max_size=3), min_size=1)
)
def test_any_captions_come_back_from_jsonl(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("jsonl") / "file"
    lines = (json.dumps({"image": name, "captions": texts}, ensure_ascii=False) for name, texts in captions.items())
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    assert dict(read_references(path).captions) == captions


@given(st.binary(max_size=60))
def test_any_bytes_are_references_or_an_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(content)
    try:
        assert read_references(path).captions
    except MetricError as error:
        # Whatever the bytes, either references come back or an error that names the file.
        assert str(path) in str(error)  # noqa: PT017
