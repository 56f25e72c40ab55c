"""The network: pure functions and Linen modules that know nothing of files, clocks, flags or logging.

Every array carries its dimensions as a suffix, one letter each, so that suffixes read as einsum strings:

    B  batch                 D  model width (embed_dim)      V  vocabulary
    T  query positions       H  query heads                  F  feed-forward width
    S  key positions         G  key/value heads              K  head size
    L  layers                N  rows and heads as one axis   P  slots in one of a cache's C parts

Read in this order: attention.py, layers.py, transformer.py, gpt.py.
"""
