"""The model: pure functions and Linen modules, independent of files, clocks, flags, logging and devices.

Every array name ends in its dimensions, one letter each, so that the suffixes are also the einsum strings:

    B  batch                 D  model width (embed_dim)      V  vocabulary
    T  query positions       H  query heads                  F  feed-forward width
    S  key positions         G  key/value heads              K  head size
    L  layers

Read in this order: ops.py, masks.py, attention.py, cache.py, layers.py, transformer.py, gpt.py. They state the equations.
Faster implementations are in `kernels/`. A model receives them as a `Kernels` value (kernels.py).
"""
