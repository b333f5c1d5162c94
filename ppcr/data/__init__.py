"""Rendered table-top scenes: scene graphs, the batched renderer, expressions and dataset readers."""
