"""Scan: queries and a stored collection in; the scores and the best k of them out."""
