"""Operators that more than one library or device has its own way for."""
