"""A real Slurm on hosts that are network namespaces, and load on what runs in its jobs.

``python -m tests.slurm.endings --list`` says how jobs can end, and runs it.
"""
