"""What setup.py built; written by it."""

torch: str
cuda: str
cutlass: str
archs: str
kernels: int
seconds: int
note: str
