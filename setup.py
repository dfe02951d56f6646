"""Build of the package. Settings are in pyproject.toml; native code under csrc/ will be built from here."""

from setuptools import setup

setup()
