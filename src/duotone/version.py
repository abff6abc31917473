"""The package's version, from its installed metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("duotone")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0+unknown"
