"""Training that starts from a model folder: the same model before the first step, with room for new words."""

import pytest
import torch
from training_runs import error_line, fit, recipe, write_table

from captioner import Captioner, CheckpointError
from captioner.checkpoint import Checkpoint, save_checkpoint
from captioner.config import ModelConfig
from captioner.model import build_model
from captioner.tokenizer import Tokenizer
from training.export import load_run
from training.module import start_from

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")
DECODERS = ("mean", "additive", "multihead")


def larger(base, words):
    tokenizer = base.tokenizer.extended([" ".join(words)], min_count=1) if words else base.tokenizer
    settings = {**base.model.config.to_dict(), "vocabulary_size": tokenizer.vocabulary_size}
    return Checkpoint(build_model(ModelConfig.from_dict(settings)).eval(), tokenizer)


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_a_new_word_the_model_is_the_same(tiny_checkpoint, example_photos, decoder):
    base = tiny_checkpoint(decoder)
    model = larger(base, ())
    start_from(model.model, base)
    expected, found = (Captioner(checkpoint, device="cpu").caption(example_photos[0]) for checkpoint in (base, model))
    assert found.text == expected.text
    assert [word.probability for word in found.words] == [word.probability for word in expected.words]


@pytest.mark.parametrize("decoder", DECODERS)
def test_new_words_get_rows_of_their_own_behind_the_old_ones(tiny_checkpoint, decoder):
    base = tiny_checkpoint(decoder)
    model = larger(base, ("zebra", "lion"))
    start_from(model.model, base)
    old, size, changed = base.model.state_dict(), base.model.config.vocabulary_size, 0
    for name, value in model.model.state_dict().items():
        assert torch.equal(value[:size] if value.shape != old[name].shape else value, old[name])
        if value.shape != old[name].shape:
            changed += 1
            assert all(torch.equal(row, old[name][Tokenizer.unknown_id]) for row in value[size:])
    assert changed


@pytest.mark.parametrize("decoder", DECODERS)
def test_another_side_of_the_pictures_stretches_the_positions_of_the_grid(tiny_checkpoint, decoder):
    base = tiny_checkpoint(decoder)
    settings = base.model.config.to_dict()
    settings["preprocessing"] = {**settings["preprocessing"], "side_px": 2 * settings["preprocessing"]["side_px"]}
    model = build_model(ModelConfig.from_dict(settings))
    start_from(model, base)
    old = base.model.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == ({"decoder.grid_row", "decoder.grid_column"} if decoder == "multihead" else set())
    for name in changed:
        given, value = old[name].flatten(0, 1), model.state_dict()[name].flatten(0, 1)
        # Each cell is halved, and its halves lie a quarter of a cell to both sides of its centre.
        between = given[:-1].lerp(given[1:], 0.25), given[:-1].lerp(given[1:], 0.75)
        torch.testing.assert_close(value[1:-1:2], between[0])
        torch.testing.assert_close(value[2::2], between[1])
        torch.testing.assert_close(value[[0, -1]], given[[0, -1]])


def test_another_shape_is_refused(tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"model\.init_from: decoder"):
        start_from(tiny_checkpoint("additive").model, tiny_checkpoint("mean"))


def test_a_run_starts_from_a_model_folder_and_refuses_settings_that_contradict_it(tmp_path, tiny_checkpoint, capsys):
    base = tiny_checkpoint("additive")
    save_checkpoint(base, tmp_path / "model")
    root = write_table(tmp_path / "data")
    settings = recipe(root, tmp_path / "run", "additive", stages=[{"epochs": 1, "learning_rate": 0.0}])
    settings["model"] |= {"init_from": str(tmp_path / "model"), "encoder": None, "decoder": None}
    settings["model"]["decoder_settings"] = None
    settings["data"] |= {"max_tokens": None, "preprocessing": None}
    assert fit(tmp_path / "run", settings) == 0
    run = load_run(next((tmp_path / "run").rglob("last.ckpt"))).checkpoint
    assert run.model.config.decoder_settings == base.model.config.decoder_settings
    trained = run.model.state_dict()
    for name, value in base.model.state_dict().items():
        torch.testing.assert_close(trained[name][: len(value)] if value.ndim else trained[name], value)
    capsys.readouterr()
    settings["model"]["decoder"] = "mean"
    assert fit(tmp_path / "run", settings) == 1
    assert "model.decoder=mean differs from that of the model" in error_line(capsys)
