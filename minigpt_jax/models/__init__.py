"""The model: pure functions and Linen modules, independent of files, clocks, flags, logging and devices.

Every array name ends in its dimensions, one letter each, so that the suffixes are also the einsum strings:

    B  batch                 D  model width (embed_dim)      V  vocabulary
    T  query positions       H  query heads                  F  feed-forward width
    S  key positions         G  key/value heads              K  head size
    L  layers                1  an axis of size one

Read in this order: ops.py, masks.py, attention.py, layers.py, transformer.py, gpt.py; then cache.py, vit.py. They state
the equations. Faster implementations are in `kernels/`. A model receives them as a `Kernels` value (kernels.py): in the
modules, read `kernels.unit_rms` as `ops.unit_rms`, and so on. The `kernel` of a dense layer is something else, its weight
matrix.

A Linen module describes a layer: its fields are its settings, and it holds no parameters. What Flax's names mean:

    model.init(key, x)                      random parameters: nested dicts, one for each submodule, by its name
    model.apply({"params": params}, x)      calls the module with these parameters
    @nn.compact                             `__call__` creates submodules and parameters where it uses them, by name
    setup(self)                             creates them as attributes instead, for use from outside: `embedding.tokens`
    self.param(name, initialiser, shape)    a parameter of the module itself
    self.make_rng("dropout")                a key derived from the one in apply(…, rngs={"dropout": key})
    self.sow("intermediates", name, x)      apply(…, mutable=["intermediates"]) also returns x; otherwise no effect
"""
