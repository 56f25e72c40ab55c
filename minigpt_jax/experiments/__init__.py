"""Experiments: questions that take several runs, or more than one measure, to answer."""
