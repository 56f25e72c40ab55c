"""The same model in PyTorch, and the proof that both agree. The only room that imports torch."""
