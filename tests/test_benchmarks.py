"""The benchmarks run in a tiny setting and answer in good form; how fast anything is, is not tested."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from captioner.checkpoint import save_checkpoint

# They are run from a checkout and are no part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import __main__ as command
from benchmarks import gpu, gpu_training
from benchmarks.cold_start import import_times_ms, run_cold
from benchmarks.figure import Figure, Settings, Value, ratio_of
from benchmarks.pictures import SIZE_PX, photo_files
from benchmarks.timing import Series, exponent, take_turns

NEEDS = {
    "one_picture": ["transformers"],
    "many_pictures": ["transformers", "onnxruntime", "onnx"],
    "int8": ["onnxruntime", "onnx"],
}
ABSENT = {"gpu", "gpu_training"}  # a test has no GPU


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The folder of a tiny model."""
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(tiny_checkpoint("multihead"), path)
    return path


@pytest.fixture
def settings(folder, tmp_path):
    return Settings(model=str(folder), runtime="torch", threads=1, quick=True, results=tmp_path)


def assert_well_formed(figure):
    record = json.loads(json.dumps(figure.to_record(), allow_nan=False))
    assert record["title"]
    if record["absent"] is None:
        assert record["values"]
        assert all(value["value"] is not None and value["name"] for value in record["values"])
        assert any(value["wanted"] for value in record["values"])
    for series in record["series"].values():
        low, high = series["quartiles_s"]
        assert 0 < low <= series["median_s"] <= high
        assert series["repetitions"] >= 1
    assert figure.lines()[0] == figure.title


@pytest.mark.parametrize("name", command.FIGURES)
def test_every_figure_answers_in_good_form(name, settings):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    if name.startswith("gpu"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("takes minutes on a GPU")
    figure = command.FIGURES[name](settings)
    assert_well_formed(figure)
    assert (figure.absent is not None) == (name in ABSENT)
    if name == "scaling":
        assert (settings.results / "scaling.png").stat().st_size > 1000


def test_the_gpu_figure_runs_on_any_device(settings):
    pytest.importorskip("transformers")
    from captioner.config import EncoderConfig, ModelConfig, MultiheadConfig, PreprocessingConfig

    large = ModelConfig(
        decoder="multihead",
        vocabulary_size=gpu.load_captioner(settings, device="cpu").tokenizer.vocabulary_size,
        preprocessing=PreprocessingConfig(side_px=64),
        encoder=EncoderConfig(backbone="resnet18"),
        decoder_settings=MultiheadConfig(dim=16, layers=1, heads=2, feedforward_dim=16),
    )
    figure = gpu.measure_on("cpu", settings, batches=(1, 2), large=large)
    assert len(figure.values) == 8  # a ratio and a rate of two batches and two models
    assert len(figure.series) == 8


def test_the_large_model_is_what_the_figure_says():
    config = gpu.large_config(100)
    sizes = config.decoder_settings
    assert (config.encoder.backbone, config.preprocessing.side_px) == ("resnet101", 384)
    assert (sizes.layers, sizes.dim) == (6, 512)


def test_sizes_that_do_not_fit_are_named():
    series = {"ours, 1": Series(seconds=(1.0,)), "theirs, 1": Series(seconds=(2.0,))}
    values, notes = gpu.values_of("model", series, (1, 256))
    assert [value.value for value in values] == [2.0, 1.0]
    assert notes == ["model: batches of 256 do not fit into memory"]


def test_the_share_of_training_is_that_of_the_steps_after_the_warm_up():
    import torch

    watch = gpu_training.make_watch(warm_up=2, steps=4)
    module = SimpleNamespace(device=torch.device("cpu"))
    for step in (1, 2, 3, 4):
        torch.randn(200, 200) @ torch.randn(200, 200)
        watch.on_train_batch_end(SimpleNamespace(global_step=step), module)
        assert (watch.whole_s > 0) == (step == 4)
    assert 0 < watch.busy_s <= watch.whole_s


def test_overlapping_intervals_count_once():
    assert gpu_training.covered([(5, 6), (0, 2), (1, 3), (1.5, 1.6), (3, 4)]) == 5
    assert gpu_training.covered([]) == 0


def test_contestants_take_turns():
    order = []
    series = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, repetitions=3)
    assert "".join(order[-6:]) == "ababab"
    assert [len(of.seconds) for of in series.values()] == [3, 3]


def test_a_turn_of_something_fast_is_many_calls():
    (series,) = take_turns({"fast": lambda: None}, repetitions=1, least_s=1e-4).values()
    assert series.calls > 1


def test_a_ratio_is_of_medians():
    series = {"slow": Series(seconds=(9.0, 4.0, 5.0)), "fast": Series(seconds=(2.0, 2.5, 99.0))}
    assert ratio_of(series, "slow", "fast") == 2.0
    assert series["slow"].quartiles_s == (4.5, 7.0)


def test_times_per_thing_keep_the_rest():
    series = Series(seconds=(4.0, 8.0), calls=3, cpu_seconds=(2.0, 2.0)).per(4)
    assert (series.seconds, series.calls, series.cpu_median_s) == ((1.0, 2.0), 3, 0.5)


def test_an_exponent_is_that_of_the_power():
    assert math.isclose(exponent([1, 2, 4], [3.0, 3.0 * 2**0.5, 6.0]), 0.5)


def test_a_value_says_whether_it_is_as_wanted():
    def reached(**limits):
        return Value(name="v", value=2.0, unit="x", **limits).reached

    assert reached() is None
    assert (reached(least=2), reached(least=2.1), reached(most=2), reached(most=1.9)) == (True, False, True, False)


def test_photo_files_are_different_pictures_of_the_stated_size():
    from PIL import Image

    with photo_files(9) as paths:
        assert {Image.open(path).size for path in paths} == {SIZE_PX}
        assert {Image.open(path).format for path in paths} == {"JPEG"}
        assert len({path.read_bytes() for path in paths}) == 9
    assert not paths[0].exists()


def test_memory_of_a_fresh_process_is_its_own():
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])  # so that this process holds it
    took_s, peak_mb = run_cold(["-c", "pass"])
    assert took_s > 0
    assert 1 < peak_mb < 200


def test_imports_are_seen():
    times = import_times_ms(["-c", "import json.decoder"])
    assert "json" in times
    assert list(times.values()) == sorted(times.values(), reverse=True)


def test_the_command_writes_what_it_prints(folder, tmp_path, capsys):
    options = ["--quick", "--threads", "1", "--runtime", "torch", "--model", str(folder), "--results", str(tmp_path)]
    command.main(["gpu", *options])
    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report["figures"]) == {"gpu"}
    assert report["figures"]["gpu"]["absent"] in capsys.readouterr().out
    assert report["machine"]["cores"] >= 1
    assert {"python", "torch", "onnxruntime", "transformers", "pillow"} <= set(report["versions"])
    assert {"date", "commit", "changed", "settings"} <= set(report)


def test_an_unknown_figure_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["nothing"])
    assert "there are one_picture" in capsys.readouterr().err


def test_what_is_not_installed_is_said(monkeypatch, settings):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    figure = command.FIGURES["one_picture"](settings)
    assert isinstance(figure, Figure)
    assert "pip install" in figure.absent
