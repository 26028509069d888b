"""Generate images: requests, methods to compare, timing, PNG files, pipelines."""
