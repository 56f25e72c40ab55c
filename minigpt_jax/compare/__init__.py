"""The functional style beside PyTorch's: guide.md, the twin in torch_gpt.py, the proof that both agree, and the traps.

Beside it only the benchmarks import torch.
"""
