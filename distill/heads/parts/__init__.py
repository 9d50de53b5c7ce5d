"""Bases and modules that several heads share."""
