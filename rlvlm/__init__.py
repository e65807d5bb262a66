"""rlvlm turns a vision-language model into a reasoning one: long-CoT SFT, then online policy mirror descent."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rlvlm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
