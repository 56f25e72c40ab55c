"""Loading trained models, from runs and from Hugging Face folders, and exporting them to Hugging Face.

Read in this order: architectures.py, hf_files.py, hf_reader.py, hf_writer.py, peft.py, load.py.
"""
