"""Divergence is noticed once per metric, and names what to lower."""

import logging

import numpy as np

from pjrlhf.training.divergence import KL_LIMIT, WINDOW, Divergence


def test_exploding_losses_and_divergences_name_the_learning_rate(caplog):
    def warnings(name, values):
        caplog.clear()
        watch = Divergence("policy", {"optimizer.learning_rate": 0.003})
        with caplog.at_level(logging.WARNING, logger="absl"):
            for step, value in enumerate(values, 1):
                watch.update(step, {name: value, "other": 1e9})
        return [record.getMessage() for record in caplog.records]

    (message,) = warnings("loss", [0.7] * 10 + [3.2] * 10)
    assert "policy: loss rose from 0.7 to" in message and "by step 12: training diverges" in message
    assert message.endswith("lower optimizer.learning_rate=0.003")
    (message,) = warnings("objective/kl", [0.0] * 5 + [2 * KL_LIMIT] * 5)
    assert "objective/kl rose from 0 to" in message
    for fine in ([0.7] * 20 + [3.2], np.linspace(4, 0, 30), [0.1, 0.9] * 20, [-0.2, 0.1] * 10, [0.7] * (WINDOW - 1)):
        assert not warnings("loss", fine)
    assert not warnings("objective/kl", np.linspace(0, 15, 50))
