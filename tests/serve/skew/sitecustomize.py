"""Python imports this at its start where this folder is on PYTHONPATH: the wall clock jumps an hour forth and back twice a second, monotonic clocks do not."""
import os
import sys
import time

if folder := os.environ.get("SKEWED"):
    seconds, nanoseconds = time.time, time.time_ns

    def off() -> int:
        return 3600 if int(2 * time.monotonic()) % 2 else -3600

    time.time, time.time_ns = lambda: seconds() + off(), lambda: nanoseconds() + off() * 10**9
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    with open(os.path.join(folder, f"skewed-{os.getpid()}"), "w") as file:
        file.write(module)
