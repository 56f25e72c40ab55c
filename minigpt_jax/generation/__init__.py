"""Text generation. Read in this order: logits.py, decode.py, context.py, sampling.py, language_model.py."""
