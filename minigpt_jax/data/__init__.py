"""Text, tokens, batches.

Read in this order: text_files.py, download.py, shakespeare.py, corpora.py, tokenizers/, token_file.py, batches.py.
"""
