"""Settings that every test shares."""

import os

# Two cores: spinning OpenMP threads make every test ten times slower, and forked ranks deadlock with two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
