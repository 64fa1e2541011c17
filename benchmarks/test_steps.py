"""The symmetrization tax: a full training step over the step of the bare backbone on random tokens, in one run."""

import pytest
import torch

from benchmarks.harness import compare
from probsym_fast import tasks

# case -> configuration, seconds of the public code's step on two cores (batch 100, S = 20)
STEPS = {"n-body GNN-PS": ("nbody/gnn_O3_ps", 0.600), "n-body Transformer-PS": ("nbody/transformer_S5xO3_ps", 2.260)}


@pytest.mark.parametrize("case", STEPS)
def test_training_step(case, device, seconds, record):
    name, public = STEPS[case]
    torch.manual_seed(0)
    task = tasks.load(name)
    config = task.config
    model = task.model().to(device).train()
    batch = tuple(x.to(device) for x in task.dataset("train")[torch.arange(config.training.batch)])
    inputs, target = task.inputs(batch)
    samples = config.samples.train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        prediction, penalties = model(inputs, samples)
        loss = task.loss(prediction, target)
        for value in penalties.values():
            loss = loss + config.training.entropy * value
        loss.backward()
        optimizer.step()

    def distribution():
        model.zero_grad()
        g, penalties = model.distribution(inputs, samples)
        tokens = model.embed(inputs, model.distribution.group, g)
        loss = sum((x.sum() for x in tokens if x.requires_grad), torch.zeros((), device=device))
        sum(penalties.values(), loss).backward()

    with torch.no_grad():
        g, _ = model.distribution(inputs, samples)
        shapes = [x.shape for x in model.embed(inputs, model.distribution.group, g)]
    tokens = [torch.randn(shape, device=device) for shape in shapes]
    wanted = torch.randn_like(model.backbone(*tokens))
    bare_optimizer = torch.optim.Adam(model.backbone.parameters(), lr=1e-4)

    def bare():
        bare_optimizer.zero_grad()
        torch.nn.functional.mse_loss(model.backbone(*tokens), wanted).backward()
        bare_optimizer.step()

    variants = {"step": step, "bare backbone": bare, "distribution and embedding": distribution}
    rows = compare(f"{case}, training step", variants, device=device, reference="bare backbone", seconds=3 * seconds)
    rows[0].extra = {"tax": round(1 / rows[0].ratio, 2)}
    if device == "cpu":
        rows[0].extra["public code ms"] = public * 1e3
    record(rows, bare)
