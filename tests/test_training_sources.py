"""Every format of training data is read alike, and what is wrong is named with its place."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from captioner import ConfigError, DataError
from training.sources import FORMATS, BadPicture, CaptionedPicture, DataSource, data_hash, read_source

TRAIN = {"a.jpg": ["A dog runs.", "A brown dog."], "b.jpg": ["A cat sits."], "d.jpg": ["Two men, talking."]}
DEV = {"c.jpg": ["A red ball."]}
TEST = {"e.jpg": ["A blue car."]}
ALL = {"train": TRAIN, "dev": DEV, "test": TEST}


def write_pictures(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path, "JPEG")


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- Writers: one set of pictures in each format, and the source that names it ---


def write_flickr8k(root):
    for split, pictures in ALL.items():
        write_pictures(root / "Images", pictures)
        write_text(root / f"Flickr_8k.{split}Images.txt", "\n".join(pictures) + "\n")
    lines = [f"{name}#{k}\t{text}" for of in ALL.values() for name, texts in of.items() for k, text in enumerate(texts)]
    write_text(root / "Flickr8k.token.txt", "\n".join([*lines, "spare.jpg.1#0\tNot in a list."]) + "\n")
    return DataSource(root=str(root), format="flickr8k")


def karpathy_content():
    names = {"a.jpg": "train", "b.jpg": "restval", "d.jpg": "train", "c.jpg": "val", "e.jpg": "test"}
    captions = TRAIN | DEV | TEST
    return {
        "images": [
            {
                "filename": name,
                "filepath": f"{split}2014",
                "split": split,
                "cocoid": number,
                "sentences": [{"raw": text, "tokens": []} for text in captions[name]],
            }
            for number, (name, split) in enumerate(names.items())
        ]
    }


def write_karpathy(root):
    content = karpathy_content()
    for image in content["images"]:
        write_pictures(root / "photos" / image["filepath"], [image["filename"]])
    write_text(root / "dataset_coco.json", json.dumps(content))
    return DataSource(root=str(root), format="karpathy", annotations="dataset_coco.json", images="photos")


def coco_content(pictures, first_id):
    images = [{"id": first_id + k, "file_name": name} for k, name in enumerate(pictures)]
    annotations = [
        {"id": 10 * image["id"] + k, "image_id": image["id"], "caption": text}
        for image in images
        for k, text in enumerate(pictures[image["file_name"]])
    ]
    return {"images": images, "annotations": annotations[::2] + annotations[1::2]}


def write_coco(root):
    for split, name, pictures in (("train", "train2017", TRAIN), ("val", "val2017", DEV)):
        write_pictures(root / name, pictures)
        content = coco_content(pictures, 100 if split == "train" else 200)
        write_text(root / "annotations" / f"captions_{name}.json", json.dumps(content))
    return DataSource(root=str(root), format="coco")


def table_rows():
    names = {"train": "train", "dev": "val", "test": "test"}
    return [
        {"image": name, "caption": text, "split": names[split]}
        for split, pictures in ALL.items()
        for name, texts in pictures.items()
        for text in texts
    ]


def csv_text(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def write_csv(root):
    write_pictures(root, TRAIN | DEV | TEST)
    write_text(root / "captions.csv", csv_text(table_rows()))
    return DataSource(root=str(root))


def write_jsonl(root):
    write_pictures(root, TRAIN | DEV | TEST)
    write_text(root / "captions.jsonl", "\n".join(map(json.dumps, table_rows())))
    return DataSource(root=str(root))


def write_jsonl_lists(root):
    write_pictures(root / "photos", TRAIN | DEV | TEST)
    rows = [{"file": name, "captions": texts, "part": split} for split, of in ALL.items() for name, texts in of.items()]
    write_text(root / "texts.jsonl", "\n".join(map(json.dumps, rows)))
    return DataSource(
        root=str(root), annotations="texts.jsonl", images="photos", image_column="file", split_column="part"
    )


WRITERS = [write_flickr8k, write_karpathy, write_coco, write_csv, write_jsonl, write_jsonl_lists]


def captions_of(content):
    return {split: {p.name: list(p.captions) for p in pictures} for split, pictures in content.pictures.items()}


# --- All formats ---


@pytest.mark.parametrize("write", WRITERS)
def test_one_data_set_reads_the_same_from_every_format(tmp_path, write):
    content = read_source(write(tmp_path))
    expected = {split: pictures for split, pictures in ALL.items() if write is not write_coco or split != "test"}
    assert captions_of(content) == expected
    assert list(content.pictures) == list(expected)
    assert content.missing == []
    assert all(picture.path.is_file() for pictures in content.pictures.values() for picture in pictures)


@pytest.mark.parametrize("write", WRITERS)
def test_a_missing_file_is_reported_and_left_out(tmp_path, write):
    source = write(tmp_path)
    gone = next(tmp_path.rglob("b.jpg"))
    gone.unlink()
    content = read_source(source)
    assert [bad.name for bad in content.missing] == ["b.jpg"]
    assert str(gone) in content.missing[0].message
    assert list(captions_of(content)["train"]) == ["a.jpg", "d.jpg"]
    assert captions_of(content)["dev"] == DEV


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("pictures", [TRAIN, DEV])
def test_a_split_without_a_usable_picture_is_an_error(tmp_path, write, pictures):
    source = write(tmp_path)
    for name in pictures:
        next(tmp_path.rglob(name)).unlink()
    with pytest.raises(DataError, match=rf"none of the {len(pictures)} pictures of split '(train|dev)' can be used"):
        read_source(source)


@pytest.mark.parametrize("write", WRITERS)
def test_a_list_or_table_that_is_missing_or_no_text_is_named(tmp_path, write):
    source = write(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".txt")]:
        if path.name == "Flickr_8k.testImages.txt":
            continue
        content = path.read_bytes()
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match=re.escape(path.name)):
            read_source(source)
        path.unlink()
        with pytest.raises(DataError, match=re.escape(path.name)):
            read_source(source)
        path.write_bytes(content)
    assert read_source(source).pictures


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name != "shards"])
def test_a_root_that_is_no_folder_is_named(tmp_path, format_name):
    annotations = "x.json" if format_name == "karpathy" else None
    for root in (tmp_path / "none", write_text(tmp_path / "file", "x")):
        with pytest.raises(DataError, match=re.escape(f"{root}: no such folder")):
            read_source(DataSource(root=str(root), format=format_name, annotations=annotations))


# --- Flickr8k ---


def test_the_test_list_of_flickr8k_is_optional(tmp_path):
    source = write_flickr8k(tmp_path)
    (tmp_path / "Flickr_8k.testImages.txt").unlink()
    assert captions_of(read_source(source)) == {"train": TRAIN, "dev": DEV}


@pytest.mark.parametrize("line", ["a.jpg#0 no tab", "a.jpg\tno number", "#", "a.jpg#x\tA dog ."])
def test_a_malformed_line_of_flickr8k_is_named(tmp_path, line):
    source = write_flickr8k(tmp_path)
    path = write_text(tmp_path / "Flickr8k.token.txt", f"a.jpg#0\tA dog .\n{line}\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ")):
        read_source(source)


def test_a_picture_without_a_caption_is_reported(tmp_path):
    source = write_flickr8k(tmp_path)
    path = tmp_path / "Flickr8k.token.txt"
    write_text(path, "".join(line for line in path.open() if not line.startswith("b.jpg#")) + "d.jpg#2\t \n")
    assert [(bad.name, bad.message) for bad in read_source(source).missing] == [
        ("b.jpg", "b.jpg: has no caption; add one, or leave it out"),
        ("d.jpg", "d.jpg: has an empty caption; fill or remove it"),
    ]


@pytest.mark.parametrize(("split", "name"), [("dev", "a.jpg"), ("train", "b.jpg")])
def test_a_picture_in_two_lists_or_twice_in_one_is_refused(tmp_path, split, name):
    source = write_flickr8k(tmp_path)
    with (tmp_path / f"Flickr_8k.{split}Images.txt").open("a") as file:
        file.write(f"{name}\n")
    with pytest.raises(DataError, match=f"come twice: {name} in train and {split}"):
        read_source(source)


def test_an_empty_list_is_refused(tmp_path):
    source = write_flickr8k(tmp_path)
    write_text(tmp_path / "Flickr_8k.devImages.txt", "\n\n")
    with pytest.raises(DataError, match="'dev' has no picture"):
        read_source(source)


# --- Karpathy and COCO ---


def test_karpathy_without_folders_takes_the_root(tmp_path):
    content = karpathy_content()
    for image in content["images"]:
        del image["filepath"], image["cocoid"]
    write_pictures(tmp_path, TRAIN | DEV | TEST)
    write_text(tmp_path / "dataset_flickr8k.json", json.dumps(content))
    source = DataSource(root=str(tmp_path), format="karpathy", annotations="dataset_flickr8k.json")
    assert captions_of(read_source(source)) == ALL


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda images: images[0].update(split="dev2"), r"a\.jpg: unknown split 'dev2'"),
        (lambda images: images[0].pop("split"), "image 1: 'split' must be text"),
        (lambda images: images[1].update(filename="a.jpg"), r"come twice: a\.jpg"),
        (lambda images: images[1].update(sentences=[]), "image 2: 'sentences' must be a list with at least one"),
        (lambda images: images[1].update(sentences=[{"tokens": []}]), "image 2: 'raw' must be text"),
        (lambda images: images[1].update(filepath=3), "image 2: 'filepath' must be text"),
        (lambda images: images.__setitem__(1, 3), "image 2: no 'filename'"),
        (lambda images: images.pop(3), "split 'dev' has no picture"),
        (lambda images: images.clear(), "'images' must be a list with at least one"),
    ],
)
def test_a_fault_of_karpathys_json_is_named(tmp_path, change, fault):
    source = write_karpathy(tmp_path)
    content = karpathy_content()
    change(content["images"])
    write_text(tmp_path / "dataset_coco.json", json.dumps(content))
    with pytest.raises(DataError, match=fault):
        read_source(source)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c["annotations"].append({"image_id": 7, "caption": "x"}), "'images' does not name: ids 7"),
        (lambda c: c["images"].append({"id": 100, "file_name": "z.jpg"}), r"id 100 is of two files, a\.jpg and z\.jpg"),
        (lambda c: c["images"].append({"id": 7, "file_name": "a.jpg"}), r"come twice: a\.jpg"),
        (lambda c: c["images"].append({"id": 7, "file_name": "c.jpg"}), r"come twice: c\.jpg in train and dev"),
        (lambda c: c["annotations"][0].pop("caption"), "annotation 1: 'caption' must be text"),
        (lambda c: c["images"].clear(), "no 'images'"),
        (lambda c: c["annotations"].clear(), "'annotations' must be a list with at least one"),
        (lambda c: c.update(images=3), "'images' must be a list"),
    ],
)
def test_a_fault_of_cocos_json_is_named(tmp_path, change, fault):
    source = write_coco(tmp_path)
    content = coco_content(TRAIN, 100)
    change(content)
    write_text(tmp_path / "annotations" / "captions_train2017.json", json.dumps(content))
    with pytest.raises(DataError, match=fault):
        read_source(source)


def test_files_and_folders_of_coco_can_be_elsewhere(tmp_path):
    write_coco(tmp_path / "data")
    (tmp_path / "data" / "train2017").rename(tmp_path / "photos")
    (tmp_path / "data" / "annotations" / "captions_train2017.json").rename(tmp_path / "train.json")
    source = DataSource(
        root=str(tmp_path / "data"),
        format="coco",
        train_annotations="../train.json",
        train_images=str(tmp_path / "photos"),
    )
    assert captions_of(read_source(source)) == {"train": TRAIN, "dev": DEV}


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{}", "[1", "{" * 9])
@pytest.mark.parametrize("write", [write_karpathy, write_coco])
def test_another_json_is_refused(tmp_path, write, content):
    source = write(tmp_path)
    path = next(tmp_path.rglob("*.json"))
    write_text(path, content)
    with pytest.raises(DataError, match=re.escape(path.name)):
        read_source(source)


# --- Tables ---


def table(root, text, name="captions.csv", pictures=("a.jpg", "b.jpg"), **options):
    write_pictures(root, pictures)
    write_text(root / name, text)
    return DataSource(root=str(root), **options)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,caption\na.jpg,A dog\n", r"csv:2: no column 'image'; there are file, caption; .* with image_column"),
        ("image,text\na.jpg,A dog\n", r"csv:2: no column 'caption'; there are image, text; .* with caption_column"),
        ("image;caption\na.jpg;A dog\n", r"no column 'image'; there are image;caption"),
        ("image,caption\na.jpg,A dog, running\n", r"csv:2: 3 values for 2 columns"),
        ("image,caption\na.jpg,A dog\n\nb.jpg\n", r"csv:4: 1 values for 2 columns"),
        ('image,caption\na.jpg,"A\ndog"\nb.jpg,\n', r"csv:4: 'caption' must be text and not empty"),
        ("image,caption\n ,A dog\n", r"csv:2: 'image' must be text and not empty"),
        ('image,caption\na.jpg,"A dog\n', r"csv:2: not comma-separated values"),
        ('image,caption\na.jpg,"A" dog\n', r"csv:2: not comma-separated values"),
        ("image,caption,image\na.jpg,A dog,b.jpg\n", r"csv:1: two columns of one name"),
        ("image,caption\n", "no row below the names"),
        ("", "no row below the names"),
        ("image,caption,split\na.jpg,A dog,train\nb.jpg,A cat,devel\n", r"csv:3: unknown split 'devel'"),
        ("image,caption,split\na.jpg,A dog,train\na.jpg,A cat,val\n", r"csv:3: a\.jpg is in split 'train' further up"),
        ("image,caption,split\na.jpg,A dog,train\n./a.jpg,A cat,val\n", r"csv:3: a\.jpg is in split 'train'"),
        ("image,caption,split\na.jpg,A dog,train\nb.jpg,A dog,train\n", "split 'dev' has no picture"),
        ("image,caption\na.jpg,A dog\n", "only one usable picture"),
        ("image,caption\nx.jpg,A dog\ny.jpg,A cat\n", r"none of the 2 pictures .*x\.jpg: no such file"),
    ],
)
def test_a_fault_of_a_csv_is_named_with_its_line(tmp_path, text, fault):
    with pytest.raises(DataError, match=fault):
        read_source(table(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", r"jsonl:2: not JSON"),
        ("[]", r"jsonl:2: expected an object"),
        ('{"image": "b.jpg"}', r"jsonl:2: no column 'caption'; there are image"),
        ('{"image": 3, "caption": "A cat"}', r"jsonl:2: 'image' must be text"),
        ('{"image": "b.jpg", "caption": null}', r"jsonl:2: 'caption' must be text"),
        ('{"image": "b.jpg", "captions": []}', r"jsonl:2: 'captions' is an empty list"),
        ('{"image": "b.jpg", "captions": ["A cat", ""]}', r"jsonl:2: 'captions' must be text and not empty"),
        ('{"image": "b.jpg", "captions": [3]}', r"jsonl:2: 'captions' must be text"),
    ],
)
def test_a_fault_of_a_jsonl_is_named_with_its_line(tmp_path, line, fault):
    text = '{"image": "a.jpg", "caption": "A dog"}\n' + line
    with pytest.raises(DataError, match=fault):
        read_source(table(tmp_path, text, "captions.jsonl"))


def test_columns_are_named_by_option(tmp_path):
    text = "id,photo,English,usage\n1,a.jpg,A dog,train\n2,b.jpg,A cat,validation\n"
    columns = {"image_column": "photo", "caption_column": "English", "split_column": "usage"}
    content = read_source(table(tmp_path, text, "captions.txt", annotations="captions.txt", **columns))
    assert captions_of(content) == {"train": {"a.jpg": ["A dog"]}, "dev": {"b.jpg": ["A cat"]}}
    with pytest.raises(DataError, match="no column 'language'; there are id, photo, English, usage"):
        read_source(table(tmp_path, text, annotations="captions.txt", image_column="photo", caption_column="language"))


def test_a_table_is_chosen_when_there_are_two_or_none(tmp_path):
    with pytest.raises(DataError, match=r"neither captions\.csv nor captions\.jsonl"):
        read_source(DataSource(root=str(tmp_path)))
    write_jsonl(tmp_path)
    write_csv(tmp_path)
    with pytest.raises(DataError, match=r"both captions\.csv and captions\.jsonl"):
        read_source(DataSource(root=str(tmp_path)))
    assert captions_of(read_source(DataSource(root=str(tmp_path), annotations="captions.jsonl"))) == ALL


def test_a_share_and_a_column_of_splits_exclude_each_other(tmp_path):
    source = write_csv(tmp_path)
    with pytest.raises(DataError, match="has a column 'split', and dev_share is set"):
        read_source(replace(source, dev_share=0.2))
    with pytest.raises(ConfigError, match="exclude each other"):
        replace(source, dev_share=0.2, split_column="split")


def test_one_file_has_one_name_however_it_is_written(tmp_path):
    root = tmp_path / "data"
    names = ["a.jpg", "./a.jpg", str(root / "a.jpg"), "sub/../a.jpg", "../out.jpg", "b.jpg"]
    write_pictures(tmp_path, ["out.jpg"])
    text = csv_text([{"image": name, "caption": f"Caption {k}."} for k, name in enumerate(names)])
    content = read_source(table(root, text))
    found = {name: texts for of in captions_of(content).values() for name, texts in of.items()}
    assert found == {
        "a.jpg": [f"Caption {k}." for k in range(4)],
        "../out.jpg": ["Caption 4."],
        "b.jpg": ["Caption 5."],
    }


def test_a_table_from_a_spreadsheet_is_read(tmp_path):
    text = '\ufeffimage,caption\r\na.jpg,"A dog, a ""cat""\r\nand a man"\r\nb.jpg, Zwei Männer \r\n'
    content = read_source(table(tmp_path, text))
    found = {name: texts for of in captions_of(content).values() for name, texts in of.items()}
    assert found == {"a.jpg": ['A dog, a "cat"\nand a man'], "b.jpg": ["Zwei Männer"]}


# --- The share that becomes dev ---


def split_of_table(root, names, **options):
    write_text(root / "captions.csv", csv_text([{"image": name, "caption": "A dog."} for name in names]))
    content = read_source(DataSource(root=str(root), **options))
    return {split: {picture.name for picture in pictures} for split, pictures in content.pictures.items()}


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    write_pictures(root, [f"{k}.jpg" for k in range(400)])
    return root


@given(st.sets(st.integers(0, 399), min_size=2), st.sampled_from([0.05, 0.1, 0.5, 0.9]))
def test_both_splits_have_a_picture_and_each_picture_one_split(many_pictures, numbers, share):
    names = {f"{k}.jpg" for k in numbers}
    found = split_of_table(many_pictures, names, dev_share=share)
    assert found["train"]
    assert found["dev"]
    assert found["train"] | found["dev"] == names
    assert not found["train"] & found["dev"]


@given(st.sets(st.integers(0, 399), min_size=200, max_size=300), st.sets(st.integers(0, 399)))
def test_a_picture_stays_in_its_split_when_others_are_added(many_pictures, before, added):
    first = split_of_table(many_pictures, [f"{k}.jpg" for k in sorted(before)])
    second = split_of_table(many_pictures, [f"{k}.jpg" for k in sorted(before | added, reverse=True)])
    assert first["train"] <= second["train"]
    assert first["dev"] <= second["dev"]


@pytest.mark.parametrize("share", [None, 0.1, 0.3, 0.6])
def test_the_share_of_dev_is_about_what_was_asked_for(many_pictures, share):
    found = split_of_table(many_pictures, [f"{k}.jpg" for k in range(400)], dev_share=share)
    assert len(found["dev"]) / 400 == pytest.approx(share or 0.1, abs=0.06)


def test_a_missing_picture_does_not_take_the_only_place_in_dev(many_pictures):
    names = ["1.jpg", "2.jpg", "3.jpg"]
    chosen = split_of_table(many_pictures, [*names, "x.jpg"], dev_share=1e-9)
    assert chosen == split_of_table(many_pictures, names, dev_share=1e-9)
    assert len(chosen["dev"]) == 1


# --- Settings ---


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"format": "pickle"}, "format must be one of flickr8k, karpathy, coco, table, shards, got 'pickle'"),
        ({"root": ""}, "root must be text and not empty"),
        ({"root": 3}, "root must be text"),
        ({"root": "a\0b"}, "root must be text"),
        ({"format": "karpathy"}, "karpathy needs annotations"),
        ({"format": "karpathy", "annotations": "x", "image_column": "image"}, "image_column is an option of .*table"),
        ({"format": "coco", "images": "x"}, "images is an option of format flickr8k and karpathy and table, not of"),
        ({"format": "flickr8k", "dev_share": 0.1}, "dev_share is an option of format table"),
        ({"train_shards": "x.tar"}, "train_shards is an option of format shards, not of table"),
        ({"format": "shards", "train_shards": "x.tar"}, "shards needs dev_shards"),
        ({"dev_share": 0.0}, "dev_share must be above 0 and below 1"),
        ({"dev_share": float("nan")}, "dev_share must be above 0"),
        ({"dev_share": True}, "dev_share must be above 0"),
        ({"dev_share": "0.1"}, "dev_share must be above 0"),
        ({"image_column": "caption"}, "must differ"),
        ({"caption_column": "x", "split_column": "x"}, "must differ"),
        ({"caption_column": " "}, "caption_column must be text and not empty"),
        ({"format": "shards", "train_shards": "a", "dev_shards": "b", "shuffle_buffer": 0}, "shuffle_buffer must be"),
    ],
)
def test_impossible_settings_are_refused(options, fault):
    with pytest.raises(ConfigError, match=fault):
        DataSource(**{"root": "x"} | options)


def test_shards_are_not_read_at_once(tmp_path):
    with pytest.raises(ConfigError, match="streamed"):
        read_source(DataSource(root=str(tmp_path), format="shards", train_shards="a", dev_shards="b"))


@pytest.mark.filterwarnings("ignore:(?si).*deprecat")  # jsonargparse renames its methods
def test_settings_come_from_yaml(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=DataSource)
    path = write_text(tmp_path / "x.yaml", "root: photos\nformat: table\ndev_share: 0.2\nimage_column: file\n")
    found = parser.instantiate_classes(parser.parse_args([f"--source={path}"])).source
    assert found == DataSource(root="photos", dev_share=0.2, image_column="file")


# --- Hash ---

a_picture = st.builds(
    CaptionedPicture,
    name=st.text("ab\n\0,", max_size=3),
    path=st.just(Path("x")),
    captions=st.lists(st.text('ab\n\0,"', max_size=3), max_size=3).map(tuple),
)
data_sets = st.dictionaries(st.sampled_from(["train", "dev"]), st.lists(a_picture, max_size=3))


@given(data_sets, data_sets)
def test_two_data_sets_have_one_hash_only_if_they_are_equal(first, second):
    def rows(data):
        return [(split, picture.name, picture.captions) for split, of in data.items() for picture in of]

    assert (data_hash(first) == data_hash(second)) == (rows(first) == rows(second))


def test_the_hash_does_not_depend_on_where_the_pictures_are(tmp_path):
    hashes = {data_hash(read_source(write_csv(tmp_path / name)).pictures) for name in ("one", "two")}
    assert len(hashes) == 1
    assert hashes == {data_hash(read_source(write_flickr8k(tmp_path / "three")).pictures)}


# --- Whatever the bytes ---


@given(st.binary(max_size=80) | st.text('image,captionsplt"\n{}[]:\\ud80a.jpg', max_size=120).map(str.encode))
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "annotations.json"])
def test_any_bytes_are_data_or_an_error_of_ours(tmp_path_factory, name, content):
    root = tmp_path_factory.mktemp("bytes")
    (root / name).write_bytes(content)
    options = {"format": "karpathy"} if name.endswith(".json") else {}
    try:
        found = read_source(DataSource(root=str(root), annotations=name, **options))
    except DataError as error:
        assert str(root) in str(error)  # noqa: PT017 - either data comes back, or an error that names it
    else:
        assert found.pictures["train"]


def test_a_name_that_no_file_can_have_is_a_missing_picture(tmp_path):
    names = ["\ud800.jpg", "a\0.jpg", "x" * 5000, "a.jpg", "b.jpg"]
    text = "\n".join(json.dumps({"image": name, "caption": "A dog."}) for name in names)
    content = read_source(table(tmp_path, text, "captions.jsonl"))
    assert [bad.name for bad in content.missing] == [r"\ud800.jpg", r"a\x00.jpg", f"{'x' * 200}...{'x' * 80}"]
    assert all(isinstance(bad, BadPicture) and bad.message.isprintable() for bad in content.missing)


def test_of_few_pictures_a_quarter_or_five_is_dev(many_pictures):
    for count, dev in ((2, 1), (8, 2), (24, 5)):
        split = split_of_table(many_pictures, [f"{k}.jpg" for k in range(count)])
        assert (len(split["dev"]), len(split["train"])) == (dev, count - dev)
