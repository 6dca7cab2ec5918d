"""Lookup of rows in a table stored as an MPO: the op and its kernel."""
