import re
import time

import jax
import numpy as np
import pytest

from jaxprune.lm.measure import machine


def test_the_versions_that_decide_the_numbers_are_named():
    found = machine.versions()
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert {"python", "jaxlib", "flax", "optax"} <= found.keys()
    others = machine.versions("pytest", "no-such-package")
    assert others == {**found, "pytest": pytest.__version__}


def test_the_devices_are_named():
    assert re.match(rf"{len(jax.devices())} x \w+", machine.device())


def test_phases_are_measured_in_their_order():
    costs = machine.Costs()
    for name in ("read", "prune"):
        with costs.phase(name):
            time.sleep(0.01)
    facts = costs.facts()
    assert [phase["name"] for phase in facts["phases"]] == ["read", "prune"]
    assert facts["seconds"] == sum(phase["seconds"] for phase in facts["phases"]) > 0.02
    assert facts["peak_memory_bytes"] >= facts["phases"][0]["peak_memory_bytes"] > 2**20
