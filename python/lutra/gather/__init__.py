"""Gather: a table and addresses in; the weighted sum of the rows found there out."""
