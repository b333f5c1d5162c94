"""Checkpoint to bundle: ONNX writers, precisions, the parity gate, and the script that runs them all."""
