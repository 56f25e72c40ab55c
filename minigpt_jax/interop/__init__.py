"""Trained models: a folder in, of a run or of another library, and a folder out.

Read in this order: architectures.py, hf_files.py, hf_reader.py, hf_writer.py, load.py.
"""
