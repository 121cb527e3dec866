"""The stages of a run; they alone know config and workdir."""
