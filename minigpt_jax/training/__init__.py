"""Training. Read in this order: schedule.py, optimizer.py, state.py, step.py, loop.py, callbacks/, resume.py."""
