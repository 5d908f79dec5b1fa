"""The tuning study: ``python -m benchmarks.tuning`` trains over a grid of learning rates α and momenta β, with and
without batch norm, and shows what came of it.

settings.py says what is studied; digits.py, networks.py and training.py are one trial. owner.py, sampler.py and
storage.py share the trials out over processes and machines, workers.py trains them beside each other, study.py brings
the two together and display.py shows how it goes. results.py holds what was measured, analysis.py counts and compares
it, and table.py, pictures.py and conclusion.py show it; those need neither torch nor Optuna nor bnext.
"""
