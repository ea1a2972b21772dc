"""Laws of the runtimes: ONNX Runtime gives what PyTorch gives, from the same file of weights, or refuses the folder."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from captions import assert_same, assert_same_words, everything, with_nan
from conftest import TINY_DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from models import selections
from PIL import Image
from safetensors import safe_open
from test_import import HEAVY

from captioner import Captioner, CheckpointError, ConfigError, SearchError
from captioner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.config import ConfidenceConfig
from captioner.engine import fingerprint
from captioner.model import build_model
from captioner.model_folder import CARD, CONFIG, GRAPHS, START_GRAPH, STEP_GRAPH, TOKENIZER, WEIGHTS, read_folder
from captioner.runtimes import export, open_runtime
from captioner.runtimes.export import OPSET, compare_runtimes, export_onnx
from captioner.runtimes.onnx import OnnxRuntime

TOLERANCE = 1e-4
KINDS = tuple(TINY_DECODERS)
VOCABULARY, MAX_TOKENS = 16, 24
CONFIDENCE = ConfidenceConfig(
    directions=3, intercept=1.5, score_weight=0.8, least_weight=0.2, familiar=0.5, strange=5.0
)
# The relative part is the rounding of log-probabilities such as -30.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=TOLERANCE)


def picture(seed, width_px=64, height_px=48):
    """A picture with large things and small ones."""
    rng = np.random.default_rng(seed)
    large = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width_px, height_px))
    small = rng.integers(-40, 40, (height_px, width_px, 3))
    return Image.fromarray((np.asarray(large) + small).clip(0, 255).astype(np.uint8))


PICTURES = [picture(seed, width_px=40 + 16 * seed) for seed in range(5)]


def calibrated(checkpoint):
    """The same model with a made-up confidence."""
    model = build_model(dataclasses.replace(checkpoint.model.config, confidence=CONFIDENCE))
    model.load_state_dict(checkpoint.model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    basis_CK, _ = torch.linalg.qr(torch.randn(model.encoder.feature_dim, CONFIDENCE.directions, generator=generator))
    model.familiarity.basis_KC.copy_(basis_CK.T)
    return Checkpoint(model.eval(), checkpoint.tokenizer, checkpoint.card)


@pytest.fixture(scope="session")
def exported(tiny_checkpoint, tmp_path_factory):
    """Folders with graphs, by the kind of decoder; not to be written to. Of multihead as the bundled model is: with
    confidence and stored in half precision.

    The encoder, which takes most of the time, is exported once: the others' is that graph, pointed into their weights.
    """
    make_graph, encoders = export._export, []

    def encoder_once(graph, places):
        if "pixels_u8" not in graph.inputs:
            return make_graph(graph, places)
        encoders.append(encoders[0] if encoders else onnx.load_from_string(make_graph(graph, places)))
        return export._linked(copy.deepcopy(encoders[0]), places).SerializeToString()

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("exported") / kind
        if kind != KINDS[0]:
            make(KINDS[0])  # in full precision, which has names for all that it reads
        checkpoint = tiny_checkpoint(kind)
        multihead = kind == "multihead"
        save_checkpoint(calibrated(checkpoint) if multihead else checkpoint, folder, half=multihead)
        logging.disable(logging.INFO)  # pytest keeps all that torch says, at twice the time
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "_export", encoder_once)
                assert export_onnx(folder).has_graphs
        finally:
            logging.disable(logging.NOTSET)
        return folder

    return make


@pytest.fixture(scope="session")
def pair(exported):
    """Captioners of one folder, torch and onnx, by the kind of decoder."""

    @functools.cache
    def make(kind):
        return tuple(Captioner.load(exported(kind), device="cpu", runtime=name) for name in ("torch", "onnx"))

    return make


@pytest.fixture(params=KINDS)
def both(request, pair):
    return pair(request.param)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported folder, to be spoilt."""
    return Path(shutil.copytree(exported("mean"), tmp_path / "model"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def vouch(folder):
    """Write the checksums of a folder's files anew, as a foreign tool that keeps to the format would."""
    description = json.loads((folder / CONFIG).read_text())
    for part in (description, description["onnx"]):
        for name in part["sha256"]:
            if (folder / name).is_file():
                part["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(description))


def refused(source, *parts, runtimes=("onnx", "auto")):
    for runtime in runtimes:
        with pytest.raises(CheckpointError, match=".*".join(re.escape(str(part)) for part in parts)) as caught:
            Captioner.load(source, device="cpu", runtime=runtime)
        assert "\n" not in str(caught.value)


def squares(captioner, pictures):
    return np.stack([captioner.prepare(item).pixels_u8 for item in pictures])


def grids(pair, kind, pictures):
    """Features of so many pictures, for torch and for onnx."""
    torch_captioner = pair(kind)[0]
    grid_BPC = torch_captioner.runtime.encode(squares(torch_captioner, [picture(seed) for seed in range(pictures)]))
    return grid_BPC, grid_BPC.numpy()


def assert_same_step(found, logits_NV, attention_NP, heads_NLHP):
    log_probs_NV, found_NP, state = found
    expected_NV = logits_NV.log_softmax(dim=-1).numpy()
    # A sum's rounding error goes with its terms, not with itself: the logits of these models reach 30 and more.
    np.testing.assert_allclose(log_probs_NV, expected_NV, rtol=0, atol=max(TOLERANCE, 1e-5 * np.abs(expected_NV).max()))
    close(found_NP, attention_NP.numpy())
    close(state.attention_heads_BLHP, heads_NLHP.numpy())
    for values in (log_probs_NV, found_NP, state.attention_heads_BLHP):
        assert values.dtype == np.float32


# --- The two compute the same. ---


@pytest.mark.parametrize("count", [1, 2, 5])
def test_both_see_the_same_in_any_number_of_pictures(both, count):
    reference, fast = (captioner.runtime.encode(squares(captioner, PICTURES[:count])) for captioner in both)
    assert reference.shape == fast.shape == (count, np.prod(both[0].runtime.grid_hw), reference.shape[2])
    np.testing.assert_allclose(fast, reference.numpy(), rtol=TOLERANCE, atol=TOLERANCE)
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.pairwise(fast))  # not alike anyway


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("pictures", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_teacher_forcing_for_any_number_of_pictures_and_rows(pair, kind, pictures, rows):
    """All steps that there are; with more than one row the cache, made for one, has to grow."""
    grid_BPC, grid = grids(pair, kind, pictures)
    reference, fast = (captioner.runtime.decoder for captioner in pair(kind))
    count = pictures * rows
    tokens_NT = np.random.default_rng(rows).integers(0, VOCABULARY, (count, MAX_TOKENS))
    with torch.inference_mode():
        logits_NTV, attention_NTP = reference(grid_BPC, torch.from_numpy(tokens_NT))
        state, other = fast.start(grid), reference.start(grid_BPC)
        order = np.repeat(np.arange(pictures), rows)
        state, other = state.select(order), other.select(torch.from_numpy(order))
        for step, tokens_N in enumerate(tokens_NT.T):
            found = fast.step(np.ascontiguousarray(tokens_N), state)
            state, other = found[2], reference.step(torch.from_numpy(tokens_N.copy()), other)[2]
            assert_same_step(found, logits_NTV[:, step], attention_NTP[:, step], other.attention_heads_BLHP)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_steps_equal_teacher_forcing_after_any_selection(pair, kind, data):
    """Rows are reordered, repeated and dropped, pictures leave, or come to have unlike numbers of rows."""
    pictures = data.draw(st.integers(1, 3))
    grid_BPC, grid = grids(pair, kind, pictures)
    reference, fast = (captioner.runtime.decoder for captioner in pair(kind))
    rng = np.random.default_rng(pictures)
    limit = data.draw(st.integers(5, MAX_TOKENS))
    picture_of_row, history_NT = np.arange(pictures), np.empty((pictures, 0), dtype=np.int64)
    with torch.inference_mode():
        state, other = fast.start(grid, max_tokens=limit), reference.start(grid_BPC, max_tokens=limit)
        for _ in range(data.draw(st.integers(1, 5))):
            for _ in range(data.draw(st.integers(0, 2))):
                chosen = np.array(data.draw(selections(picture_of_row.tolist())))
                picture_of_row, history_NT = picture_of_row[chosen], history_NT[chosen]
                state, other = state.select(chosen), other.select(torch.from_numpy(chosen))
                close(state.attention_heads_BLHP, other.attention_heads_BLHP.numpy())
            history_NT = np.hstack([history_NT, rng.integers(0, VOCABULARY, (len(history_NT), 1))])
            logits, attention = reference(grid_BPC[picture_of_row], torch.from_numpy(history_NT))
            found = fast.step(history_NT[:, -1].copy(), state)
            state, other = found[2], reference.step(torch.from_numpy(history_NT[:, -1].copy()), other)[2]
            assert_same_step(found, logits[:, -1], attention[:, -1], other.attention_heads_BLHP)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_beyond_the_limit_is_refused(pair, kind):
    _, grid = grids(pair, kind, 2)
    decoder = pair(kind)[1].runtime.decoder
    state = decoder.start(grid, max_tokens=2)
    tokens_N = np.ones(2, dtype=np.int64)
    for _ in range(2):
        state = decoder.step(tokens_N, state)[2]
    with pytest.raises(ConfigError, match="all steps that its state was started for"):
        decoder.step(tokens_N, state)
    for steps in (0, MAX_TOKENS + 1):
        with pytest.raises(ConfigError, match=f"1 to {MAX_TOKENS} steps, got {steps}"):
            decoder.start(grid, max_tokens=steps)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_rows_gives_none(pair, kind):
    """As when every picture of a batch has its caption."""
    _, grid = grids(pair, kind, 2)
    decoder = pair(kind)[1].runtime.decoder
    state = decoder.step(np.ones(2, dtype=np.int64), decoder.start(grid))[2].select(np.empty(0, dtype=np.int64))
    assert len(state.attention_heads_BLHP) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_a_step_are_not_written_to_by_later_ones(pair, kind):
    _, grid = grids(pair, kind, 2)
    decoder = pair(kind)[1].runtime.decoder
    tokens_N = np.array([1, 5])
    log_probs_NV, attention_NP, state = decoder.step(tokens_N, decoder.start(grid))
    kept = [log_probs_NV, attention_NP, state.attention_heads_BLHP]
    before = copy.deepcopy(kept)
    for step in range(3):
        state = decoder.step(tokens_N + step, state.select(np.array([1, 0])))[2]
    for values, expected in zip(kept, before, strict=True):
        assert np.array_equal(values, expected)


OPTIONS = {
    "default": {},
    "greedy": {"method": "greedy"},
    "beam": {"beam_size": 5, "n_best": 5},
    "wide": {"beam_size": 12, "n_best": 3, "length_penalty": 0.5, "max_words": 6},
    "diverse": {"beam_size": 6, "groups": 3, "diversity": 1.0, "n_best": 4},
    "sample": {"method": "sample", "seed": 3, "n_best": 3},
    "nucleus": {"method": "sample", "seed": 4, "temperature": 1.5, "top_p": 0.8},
    "top_k": {"method": "sample", "seed": 5, "top_k": 4},
    "must_include": {"must_include": ["red ball", "man"], "beam_size": 4},
    "ban": {"ban": ["dog", "the grass"], "n_best": 2},
    "no_repeat_ngram": {"no_repeat_ngram": 1, "beam_size": 3},
    "length": {"min_words": 4, "max_words": 5, "n_best": 3},
    "one word": {"max_words": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_give_the_same_captions(both, options):
    reference, fast = (list(captioner.caption_batch(PICTURES, batch_size=3, **options)) for captioner in both)
    for found, expected in zip(fast, reference, strict=True):
        assert_same(found, expected, tolerance=TOLERANCE)
        for caption, other in zip(everything(found), everything(expected), strict=True):
            assert caption.confidence == pytest.approx(other.confidence, abs=TOLERANCE)
            assert (caption.confidence is None) == (both[0].config.confidence is None)
    assert len({caption.score for caption in fast}) == len(PICTURES)  # they are not alike anyway


@pytest.mark.parametrize("name", ["default", "beam", "diverse", "no_repeat_ngram"])
def test_a_batch_gives_what_singles_give(both, name):
    fast = both[1]
    singles = [fast.caption(each, **OPTIONS[name]) for each in PICTURES]
    for batch_size in (2, 32):
        batch = fast.caption_batch(PICTURES, batch_size=batch_size, **OPTIONS[name])
        for found, expected in zip(batch, singles, strict=True):
            assert_same(found, expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"method": "sample", "seed": 3}])
def test_a_stream_gives_the_words_of_the_caption(both, options):
    fast = both[1]
    for each in PICTURES[:3]:
        expected = fast.caption(each, **{"method": "greedy", **options})
        assert_same_words(list(fast.stream(each, **options)), expected.words, tolerance=TOLERANCE)


def test_both_score_a_sentence_alike(both):
    reference, fast = both
    for each in PICTURES[:3]:
        for sentence in ("A dog runs on the grass.", "red", fast.caption(each).text):
            found, expected = fast.score(each, sentence), reference.score(each, sentence)
            assert_same(found, expected, tolerance=TOLERANCE)
            assert found.end_probability == pytest.approx(expected.end_probability, abs=TOLERANCE)
            assert found.confidence == pytest.approx(expected.confidence, abs=TOLERANCE)
        assert found.score == pytest.approx(fast.caption(each).score, abs=TOLERANCE)


def test_both_find_the_same_pictures_strange(pair):
    strange = []
    for captioner in pair("multihead"):
        grid_BPC = captioner.runtime.encode(squares(captioner, PICTURES))
        strange.append(captioner.runtime.strangeness(grid_BPC))
    assert strange[1] == pytest.approx(strange[0], rel=TOLERANCE)
    assert min(strange[0]) > 0
    assert pair("mean")[1].runtime.strangeness(np.zeros((2, 4, 576), dtype=np.float32)) == [None, None]


def test_features_are_torch_tensors_of_the_same_values(both):
    reference, fast = (captioner.features(PICTURES) for captioner in both)
    assert isinstance(fast, torch.Tensor)
    torch.testing.assert_close(fast, reference, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_without_a_caption_is_named_and_loses_no_other(pair, kind, batch_size, tmp_path, monkeypatch):
    fast = pair(kind)[1]
    expected = [fast.caption(PICTURES[0]), fast.caption(PICTURES[1])]
    encode = Captioner._encode
    monkeypatch.setattr(
        Captioner,
        "_encode",
        lambda self, inputs: with_nan(encode(self, inputs), [item.name.endswith("bad.png") for item in inputs]),
    )
    PICTURES[2].save(tmp_path / "bad.png")
    pictures = [PICTURES[0], tmp_path / "bad.png", PICTURES[1]]
    first, error, last = fast.caption_batch(pictures, batch_size=batch_size, on_error="return")
    assert isinstance(error, SearchError)
    assert str(error).startswith(f"{tmp_path / 'bad.png'}: the model gave NaN")
    assert_same(first, expected[0], tolerance=TOLERANCE)
    assert_same(last, expected[1], tolerance=TOLERANCE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_where_one_score_is_no_number_all_of_the_row_are_nan(pair, folder, value):
    """What is promised by `normalised`: a search looks at one column."""
    patch(folder, "decoder.output.bias", lambda bias_V: np.where(np.arange(len(bias_V)) == 7, value, bias_V))
    decoder = OnnxRuntime(read_folder(folder)).decoder
    assert decoder.normalised
    log_probs_NV, _, _ = decoder.step(np.ones(2, dtype=np.int64), decoder.start(grids(pair, "mean", 2)[1]))
    assert np.isnan(log_probs_NV).all()


def test_many_threads_get_what_they_get_alone(both):
    fast = both[1]
    tasks = [(each, options) for each in PICTURES for options in (OPTIONS["beam"], OPTIONS["sample"], {}, {})]
    alone = [fast.caption(each, **options) for each, options in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda task: fast.caption(task[0], **task[1]), tasks))
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_caption(pair, exported, threads):
    fast = Captioner.load(exported("multihead"), runtime="onnx", threads=threads)
    for each in PICTURES[:2]:
        assert_same(fast.caption(each, n_best=3), pair("multihead")[1].caption(each, n_best=3), tolerance=TOLERANCE)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_no_more_threads_compute_than_were_asked_for(exported):
    """Each of three graphs has the thread that calls it, and those of its own."""
    program = """
import os, sys
from captioner import Captioner
import onnxruntime
count = lambda: len(os.listdir("/proc/self/task"))
for threads in (1, 3):
    before = count()
    kept = Captioner.load(sys.argv[1], runtime="onnx", threads=threads)
    print(count() - before)
    del kept
"""
    one, three = map(int, fresh(program, exported("mean")).split())
    assert (one, three) == (0, 6)


# --- The weights are in one place. ---


def places(folder):
    """Where a safetensors file holds each weight: offset and length."""
    content = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (start + first, last - first) for name, (first, last) in offsets.items()}


def patch(folder, name, change):
    """Change a weight where it lies, and vouch for it."""
    with safe_open(folder / WEIGHTS, framework="np") as weights:
        value = weights.get_tensor(name)
    content = bytearray((folder / WEIGHTS).read_bytes())
    offset, length = places(folder)[name]
    content[offset : offset + length] = change(value).astype(value.dtype).tobytes()
    (folder / WEIGHTS).write_bytes(content)
    vouch(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_hold_no_weight(exported, kind):
    folder, read = exported(kind), set()
    where = places(folder)
    for name in GRAPHS:
        graph = onnx.load(folder / name, load_external_data=False)
        assert graph.opset_import[0].version == OPSET
        for tensor in graph.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                weight = tensor.name.removesuffix(".stored")
                assert entry["location"] == WEIGHTS
                assert (int(entry["offset"]), int(entry["length"])) == where[weight]
                read.add(weight)
            else:  # shapes and scalars, and the zeros of a convolution without a bias
                assert tensor.name not in where
                value = onnx.numpy_helper.to_array(tensor)
                assert value.size <= 4 or not value.any()
        assert all(value.ByteSize() < 200 for node in graph.graph.node for value in node.attribute)
    unread = {name for name in where.keys() - read if "num_batches_tracked" not in name}
    assert unread == ({"familiarity.mean_C", "familiarity.basis_KC"} if kind == "multihead" else set())
    assert sum((folder / name).stat().st_size for name in GRAPHS) < 0.1 * (folder / WEIGHTS).stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_compute_with_whatever_weights_the_file_holds(exported, tiny_checkpoint, tmp_path, kind):
    folder = Path(shutil.copytree(exported(kind), tmp_path / "model"))
    other = tiny_checkpoint(kind, seed=1)
    save_checkpoint(calibrated(other) if kind == "multihead" else other, tmp_path / "other", half=kind == "multihead")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / WEIGHTS}: damaged, or not of this model")):
        Captioner.load(folder, runtime="onnx")
    vouch(folder)
    expected = Captioner.load(tmp_path / "other", device="cpu").caption(PICTURES[0], n_best=3)
    assert_same(Captioner.load(folder, runtime="onnx").caption(PICTURES[0], n_best=3), expected, tolerance=TOLERANCE)
    compare_runtimes(read_folder(folder), load_checkpoint(folder))


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, *GRAPHS])
def test_a_changed_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / name).write_bytes(changed)
        refused(folder, folder / name, "damaged", "SHA-256")
    if name in GRAPHS:
        assert Captioner.load(folder, device="cpu", runtime="torch").caption(PICTURES[0])  # which does not read it


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG, *GRAPHS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, folder / name, "missing")


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("content", [b"", b"no graph\n" * 9], ids=["empty", "foreign"])
def test_a_graph_that_is_vouched_for_but_none_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    vouch(folder)
    refused(folder, folder / name, "cannot load it", "runtime='torch'")


def test_graphs_of_another_model_are_refused(folder, exported):
    for name in GRAPHS:
        shutil.copy(exported("additive") / name, folder / name)
    refused(folder, folder, "damaged, or not of this model")


def test_weights_that_are_cut_are_refused_even_if_vouched_for(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    vouch(folder)
    refused(folder, folder, "cannot load it")


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": {}},
        {"sha256": None},
        {"grid_hw": None},
        {"grid_hw": [2]},
        {"grid_hw": ["2", "x"]},
        {"grid_hw": [0, 4]},
        {"grid_hw": [-2, -2]},
        {"grid_hw": [True, 4]},
        {"grid_hw": [2, 6]},
        {"grid_hw": 4},
    ],
    ids=str,
)
def test_a_damaged_description_of_the_graphs_is_refused(folder, change):
    description = json.loads((folder / CONFIG).read_text())
    description["onnx"] |= change
    (folder / CONFIG).write_text(json.dumps(description))
    refused(folder, folder)
    del description["onnx"][next(iter(change))]
    (folder / CONFIG).write_text(json.dumps(description))
    refused(folder, folder / CONFIG, "onnx")


@pytest.mark.parametrize("value", [None, [], {}, "x", 5])
def test_what_is_no_description_of_graphs_is_refused(folder, value):
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(description | {"onnx": value}))
    refused(folder, folder / CONFIG, '"onnx"')


def test_a_folder_without_graphs_runs_in_torch_and_says_how_to_export(tiny_checkpoint, tmp_path):
    save_checkpoint(tiny_checkpoint("mean"), tmp_path)
    for runtime in ("auto", "torch"):
        assert Captioner.load(tmp_path, device="cpu", runtime=runtime).runtime.name == "torch"
    refused(tmp_path, f"{tmp_path}: holds no ONNX graphs", f"captioner export {tmp_path}", runtimes=["onnx"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_captioner_is_saved_as_the_same_bytes(exported, tmp_path, kind):
    folder = exported(kind)
    Captioner.load(folder, runtime="onnx").save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert contents(folder).keys() == {WEIGHTS, CONFIG, TOKENIZER, CARD, *GRAPHS}
    again = Captioner.load(tmp_path / "again", runtime="onnx")
    again.save(tmp_path / "again")  # over itself
    assert contents(tmp_path / "again") == contents(folder)
    assert_same(again.caption(PICTURES[0]), Captioner.load(folder, runtime="onnx").caption(PICTURES[0]))


def test_a_folder_that_changed_since_it_was_loaded_is_not_saved(folder, tmp_path):
    captioner = Captioner.load(folder, runtime="onnx")
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(description | {"more": 1}))
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / CONFIG}: changed since")):
        captioner.save(tmp_path / "again")
    (folder / CONFIG).write_text(json.dumps(description))
    captioner.save(tmp_path / "again")
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(str(folder / WEIGHTS))):
        captioner.save(tmp_path / "again")
    Captioner.load(tmp_path / "again", runtime="onnx")


def test_a_captioner_outlives_a_change_of_the_current_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    captioner = Captioner.load(folder.name, runtime="onnx")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert sum(parameter.numel() for parameter in captioner.model.parameters()) > 0
    assert fingerprint(captioner)
    captioner.save("again")
    assert contents(tmp_path / "elsewhere" / "again") == contents(folder)


def test_a_folder_of_links_is_a_model(folder, tmp_path):
    """As the hub's cache has it."""
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / "1" / path.name).symlink_to(Path("../../blobs") / str(number))
    captioner = Captioner.load(tmp_path / "snapshots" / "1", runtime="onnx")
    assert (
        captioner.caption(PICTURES[0]).text
        == Captioner(Checkpoint(captioner.model, captioner.tokenizer)).caption(PICTURES[0]).text
    )


def test_a_folder_of_any_name_is_a_model(folder, tmp_path):
    moved = folder.rename(tmp_path / "Modèle 词 #1%20")
    assert Captioner.load(moved, runtime="onnx").caption(PICTURES[0]).text


def test_a_model_saved_over_an_exported_one_removes_its_graphs(folder, tiny_checkpoint):
    save_checkpoint(tiny_checkpoint("mean", seed=1), folder)
    assert contents(folder).keys() == {WEIGHTS, CONFIG, TOKENIZER, CARD}
    assert Captioner.load(folder, device="cpu").runtime.name == "torch"
    refused(folder, "holds no ONNX graphs", runtimes=["onnx"])


def test_a_captioner_in_torch_saves_no_graphs(folder):
    """Its weights may have been changed meanwhile."""
    Captioner.load(folder, device="cpu", runtime="torch").save(folder)
    assert contents(folder).keys() == {WEIGHTS, CONFIG, TOKENIZER, CARD}
    Captioner.load(folder, device="cpu")


# --- The export. ---


def test_graphs_of_other_weights_do_not_pass(exported, tiny_checkpoint):
    folder = read_folder(exported("mean"))
    compare_runtimes(folder, tiny_checkpoint("mean"))
    with pytest.raises(CheckpointError, match="PyTorch and ONNX Runtime differ by"):
        compare_runtimes(folder, tiny_checkpoint("mean", seed=1))


@pytest.mark.parametrize("change", [0.01, np.nan])
@pytest.mark.parametrize("kind", ["mean", "additive"])
def test_one_other_weight_does_not_pass(exported, tiny_checkpoint, kind, change):
    """That of the word read last alone: the steps before it are the same."""
    checkpoint = tiny_checkpoint(kind)
    tokens_TN = np.random.default_rng(0)
    tokens_TN.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    read = tokens_TN.integers(0, VOCABULARY, (6, 6))
    late = next(token for token in read[1:].flatten() if token not in read[0])
    with torch.no_grad():
        checkpoint.model.decoder.embedding.weight[late] += change
    with pytest.raises(CheckpointError, match="PyTorch and ONNX Runtime differ by"):
        compare_runtimes(read_folder(exported(kind)), checkpoint)


@pytest.fixture
def quick(monkeypatch, folder):
    """An export that takes the graphs which are there, without the time of making them."""
    made = {name: (folder / name).read_bytes() for name in GRAPHS}
    monkeypatch.setattr(export, "_graphs", lambda checkpoint: dict(zip(GRAPHS, GRAPHS, strict=True)))
    monkeypatch.setattr(export, "_export", lambda name, places: made[name])


def test_an_export_over_graphs_that_are_there_is_the_same(quick, folder, exported):
    for name in GRAPHS:
        (folder / name).unlink()
    export_onnx(folder)
    assert contents(folder) == contents(exported("mean"))


def test_an_export_that_is_not_exact_writes_nothing(quick, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="PyTorch and ONNX Runtime differ by"):
        export_onnx(folder)
    assert contents(folder) == before


def test_an_export_without_what_exports_says_what_to_install(folder, monkeypatch):
    import importlib.metadata

    version = importlib.metadata.version

    def missing(name):
        if name == "onnxscript":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"onnxscript: pip install 'captioner\[export\]'"):
        export_onnx(folder)


def test_weights_that_no_graph_can_read_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("mean")
    checkpoint.model.decoder.to(torch.bfloat16)
    save_checkpoint(checkpoint, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / WEIGHTS}: ") + ".*BF16"):
        export_onnx(tmp_path)
    assert contents(tmp_path) == before


# --- Which runtime. ---


def test_auto_takes_onnx_on_a_cpu(exported):
    assert Captioner.load(exported("mean"), device="cpu").runtime.name == "onnx"
    for runtime in ("onnx", "torch"):
        captioner = Captioner.load(exported("mean"), device="cpu", runtime=runtime)
        assert (captioner.runtime.name, captioner.device) == (runtime, "cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("driver", [False, True])
def test_auto_takes_onnx_where_there_is_no_gpu(exported, monkeypatch, driver):
    """A driver without a GPU, too."""
    monkeypatch.setattr("captioner.runtimes._may_have_gpu", lambda device: driver)
    captioner = Captioner.load(exported("mean"))
    assert (captioner.runtime.name, captioner.device) == ("onnx", "cpu")


def test_auto_takes_torch_where_there_is_a_gpu(exported, monkeypatch):
    monkeypatch.setattr("captioner.runtimes._may_have_gpu", lambda device: True)
    monkeypatch.setattr("captioner.runtimes.pytorch.find_device", lambda name: torch.device("meta"))
    assert Captioner.load(exported("mean")).runtime.name == "torch"


def test_without_onnxruntime_auto_takes_torch_and_onnx_is_refused(exported, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Captioner.load(exported("mean"), device="cpu").runtime.name == "torch"
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        Captioner.load(exported("mean"), runtime="onnx")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "gpu", ""])
def test_onnx_computes_on_the_cpu_alone(exported, device):
    with pytest.raises(ConfigError, match=f"'onnx' computes on the CPU, got device '{device}'"):
        Captioner.load(exported("mean"), device=device, runtime="onnx")


@pytest.mark.parametrize("runtime", ["tensorrt", "ONNX", "", None, 5, ["onnx"]])
def test_an_unknown_runtime_is_refused(exported, runtime):
    with pytest.raises(
        ConfigError, match=re.escape(f"runtime must be one of auto, torch, onnx, onnx-int8, got {runtime!r}")
    ):
        Captioner.load(exported("mean"), runtime=runtime)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.0, True, "2"])
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_an_impossible_number_of_threads_is_refused(exported, runtime, threads):
    with pytest.raises(ConfigError, match=re.escape(f"from 1 to 1024, got {threads!r}")):
        Captioner.load(exported("mean"), device="cpu", runtime=runtime, threads=threads)


def test_the_model_of_an_onnx_captioner_is_that_of_torch(both):
    reference, fast = (captioner.model.state_dict() for captioner in both)
    assert fast.keys() == reference.keys()
    for name, value in reference.items():
        assert torch.equal(fast[name], value)
    assert both[1].model is both[1].model
    assert both[1].config == both[0].config


def test_a_fingerprint_is_of_the_model_whatever_computes(both):
    reference, fast = map(fingerprint, both)
    assert fast == reference
    captioner = both[0]
    # As it was before there were runtimes: a run that was begun then goes on.
    settings = captioner.config.to_dict()
    del settings["search"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(captioner.tokenizer.to_json().encode())
    for name, value in sorted(captioner.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    assert reference == digest.hexdigest()


def test_fingerprints_of_two_models_differ(pair, exported, tiny_checkpoint):
    found = {fingerprint(pair(kind)[1]) for kind in KINDS}
    assert len(found | {fingerprint(Captioner(tiny_checkpoint("mean", seed=1), device="cpu"))}) == len(KINDS) + 1


def fresh(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captioning_with_onnx_imports_no_torch(exported):
    program = """
import json, sys
import numpy as np
from captioner import Captioner
captioner = Captioner.load(sys.argv[1], runtime="onnx")
picture = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
for options in ({}, {"method": "sample", "seed": 1}, {"groups": 2, "beam_size": 4}):
    assert captioner.caption(picture, **options).text
assert list(captioner.caption_batch([picture] * 3)) and list(captioner.stream(picture))
captioner.score(picture, "a dog")
print(json.dumps([name.split(".")[0] for name in sys.modules]))
"""
    for kind in ("mean", "multihead"):
        loaded = set(json.loads(fresh(program, exported(kind))))
        assert "onnxruntime" in loaded
        assert loaded.isdisjoint(HEAVY | {"onnx", "onnxscript", "array_api_compat"})


def test_an_allocation_that_fails_names_what_to_lower(pair, monkeypatch):
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    fast = pair("mean")[1]

    class Full:
        def run(self, *_):
            raise RuntimeException("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(fast.runtime.decoder._step, "_session", Full())
    with pytest.raises(SearchError, match="beam_size=900 for 1 pictures at once; lower beam_size or batch_size"):
        fast.caption(PICTURES[0], beam_size=900)


def test_a_runtime_is_opened_from_a_folder_that_was_read(exported):
    assert open_runtime(read_folder(exported("mean")), device="cpu").name == "onnx"
    assert os.fspath(read_folder(exported("mean")).path) == str(exported("mean"))
    assert {START_GRAPH, STEP_GRAPH} < set(GRAPHS)
