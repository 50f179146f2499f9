"""One compute thread unless a test asks for more: idle threads spin, and steal what their neighbours need."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
