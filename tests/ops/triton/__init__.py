"""The Triton kernels without a GPU: compiled, and under the interpreter. Without triton every test here is skipped."""

import pytest

pytest.importorskip("triton")
