"""PPCR: progressive prompt-guided cross-modal reasoning for referring image segmentation.

A reconstruction of the method of arXiv 2603.27993 (whose code and body are not public), made to be
exported: the modules directly in this package are the words of the method (prompts, constraints, boxes,
images, masks, configuration) and need numpy and Pillow only; ``ppcr.model``, ``ppcr.data``,
``ppcr.training`` and ``ppcr.evaluation`` need torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
