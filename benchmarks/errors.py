"""Why a benchmark has no result."""


class BenchmarkError(Exception):
    """Names what cannot be measured, and what would be needed."""
