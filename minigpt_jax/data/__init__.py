"""From text to tokens to batches.

Reading order: text_files.py, download.py, shakespeare.py, corpora.py, tokenizers/, token_file.py, splits.py, batches.py.
"""
