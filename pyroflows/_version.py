"""The version, readable without importing torch."""

__version__ = "0.4.0.dev0"
