"""One torch thread for each worker: two on busy cores are many times slower than one."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start
