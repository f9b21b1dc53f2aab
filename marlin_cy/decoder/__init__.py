"""Whole models: from tokens to logits, without PyTorch."""
