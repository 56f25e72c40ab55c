"""Functional versus PyTorch style: a guide, the same model in PyTorch (the twin), a check that both agree, and JAX traps.

Only this folder and `benchmarks/` import torch.
"""
