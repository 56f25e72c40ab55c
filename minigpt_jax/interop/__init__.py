"""Models of other libraries, in and out. Read in this order: architectures.py, hf_files.py, hf_reader.py, hf_writer.py."""
