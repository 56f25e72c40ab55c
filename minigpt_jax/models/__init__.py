"""The network: pure functions and Linen modules that know nothing of files, clocks, flags, logging or devices.

Every array carries its dimensions as a suffix, one letter each, so that suffixes read as einsum strings:

    B  batch                 D  model width (embed_dim)      V  vocabulary
    T  query positions       H  query heads                  F  feed-forward width
    S  key positions         G  key/value heads              K  head size
    L  layers

Read in this order: ops.py, masks.py, attention.py, cache.py, layers.py, transformer.py, gpt.py. They state equations.
What is fast on a given machine is in `kernels/`, and a model receives it as a `Kernels` value (kernels.py).
"""
