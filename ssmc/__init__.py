"""ssmc: make Mamba models smaller and faster, in one shot."""

__version__ = "0.1.0"
