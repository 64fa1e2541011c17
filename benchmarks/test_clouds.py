"""Vector Neurons on molecules, a training step: clouds of different sizes beside equal ones of as many atoms."""

import pytest
import torch

from benchmarks.harness import compare
from probsym_fast.distributions import VectorNeurons
from probsym_fast.groups import PointClouds

# numbers of atoms: of ethanol, and those of 32 molecules of ase's G2 collection
ETHANOL, NEARLY = [9] * 32, [9] * 31 + [8]
G2 = [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 12, 14]
SAMPLES, TYPES = 8, 4
CASES = {
    "32 ethanols": {"without num_nodes": (ETHANOL, False), "with": (ETHANOL, True), "one smaller": (NEARLY, True)},
    "32 molecules of G2, 182 atoms": {
        "as many of 6 atoms": ([6] * 30, False),
        "ragged": (G2, True),
        "padding computed": (G2, False),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_vector_neurons(case, device, seconds, record):
    generator = torch.Generator().manual_seed(0)
    net = VectorNeurons(channels=1, features=TYPES).to(device)

    def step(sizes, ragged):
        B, n = len(sizes), max(sizes)
        x, features = torch.randn(B, n, 3, generator=generator), torch.rand(B, n, TYPES, generator=generator)
        counts = torch.tensor(sizes, device=device) if ragged else None
        batch = PointClouds(x.to(device), features=features.to(device), num_nodes=counts)
        noise = torch.randn(net.noise_shape(batch, SAMPLES), generator=generator).to(device)

        def run():
            loss = sum(y.square().sum() for y in net(batch, noise).values())
            return torch.autograd.grad(loss, list(net.parameters()))

        return run

    variants = {name: step(*given) for name, given in CASES[case].items()}
    first = next(iter(variants))
    name = f"Vector Neurons, training, {case}, {SAMPLES} samples"
    rows = compare(name, variants, device=device, reference=first, seconds=seconds, whole=True)
    record(rows, variants[first])
