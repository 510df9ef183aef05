"""One thread a process: for models this small a second gains little, and beside another program
on the same cores the two wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there, which reads it once
