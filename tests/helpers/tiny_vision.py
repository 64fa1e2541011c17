"""Experiments with vision transformers on graphs, made tiny."""

TINY = [
    "--backbone.name=vit_tiny_patch16_224",
    "--backbone.pretrained=false",
    "--backbone.grid=4",
    "--backbone.arguments={depth: 2, embed_dim: 32, num_heads: 2}",
    "--graphs.train=8",
    "--graphs.valid=6",
    "--graphs.test=5",
    "--training.batch=4",
    "--training.steps=null",
    "--training.warmup_steps=0",
    "--training.epochs=1",
    "--training.validate_every=1",
    "--training.precision=32-true",
    "--training.progress=false",
    "--samples.valid=1",
    "--samples.trials=1",
    "--also_test=[]",
    "--distribution.width=8",
]


def tiny(dataset, method, folder, *more):
    """The published configuration of the set, on generated graphs and with a tiny backbone."""
    samples = 1 if method in ("canonical", "fa") else 2
    name = f"{dataset.removeprefix('random_')}/pretrained_{method}"
    changes = [f"--dataset={dataset}", f"--samples.test={samples}", f"--samples.train={samples}", f"--folder={folder}"]
    return name, [*TINY, *changes, *more]
