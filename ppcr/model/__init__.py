"""Torch reference of the method's stages: the segmenter's encoders and decoder, and the prompt MLLM around it."""
