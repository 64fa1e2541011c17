"""The Triton kernels on CPU tensors under triton's interpreter, against the float64 reference.

    TRITON_INTERPRET=1 python -m pytest tests/ops/triton/interpreted

tests/ops/conftest.py starts them in processes of their own, since triton reads the variable when it is imported.
"""
