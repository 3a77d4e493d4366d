"""The simulator sees every mistake of `mutants_of_steps.py` and `mutants_of_members.py`."""

from __future__ import annotations

import pytest
from tests.sim import mutants_of_members, mutants_of_steps
from tests.sim.cluster import Cluster
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.shrinking import failure

SEEDS = range(300)


def test_there_are_mistakes_of_every_kind():
    modules = {mutant.mistake.__module__ for mutant in MUTANTS}
    assert modules == {mutants_of_steps.__name__, mutants_of_members.__name__}
    assert len(MUTANTS) >= 25


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake.__name__)
def test_the_simulator_sees(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    mutant.mistake(monkeypatch)
    assert any(failure(Cluster(seed, family=mutant.family)) for seed in SEEDS)
