"""A static model of the GPU kernels: what their compiled code costs, without running it.

    python -m benchmarks.gpu_model            prints the table
    python -m benchmarks.gpu_model --write    and writes it to benchmarks/results/gpu-predicted.json and .md

`cases` names calls with realistic shapes, `record` runs them on tensors without data and keeps every launch, `launches`
compiles it, `sass` reads the machine code, `source` counts how often its loops run, and `model` makes a time of it all.
Every figure that comes out is predicted. docs/gpu.md says how to read the table.
"""
