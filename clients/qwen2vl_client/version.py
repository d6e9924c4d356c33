"""The version, apart from the package so that any module of it may import it."""

__version__ = "0.1.0"
