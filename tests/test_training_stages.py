"""Which stage an epoch is in, and how fast it learns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import ConfigError
from training.stages import Stage, StagePlan, warmup_cosine

plans = st.lists(
    st.builds(
        Stage,
        epochs=st.integers(1, 4),
        encoder=st.sampled_from(["frozen", "finetune"]),
        learning_rate=st.floats(1e-5, 1e-2),
        encoder_learning_rate=st.floats(1e-5, 1e-2),
        warmup_steps=st.integers(0, 8),
        final_share=st.floats(0, 1),
    ),
    min_size=1,
    max_size=4,
).map(StagePlan)


@given(warmup=st.integers(0, 50), length=st.integers(1, 200), final=st.floats(0, 1), step=st.integers(0, 400))
@settings(max_examples=60)
def test_the_rate_rises_from_zero_falls_to_its_final_share_and_stays_in_range(warmup, length, final, step):
    def factor(at):
        return warmup_cosine(at, warmup=warmup, length=warmup + length, final_share=final)

    assert 0 <= factor(step) <= 1
    if step + 1 < warmup:
        assert factor(step) < factor(step + 1)
    elif step >= warmup:
        assert factor(step + 1) <= factor(step) + 1e-12
    assert factor(warmup) == pytest.approx(1)
    assert factor(warmup + length) == pytest.approx(final, abs=1e-12)


@given(plans, st.integers(1, 7))
@settings(max_examples=60)
def test_each_epoch_is_in_one_stage_whose_rates_its_steps_have(plan, steps):
    expected = [index for index, stage in enumerate(plan.stages) for _ in range(stage.epochs)]
    assert [plan.at(epoch).index for epoch in range(plan.epochs)] == expected
    assert plan.at(plan.epochs + 3).index == len(plan.stages) - 1
    for epoch in range(plan.epochs):
        position = plan.at(epoch)
        assert expected[position.first_epoch] == position.index
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert 0 <= plan.rate(step, steps, part="decoder") <= position.stage.learning_rate
            encoder = plan.rate(step, steps, part="encoder")
            assert encoder <= position.stage.encoder_learning_rate
            assert encoder == 0 or position.stage.encoder == "finetune"


def test_every_stage_begins_with_its_own_warm_up():
    plan = StagePlan([Stage(epochs=2, learning_rate=1.0), Stage(epochs=1, learning_rate=0.5, warmup_steps=2)])
    rates = [plan.rate(step, 4, part="decoder") for step in range(12)]
    assert rates[0] == 1.0
    assert rates[8:10] == [0.25, 0.5]
    assert rates[7] < 0.05


def test_cached_epochs_are_those_up_to_the_end_of_the_last_cached_stage():
    cached, frozen = Stage(epochs=2, cached=True), Stage(epochs=3)
    assert StagePlan([cached]).cached_epochs == 2
    assert StagePlan([frozen]).cached_epochs == 0
    assert StagePlan([cached, Stage(epochs=1, encoder="finetune")]).cached_epochs == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs"),
        ({"encoder": "half"}, "frozen or finetune"),
        ({"objective": "reward"}, "cross_entropy, self_critical"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"drop_words": 1.1}, "from 0 to 1"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"cached": True, "encoder": "finetune"}, "cached: false"),
        ({"encoder_stages": 2}, "needs encoder: finetune"),
        ({"objective": "self_critical", "scheduled_sampling": 0.1}, "leave it out"),
        ({"cross_entropy_weight": 0.1}, "self_critical"),
        ({"dropout": True}, "dropout: true belongs to objective: self_critical"),
    ],
)
def test_a_stage_out_of_range_or_with_options_that_exclude_each_other_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Stage(**{"epochs": 1, **settings})


def test_no_stage_and_cached_features_of_a_trained_encoder_are_refused():
    with pytest.raises(ConfigError, match="empty"):
        StagePlan([])
    with pytest.raises(ConfigError, match="stage 2 reads cached features, but stage 1"):
        StagePlan([Stage(epochs=1, encoder="finetune"), Stage(epochs=1, cached=True)])
