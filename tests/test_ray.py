"""`captioner.ray_engine`: Ray for real, on this machine; workers that die; and how a cluster is divided."""

import itertools
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import rays
from batch_runs import Deadly, make_pictures

from captioner import Captioner, ConfigError, ImageReadError
from captioner.batch import run
from captioner.caption import Caption, error_record
from captioner.engine import LocalEngine, fingerprint
from captioner.ray_engine import Pool, RayEngine, _results, model_files, pool_for
from captioner.sources import find_pictures

COUNT, BAD, BATCH = 24, (5, 17), 2
FAST = {"method": "greedy", "max_words": 5}


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs, which the engines of these tests find."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with pip install 'captioner[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where actors find `batch_runs`
        yield from _started(ray)


def _started(ray):
    rays.start(ray)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of float32 depend on how many threads share them; an actor of one CPU has one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "pictures", COUNT, bad=BAD)


@pytest.fixture
def engine(cluster, tiny_captioner):
    def make(**settings):
        defaults = {"actors": 1, "workers": 0, "batch_size": BATCH, "device": "cpu", "options": FAST}
        return RayEngine(lambda: tiny_captioner, **(defaults | settings))

    return make


@pytest.fixture
def local(tiny_captioner):
    def make(**settings):
        return LocalEngine(lambda: tiny_captioner, **({"workers": 0, "batch_size": BATCH, "options": FAST} | settings))

    return make


def actor_processes():
    """The ids of the processes that hold the model: children of the raylet, which is one of ours."""

    def parent(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = parent(parent(folder.name)) == os.getpid()
            if ours and (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def flat(batches):
    return [item for batch in batches for item in batch]


def record(picture, result):
    return result.to_record(picture.name) if isinstance(result, Caption) else error_record(picture.name, result)


# --- Ray for real ---


def test_a_killed_worker_loses_and_doubles_nothing(engine, local, source, tmp_path):
    killed = []

    def kill(progress):
        if not killed:
            killed.extend(actor_processes())
            os.kill(killed[0], signal.SIGKILL)

    summary = run([source], tmp_path / "ray.jsonl", engine=engine(actors=2), progress=kill)
    assert len(killed) == 2
    assert (summary.captioned, summary.failed) == (COUNT - len(BAD), {"ImageReadError": len(BAD)})
    run([source], tmp_path / "local.jsonl", engine=local())
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    # What a cluster began, this machine goes on with.
    again = run([source], tmp_path / "ray.jsonl", engine=local())
    assert (again.captioned, again.skipped, again.failed_before) == (0, COUNT - len(BAD), len(BAD))


def test_a_picture_that_kills_its_worker_becomes_an_error_and_the_others_are_captioned(engine, local, source):
    pictures = list(find_pictures([source]))[:5]
    ordinary = pictures[2]
    deadly = Deadly(**{name: getattr(ordinary, name) for name in ordinary.__dataclass_fields__})
    with local() as one:
        expected = [record(*item) for item in flat(one.captions(iter(pictures)))]
    with engine() as many:
        found = flat(many.captions(iter([*pictures[:2], deadly, *pictures[3:]])))
    assert [picture for picture, _ in found] == [*pictures[:2], deadly, *pictures[3:]]
    assert isinstance(found[2][1], ImageReadError)
    assert str(found[2][1]).startswith(f"{deadly.name}: captioning it ended the process 3 times")
    texts = [(record(*item)["caption"], record(*item)["error"]) for item in found]
    assert texts[:2] + texts[3:] == [(each["caption"], each["error"]) for each in expected[:2] + expected[3:]]


def test_pictures_are_drawn_as_they_are_needed_and_captions_come_whole(engine, local, source):
    pictures = [picture for picture in find_pictures([source]) if picture.size_bytes > 40]
    drawn = 0

    def endless():
        nonlocal drawn
        for picture in itertools.cycle(pictures):
            drawn += 1
            yield picture

    with engine(workers=1) as many:
        batches = many.captions(endless())
        found = flat(itertools.islice(batches, 2))
        batches.close()
    assert len(found) == 2 * BATCH
    assert drawn <= 8 * BATCH
    with local() as one:
        expected = flat(one.captions(iter(pictures[: 2 * BATCH])))
    for (_, left), (_, right) in zip(found, expected, strict=True):
        assert left.text == right.text
        for ours, theirs in zip(left.words, right.words, strict=True):
            np.testing.assert_array_equal(ours.attention_heads, theirs.attention_heads)


# --- What needs no Ray ---


def test_an_error_and_a_model_arrive_as_they_were(tiny_captioner, tmp_path):
    error = pickle.loads(pickle.dumps(ImageReadError("a.jpg: damaged")))
    assert (type(error), str(error)) == (ImageReadError, "a.jpg: damaged")
    for name, data in model_files(tiny_captioner).items():
        (tmp_path / name).write_bytes(data)
    assert fingerprint(Captioner.load(tmp_path, device="cpu")) == fingerprint(tiny_captioner)


def test_a_path_that_only_a_worker_lacks_is_said(source, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed; it comes with pip install 'captioner[ray]'")
    from captioner.ray_workers import Answer

    there = next(find_pictures([source]))
    (gone,) = find_pictures([tmp_path / "gone.jpg"])
    errors = [ImageReadError(f"{there.name}: missing"), ImageReadError(f"{gone.name}: missing")]
    (_, first), (_, second) = _results([there, gone], Answer([*errors], [0, 1], "node-7"))
    assert str(first).startswith(f"{there.name}: is not there on node-7, though it is here; put the pictures")
    assert second is errors[1]


def node(alive=True, **resources):
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "actors", "pool"),
    [
        ([node(CPU=8.0)], None, Pool(1, 8, 0)),
        ([node(CPU=8.0)], 3, Pool(3, 2, 0)),
        ([node(CPU=8.0), node(CPU=2.0), node(CPU=64.0, alive=False)], None, Pool(2, 4, 0)),
        ([node(CPU=8.0), node(CPU=2.0)], 5, Pool(5, 2, 0)),
        ([node(CPU=3.0), node(CPU=3.0)], 3, Pool(3, 1, 0)),
        ([node(CPU=0.0), node(CPU=16.0, GPU=4.0), node(CPU=32.0, GPU=4.0)], None, Pool(8, 4, 1)),
        ([node(CPU=64.0), node(CPU=16.0, GPU=2.0)], 1, Pool(1, 8, 1)),
        ([node(CPU=1.0, GPU=2.0)], None, Pool(2, 0, 1)),
    ],
)
def test_a_cluster_is_divided_so_that_all_actors_fit(nodes, actors, pool):
    assert pool_for(nodes, actors) == pool


@pytest.mark.parametrize("nodes", [[node(CPU=2.0)], [node(CPU=9.0, GPU=2.0)]])
def test_more_actors_than_fit_are_refused(nodes):
    with pytest.raises(ConfigError, match=r"3 actors need a .PU each, the Ray cluster has 2; lower actors"):
        pool_for(nodes, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actors": 0}, "actors must be a whole number, at least 1, got 0"),
        ({"address": "ray://head:10001"}, "must be 'auto' or 'host:port', got 'ray://head:10001'"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"options": {"beam_size": 0}}, "beam_size"),
    ],
)
def test_an_impossible_setting_is_said_before_anything_starts(settings, message):
    with pytest.raises(ConfigError, match=message):
        RayEngine(lambda: pytest.fail("the model was loaded"), **settings)


def test_without_ray_the_remedy_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ConfigError, match=r'pip install "captioner\[ray\]"'):
        run([source], tmp_path / "out.jsonl", engine="ray")


def test_options_of_the_cluster_are_refused_on_this_machine(source, tmp_path):
    with pytest.raises(ConfigError, match="actors=2 is of the engine 'ray'"):
        run([source], tmp_path / "out.jsonl", actors=2)
    with pytest.raises(ConfigError, match="engine must be 'local' or 'ray', got 'spark'"):
        run([source], tmp_path / "out.jsonl", engine="spark")
