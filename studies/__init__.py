"""Experiments that take hours, each a package with its own command."""
