"""Recurrences with several implementations: a `reference` beside the fast ones, one dispatcher each."""
