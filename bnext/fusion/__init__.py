"""Fusing batch norms with what follows them, on graphs that are captured from a model's calls: see docs/design.md."""
