"""A workaround for a fault of XLA that gives wrong numbers."""

import importlib.metadata
import os


def turn_off_wrong_sums() -> None:
    """Turns off XLA's fusions of sums with what they sum (YNNPACK) in jaxlib 0.11 and 0.12, before JAX is first used.

    With them, the compiled gradient of a dense layer followed by an RMSNorm is wrong by a third on CPUs: from 131,072
    elements with jaxlib 0.12.0.1 (8 heads × 32 features), from 1,048,576 with 0.11.2 (one row of 256 features), measured on
    an AMD EPYC with AVX2, 2026-11-28; jaxlib 0.10.2 is right. tests/test_compiled.py shows whether a version is.

    Does nothing with other versions, which may not know the flag, or if the user has chosen it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    is_wrong = importlib.metadata.version("jaxlib").startswith(("0.11.", "0.12."))
    if is_wrong and "xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=-reduce".strip()
