"""The simulator sees every mistake of `mutants.py`."""

from __future__ import annotations

import pytest
from tests.sim.cluster import Cluster
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.shrinking import failure

SEEDS = range(300)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake.__name__)
def test_the_simulator_sees(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    mutant.mistake(monkeypatch)
    assert any(failure(Cluster(seed, family=mutant.family)) for seed in SEEDS)
