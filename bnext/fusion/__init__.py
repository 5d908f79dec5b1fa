"""Fusing batch norms with what follows them, on the graph that a model really runs: see docs/design.md."""
