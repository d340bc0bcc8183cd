"""Separators that ESPnet does not have; they serve in its enhancement models as its own do."""
