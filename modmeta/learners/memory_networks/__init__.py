"""Networks that read a support set as a sequence, for memory learners."""

from modmeta.learners.memory_networks import lstm, mann, snail  # noqa: F401 - they register themselves
from modmeta.learners.memory_networks.network import MEMORY_NETWORKS, MemoryNetwork, Recall, register_memory_network

__all__ = ["MEMORY_NETWORKS", "MemoryNetwork", "Recall", "register_memory_network"]
