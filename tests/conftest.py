"""One thread a process: for models this small two gain nothing, and wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there, which reads it once
