"""What `benchmarks/gpu_check.py` is made of: stages that each run in a process of their own, results, their rendering.

gpu_check.py ── check ──> worker (one process a stage) ──> scan, scan_time, pytorch, served, …
     │            └─────> benchmarks/results/<gpu>-<date>.json
     └─ render ── claims ──> the tables of docs/gpu.md, and a line of README.md
"""
