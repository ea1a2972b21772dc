"""A model folder is read back as it was written, or refused with a line that names the file."""

import hashlib
import json
import re
import socket

import numpy as np
import pytest
import torch
from captions import assert_same
from conftest import TINY_DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from captioner import Captioner, CheckpointError, ConfigError
from captioner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model_folder import CARD, CONFIG, TOKENIZER, WEIGHTS
from captioner.tokenizer import Tokenizer

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    save_checkpoint(tiny_checkpoint("additive"), tmp_path / "model")
    return tmp_path / "model"


def replace(folder, name, content):
    """Replace a file and its SHA-256, as a foreign tool that keeps to the format would."""
    (folder / name).write_bytes(content)
    description = json.loads((folder / CONFIG).read_text())
    description["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / CONFIG).write_text(json.dumps(description))


def describe(folder, description):
    """Write config.json with the checksum that its settings need."""
    settings = json.dumps(description["model"], sort_keys=True, separators=(",", ":"))
    description["sha256"]["model"] = hashlib.sha256(settings.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(description))


def refused(source, *parts):
    with pytest.raises(CheckpointError, match=".*".join(re.escape(str(part)) for part in parts)) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value)


# --- What is written is read. ---


@pytest.mark.parametrize("decoder", TINY_DECODERS)
def test_save_then_load_is_the_identity(tiny_checkpoint, tmp_path, decoder):
    saved = tiny_checkpoint(decoder, card="# Ünï 词\r\nsecond line\n")
    save_checkpoint(saved, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.model.config == saved.model.config
    assert loaded.tokenizer.to_json() == saved.tokenizer.to_json()
    assert loaded.card == saved.card
    assert not loaded.model.training
    wanted = saved.model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    options = {"beam_size": 3, "n_best": 3}
    expected = Captioner(saved, device="cpu").caption(PICTURE, **options)
    assert_same(Captioner(loaded, device="cpu").caption(PICTURE, **options), expected)


def test_a_loaded_model_is_saved_as_the_same_bytes(folder, tmp_path):
    Captioner.load(folder, device="cpu").save(tmp_path / "again")
    for name in (WEIGHTS, CONFIG, TOKENIZER, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("decoder", TINY_DECODERS)
def test_a_loaded_model_can_be_trained(tiny_checkpoint, tmp_path, decoder):
    save_checkpoint(tiny_checkpoint(decoder), tmp_path)
    model = load_checkpoint(tmp_path).model.train()
    logits_BTV, _ = model(torch.zeros(2, 3, 64, 64), torch.ones(2, 3, dtype=torch.int64))
    logits_BTV.sum().backward()
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


def test_half_precision_halves_the_matrices_and_keeps_the_scores_close(captioner, example_photos, tmp_path):
    save_checkpoint(Checkpoint(captioner.model.float(), captioner.tokenizer), tmp_path, half=True)
    kept = load((tmp_path / WEIGHTS).read_bytes())
    assert {value.dtype for value in kept.values() if value.ndim > 1} == {torch.float16}
    assert torch.float16 not in {value.dtype for value in kept.values() if value.ndim <= 1}
    rounded = Captioner.load(tmp_path, device="cpu")
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}
    for photo in example_photos[:3]:
        caption = captioner.caption(photo)
        assert rounded.score(photo, caption.text).score == pytest.approx(caption.score, abs=0.02)


def test_a_model_saved_over_another_replaces_it(tiny_checkpoint, tmp_path):
    save_checkpoint(tiny_checkpoint("mean", card="first"), tmp_path)
    save_checkpoint(tiny_checkpoint("multihead", card="second"), tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.model.config.decoder, loaded.card) == ("multihead", "second")
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, TOKENIZER, CARD}


def test_a_weight_too_large_for_half_precision_is_named(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("mean")
    name = next(name for name, value in checkpoint.model.named_parameters() if value.ndim == 2)
    with torch.no_grad():
        checkpoint.model.get_parameter(name)[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=re.escape(name)):
        save_checkpoint(checkpoint, tmp_path, half=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(CheckpointError, match=re.escape(str(target))):
            save_checkpoint(tiny_checkpoint("mean"), target)


# --- What is damaged is refused. ---


def test_a_missing_file_is_named(folder):
    for name in (WEIGHTS, TOKENIZER, CONFIG):
        (folder / name).rename(folder / "elsewhere")
        refused(folder, folder / name, "missing")
        (folder / "elsewhere").rename(folder / name)
    load_checkpoint(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    for name in (WEIGHTS, TOKENIZER, CONFIG, CARD):
        (folder / name).rename(folder / "elsewhere")
        (folder / name).mkdir()
        refused(folder, folder / name, "cannot be read")
        (folder / name).rmdir()
        (folder / "elsewhere").rename(folder / name)


def test_a_folder_without_a_card_has_none(folder):
    (folder / CARD).unlink()
    assert load_checkpoint(folder).card == ""


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG])
def test_a_truncated_file_is_named(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    refused(folder, folder / name, "damaged")


@pytest.fixture(scope="module")
def written(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    save_checkpoint(tiny_checkpoint("mean"), folder)
    return folder, {name: (folder / name).read_bytes() for name in (WEIGHTS, TOKENIZER, CONFIG, CARD)}


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_bit_is_named_or_harmless(written, data):
    folder, contents = written
    name = data.draw(st.sampled_from(sorted(contents)))
    content = bytearray(contents[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    fault = None
    try:
        load_checkpoint(folder)
    except CheckpointError as err:
        fault = str(err)
    finally:
        (folder / name).write_bytes(contents[name])
    if fault is None:
        assert name == CARD  # nothing vouches for it
    else:
        assert str(folder) in fault  # a flip in config.json may look like damage of what it vouches for


@settings(max_examples=20)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_no_model(written, content):
    folder, contents = written
    for name in (WEIGHTS, TOKENIZER, CONFIG):
        (folder / name).write_bytes(content)
        refused(folder, folder / name)
        (folder / name).write_bytes(contents[name])


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04", save({"a": torch.zeros(2)})[:-3]])
def test_weights_that_are_vouched_for_but_no_safetensors_are_named(folder, content):
    replace(folder, WEIGHTS, content)
    refused(folder, folder / WEIGHTS, "not a safetensors file")


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{}", '{"format": "other"}', '{"architectures": ["Bert"]}', '"captioner"', "[" * 9999],
)
def test_foreign_json_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, folder / CONFIG)


@pytest.mark.parametrize("version", [0, 4, "1", None, True, 1.0, 2.0, [1]])
def test_another_version_is_refused(folder, version):
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(description | {"format_version": version}))
    refused(folder, folder / CONFIG, "version")


@pytest.mark.parametrize("part", ["model", "sha256"])
@pytest.mark.parametrize("value", [None, [], "x", {}])
def test_a_description_without_a_part_is_refused(folder, part, value):
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(description | {part: value}))
    refused(folder, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"decoder": "gru"},
        {"decoder": ["mean"]},
        {"colour": "red"},
        {"max_tokens": -1},
        {"vocabulary_size": "16"},
        {"encoder": {"backbone": "mobilenet_v9", "stride": 32}},
        {"encoder": {"backbone": "mobilenet_v3_small", "stride": 7}},
        {"encoder": 5},
        {"preprocessing": {"side_px": 16}},
        {"decoder_settings": {"heads": 3}},
        {"decoder_settings": {"state_dim": 2**62}},
        {"vocabulary_size": 10**30},
    ],
    ids=str,
)
def test_settings_that_make_no_model_are_refused_naming_the_file(folder, change):
    description = json.loads((folder / CONFIG).read_text())
    description["model"] |= change
    describe(folder, description)
    refused(folder, folder / CONFIG)


def test_settings_of_another_shape_are_refused_naming_a_weight(folder):
    description = json.loads((folder / CONFIG).read_text())
    description["model"]["decoder_settings"]["state_dim"] = 99
    describe(folder, description)
    refused(folder, folder / WEIGHTS, "decoder.attention.query.weight is [10, 12], expected [10, 99]")


def test_settings_changed_without_their_checksum_are_refused(folder):
    description = json.loads((folder / CONFIG).read_text())
    description["model"]["max_tokens"] -= 1
    (folder / CONFIG).write_text(json.dumps(description))
    refused(folder, folder / CONFIG, "changed by hand", "SHA-256")
    describe(folder, description)
    assert load_checkpoint(folder).model.config.max_tokens == description["model"]["max_tokens"]


def test_settings_laid_out_in_another_way_are_the_same(folder):
    description = json.loads((folder / CONFIG).read_text())
    description["model"] = dict(reversed(description["model"].items()))
    (folder / CONFIG).write_text(json.dumps(description, indent=7))
    load_checkpoint(folder)


def test_a_folder_of_version_1_is_read_without_a_checksum_of_its_settings(folder):
    expected = load_checkpoint(folder).model.config
    description = json.loads((folder / CONFIG).read_text())
    del description["sha256"]["model"]
    (folder / CONFIG).write_text(json.dumps(description))
    refused(folder, folder / CONFIG, "SHA-256")  # of version 2
    (folder / CONFIG).write_text(json.dumps(description | {"format_version": 1}))
    assert load_checkpoint(folder).model.config == expected


@pytest.mark.parametrize("fault", [RuntimeError("Storage size\noverflow"), TypeError("no"), OverflowError("int")])
def test_what_torch_cannot_build_is_one_line_naming_the_file(folder, monkeypatch, fault):
    def fail(config):
        raise fault

    monkeypatch.setattr("captioner.checkpoint.build_model", fail)
    refused(folder, folder / CONFIG, "no model can be built")


def test_a_tokenizer_of_another_size_is_refused(folder):
    other = Tokenizer.train(["one two three four five"], min_count=1)
    replace(folder, TOKENIZER, other.to_json().encode())
    refused(folder, TOKENIZER, "9 tokens", "16")


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff\xfe", b"word\nlist\n"])
def test_a_tokenizer_that_is_none_is_named(folder, content):
    replace(folder, TOKENIZER, content)
    refused(folder, folder / TOKENIZER)


def test_a_card_that_is_no_text_is_named(folder):
    (folder / CARD).write_bytes(b"\xff\xfe\x00")
    refused(folder, folder / CARD)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda weights, name: weights.pop(name), "lacks 1 weights, such as NAME"),
        (lambda weights, name: weights.update(zzz=torch.zeros(1)), "has unknown 1 weights, such as zzz"),
        (lambda weights, name: weights.update({name: weights[name].T}), "NAME is ["),
        (lambda weights, name: weights.update({name: weights[name][:1]}), "NAME is ["),
        (lambda weights, name: weights.update({name: weights[name].long()}), "NAME is torch.int64"),
    ],
    ids=["missing", "extra", "transposed", "cut", "whole numbers"],
)
def test_weights_of_another_model_are_refused_naming_one(folder, change, fault):
    weights = load((folder / WEIGHTS).read_bytes())
    name = min(name for name in weights if weights[name].ndim == 2)
    change(weights, name)
    replace(folder, WEIGHTS, save({key: value.contiguous() for key, value in weights.items()}))
    refused(folder, folder / WEIGHTS, fault.replace("NAME", name))


# --- Where a model comes from. ---


def test_a_path_that_is_a_file_is_refused(folder):
    refused(folder / WEIGHTS, folder / WEIGHTS, "is a file")


@pytest.mark.parametrize("source", [5, 2.5, [], b"folder", object], ids=str)
def test_what_is_no_path_names_no_model(tiny_checkpoint, source):
    if isinstance(source, bytes):  # a name, if not of text
        refused(source, "folder")
        return
    with pytest.raises(ConfigError, match="path of its folder"):
        load_checkpoint(source)
    with pytest.raises(ConfigError, match="path of its folder"):
        save_checkpoint(tiny_checkpoint("mean"), source)


@pytest.mark.parametrize("name", ["a" * 300, "user/" + "a" * 300, "a\0b", "user/a\0b", "a\ud800b"])
def test_an_impossible_name_is_one_short_line(tiny_checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    for call in (load_checkpoint, lambda source: save_checkpoint(tiny_checkpoint("mean"), source)):
        with pytest.raises(CheckpointError) as caught:
            call(name)
        assert len(str(caught.value)) < 500
        assert not set("\n\0") & set(str(caught.value))


def test_a_folder_without_permission_is_named(folder, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", fail)
    refused(folder, folder, "cannot be read: Permission denied")


def test_an_empty_name_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    load_checkpoint(".")
    refused("", "empty")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "../x", "a b/c"])
def test_a_folder_that_does_not_exist_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    refused(name, name)
    refused(tmp_path / "user" / "name", tmp_path / "user" / "name", "no such folder")


def no_network(*_):
    raise AssertionError("the network was used")


def test_the_bundled_model_needs_no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket.socket, "connect_ex", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert Captioner.load(device="cpu").caption(PICTURE).text


def test_a_hub_id_offline_says_so(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    refused("user/name", "user/name", "offline")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("no route"), "offline"),
        (ValueError("proxy:\nsays no"), "offline"),
        (FileNotFoundError("not cached"), "offline"),
    ],
)
def test_whatever_the_network_raises_is_one_line(monkeypatch, raised, said):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("user/name", "user/name", said)


def test_a_hub_that_refuses_is_told_from_being_offline(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    class RefusedError(HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "404 Client Error")

    def fail(*_, **__):
        raise RefusedError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("user/name", "user/name", "refused it", "404")


def test_a_model_of_the_hub_is_its_downloaded_folder(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **_: str(folder))
    assert load_checkpoint("user/name").model.config.decoder == "additive"
