"""Models side by side on the same data: ``anomalib-raad compare``."""
