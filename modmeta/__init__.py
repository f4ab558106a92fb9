"""Learn how to adapt one frozen vision backbone to new domains."""

__version__ = "0.1.0"
