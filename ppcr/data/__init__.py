"""Rendered table-top scenes: scene graphs, the batched renderer, referring expressions and dataset readers."""
