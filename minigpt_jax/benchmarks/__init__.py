"""What `scripts/benchmark.py` measures: a module for each benchmark, the peers, the machine's limits, the
turns that candidates take, and the pictures.

Each of the first has ROUNDS, `measure(rounds, …)`, which prints a table and returns its figures, and
`draw(figures, axes_of)`.
"""
