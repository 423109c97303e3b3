"""What `scripts/kernel_gate.py` compiles, what it reads from the machine code, and what it holds that to."""
