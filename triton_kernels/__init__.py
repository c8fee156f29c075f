"""Triton kernels of gcfast, one op a file, installed as ``gcfast.triton_kernels``.

This version ships none: ``gcfast.backends()`` says so for every op.
"""
