"""Everything is declared in pyproject.toml; native extensions will be added here."""

from setuptools import setup

setup()
