"""Measurements of whole models."""
