"""Compiled and op by op, a large attention input gives the same numbers.

XLA's fusions of a matmul with the sum of squares after it have been wrong on some CPUs (jaxlib 0.10 to 0.12), which is the
form of a dense layer followed by QK-norm or RMSNorm: see minigpt_jax/system/xla.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KERNELS, normal

from minigpt_jax.benchmarks.interleave import in_own_process

pytestmark = pytest.mark.slow

B, T, F = 66, 64, 256
HEADS = 1, 8  # 4,224 rows of 256 features and 33,792 of 32


def measure():
    """By kernels and number of heads: the largest error of the compiled output against float64, and those of the compiled
    output and gradients against what is computed op by op, each relative to its largest value."""
    return {(name, H): errors(KERNELS[name], H) for name in KERNELS for H in HEADS}


def errors(kernels, H):
    x_BTD, kernel_DF, weights_BTHK = normal(B, T, 48), normal(48, F, seed=1), normal(B, T, H, F // H, seed=2)

    def queries(x_BTD, kernel_DF):
        return kernels.unit_rms(kernels.matmul(x_BTD, kernel_DF).reshape(weights_BTHK.shape), 1e-6)

    def loss(x_BTD, kernel_DF):
        return jnp.sum(queries(x_BTD, kernel_DF) * weights_BTHK)

    gradient = jax.grad(loss, argnums=(0, 1))
    q_BTHK = (x_BTD.astype(np.float64) @ kernel_DF).reshape(weights_BTHK.shape)
    truth = q_BTHK / np.sqrt(np.mean(q_BTHK**2, axis=-1, keepdims=True) + 1e-6)
    compiled = [jax.jit(queries)(x_BTD, kernel_DF), *jax.jit(gradient)(x_BTD, kernel_DF)]
    eager = [queries(x_BTD, kernel_DF), *gradient(x_BTD, kernel_DF)]
    relative = [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(compiled, eager, strict=True)]
    return [float(np.abs(compiled[0] - truth).max()), *relative]


@pytest.fixture(scope="module")
def measured():
    """From a process with the flags that a user's process has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        return in_own_process(measure)


@pytest.mark.parametrize("H", HEADS)
@pytest.mark.parametrize("name", KERNELS)
def test_dense_and_qk_norm_agree_compiled_and_not_in_large_arrays(measured, name, H):
    assert all(error <= 1e-5 for error in measured[name, H])  # False for NaN
