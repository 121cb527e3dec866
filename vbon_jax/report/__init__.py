"""Figures, tables and the page of a run, read from the files in its workdir."""
