"""Which ExpertMesh this is. The same as in pyproject.toml, which a source tree need not have installed."""

VERSION = "0.1.0"
