"""Text, tokens, batches. Read in this order: text_files.py, corpora.py, tokenizers.py, token_file.py, batches.py."""
