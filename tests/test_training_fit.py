"""Trainings of a toy data set from end to end: what is trained, on what, and what the options change."""

import shutil

import pytest
import torch
import yaml
from conftest import TINY_DECODERS
from lightning import seed_everything
from training_runs import TRAIN, Recorder, error_line, fit, recipe, write_table

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers", "ignore:.*CPU. Using")
NO_VALIDATION = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
RECORDER = {"class_path": "training_runs.Recorder"}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"))


def run(data_root, folder, decoder="mean", *, status=0, still=False, **more):
    """Train and return what happened; `still`: without dropout and augmentation, so that steps can be compared."""
    settings = recipe(data_root, folder, decoder, callbacks=[RECORDER], **more)
    if still:
        settings["model"]["decoder_settings"] = {**TINY_DECODERS[decoder], "dropout": 0.0}
        settings["data"] |= {"augmentation": None, "cache_views": 1}
        settings["trainer"] |= NO_VALIDATION
        settings["best_checkpoint"] = {"monitor": None}
    assert fit(folder, settings) == status
    return Recorder.last


def one(**stage):
    return [{"epochs": 1, **stage}]


# --- Three stages ---


@pytest.fixture(scope="module", params=TINY_DECODERS)
def stages(request, data_root, tmp_path_factory):
    """What happened in a training of three stages."""
    return run(data_root, tmp_path_factory.mktemp(request.param), request.param)


def test_gradients_reach_exactly_what_is_trained(stages):
    parts = [{name.partition(".")[0] for name in stages.trainable[epoch]} for epoch in range(3)]
    assert parts == [{"decoder"}, {"decoder", "encoder"}, {"decoder"}]
    assert stages.with_gradient[0] == stages.trainable[0]
    assert stages.with_gradient[1] == stages.trainable[1]
    assert stages.with_gradient[2] <= stages.trainable[2]  # no reward, no gradient


def test_statistics_of_batch_norms_move_only_while_the_encoder_is_trained(stages):
    counts = [
        {int(value) for name, value in stages.statistics[epoch].items() if name.endswith("num_batches_tracked")}
        for epoch in range(3)
    ]
    assert counts == [{0}, {2}, {2}]
    assert same(stages.statistics[1], stages.statistics[2])
    assert not same(stages.statistics[0], stages.statistics[1])


def test_each_epoch_shows_every_picture_once_in_another_order(stages):
    orders = [[name for names in stages.pictures[epoch] for name in names] for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(f"{index}.jpg" for index in range(TRAIN)) for order in orders)


def test_exactly_the_cached_stages_read_features(stages):
    assert stages.cached == {0: True, 1: False, 2: False}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


# --- The encoder ---


def test_a_step_on_cached_features_has_the_loss_of_one_on_pictures_up_to_float16(data_root, tmp_path):
    cached, shown = (
        run(data_root, tmp_path / str(cached), "multihead", still=True, stages=one(cached=cached))
        for cached in (True, False)
    )
    assert (cached.cached, shown.cached) == ({0: True}, {0: False})
    assert cached.losses[0] == pytest.approx(shown.losses[0], rel=1e-3)


def test_exactly_the_last_stages_of_the_encoder_are_trained_and_its_statistics_can_keep_still(data_root, tmp_path):
    stage = {"encoder": "finetune", "encoder_stages": 2, "encoder_batch_norm": False}
    happened = run(data_root, tmp_path, stages=[{"epochs": 1}, {"epochs": 1, **stage}])
    trained = {name.split(".")[2] for name in happened.trainable[1] if name.startswith("encoder.")}
    assert trained == {"11", "12"}  # of 13
    assert happened.with_gradient[1] == happened.trainable[1]
    assert same(happened.statistics[0], happened.statistics[1])


# --- What changes the loss ---


@pytest.fixture(scope="module")
def plain(data_root, tmp_path_factory):
    """The losses of a stage without any option."""
    return run(data_root, tmp_path_factory.mktemp("plain"), "additive", still=True, stages=one()).losses[0]


@pytest.mark.parametrize("name", ["label_smoothing", "attention_regularisation", "drop_words", "scheduled_sampling"])
def test_an_option_changes_the_loss(data_root, tmp_path, plain, name):
    losses = run(data_root, tmp_path, "additive", still=True, stages=one(**{name: 0.9})).losses[0]
    assert losses[1] != plain[1]
    # Scheduled sampling rises from 0: the first step is as without it.
    assert (losses[0] == plain[0]) == (name == "scheduled_sampling")


def test_gradients_of_several_batches_can_be_added_up(data_root, tmp_path):
    happened = run(data_root, tmp_path, stages=one(learning_rate=0.1), trainer={"accumulate_grad_batches": 2})
    assert len(happened.losses[0]) == 2
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_decoder_has_the_loss_of_an_eager_one(data_root, tmp_path):
    eager, compiled = (
        run(
            data_root,
            tmp_path / str(compiled),
            still=True,
            stages=one(),
            model={"compile_decoder": compiled},
            data={"batch_size": 8},
        )
        for compiled in (False, True)
    )
    assert compiled.losses[0] == pytest.approx(eager.losses[0], rel=1e-4)


# --- Precision ---


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # on a CPU Lightning takes bf16-mixed for both
def test_half_precision_trains_all_stages_to_nearly_the_same_loss(data_root, tmp_path, precision, monkeypatch):
    monkeypatch.setattr("training.cli._computes_bfloat16_in_software", lambda accelerator: False)
    half = run(data_root, tmp_path / "half", "multihead", still=True, trainer={"precision": precision})
    full = run(data_root, tmp_path / "full", "multihead", still=True, stages=one(cached=True, warmup_steps=1))
    assert half.losses[0] == pytest.approx(full.losses[0], rel=0.03)
    assert half.losses[0] != full.losses[0]
    assert len(half.losses) == 3


@pytest.mark.parametrize(("capability", "taken"), [("AVX2", "32-true"), ("AVX512", "bf16-mixed")])
def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so(
    data_root, tmp_path, monkeypatch, capsys, capability, taken
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    settings = recipe(data_root, tmp_path, stages=one(cached=True, warmup_steps=1), trainer={"precision": "bf16-mixed"})
    settings["trainer"]["logger"] = True
    assert fit(tmp_path, settings) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["precision"] == taken
    assert ("32-true is taken" in capsys.readouterr().err) == (taken == "32-true")


# --- Self-critical ---


class RewardRecorder(Recorder):
    """Writes down the mean reward of every epoch too."""

    def __init__(self):
        super().__init__()
        self.rewards = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.rewards.setdefault(trainer.current_epoch, []).append(float(trainer.callback_metrics["train_reward"]))


def late_reward(data_root, folder, baseline, learning_rate):
    stage = {"epochs": 40, "objective": "self_critical", "learning_rate": learning_rate}
    settings = recipe(
        data_root,
        folder,
        "mean",
        stages=[{**stage, "reward": {"baseline": baseline, "samples": 10}}],
        callbacks=[{"class_path": f"{__name__}.RewardRecorder"}],
        trainer=NO_VALIDATION,
        data={"augmentation": None},
    )
    settings["best_checkpoint"] = {"monitor": None}
    assert fit(folder, settings) == 0
    late = [reward for epoch, found in RewardRecorder.last.rewards.items() for reward in found if epoch >= 30]
    return sum(late) / len(late)


@pytest.mark.parametrize("baseline", ["mean_of_others", "greedy"])
def test_self_critical_training_raises_the_reward(data_root, tmp_path, baseline):
    untrained, trained = (late_reward(data_root, tmp_path / str(rate), baseline, rate) for rate in (0.0, 0.05))
    assert trained > 1.15 * untrained


@pytest.mark.parametrize("decoder", ["multihead", "additive"])
def test_dropout_of_self_critical_training_changes_what_is_learned_and_not_what_is_drawn(data_root, tmp_path, decoder):
    stage = {"epochs": 1, "objective": "self_critical", "learning_rate": 0.0, "reward": {"samples": 4}}
    happened = []
    for dropout in (False, True):
        settings = recipe(
            data_root,
            tmp_path / str(dropout),
            decoder,
            stages=[{**stage, "dropout": dropout}],
            callbacks=[{"class_path": f"{__name__}.RewardRecorder"}],
            trainer=NO_VALIDATION,
        )
        settings["model"]["decoder_settings"] = settings["model"]["decoder_settings"] | {"dropout": 0.5}
        settings["best_checkpoint"] = {"monitor": None}
        assert fit(tmp_path / str(dropout), settings) == 0
        happened.append(RewardRecorder.last)
    without, with_dropout = happened
    assert without.rewards == with_dropout.rewards
    assert any(without.rewards[0])
    assert without.losses != with_dropout.losses


# --- Bad pictures ---


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_of_bad_pictures_alone_has_no_loss_and_training_goes_on(tmp_path, cached):
    root = write_table(tmp_path / "data", train=8)
    for index in range(8):
        (root / f"{index}.jpg").write_bytes(b"no picture") if index < 7 else None
    happened = run(
        root, tmp_path, stages=one(cached=cached), data={"batch_size": 1, "bad_picture_limit": 1.0, "cache_views": 1}
    )
    losses = happened.losses[0]
    assert sorted(loss == 0 for loss in losses) == [False] + [True] * 7
    listed = (tmp_path / "bad_pictures.txt").read_text()
    assert sorted(line.split("\t")[0] for line in listed.splitlines()) == [f"{index}.jpg" for index in range(7)]


@pytest.mark.parametrize("cached", [False, True])
def test_undecodable_pictures_beyond_the_limit_stop_training_with_the_list(tmp_path, capsys, cached):
    root = write_table(tmp_path / "data")
    for index in (1, 2, 5):
        (root / f"{index}.jpg").write_bytes(b"no picture")
    run(root, tmp_path, status=1, stages=one(cached=cached), data={"bad_picture_limit": 0.2})
    line = error_line(capsys)
    assert "3 of 12 pictures cannot be used, more than data.bad_picture_limit=0.2" in line
    assert "1.jpg" in line
    assert "raise the limit" in line


def test_the_seed_decides_everything(data_root, tmp_path):
    seed_everything(99)
    first, second = (run(data_root, tmp_path / name, stages=one()).losses for name in "ab")
    assert first == second
