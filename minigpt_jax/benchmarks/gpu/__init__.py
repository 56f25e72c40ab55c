"""Every figure of a GPU from one command, `scripts/benchmark.py gpu`.

runner.py runs the parts one after the other, each in its own process, within a time budget. A part is a module here with
`measure(setup)`, which yields results as soon as they exist; the runner writes each of them to the file at once. With
`rehearse` every part runs with tiny sizes on any device, so that no minute of a borrowed GPU is spent on a typing error.
"""
