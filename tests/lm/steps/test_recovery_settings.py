"""Options of a recovery: what they mean where they are left out."""

import pytest

pytest.importorskip("tyro")

from jaxprune.lm.steps.recovery_settings import Recovery


@pytest.mark.parametrize(
    ("options", "rate", "relative"),
    [
        ({}, 2e-3, True),
        ({"recover_train": "matrices"}, 2e-3, True),
        ({"recover_by": "retraining"}, 2e-3, True),
        ({"recover_train": "lora"}, 3e-5, False),
        ({"recover_learning_rate": 2e-4}, 2e-4, False),
        ({"recover_learning_rate": 2e-4, "recover_train": "lora"}, 2e-4, False),
    ],
)
def test_a_rate_that_is_left_out_follows_the_size_of_the_weights(
    options, rate, relative
):
    recovery = Recovery(recover_steps=2, **options)
    assert (recovery.learning_rate, recovery.relative) == (rate, relative)
