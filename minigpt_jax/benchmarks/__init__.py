"""What `scripts/benchmark.py` measures: a module for each benchmark, the peers, and the turns that contestants take.

Each of the first has ROUNDS, `measure(rounds)`, which prints a table and returns its figures, and `draw(figures, axes_of)`.
"""
