"""The training recipe: two resumable commands, one for the prompt MLLM and one for the segmenter."""
