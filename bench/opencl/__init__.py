"""Measurements of the OpenCL backend."""
