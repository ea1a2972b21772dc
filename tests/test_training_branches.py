"""Laws of branches: each begins with the weights of its stage, and their mean is what is exported."""

import shutil

import lightning
import pytest
import torch
from safetensors.torch import load_file
from test_training_resume import EMA, assert_same_end
from training_runs import error_line, fit, recipe, write_table

from captioner import Captioner, ConfigError
from training.export import load_run
from training.stages import Stage, StagePlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*WeightAveraging", "ignore:(?s).*serialize"),
    pytest.mark.filterwarnings("ignore:.*not resumable", "ignore:The dirpath has changed"),
]


class Starts(lightning.Callback):
    """Writes down the weights and the optimiser's memory before the first step of every epoch."""

    found = None

    def __init__(self):
        type(self).found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            weights = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
            self.found[trainer.current_epoch] = (weights, len(trainer.optimizers[0].state))


def settings_for(data_root, folder, callbacks=()):
    branch = {"epochs": 2, "objective": "self_critical", "learning_rate": 1e-3, "from_stage": 1, "dropout": True}
    settings = recipe(
        data_root,
        folder,
        stages=[{"epochs": 1, "learning_rate": 1e-2}, branch, branch],
        callbacks=[EMA, *callbacks],
        data={"cache_folder": str(data_root / "cache")},
    )
    return {**settings, "last_checkpoint": {"minutes": 0}}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"), train=13, dev=4)


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """A run of a stage and two branches: its checkpoints and what they began with."""
    folder = tmp_path_factory.mktemp("whole")
    callbacks = [
        {"class_path": f"{__name__}.Starts"},
        {"class_path": "test_training_resume.KeepAll", "init_args": {"folder": str(folder / "kept")}},
    ]
    assert fit(folder, settings_for(data_root, folder, callbacks), "--export", folder / "model") == 0
    return folder, Starts.found


def weights_of(path):
    return load_run(path).checkpoint.model.state_dict()


def test_every_branch_begins_with_the_weights_of_its_stage_and_no_memory(whole):
    folder, starts = whole
    expected = weights_of(folder / "checkpoints" / "stage-1.ckpt")
    for epoch in (1, 3):
        weights, memory = starts[epoch]
        assert memory == 0
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert starts[2][1] > 0  # within a branch it goes on


def test_branches_differ_and_their_mean_is_exported(whole):
    folder, _ = whole
    first, second = (weights_of(folder / "checkpoints" / f"stage-{number}.ckpt") for number in (2, 3))
    assert "the mean of stage-2.ckpt, stage-3.ckpt" in (folder / "model" / "README.md").read_text()
    exported = Captioner.load(folder / "model", device="cpu").model.state_dict()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert any("decoder" in name for name in different)
    for name in different:
        torch.testing.assert_close(exported[name], (first[name] + second[name]) / 2)


def test_a_run_resumed_anywhere_in_its_branches_ends_the_same(whole, data_root, tmp_path):
    folder, _ = whole
    end = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = sorted((folder / "kept").iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    per_epoch = end["global_step"] // 5
    for step in (3 * per_epoch, 3 * per_epoch + 1):  # between two branches, and within one
        checkpoint = next(path for path in kept if int(path.stem.split("-")[1]) == step)
        before, after = tmp_path / f"{step}-before", tmp_path / f"{step}-after"
        before.mkdir()
        shutil.copy(checkpoint, before / "last.ckpt")
        shutil.copy(folder / "checkpoints" / "stage-1.ckpt", before)
        assert fit(after, settings_for(data_root, after), "--ckpt_path", before / "last.ckpt") == 0
        assert_same_end(torch.load(after / "checkpoints" / "last.ckpt", weights_only=True), end, str(step))
        assert (after / "checkpoints" / "stage-1.ckpt").exists()


def test_a_run_exports_the_mean_of_the_stages_that_it_names_also_when_it_is_resumed(whole, data_root, tmp_path):
    folder, _ = whole
    settings = settings_for(data_root, tmp_path / "run")
    settings["model"]["export_stages"] = [1, 2]
    settings["model"]["search"] |= {"beam_size": 2, "no_repeat_ngram": 2}
    shutil.copytree(folder / "checkpoints", tmp_path / "before", ignore=shutil.ignore_patterns("stage-3.ckpt"))
    arguments = ["--ckpt_path", tmp_path / "before" / "stage-2.ckpt", "--export", tmp_path / "model"]
    assert fit(tmp_path / "run", settings, *arguments, "--export_half", "true") == 0
    model = Captioner.load(tmp_path / "model", device="cpu")
    first, second = (weights_of(tmp_path / "before" / f"stage-{number}.ckpt") for number in (1, 2))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = "decoder.embedding.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(stored[name], ((first[name] + second[name]) / 2).half())
    assert "the mean of stage-1.ckpt, stage-2.ckpt" in (tmp_path / "model" / "README.md").read_text()
    assert (model.config.search.beam_size, model.config.search.no_repeat_ngram) == (2, 2)


@pytest.mark.parametrize(
    ("stages", "words"), [([0], "names stage 0, and there are 2"), ([3], "names stage 3"), ([1, 1], "a stage twice")]
)
def test_stages_to_export_that_there_are_not_are_refused(stages, words):
    with pytest.raises(ConfigError, match=rf"^model\.export_stages .*{words}"):
        StagePlan([Stage(epochs=1), Stage(epochs=1)], export_stages=stages)


@pytest.mark.parametrize(("content", "words"), [(None, "missing, but stage 3"), (b"no checkpoint", "damaged, or of")])
def test_a_branch_without_its_checkpoint_stops_with_one_line(whole, data_root, tmp_path, capsys, content, words):
    folder, _ = whole
    shutil.copy(folder / "checkpoints" / "stage-2.ckpt", tmp_path)
    if content is not None:
        (tmp_path / "stage-1.ckpt").write_bytes(content)
    settings = settings_for(data_root, tmp_path / "run")
    assert fit(tmp_path / "run", settings, "--ckpt_path", tmp_path / "stage-2.ckpt") == 1
    line = error_line(capsys)
    assert words in line
    assert "stage-1.ckpt" in line


def test_branches_are_the_last_stages_that_begin_with_one():
    plain = Stage(epochs=1)
    assert StagePlan([plain, plain]).branches == ()
    assert StagePlan([plain, Stage(epochs=1, from_stage=1)]).branches == ()
    first, second = Stage(epochs=1, from_stage=1), Stage(epochs=1, from_stage=2)
    assert StagePlan([plain, first, first, first]).branches == (2, 3, 4)
    assert StagePlan([plain, plain, first, second, second]).branches == (4, 5)
    again = Stage(epochs=1, from_stage=(2, 3))
    assert StagePlan([plain, first, first, again, again]).branches == (4, 5)
    assert StagePlan([plain, first, first, again]).branches == ()
    assert StagePlan([plain, first, first]).exported == (2, 3)
    assert StagePlan([plain, first, first], export_stages=[1, 3]).exported == (1, 3)
    assert StagePlan([plain, first]).exported == ()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((), "names no stage"),
        ((2, 2), "names a stage twice"),
        ((2, 5), "must name an earlier stage, got 5"),
        ((1, 2), "takes the mean of branches from one stage"),
        ((2, 4), "takes the mean of branches from one stage"),
    ],
)
def test_the_mean_is_of_branches_from_one_stage(numbers, words):
    plain, branch = Stage(epochs=1), Stage(epochs=1, from_stage=1)
    last = Stage(epochs=1, from_stage=numbers)
    with pytest.raises(ConfigError, match=f"stage 5: from_stage {words}"):
        StagePlan([plain, branch, branch, plain, last])


def test_a_second_round_begins_with_the_mean_of_the_first(data_root, tmp_path):
    callbacks = [{"class_path": f"{__name__}.Starts"}]
    settings = settings_for(data_root, tmp_path, callbacks)
    stages = settings["model"]["stages"]
    again = {**stages[-1], "epochs": 1, "from_stage": [2, 3]}
    settings["model"]["stages"] = [*stages, again, again]
    assert fit(tmp_path, settings) == 0
    first, second = (weights_of(tmp_path / "checkpoints" / f"stage-{number}.ckpt") for number in (2, 3))
    for epoch in (5, 6):
        weights, memory = Starts.found[epoch]
        assert memory == 0
        for name, value in weights.items():
            mean = (first[name] + second[name]) / 2 if value.is_floating_point() else first[name]
            torch.testing.assert_close(value, mean)


@pytest.mark.parametrize("number", [0, -1, 2, 3])
def test_a_stage_that_begins_with_none_before_it_is_refused(number):
    with pytest.raises(ConfigError, match=f"stage 2: from_stage must name an earlier stage, got {number}"):
        StagePlan([Stage(epochs=1), Stage(epochs=1, from_stage=number)])
