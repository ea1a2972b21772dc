"""Laws of the model in 8 bits: near the one in float32, never taken unasked, checked like every file of a model."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from captions import assert_same
from PIL import Image
from test_runtimes import PICTURES, contents, exported, picture  # noqa: F401  # a fixture
from typer.testing import CliRunner

from captioner import Captioner, CheckpointError, ConfigError
from captioner.cli import app
from captioner.engine import fingerprint
from captioner.model_folder import (
    BUNDLED,
    CONFIG,
    ENCODER_GRAPH,
    ENCODER_INT8_GRAPH,
    GRAPHS,
    INT8_GRAPHS,
    STEP_GRAPH,
    STEP_INT8_GRAPH,
    read_folder,
)
from captioner.prepared import prepare
from captioner.runtimes import export
from captioner.runtimes.export import export_onnx
from captioner.runtimes.quantise import (
    FEWEST_PHOTOS,
    MOST_PHOTOS,
    quantise_encoder,
    quantise_weights,
    read_photos,
)

DECODERS = ["mean", "additive", "multihead"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of as many pictures as are needed, and one file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(FEWEST_PHOTOS):
        picture(seed).save(folder / f"{seed:02}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(exported, photos, patch, tmp_path_factory):  # noqa: F811
    """A tiny model in both ways; not to be written to. Its graphs are not made anew: that takes time."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    for decoder in DECODERS:  # while they can be made
        exported(decoder)
    shutil.copytree(exported("multihead"), folder)
    made = {name: (folder / name).read_bytes() for name in GRAPHS}
    patch.setattr(export, "_graphs", lambda checkpoint: dict(zip(GRAPHS, GRAPHS, strict=True)))
    patch.setattr(export, "_export", lambda name, places: made[name])
    found = CliRunner().invoke(app, ["export", str(folder), "--int8", str(photos)])
    assert found.exit_code == 0, found.output
    for name in INT8_GRAPHS:
        assert name in found.output
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_it_lies_beside_the_other_graphs_which_stay_as_they_were(folder, exported):  # noqa: F811
    before, after = contents(exported("multihead")), contents(folder)
    assert after.keys() - before.keys() == set(INT8_GRAPHS)
    assert {name for name in before if after[name] != before[name]} == {CONFIG}
    assert read_folder(folder).description["onnx"]["int8_photos"] == FEWEST_PHOTOS
    assert read_folder(folder).runtimes == ("torch", "onnx", "onnx-int8")
    encoder, step = (onnx.load(folder / name).graph.node for name in (ENCODER_INT8_GRAPH, STEP_INT8_GRAPH))
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in encoder}
    assert "MatMulNBits" in {node.op_type for node in step}
    assert "Gemm" not in {node.op_type for node in step}


def test_it_is_taken_when_it_is_asked_for_and_only_then(folder):
    assert Captioner.load(folder, device="cpu").runtime.name == "onnx"
    captioner = Captioner.load(folder, runtime="onnx-int8")
    assert (captioner.runtime.name, captioner.device) == ("onnx-int8", "cpu")
    caption = captioner.caption(PICTURES[0])
    assert caption.text
    for word in caption.words:
        assert word.attention.min() >= 0
        assert word.attention.sum() == pytest.approx(1, abs=1e-4)


def test_a_run_over_pictures_does_not_mix_it_with_float32(folder):
    plain, quantised = (Captioner.load(folder, runtime=name) for name in ("onnx", "onnx-int8"))
    assert fingerprint(plain) != fingerprint(quantised)
    assert fingerprint(Captioner.load(folder, runtime="torch")) == fingerprint(plain)


def test_save_then_load_is_the_identity(folder, tmp_path):
    captioner = Captioner.load(folder, runtime="onnx-int8")
    captioner.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    again = Captioner.load(tmp_path / "again", runtime="onnx-int8")
    assert_same(again.caption(PICTURES[0]), captioner.caption(PICTURES[0]))


def test_an_export_without_it_takes_the_old_one_away(copied):
    export_onnx(copied)
    assert not any((copied / name).exists() for name in INT8_GRAPHS)
    with pytest.raises(
        CheckpointError, match=f"no graphs in 8 bits; make them with: captioner export {copied} --int8 PHOTOS"
    ):
        Captioner.load(copied, runtime="onnx-int8")


@pytest.mark.parametrize("name", INT8_GRAPHS)
def test_a_damaged_one_is_refused_where_it_is_used(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        Captioner.load(copied, runtime="onnx-int8")
    assert Captioner.load(copied, runtime="onnx").caption(PICTURES[0]).text


def test_too_few_photos_are_refused_and_nothing_is_written(copied, tmp_path):
    before = contents(copied)
    picture(0).save(tmp_path / "one.png")
    with pytest.raises(ConfigError, match=f"1 photos that can be read; name at least {FEWEST_PHOTOS}"):
        export_onnx(copied, int8_photos=[str(tmp_path / "one.png")])
    with pytest.raises(ConfigError, match="fits no picture, folder or archive"):
        export_onnx(copied, int8_photos=[str(tmp_path / "nowhere*")])
    assert contents(copied) == before


def test_no_more_photos_are_read_than_are_used(tiny_checkpoint, tmp_path):
    for seed in range(MOST_PHOTOS + 8):
        Image.new("RGB", (8, 8), (seed, 0, 0)).save(tmp_path / f"{seed:03}.png")
    config = tiny_checkpoint("mean").model.config.preprocessing
    assert len(read_photos([str(tmp_path)], config)) == MOST_PHOTOS


def test_features_of_the_bundled_model_in_8_bits_are_near_those_in_float32(example_photos, tmp_path):
    """With 7 bits 0.90 of examples, of photos from Flickr8k 0.95; without the clips it falls below 0.8."""
    config = read_folder().config.preprocessing
    squares = [prepare(path, config).pixels_u8 for path in example_photos]
    squares = [flip for square in squares for flip in (square, np.ascontiguousarray(square[:, :, ::-1]))]
    (tmp_path / ENCODER_INT8_GRAPH).write_bytes(quantise_encoder(BUNDLED / ENCODER_GRAPH, squares))
    exact, rounded = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, {"pixels_u8": np.stack(squares)}
        )[0]
        for path in (BUNDLED / ENCODER_GRAPH, tmp_path / ENCODER_INT8_GRAPH)
    )
    norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(rounded, axis=-1)
    assert ((exact * rounded).sum(axis=-1) / norms).mean() > 0.87


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_in_8_bits_gives_nearly_the_same_probabilities(exported, decoder, tmp_path):  # noqa: F811
    folder = shutil.copytree(exported(decoder), tmp_path / "model")
    exact = Captioner.load(folder, runtime="onnx")
    (tmp_path / "step.onnx").write_bytes(quantise_weights(folder / STEP_GRAPH))
    assert "MatMulNBits" in {node.op_type for node in onnx.load(tmp_path / "step.onnx").graph.node}
    rounded = Captioner.load(folder, runtime="onnx")
    rounded.runtime.decoder._step._session = onnxruntime.InferenceSession(
        str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"]
    )
    sentence = exact.caption(PICTURES[0]).text
    one, other = exact.score(PICTURES[0], sentence), rounded.score(PICTURES[0], sentence)
    assert one.score != other.score
    assert other.score == pytest.approx(one.score, rel=0.02)
    for word, near in zip(one.words, other.words, strict=True):
        assert near.attention == pytest.approx(word.attention, abs=0.05)


def test_a_decoder_of_the_bundled_model_in_8_bits_scores_captions_nearly_alike(example_photos, tmp_path):
    exact, rounded = (Captioner.load(runtime="onnx") for _ in range(2))
    (tmp_path / "step.onnx").write_bytes(quantise_weights(BUNDLED / STEP_GRAPH))
    rounded.runtime.decoder._step._session = onnxruntime.InferenceSession(
        str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"]
    )
    for photo in example_photos:
        caption = exact.caption(photo)
        other = rounded.score(photo, caption.text)
        assert other.score == pytest.approx(exact.score(photo, caption.text).score, abs=0.03)
        for word, near in zip(caption.words, other.words, strict=True):
            assert near.probability == pytest.approx(word.probability, abs=0.1)
