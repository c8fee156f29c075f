"""What the device can do at most: copy bandwidth, and matrix products by dtype. Printed, and recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # the modules that benchmarks share

from _compare import bench_device, copy_bandwidth, matmul_peak


def main() -> None:
    device = bench_device()
    print(f"copy {copy_bandwidth() / 1e9:.1f} GB/s, read and written")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        print(f"matmul {str(dtype).removeprefix('torch.')} {matmul_peak(dtype) / 1e12:.2f} TFLOP/s")
    if device.type == "cuda":
        print(f"matmul tf32 {matmul_peak(torch.float32, tf32=True) / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
