"""Helpers shared by the tests: servers, real processes around them, and ready-made messages."""
