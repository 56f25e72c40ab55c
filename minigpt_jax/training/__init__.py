"""Training. Read in this order: losses.py, optimizer.py, step.py, checkpoint.py, loop.py."""
