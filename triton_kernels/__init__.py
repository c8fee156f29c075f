"""Triton kernels of gcfast, one op a file, installed as ``gcfast.triton_kernels``.

A file holds the kernels of one op (names end in ``_kernel``), the table of its launch configurations with
the reasons beside it, the launcher that ``gcfast.ops`` calls, and ``specializations()``: every compilation
that the launcher can ask for, which ``tools/aot.py`` compiles without a GPU. Kernels are deterministic (no
atomics, a fixed order of summation) and compute addresses in 64 bits. Nothing here is imported before a
Triton backend is first used.
"""
