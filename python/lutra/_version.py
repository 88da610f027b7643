"""The version: pyproject.toml's, as the installed metadata has it."""

from importlib import metadata

try:
    __version__ = metadata.version("lutra")
except metadata.PackageNotFoundError:  # a build in the source tree
    __version__ = "0.0.0.dev0"
