"""Kills at random moments under load, and a checker that reads afterwards what became of every task."""
