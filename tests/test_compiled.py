"""Compiled and op by op, a large attention input gives the same numbers.

XLA's fusions of a matmul with the sum of squares after it have been wrong on some CPUs (jaxlib 0.10 to 0.12), which is the
form of a dense layer followed by QK-norm or RMSNorm: see minigpt_jax/system/xla.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KERNELS, normal

pytestmark = pytest.mark.slow

B, T, F = 66, 64, 256
X_BTD, KERNEL_DF = normal(B, T, 48), normal(48, F, seed=1)


def expected(H, K):
    """The normalised queries, in float64."""
    q_BTHK = (X_BTD.astype(np.float64) @ KERNEL_DF).reshape(B, T, H, K)
    return q_BTHK / np.sqrt(np.mean(q_BTHK**2, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("H", [1, 8])  # 4,224 rows of 256 features and 33,792 of 32
@pytest.mark.parametrize("name", KERNELS)
def test_dense_and_qk_norm_agree_compiled_and_not_in_large_arrays(name, H):
    kernels, K = KERNELS[name], F // H

    def queries(x_BTD, kernel_DF):
        return kernels.unit_rms(kernels.matmul(x_BTD, kernel_DF).reshape(B, T, H, K), 1e-6)

    def loss(x_BTD, kernel_DF):
        return jnp.sum(queries(x_BTD, kernel_DF) * weights_BTHK)

    weights_BTHK = normal(B, T, H, K, seed=2)
    gradient = jax.grad(loss, argnums=(0, 1))
    compiled, eager = (jax.tree.map(np.asarray, (f(X_BTD, KERNEL_DF), g(X_BTD, KERNEL_DF))) for f, g in [
        (jax.jit(queries), jax.jit(gradient)), (queries, gradient),
    ])  # fmt: skip
    np.testing.assert_allclose(compiled[0], expected(H, K), atol=1e-5, rtol=0)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)
