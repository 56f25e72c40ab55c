"""Text, tokens, batches. Read in this order: corpora.py, tokenizers.py, batches.py."""
