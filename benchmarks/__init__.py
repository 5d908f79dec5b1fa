"""The benchmark of bnext: ``python -m benchmarks`` compares it with torch and with a copy of the same bytes.

suites.py says what is measured, operations.py what one call is, check.py that it is right, timing.py how it
is timed; measure.py runs them. rows.py holds the results, report.py compares them, and table.py, plot.py and
readme.py show them; those five need neither torch nor bnext.
"""
