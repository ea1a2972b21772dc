"""Run folders become one file: a row for each stage, what was measured is kept, what cannot be compared is refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from training_runs import command, error_line, fit, recipe, write_table

from captioner import Captioner, SearchOptions
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.metrics import Interval, evaluate, java
from training import results_measure
from training.results import _models, _runs
from training.results_analysis import References, mean_of
from training.results_measure import Protocol
from training.results_runs import check_comparable, duration, read_run
from training.results_tables import PUBLISHED, signed, table

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")
KINDS = ("frozen", "fine-tuned", "+ SCST")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(java, "missing", lambda metric: "left out")  # METEOR takes its time


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """Two runs of three stages, of the decoder with no attention and of that with most."""
    folders = {}
    for decoder in ("mean", "multihead"):
        folders[decoder] = tmp_path_factory.mktemp(decoder)
        assert fit(folders[decoder], recipe(data_root, folders[decoder], decoder)) == 0
    return folders


@pytest.fixture
def runs(trained, tmp_path):
    """Copies of the runs, each test its own."""
    return {decoder: shutil.copytree(folder, tmp_path / decoder) for decoder, folder in trained.items()}


def change(path, edit):
    """Edit a JSON or YAML file in place."""
    reader, writer = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = reader(path.read_text())
    edit(content)
    path.write_text(writer(content))


def change_checkpoints(run, edit):
    for path in (run / "checkpoints").glob("stage-*.ckpt"):
        content = torch.load(path, weights_only=True)
        edit(content)
        torch.save(content, path)


def write(data_root, output, *arguments):
    return command("results", *arguments, "--data-root", data_root, "-o", output, "--mosaics", 4, "--beam-size", 2)


def rows_of(text, first_column):
    """Return the rows of the table that begins with a column, as dictionaries."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    cells = []
    for line in lines[at:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


# --- The file ---


def test_each_stage_of_each_run_is_a_row_and_the_second_call_measures_nothing(
    runs, data_root, tmp_path, capsys, monkeypatch
):
    output, notes = tmp_path / "docs" / "results.md", tmp_path / "notes.md"
    notes.write_text("## Log\n\nWhat was tried | *here*.\n")
    arguments = [*runs.values(), "--model", f"first={tmp_path / 'model'}", "--notes", notes]
    (checkpoint,) = (runs["mean"] / "checkpoints").glob("stage-1.ckpt")
    assert command("export", checkpoint, "--folder", tmp_path / "model") == 0
    assert write(data_root, output, *arguments) == 0
    text = output.read_text()
    rows = rows_of(text, "decoder")
    assert [(row["training"], row["decoder"]) for row in rows] == [
        (kind, decoder) for kind in KINDS for decoder in ("mean", "multihead")
    ]
    assert {row["seeds"] for row in rows} == {"1"}
    assert all(row["pointing share"] == "25.0%" for row in rows if row["decoder"] == "mean")
    for row in rows:
        assert float(row["captions per second"]) > 0
        assert float(row["parameters (M)"]) > 0
        assert re.fullmatch(r"\d+ (s|min)", row["training time"])
        assert re.search(r", \d+ cores$", row["machine"])
        assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row["CIDEr-D (95 % interval)"])
        assert "METEOR" not in row
    steps = rows_of(text, "training")
    assert [(row["training"], row["step"], row["seed"]) for row in steps] == [
        (kind, "mean → multihead", "1") for kind in KINDS
    ]
    (model,) = rows_of(text, "model")
    assert (model["model"], model["decoder"]) == ("first", "mean")
    protocol = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| references"))
    assert protocol["references"].startswith("8, SHA-256 ")
    assert text.endswith(notes.read_text())
    assert all(row.bleu in text for row in PUBLISHED)

    def refuse(*arguments, **options):
        raise AssertionError("measured again")

    for name in ("caption_pictures", "pointing", "_speed", "load_run"):
        monkeypatch.setattr(results_measure, name, refuse)
    monkeypatch.setattr(results_measure.Captioner, "load", refuse)
    output.unlink()
    assert write(data_root, output, *arguments) == 0
    assert output.read_text() == text
    with pytest.raises(AssertionError, match="measured again"):  # another search is another measure
        command("results", *runs.values(), "--data-root", data_root, "-o", output, "--mosaics", 4, "--beam-size", 1)


def test_one_run_alone_gives_a_table_and_says_what_is_left_out(runs, data_root, tmp_path):
    for number in (2, 3):
        (runs["mean"] / "checkpoints" / f"stage-{number}.ckpt").unlink()
    output = tmp_path / "results.md"
    assert write(data_root, output, runs["mean"]) == 0
    text = output.read_text()
    assert [row["training"] for row in rows_of(text, "decoder")] == ["frozen"]
    assert "Left out: it needs two decoders" in text
    assert "→" not in text


def test_seeds_of_one_recipe_are_joined_and_recipes_with_labels_are_not(runs, data_root, tmp_path):
    for run in runs.values():
        for number in (2, 3):
            (run / "checkpoints" / f"stage-{number}.ckpt").unlink()
    # What was made by other means than training is as good here.
    seeds = [runs["mean"], tmp_path / "seed2"]
    shutil.copytree(runs["mean"], seeds[1])
    change(seeds[1] / "run.json", lambda record: record.update(seed=2))
    change_checkpoints(
        seeds[1], lambda content: [w.mul_(1.5) for w in content["state_dict"].values() if w.is_floating_point()]
    )
    labelled = shutil.copytree(runs["mean"], tmp_path / "labelled")
    change(labelled / "config.yaml", lambda config: config["model"]["stages"][0].update(learning_rate=0.5))
    output = tmp_path / "results.md"
    assert write(data_root, output, *seeds, f"fast={labelled}", runs["multihead"]) == 0
    text = output.read_text()
    found = {(row["decoder"], row["training"]): row for row in rows_of(text, "decoder")}
    assert {key: row["seeds"] for key, row in found.items()} == {
        ("mean", "frozen"): "2",
        ("multihead", "frozen"): "1",
        ("mean", "frozen (fast)"): "1",
    }
    joined = found["mean", "frozen"]["CIDEr-D (95 % interval)"]
    assert "; seed 1: " in joined
    (step,) = rows_of(text, "training")
    assert (step["training"], step["seed"]) == ("frozen", "1")


def test_every_model_is_searched_as_the_table_says_whatever_its_own_settings(tiny_checkpoint):
    search = SearchOptions(beam_size=2, max_words=20)
    protocol = Protocol(pictures=[], search=search, mosaics=4)
    for max_tokens, words in ((24, 20), (12, 11)):
        captioner = Captioner(tiny_checkpoint(max_tokens=max_tokens), device="cpu")
        assert SearchOptions(**protocol.options(captioner)) == dataclasses.replace(search, max_words=words)


# --- What cannot be compared ---


def test_a_run_with_other_data_is_refused_by_name(runs, data_root, tmp_path, capsys):
    change_checkpoints(runs["multihead"], lambda content: content["CaptionData"].update(data_sha256="0" * 64))
    assert write(data_root, tmp_path / "results.md", *runs.values()) == 1
    line = error_line(capsys)
    assert str(runs["multihead"]) in line
    assert "hash of the data is not that of" in line
    assert "000000000000..." in line


def test_data_that_are_not_those_of_the_runs_are_refused(runs, data_root, tmp_path, capsys):
    moved = shutil.copytree(data_root, tmp_path / "moved")
    path = moved / "captions.csv"
    path.write_text(path.read_text().replace("red", "pink"))
    assert write(moved, tmp_path / "results.md", runs["mean"]) == 1
    assert "not the data of" in error_line(capsys)


def rows_with(run, **changes):
    """Return the rows of a run, each with other facts or another recipe."""
    return [
        dataclasses.replace(row, **{name: {**getattr(row, name), **value} for name, value in changes.items()})
        for row in read_run(run)
    ]


@pytest.mark.parametrize("what", ["encoder", "preprocessing", "vocabulary", "data_sha256"])
def test_what_all_rows_must_share_is_checked_and_the_run_named(runs, what):
    first, other = read_run(runs["mean"]), rows_with(runs["multihead"], facts={what: {"backbone": "resnet50"}})
    check_comparable([*first, *read_run(runs["multihead"])])
    with pytest.raises(DataError if what == "data_sha256" else ConfigError, match=re.escape(str(runs["multihead"]))):
        check_comparable([*first, *other])


def test_the_same_seed_twice_and_another_recipe_are_refused(runs, tmp_path):
    again = shutil.copytree(runs["mean"], tmp_path / "again")
    with pytest.raises(ConfigError, match=r"again.*seed 1 is in .*mean too"):
        check_comparable([*read_run(runs["mean"]), *read_run(again)])
    check_comparable([*read_run(runs["mean"]), *read_run(again, label="other")])
    change(again / "run.json", lambda record: record.update(seed=2))
    check_comparable([*read_run(runs["mean"]), *read_run(again)])
    change(again / "config.yaml", lambda config: config["data"].update(batch_size=5))
    with pytest.raises(ConfigError, match=r"again: data.batch_size is not that of"):
        check_comparable([*read_run(runs["mean"]), *read_run(again)])


def remove(name):
    return lambda run: (run / name).unlink()


def overwrite(name, content):
    return lambda run: (run / name).write_text(content)


FAULTS = {
    "run.json cannot be read": remove("run.json"),
    "config.yaml cannot be read": remove("config.yaml"),
    "scores.jsonl cannot be read": remove("scores.jsonl"),
    "not JSON": overwrite("run.json", "{"),
    "not YAML": overwrite("config.yaml", "a: [1, 2\nb: }"),
    "is damaged, or not of this run": overwrite("scores.jsonl", '{"epoch": 0}\nno json\n'),
    "restore it": overwrite("config.yaml", "[]"),
    "no checkpoints/stage-": lambda run: shutil.rmtree(run / "checkpoints"),
    "stage-2.ckpt: damaged": overwrite("checkpoints/stage-2.ckpt", "no checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_run_folder_is_named_in_one_line(runs, fault):
    FAULTS[fault](runs["mean"])
    with pytest.raises(CheckpointError, match=re.escape(fault)) as caught:
        read_run(runs["mean"])
    assert str(runs["mean"]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_memory_of_what_was_measured_is_named(runs, data_root, tmp_path, capsys):
    for number in (2, 3):
        (runs["mean"] / "checkpoints" / f"stage-{number}.ckpt").unlink()
    arguments = (data_root, tmp_path / "results.md", runs["mean"])
    assert write(*arguments) == 0
    (kept,) = (runs["mean"] / "checkpoints").glob("stage-1.ckpt.results-*.json")
    content = json.loads(kept.read_text())
    assert sorted(content["captions"]) == sorted(f"{index}.jpg" for index in range(8, 12))
    kept.write_text(kept.read_text()[:100])
    capsys.readouterr()
    assert write(*arguments) == 1
    assert "delete it" in error_line(capsys)
    kept.unlink()
    assert write(*arguments) == 0


# --- What stages and times are called ---


def kinds_of(run, stages, init_from=None):
    """Return the kinds of a run that had other stages; its checkpoints are as they were."""

    def edit(config):
        plain = config["model"]["stages"][0]
        config["model"] |= {"stages": [{**plain, **stage} for stage in stages], "init_from": init_from}

    change(run / "config.yaml", edit)
    return [row.kind for row in read_run(run)]


def test_stages_are_named_after_all_that_came_before_them(runs):
    tuned, critical, plain = {"encoder": "finetune"}, {"objective": "self_critical"}, {}
    run = runs["mean"]
    assert kinds_of(run, [plain, tuned, critical]) == list(KINDS)
    assert kinds_of(run, [plain, critical, plain]) == ["frozen", "frozen + SCST (stage 2 of 3)", "frozen + SCST"]
    assert kinds_of(run, [tuned, plain, tuned]) == [
        "fine-tuned (stage 1 of 3)",
        "fine-tuned (stage 2 of 3)",
        "fine-tuned",
    ]
    assert kinds_of(run, [plain, tuned, critical], "runs/base")[2] == "+ SCST, from base"
    with pytest.raises(CheckpointError, match="not of this run"):
        kinds_of(run, [plain, tuned])


def minute(number):
    return f"2026-01-01T00:{number:02d}:00+00:00"


def score_line(attempt, epoch, at):
    return {"attempt": attempt, "epoch": epoch, "time": minute(at)}


def test_time_counts_up_to_the_stage_with_what_was_lost():
    done, killed = {"started": minute(0), "ended": minute(30)}, {"started": minute(0), "ended": None}
    again = {"started": minute(40), "ended": minute(55)}
    scores = [score_line(1, 0, 10), score_line(1, 1, 20)]
    assert duration([done], scores, last_epoch=0).seconds == 600
    assert duration([done], scores, last_epoch=1).seconds == 1200
    assert duration([done], scores, last_epoch=2) is None
    resumed = [*scores, score_line(2, 1, 45), score_line(2, 2, 50)]
    assert duration([done, again], resumed, last_epoch=0).seconds == 600  # it was over before the break
    whole = duration([done, again], resumed, last_epoch=2)
    assert (whole.seconds, whole.at_least) == (60 * (30 + 10), False)
    whole = duration([killed, again], resumed, last_epoch=2)
    assert (whole.seconds, whole.at_least) == (60 * (20 + 10), True)
    assert duration([killed, again], resumed[2:], last_epoch=2).seconds == 600


def test_time_is_known_of_epochs_that_were_not_validated():
    killed = {"started": minute(0), "ended": None, "epoch_ends": {"0": minute(10), "1": minute(22)}}
    again = {"started": minute(40), "ended": minute(55), "epoch_ends": {"1": minute(46), "2": minute(51)}}
    scores = [score_line(1, 1, 20), score_line(2, 1, 45)]
    assert duration([killed], [], last_epoch=0).seconds == 600
    assert duration([killed], scores[:1], last_epoch=1).seconds == 60 * 22
    assert duration([killed, again], scores, last_epoch=0).seconds == 600
    whole = duration([killed, again], scores, last_epoch=2)
    assert (whole.seconds, whole.at_least) == (60 * (22 + 11), True)
    assert duration([killed, again], scores, last_epoch=1).seconds == 60 * (22 + 6)
    assert duration([killed, again], scores, last_epoch=3) is None


# --- Analysis ---

REFERENCES = {
    "a": ["A red dog runs .", "The red dog .", "Dog , red !", "A cat .", "Nothing at all here to see"],
    "b": ["One two .", "One three .", "Four .", "Five .", "Six ."],
    "c": ["A b c d e f g h i j", "a b c d e f g h i j", "x", "y", "z"],
}


def test_things_are_content_words_that_three_of_five_references_share():
    references = References(REFERENCES)
    assert references.names == ["a", "b", "c"]
    assert references.things() == [2, 0, 0]  # red, dog
    assert References({"a": ["a dog", "the dog runs"], "b": ["x"]}).things() == [1, 1]  # of two both, of one it


def test_bins_hold_every_picture_once():
    rng = np.random.default_rng(0)
    words = [f"w{index}" for index in range(30)]
    references = {
        f"{index:02d}": [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(5)] for index in range(40)
    }
    made = References(references)
    for bins in (made.by_length(), made.by_things()):
        assert sorted(index for some in bins for index in some.pictures) == list(range(40))
        assert all(some.pictures for some in bins)
    lengths = made.mean_lengths()
    thirds = made.by_length()
    assert max(lengths[i] for i in thirds[0].pictures) < min(lengths[i] for i in thirds[1].pictures)
    assert max(lengths[i] for i in thirds[1].pictures) < min(lengths[i] for i in thirds[2].pictures)
    assert all(10 <= len(some.pictures) <= 16 for some in thirds)


def test_cider_of_pictures_has_that_of_the_set_as_its_mean():
    captions = {"a": "A red dog.", "b": "One two three.", "c": "x"}
    wanted = evaluate(captions, REFERENCES, resamples=2).scores["CIDEr-D"]
    assert References(REFERENCES).cider(captions).mean() == pytest.approx(wanted)


def test_an_interval_needs_enough_pictures_and_zero_in_it_is_not_distinguishable():
    assert mean_of(np.arange(9.0)).interval is None
    found = mean_of(np.arange(100.0))
    assert found.value == pytest.approx(49.5)
    assert 43 < found.interval.low < 46 < 53 < found.interval.high < 56
    assert signed(1.0, Interval(-0.1, 2.0)).endswith("not distinguishable")
    assert signed(0.0, Interval(0.0, 0.0)).endswith("not distinguishable")
    assert signed(0.0, Interval(1e-9, 2e-9)) == "+0.0 (+0.0 to +0.0), not distinguishable"
    assert "not" not in signed(1.0, Interval(0.1, 2.0))
    assert "not" not in signed(-1.0, Interval(-2.0, -0.1))
    assert "too few" in signed(1.0, None)


def test_a_bar_in_a_cell_does_not_break_the_table():
    assert table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


# --- The command ---


def test_labels_are_told_from_paths(tmp_path):
    odd = tmp_path / "rate=3"
    odd.mkdir()
    assert _runs([str(odd), "plain", "fast=runs/x"]) == {odd: "", type(odd)("plain"): "", type(odd)("runs/x"): "fast"}
    with pytest.raises(ConfigError, match="named twice"):
        _runs(["x", "fast=x"])
    assert _models(["a=b=c"]) == {"a": type(odd)("b=c")}
    for wrong in ("a", "=a", "a="):
        with pytest.raises(ConfigError, match="LABEL=FOLDER"):
            _models([wrong])
    with pytest.raises(ConfigError, match="taken"):
        _models(["a=b", "a=c"])


@pytest.mark.parametrize("fault", ["output", "notes", "model", "run", "beam"])
def test_a_wrong_argument_is_named_before_any_work(data_root, tmp_path, capsys, fault):
    file = tmp_path / "file"
    file.touch()
    given = {"output": tmp_path / "x.md", "notes": file, "model": "a=b", "run": tmp_path / "run", "beam": 2}
    given |= {"output": file / "x.md"} if fault == "output" else {}
    given |= {"notes": tmp_path / "none.md"} if fault == "notes" else {}
    given |= {"model": "ab"} if fault == "model" else {}
    given |= {"beam": 0} if fault == "beam" else {}
    arguments = ["--notes", given["notes"], "--model", given["model"], "--beam-size", given["beam"]]
    assert command("results", given["run"], "--data-root", data_root, "-o", given["output"], *arguments) == 1
    words = {"output": "--output", "notes": "--notes", "model": "--model", "run": "run.json", "beam": "beam_size"}
    assert words[fault] in error_line(capsys)
