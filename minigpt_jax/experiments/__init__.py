"""Experiments that train several models: reference runs."""
