"""Torch reference of the method's stages: the prompt MLLM, and the segmenter's encoders and decoder."""
