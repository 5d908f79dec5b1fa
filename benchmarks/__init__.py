"""The benchmark of bnext: ``python -m benchmarks`` compares it with torch and with a copy of the same bytes.

suites.py says what is measured, operations.py what one call is, providers.py whose, check.py and float64.py that it is
right, timing.py how it is timed, memory.py what it holds; measure.py runs them on a device, which is the host or that
of cuda/. Whole models likewise: model_suites.py says what is measured, models.py, networks.py, resnet.py and
packages.py are the models, training.py and compiled.py what is called and checked, closeness.py when it is right,
peak.py how much memory training takes; model_measure.py runs them. Errors: numerics.py runs numerics_cases.py and
measures as numerics_error.py says.

rows.py holds the results. report.py and bars.py, model_report.py and numerics_report.py make tables of them, which
tables.py prints or writes as Markdown and document.py puts into docs/benchmarks.md; plot.py and pictures.py draw them
in the look of style.py. All these need neither torch nor bnext.
"""
