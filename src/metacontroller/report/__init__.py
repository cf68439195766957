"""Figures, tables and the HTML report, drawn from the files of runs."""
