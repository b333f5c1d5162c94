"""Latency and accuracy of a bundle, each by one command that ends with one JSON line."""
