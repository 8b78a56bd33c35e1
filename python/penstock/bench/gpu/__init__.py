# SPDX-License-Identifier: Apache-2.0
"""`penstock bench --device cuda`: what is different on a GPU.

bench_shape and bench_decode make the rows of one shape (bench.py). Their parts: start (time from
the process's start to the first step), runs (a peer eager and as a CUDA graph), yardstick (cuBLAS),
clock (alternating timings, caches cleared), ceilings (what the card reaches), memory (torch's
allocator), formulas and launches (the profile of each launch), report and plot.
"""
