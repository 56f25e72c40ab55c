"""Text from a model. Read in this order: logits.py, sampler.py, language_model.py."""
