"""The benchmark of bnext: ``python -m benchmarks`` compares it with torch and with a copy of the same bytes.

suites.py says what is measured, operations.py what one call is, providers.py whose, check.py and fused_check.py that
it is right, timing.py how it is timed, memory.py what it holds; measure.py runs them, cuda/ on a GPU. rows.py holds
the results, report.py compares them, bars.py says what they should be, and table.py, plot.py and readme.py show them;
those six need neither torch nor bnext.

Whole models likewise: model_suites.py says what is measured, models.py and resnet.py are the models, training.py and
compiled.py what is called and checked, closeness.py when it is right, peak.py how much memory training takes;
model_measure.py runs them, model_report.py and model_table.py show them.

Errors: numerics.py runs numerics_cases.py and measures as numerics_error.py says; numerics_results.py holds the rows
and their bar, numerics_table.py shows them.
"""
