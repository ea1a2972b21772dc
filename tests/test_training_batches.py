"""Which pictures come together, in which order, and what a batch of them is."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import ConfigError
from captioner.tokenizer import Tokenizer
from training.batches import (
    Item,
    ItemKey,
    LengthBatchSampler,
    choose_captions,
    collate,
    stateless_random,
    stateless_seed,
)
from training.sources import BadPicture

START, END, PAD = Tokenizer.start_id, Tokenizer.end_id, Tokenizer.pad_id
samplers = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(3, 40), min_size=4, max_size=150),
        "batch_size": st.integers(1, 20),
        "seed": st.integers(0, 99),
        "bucket_batches": st.integers(1, 5),
    }
)


def make(options, **more):
    return LengthBatchSampler(**{**options, **more})


# --- Order ---


@given(samplers)
@settings(max_examples=50)
def test_an_epoch_shows_each_picture_at_most_once_in_full_batches(options):
    sampler, count = make(options), len(options["lengths"])
    size = min(options["batch_size"], count)
    found = sampler.epoch_batches(3)
    shown = [index for batch in found for index in batch]
    assert len(found) == len(sampler) == count // size
    assert all(len(batch) == size for batch in found)
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(range(count))


@given(samplers)
@settings(max_examples=30)
def test_the_order_depends_on_seed_and_epoch_alone(options):
    first, second = make(options), make(options)
    second.epoch_batches(9)
    assert first.epoch_batches(5) == second.epoch_batches(5)


def test_epochs_and_seeds_differ_in_order_and_reach_all_pictures():
    sampler = LengthBatchSampler(range(50), batch_size=4, seed=1)
    orders = [sampler.epoch_batches(epoch) for epoch in range(20)]
    assert len({str(order) for order in orders}) == 20
    assert {index for order in orders for batch in order for index in batch} == set(range(50))
    assert LengthBatchSampler(range(50), batch_size=4, seed=2).epoch_batches(0) != orders[0]


@given(samplers, st.integers(2, 4), st.integers(0, 9))
@settings(max_examples=50)
def test_processes_share_the_batches_of_one_with_as_many_times_the_size(options, world, epoch):
    size = max(1, min(options["batch_size"], len(options["lengths"]) // world))
    options = {**options, "batch_size": size}
    parts = [make(options, rank=rank, world_size=world).epoch_batches(epoch) for rank in range(world)]
    whole = make(options, batch_size=size * world).epoch_batches(epoch)
    assert [sorted(index for batch in at for index in batch) for at in zip(*parts, strict=True)] == [
        sorted(batch) for batch in whole
    ]
    assert all(len(batch) == size for part in parts for batch in part)


@given(samplers, st.integers(0, 5), st.data())
@settings(max_examples=30)
def test_a_resumed_epoch_goes_on_behind_its_last_batch(options, epoch, data):
    sampler = make(options)
    done = data.draw(st.integers(0, len(sampler)))
    rest = list(make(options, where=lambda _batches: (epoch, done)))
    assert rest == [[ItemKey(epoch, index) for index in batch] for batch in sampler.epoch_batches(epoch)[done:]]


def test_where_is_asked_at_the_start_of_each_epoch_with_the_length_of_one():
    asked = []
    sampler = LengthBatchSampler(range(9), batch_size=2, seed=0, where=lambda n: (asked.append(n), (len(asked), 0))[1])
    epochs = [{key.epoch for batch in sampler for key in batch} for _ in range(2)]
    assert (asked, epochs) == ([4, 4], [{1}, {2}])


def test_captions_of_a_batch_are_of_like_length():
    lengths = [random.Random(index).randrange(5, 40) for index in range(400)]
    batches = LengthBatchSampler(lengths, batch_size=10, seed=0).epoch_batches(0)
    spread = [max(at) - min(at) for at in ([lengths[index] for index in batch] for batch in batches)]
    assert sum(spread) / len(spread) < 4  # of 35 in random batches


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_pictures_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        LengthBatchSampler([3, 4], batch_size=batch_size, seed=0)


def test_fewer_pictures_than_processes_are_refused():
    with pytest.raises(ConfigError, match="2 pictures are too few for 3 processes"):
        LengthBatchSampler([3, 4], batch_size=1, seed=0, world_size=3)


# --- Random numbers ---


def test_random_numbers_depend_on_the_key_alone():
    first = stateless_random(1, "order", 2).random()
    random.seed(5)
    assert stateless_random(1, "order", 2).random() == first
    keys = [(1, "order", 2), (1, "order", 3), (2, "order", 2), (1, "captions", 2), (12,), (1, 2)]
    seeds = {stateless_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=50)
def test_a_picture_gives_as_many_captions_as_wanted_and_each_before_any_twice(there, wanted, seed):
    captions = [[index] for index in range(there)]
    chosen = [index for (index,) in choose_captions(captions, wanted, random.Random(seed))]
    assert len(chosen) == wanted
    assert len(set(chosen)) == min(there, wanted)
    assert captions == [[index] for index in range(there)]


# --- Batches ---

BAD = BadPicture("bad.jpg", "bad.jpg: damaged")


def item(name, *captions):
    return Item(torch.full((3, 2, 2), float(len(name))), [[START, *words, END] for words in captions], name)


def test_captions_stand_side_by_side_per_picture_and_end_in_padding():
    batch = collate([item("a", [7], [8, 9]), BAD, item("bc", [5, 5, 5], [6])])
    assert batch.names == ("a", "bc")
    assert batch.bad == (BAD,)
    assert batch.pictures.mean(dim=(1, 2, 3)).tolist() == [1, 2]
    assert batch.tokens.tolist() == [
        [START, 7, END, PAD, PAD],
        [START, 8, 9, END, PAD],
        [START, 5, 5, 5, END],
        [START, 6, END, PAD, PAD],
    ]
    assert not batch.cached


def test_a_batch_of_bad_pictures_alone_names_them():
    batch = collate([BAD, BAD])
    assert (batch.names, batch.bad, batch.tokens.shape) == ((), (BAD, BAD), (0, 1))
    assert not batch.cached
    assert batch.to(torch.device("cpu")).bad == (BAD, BAD)


def test_grid_features_make_a_cached_batch():
    features = torch.ones(4, 5, dtype=torch.float16)
    batch = collate([Item(features, [[START, END]], "a")])
    assert batch.cached
    assert batch.pictures.dtype == torch.float16
