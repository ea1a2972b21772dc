"""Laws of `Captioner`, with the bundled model: they hold whatever its captions say."""

import io
import itertools
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from captions import TOLERANCE, assert_map, assert_same, assert_same_words, everything, grid_of, with_nan
from conftest import TINY_DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import EXAMPLES, STORED_AS
from PIL import Image

from captioner import Captioner, ConfigError, ImageError, ImageReadError, SearchError

SEARCHES = {
    "beam": {"beam_size": 4, "n_best": 3},
    "diverse beam": {"beam_size": 4, "groups": 2, "n_best": 4},
    "greedy": {"method": "greedy"},
    "sample": {"method": "sample", "seed": 7, "n_best": 3, "temperature": 0.8},
}


@pytest.fixture(scope="module", params=["bundled", *TINY_DECODERS])
def any_captioner(request, captioner, tiny_checkpoint):
    """The bundled model, and one of random weights of every decoder."""
    if request.param == "bundled":
        return captioner
    return Captioner(tiny_checkpoint(request.param), device="cpu")


def test_the_tests_could_tell_one_picture_and_one_word_from_another(any_captioner, example_photos):
    """What mixed them up would otherwise pass: see `conftest.discriminate`."""
    visible = 100 * TOLERANCE
    found = [any_captioner.caption(photo, beam_size=4) for photo in example_photos]
    for caption, other in itertools.combinations(found, 2):
        differences = [caption.score - other.score, caption.words[0].probability - other.words[0].probability]
        assert np.abs(differences).max() > visible
    if any_captioner.config.decoder == "mean":
        return  # its maps are even
    for caption, other in itertools.combinations(found, 2):
        assert np.abs(caption.words[0].attention - other.words[0].attention).max() > visible
    steps = [np.abs(w.attention - v.attention).max() for c in found for w, v in itertools.pairwise(c.words)]
    assert np.mean(np.array(steps) > visible) > 0.5


@pytest.fixture(scope="module", params=SEARCHES)
def singles(request, any_captioner, example_photos):
    """A search, and what it finds for each example photo alone."""
    options = SEARCHES[request.param]
    return options, [any_captioner.caption(photo, **options) for photo in example_photos]


def test_a_batch_gives_what_singles_give(any_captioner, example_photos, singles):
    options, expected = singles
    for batch_size in (3, 32):
        found = list(any_captioner.caption_batch(example_photos, batch_size=batch_size, **options))
        for caption, single in zip(found, expected, strict=True):
            assert_same(caption, single)


def test_a_found_caption_scores_as_it_was_found(any_captioner, example_photos, singles):
    for photo, best in zip(example_photos, singles[1], strict=True):
        for caption in everything(best):
            scored = any_captioner.score(photo, caption.text)
            assert scored.text == caption.text
            assert scored.score == pytest.approx(caption.score, abs=TOLERANCE)
            assert scored.end_probability == pytest.approx(caption.end_probability, abs=TOLERANCE)
            assert_same_words(scored.words, caption.words)


def test_maps_and_probabilities_are_those_of_teacher_forcing(any_captioner, example_photos, singles):
    tokenizer = any_captioner.tokenizer
    for photo, best in zip(example_photos, singles[1], strict=True):
        grid_1PC = grid_of(any_captioner, photo)
        for caption in everything(best):
            token_ids = tokenizer.encode(caption.text)
            with torch.inference_mode():
                tokens_1T = torch.tensor([[tokenizer.start_id, *token_ids]])
                logits_1TV, attention_1TP = any_captioner.model.decoder(grid_1PC, tokens_1T)
            probabilities_TV = logits_1TV[0].softmax(dim=-1)
            assert len(caption.words) == len(token_ids)
            for step, (word, token_id) in enumerate(zip(caption.words, token_ids, strict=True)):
                assert_map(word.attention, any_captioner.model.encoder.grid_hw)
                assert_map(word.attention_heads, any_captioner.model.encoder.grid_hw)
                forced_P = attention_1TP[0, step].numpy()
                np.testing.assert_allclose(word.attention.ravel(), forced_P, rtol=0, atol=TOLERANCE)
                forced = float(probabilities_TV[step, token_id])
                assert word.probability == pytest.approx(forced, abs=TOLERANCE)


def test_alternatives_are_best_first_and_no_two_have_one_text(singles):
    for best in singles[1]:
        captions = everything(best)
        scores = [caption.score for caption in captions]
        assert scores == sorted(scores, reverse=True)
        assert len({caption.text for caption in captions}) == len(captions) <= singles[0].get("n_best", 1)


@pytest.mark.parametrize(
    "options", [{}, {"max_words": 4}, {"method": "sample", "seed": 3}, {"min_words": 14, "ban": ("a",)}]
)
def test_a_stream_gives_the_words_of_the_caption(captioner, example_photos, options):
    for photo in example_photos[:3]:
        expected = captioner.caption(photo, **{"method": "greedy", **options})
        assert_same_words(list(captioner.stream(photo, **options)), expected.words)


def test_a_seed_makes_sampling_reproducible_and_leaves_the_global_generator_alone(captioner, example_photos):
    options = {"method": "sample", "temperature": 1.5}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = captioner.caption(example_photos[0], seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(captioner.caption(example_photos[0], seed=1, **options), first)
    others = {captioner.caption(example_photos[0], seed=seed, **options).text for seed in range(2, 8)}
    assert others != {first.text}


@pytest.mark.parametrize("orientation", STORED_AS)
def test_the_exif_orientation_does_not_change_the_caption(any_captioner, example_photos, orientation):
    upright = Image.open(example_photos[0]).resize((320, 200))
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)  # lossless, so that the pixels are equal
    caption = any_captioner.caption(file.getvalue())
    assert caption.geometry.picture_hw_px == (200, 320)
    assert_same(caption, any_captioner.caption(np.asarray(upright)))
    if turn is not None:  # or the orientation would not matter
        sideways = any_captioner.caption(np.asarray(stored))
        assert abs(sideways.score - caption.score) > 10 * TOLERANCE


# --- Batches. What a caption says does not matter here: a tiny model. ---


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_a_batch_of_an_endless_source_is_lazy_and_pulls_one_batch_ahead(tiny_captioner):
    pulled = 0

    def endless():
        nonlocal pulled
        for seed in itertools.count():
            pulled += 1
            yield noise(seed)

    captions = tiny_captioner.caption_batch(endless(), batch_size=3)
    assert pulled == 0
    for taken in range(1, 8):
        next(captions)
        assert pulled == -(-taken // 3) * 3


def test_a_batch_keeps_no_picture_that_is_done(tiny_captioner):
    made = []

    def pictures():
        for seed in range(20):
            picture = noise(seed)
            made.append(weakref.ref(picture))
            yield picture

    most = 0
    for _ in tiny_captioner.caption_batch(pictures(), batch_size=2):
        most = max(most, sum(picture() is not None for picture in made))
    assert len(made) == 20
    assert most <= 4  # a batch, and the one before it while the batch is filled


def test_a_batch_keeps_the_order(tiny_captioner):
    pictures = [noise(seed) for seed in range(7)]
    found = tiny_captioner.caption_batch(pictures, batch_size=3, method="sample", seed=1)
    for caption, picture in zip(found, pictures, strict=True):
        assert caption.picture == picture


def test_no_pictures_give_no_captions(tiny_captioner):
    assert list(tiny_captioner.caption_batch([])) == []


def test_an_error_is_returned_in_its_place(tiny_captioner):
    pictures = [noise(0), b"not a picture", noise(1), "no/such/file.jpg", b""]
    found = list(tiny_captioner.caption_batch(pictures, batch_size=2, on_error="return"))
    assert [isinstance(result, ImageError) for result in found] == [False, True, False, True, True]
    assert "no/such/file.jpg" in str(found[3])
    assert_same(found[2], tiny_captioner.caption(noise(1)))


def test_a_batch_of_bad_pictures_alone_gives_their_errors(tiny_captioner):
    found = list(tiny_captioner.caption_batch([b"x", b"y"], on_error="return"))
    assert [type(result) for result in found] == [ImageReadError, ImageReadError]


def test_an_error_is_raised_after_the_captions_before_it(tiny_captioner):
    captions = tiny_captioner.caption_batch([noise(0), noise(1), noise(2), b"bad", noise(3)], batch_size=2)
    for seed in range(3):
        assert_same(next(captions), tiny_captioner.caption(noise(seed)))
    with pytest.raises(ImageReadError, match="<bytes>"):
        next(captions)


@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_what_the_source_of_the_pictures_raises_comes_after_the_captions_before_it(tiny_captioner, batch_size):
    def pictures():
        for seed in range(3):
            yield noise(seed)
        raise RuntimeError("the disk is gone")

    captions = tiny_captioner.caption_batch(pictures(), batch_size=batch_size)
    for seed in range(3):
        assert_same(next(captions), tiny_captioner.caption(noise(seed)))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(captions)


@pytest.fixture
def spoilt(tiny_captioner, tmp_path, monkeypatch):
    """A captioner whose features of one picture are NaN, and that picture among others."""
    encode = Captioner._encode

    def spoil(self, inputs):
        return with_nan(encode(self, inputs), [item.name.endswith("bad.png") for item in inputs])

    monkeypatch.setattr(Captioner, "_encode", spoil)
    noise(9).save(tmp_path / "bad.png")
    return tiny_captioner, [noise(0), tmp_path / "bad.png", noise(1)]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_picture_that_has_no_caption_is_named_and_loses_no_other(spoilt, batch_size):
    captioner, pictures = spoilt
    first, error, last = captioner.caption_batch(pictures, batch_size=batch_size, on_error="return")
    assert isinstance(error, SearchError)
    assert str(error).startswith(f"{pictures[1]}: the model gave NaN")
    assert_same(first, captioner.caption(pictures[0]))
    assert_same(last, captioner.caption(pictures[2]))
    captions = captioner.caption_batch(pictures, batch_size=batch_size)
    assert_same(next(captions), first)
    with pytest.raises(SearchError, match=r"bad\.png"):
        next(captions)
    with pytest.raises(SearchError, match=r"bad\.png"):
        captioner.caption(pictures[1])


def test_what_no_picture_can_meet_is_raised_even_where_errors_are_returned(tiny_captioner):
    options = {"must_include": ["dog"], "ban": ["dog"]}
    with pytest.raises(SearchError, match="must_include 'dog' and ban 'dog'"):
        list(tiny_captioner.caption_batch([noise(0), noise(1)], on_error="return", **options))


def test_of_many_demands_the_first_ones_are_named(tiny_captioner):
    words = ["a", "dog", "man", "red", "ball", "runs", "with", "the"]
    with pytest.raises(SearchError, match="'ball' and 3 more of must_include and max_words=7") as caught:
        tiny_captioner.caption(noise(0), must_include=words, max_words=7)
    assert "'runs'" not in str(caught.value)


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_search_without_memory_names_what_to_lower(tiny_captioner, monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(tiny_captioner.model.decoder, "start", fail)
    with pytest.raises(SearchError, match="beam_size=900 for 2 pictures at once; lower beam_size or batch_size"):
        list(tiny_captioner.caption_batch([noise(0), noise(1)], beam_size=900, on_error="return"))


def test_a_model_of_few_words_caps_what_was_not_asked_for(tiny_checkpoint):
    short = Captioner(tiny_checkpoint("mean", max_tokens=8), device="cpu")
    assert len(short.caption(noise(0)).words) <= 7
    assert len(list(short.stream(noise(0)))) <= 7
    with pytest.raises(SearchError, match="at most 8; set max_words to at most 7"):
        short.caption(noise(0), max_words=8)


def test_numbers_of_numpy_are_numbers(tiny_captioner):
    options = {"beam_size": np.int64(4), "n_best": np.uint8(2), "length_penalty": np.float32(0.5)}
    expected = tiny_captioner.caption(noise(0), beam_size=4, n_best=2, length_penalty=0.5)
    assert_same(next(tiny_captioner.caption_batch([noise(0)], batch_size=np.int32(2), **options)), expected)
    with pytest.raises(ConfigError, match="beam_size"):
        tiny_captioner.caption(noise(0), beam_size=np.True_)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_default_dtype_of_torch_changes_nothing(any_captioner, search):
    expected = any_captioner.caption(noise(0), **SEARCHES[search])
    torch.set_default_dtype(torch.float64)
    try:
        found = any_captioner.caption(noise(0), **SEARCHES[search])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)
    assert found.words[0].attention.dtype == np.float32


class BytesPath(os.PathLike):
    def __init__(self, path):
        self.path = os.fsencode(path)

    def __fspath__(self):
        return self.path


def test_a_path_may_be_bytes_behind_its_name(tiny_captioner, example_photos):
    found = tiny_captioner.caption(BytesPath(example_photos[0]))
    assert_same(found, tiny_captioner.caption(example_photos[0]))
    assert found.picture == example_photos[0]


MUTABLE = {
    "array": lambda array: (array, lambda: array.fill(0)),
    "tensor": lambda array: ((tensor := torch.from_numpy(array).permute(2, 0, 1)), tensor.zero_),
    "image": lambda array: ((image := Image.fromarray(array)), image.close),
    "bytearray": lambda array: ((data := bytearray(png_of(array))), data.clear),
    "memoryview": lambda array: (memoryview(data := bytearray(png_of(array))), lambda: data.__setitem__(0, 0)),
}


def png_of(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", MUTABLE)
def test_a_figure_draws_what_was_captioned_whatever_became_of_it(tiny_captioner, kind):
    pixels = np.asarray(noise(0)).copy()
    source, spoil = MUTABLE[kind](pixels.copy())
    caption = tiny_captioner.caption(source, max_words=1)
    spoil()
    np.testing.assert_array_equal(caption.figure().axes[0].images[0].get_array(), pixels)


def test_a_caption_holds_a_small_copy_of_a_large_array(tiny_captioner):
    caption = tiny_captioner.caption(np.zeros((900, 1800, 3), np.uint8), max_words=1)
    assert caption.picture.size == (512, 256)
    assert caption.geometry.picture_hw_px == (900, 1800)


@pytest.mark.parametrize(
    "pictures",
    [
        "photo.jpg",
        b"data",
        bytearray(b"data"),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        io.BytesIO(b"data"),
        Image.new("RGB", (8, 8)),
        None,
        5,
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_picture_is_no_batch(tiny_captioner, pictures):
    with pytest.raises(ConfigError, match="use caption"):
        tiny_captioner.caption_batch(pictures)


def test_stacked_arrays_and_arrays_of_paths_are_batches(tiny_captioner, example_photos):
    stack = np.stack([np.asarray(noise(seed)) for seed in range(3)])
    for caption, seed in zip(tiny_captioner.caption_batch(stack), range(3), strict=True):
        assert_same(caption, tiny_captioner.caption(noise(seed)))
    assert len(list(tiny_captioner.caption_batch(np.array([str(example_photos[0])])))) == 1


# --- Wrong use. Nothing is iterated over: the error comes with the call. ---

WRONG_OPTIONS = [
    ({"beam_size": 0}, "beam_size"),
    ({"beam_sise": 2}, "beam_size"),
    ({"n_best": 5}, "n_best"),
    ({"method": "magic"}, "magic"),
    ({"temperature": 0.0}, "temperature"),
    ({"seed": -1}, "seed"),
    ({"min_words": 9, "max_words": 3}, "min_words"),
    ({"method": "greedy", "n_best": 2}, "n_best"),
    ({"method": "sample", "must_include": ["dog"]}, "must_include"),
]


@pytest.mark.parametrize(("options", "named"), WRONG_OPTIONS)
def test_wrong_options_are_refused_at_once(tiny_captioner, options, named):
    for call in (tiny_captioner.caption, lambda picture, **o: tiny_captioner.caption_batch([picture], **o)):
        with pytest.raises(ConfigError, match=named):
            call(noise(0), **options)


@pytest.mark.parametrize(
    "batch", [{"batch_size": 0}, {"batch_size": 10**30}, {"batch_size": True}, {"batch_size": 2.0}, {"on_error": "x"}]
)
def test_wrong_arguments_of_a_batch_are_refused_at_once(tiny_captioner, batch):
    with pytest.raises(ConfigError, match=next(iter(batch))):
        tiny_captioner.caption_batch([noise(0)], **batch)


@pytest.mark.parametrize(
    "options",
    [{"method": "beam"}, {"method": "sample", "n_best": 2}, {"must_include": ["dog"]}, {"beam_size": 0}],
)
def test_a_stream_refuses_wrong_options_at_once(tiny_captioner, options):
    with pytest.raises(ConfigError):
        tiny_captioner.stream(noise(0), **options)


def test_a_stream_refuses_a_bad_picture_and_an_impossible_search_at_once(tiny_captioner):
    with pytest.raises(ImageReadError):
        tiny_captioner.stream(b"not a picture")
    with pytest.raises(SearchError, match="max_words"):
        tiny_captioner.stream(noise(0), max_words=100)


def test_words_that_must_appear_do_and_banned_ones_do_not(captioner, example_photos):
    for photo in example_photos[:2]:
        found = captioner.caption(photo, must_include=["red ball", "dog"], beam_size=5)
        words = [word.text.lower() for word in found.words]
        assert "red ball" in " ".join(words)
        assert "dog" in words
        first = captioner.caption(photo).words[1].text
        without = captioner.caption(photo, ban=[first], beam_size=4, n_best=3)
        for caption in everything(without):
            assert first not in [word.text.lower() for word in caption.words]


def test_an_unknown_word_cannot_be_included_and_is_named(captioner, example_photos):
    for call in (captioner.caption, lambda photo, **o: captioner.caption_batch([photo], **o)):
        with pytest.raises(SearchError, match="'qwyzzle'"):
            call(example_photos[0], must_include=["a qwyzzle runs"])


def test_an_unknown_word_is_banned_already(captioner, example_photos):
    expected = captioner.caption(example_photos[0])
    assert_same(captioner.caption(example_photos[0], ban=["qwyzzle", "a qwyzzle"]), expected)


@pytest.mark.parametrize("text", ["...", "!?"])
def test_a_phrase_without_words_is_refused(captioner, example_photos, text):
    with pytest.raises(SearchError, match="at least one word"):
        captioner.caption(example_photos[0], must_include=[text])


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("", "at least one word"),
        (None, "at least one word"),
        ("A qwyzzle.", "'qwyzzle'"),
        ("a " * 60, "60 words"),
    ],
)
def test_a_sentence_that_cannot_be_scored_is_refused(captioner, example_photos, sentence, fault):
    with pytest.raises(SearchError, match=fault):
        captioner.score(example_photos[0], sentence)


def test_capitals_and_punctuation_do_not_change_a_score(captioner, example_photos):
    expected = captioner.score(example_photos[0], "A man's dog runs.")
    assert expected.text == "A man's dog runs."
    assert_same(captioner.score(example_photos[0], "  a MAN’S dog, runs!"), expected)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", "hpu", "privateuseone", "vulkan", "cpu:x", None, 3.5])
def test_a_device_that_is_not_there_is_refused(tiny_checkpoint, device):
    with pytest.raises(ConfigError, match="device"):
        Captioner(tiny_checkpoint("mean"), device=device)


def test_a_captioner_says_what_it_could_compute_in(captioner, tiny_checkpoint):
    made = Captioner(tiny_checkpoint("mean"))
    assert made.runtimes == ("torch",)
    assert captioner.runtimes == ("torch", "onnx")
    for name in captioner.runtimes:
        assert Captioner.load(runtime=name).runtime.name == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_another_device_and_cuda_is_refused(tiny_checkpoint):
    assert not Captioner(tiny_checkpoint("mean")).device.startswith("cuda")
    with pytest.raises(ConfigError, match="cuda"):
        Captioner(tiny_checkpoint("mean"), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("search", SEARCHES)
def test_a_gpu_captions_as_the_cpu_does(captioner, example_photos, search):
    on_gpu = Captioner.load(device="cuda")
    assert Captioner.load().device.startswith("cuda")
    assert captioner.device == "cpu"
    for photo in example_photos:
        expected = captioner.caption(photo, **SEARCHES[search])
        scored = on_gpu.score(photo, expected.text)
        assert scored.score == pytest.approx(expected.score, abs=1e-2)  # its convolutions may run in TF32
        assert on_gpu.caption(photo, **SEARCHES[search]).words[0].attention.dtype == np.float32


# --- Whatever the options, the result obeys them. ---

WORDS = ("dog", "man", "red ball", "grass", "a", "woman in black")


@st.composite
def search_options(draw):
    method = draw(st.sampled_from(["beam", "beam", "greedy", "sample"]))
    options = {
        "method": method,
        "min_words": draw(st.integers(1, 6)),
        "max_words": draw(st.integers(8, 14)),
        "no_repeat_ngram": draw(st.integers(0, 3)),
        "ban": draw(st.lists(st.sampled_from(WORDS[:3]), max_size=2)),
    }
    if method == "beam":
        groups = draw(st.sampled_from([1, 1, 2]))
        options |= {
            "beam_size": groups * draw(st.integers(1, 3)),
            "groups": groups,
            "diversity": draw(st.floats(0, 2)),
            "length_penalty": draw(st.floats(-1, 2)),
        }
        options["n_best"] = draw(st.integers(1, options["beam_size"]))
        if groups == 1:
            options["must_include"] = draw(st.lists(st.sampled_from(WORDS[3:]), max_size=1))
    if method == "sample":
        options |= {
            "n_best": draw(st.integers(1, 3)),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "temperature": draw(st.floats(0.1, 3)),
            "top_k": draw(st.integers(0, 20)),
            "top_p": draw(st.floats(0.1, 1)),
        }
    return options


def contains(words, phrase):
    wanted = phrase.split()
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))


@settings(max_examples=25)
@given(options=search_options(), photo=st.sampled_from(EXAMPLES))
def test_whatever_the_options_the_captions_obey_them(captioner, options, photo):
    best = captioner.caption(photo, **options)
    captions = everything(best)
    assert len({caption.text for caption in captions}) == len(captions) <= options.get("n_best", 1)
    for caption in captions:
        words = [word.text.lower() for word in caption.words]
        assert options["min_words"] <= len(words) <= options["max_words"]
        assert not any(contains(words, phrase) for phrase in options["ban"])
        assert all(contains(words, phrase) for phrase in options.get("must_include", ()))
        size = options["no_repeat_ngram"]
        runs = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)] if size else []
        assert len(set(runs)) == len(runs)
        assert caption.score <= 0
        for word in caption.words:
            assert_map(word.attention, captioner.model.encoder.grid_hw)
            assert 0 <= word.probability <= 1
    assert_same(captioner.caption(photo, **options), best)


# --- Threads and processes. ---


def test_threads_share_a_captioner(captioner, example_photos):
    jobs = [(photo, SEARCHES[name]) for photo in example_photos for name in ("beam", "sample")]
    expected = [captioner.caption(photo, **options) for photo, options in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda job: captioner.caption(job[0], **job[1]), jobs)
        for caption, single in zip(found, expected, strict=True):
            assert_same(caption, single)


def test_a_caption_survives_pickling(captioner, example_photos):
    with example_photos[0].open("rb") as file:
        caption = captioner.caption(file, n_best=2)
    again = pickle.loads(pickle.dumps(caption))
    assert_same(again, caption)
    assert again.finished == caption.finished
    assert again.end_probability == caption.end_probability
    assert again.picture == caption.picture


def test_results_are_plain_arrays_that_can_be_changed(captioner, example_photos):
    attention = captioner.caption(example_photos[0]).words[0].attention
    attention *= 2
    assert attention.sum() == pytest.approx(2, abs=TOLERANCE)
