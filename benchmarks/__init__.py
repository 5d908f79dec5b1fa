"""The benchmark of bnext: ``python -m benchmarks`` compares it with torch and with a copy of the same bytes.

suites.py says what is measured, and traffic.py what that has to move; measure.py checks and times it on a device, which
is the host or that of cuda/, in turn and within a budget (timing.py). Of batch norms operators.py has the calls; of
whole models, models.py and networks.py build them, training.py says what is called, and trainer_process.py trains each
in a process of its own, counts its page faults and its memory, and says where its time goes (shares.py); walk.py calls
a model's batch norms alone. correctness.py says whether a result is right enough to be timed. How large errors are is a
measurement of its own, the command numerics: numerics.py runs numerics_cases.py.

rows.py holds the results. report.py, with acceptance.py and model_report.py, and numerics_report.py make tables of
them, which tables.py prints or writes as Markdown and document.py puts into docs/benchmarks.md; pictures.py draws them
in the look of style.py. All these need neither torch nor bnext.
"""
