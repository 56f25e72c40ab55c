"""The cores of this machine, and how JAX sees them."""

import os


def use_two_cpu_devices() -> None:
    """Lets JAX see a CPU of several cores as two devices, among which sampling divides its rows. Before JAX is first used.

    XLA decodes a few rows with little more than one core. Measured at 6 layers × 256: with 16 rows a step takes 0.72 of the
    time, with 2 rows 0.59. Two and not more, since no machine was at hand to measure more on. Does nothing where the user
    has chosen (JAX_NUM_CPU_DEVICES, XLA_FLAGS).
    """
    import jax

    chosen: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    has_chosen = chosen >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not has_chosen and num_cores() > 1:
        jax.config.update("jax_num_cpu_devices", 2)


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
