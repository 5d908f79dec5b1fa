"""The benchmark of bnext: ``python -m benchmarks`` compares it with torch and with a copy of the same bytes.

suites.py lists what is measured, and traffic.py computes the bytes that it has to move. measure.py checks each case and
times the providers in turn, within a budget (timing.py), on the host or on the device of cuda/. operators.py has the
calls of batch norms. models.py and networks.py build whole models; training.py has their steps and calls;
trainer_process.py trains each model in a process of its own, measures its page faults and memory, and where its time
goes (shares.py); walk.py calls a model's batch norms alone. correctness.py checks that a result is right enough to be
timed. The command numerics measures errors: numerics.py runs the cases of numerics_cases.py.

rows.py holds the results. report.py, with acceptance.py and model_report.py, and numerics_report.py make tables of
them, which tables.py prints or writes as Markdown and document.py puts into docs/benchmarks.md. pictures.py draws them
in the style of style.py. None of these needs torch or bnext.
"""
