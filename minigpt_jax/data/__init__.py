"""Text, tokens, batches. Read in this order: texts.py, corpora.py, tokenizers.py, tokens.py, batches.py."""
