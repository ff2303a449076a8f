"""A stand-in for the real package; see its one module."""
