"""Seeding the generators at every step: torch.manual_seed's numbers without what it costs where CUDA is not in use."""

import pytest
import torch

from probsym_fast.draws import seed_generators
from probsym_fast.training import module
from tests.helpers.tiny import run


@pytest.fixture
def seeded(monkeypatch) -> list[int]:
    """The seeds that CUDA is given."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    return seeds


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 3, 2**63 - 1])
def test_numbers_are_those_of_manual_seed(seed):
    torch.manual_seed(seed)
    expected = torch.rand(5), torch.randn(40)
    seed_generators(seed)
    assert torch.initial_seed() == seed
    assert all(torch.equal(a, b) for a, b in zip((torch.rand(5), torch.randn(40)), expected, strict=True))


@pytest.mark.parametrize("used", [True, False])
def test_gpus_are_seeded_where_they_are_in_use(monkeypatch, seeded, used):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    seed_generators(7)
    assert seeded == ([7] if used else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is in use")
def test_steps_of_a_training_on_a_cpu_leave_cuda_alone(tmp_path, monkeypatch, seeded):
    found, counts = [], []
    for name, seed in (("own", seed_generators), ("torch", torch.manual_seed)):
        monkeypatch.setattr(module, "seed_generators", seed)
        seeded.clear()
        found.append(run(tmp_path / name, dropout=0.5)["state_dict"])
        counts.append(len(seeded))
    own, torchs = found
    assert all(torch.equal(own[key], torchs[key]) for key in torchs)
    assert counts[1] == counts[0] + 12  # six steps of training and of validation
