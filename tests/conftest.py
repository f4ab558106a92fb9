"""Settings that every test shares."""

import os

# The models are tiny, the tests run in two processes, and ranks that are forked deadlock with two threads. What a test
# starts inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
