"""Experiments on the embedded default: which claims of the paper hold there."""
