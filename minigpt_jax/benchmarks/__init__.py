"""What `scripts/benchmark.py` measures: a module per benchmark, and what they share.

Each benchmark has `ROUNDS`, `measure(rounds, …)` and `draw(figures, axes_of)`. `measure` prints a table and returns figures.
Shared: interleaved timing (`interleave`), PyTorch and Hugging Face (`baselines`), machine limits (`roofline`), `plots`.
`gpu/` measures everything about a GPU in one run, with a time budget instead of a number of rounds.
"""
