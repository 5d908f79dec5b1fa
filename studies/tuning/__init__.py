"""The tuning study: ``python -m benchmarks tuning`` trains over a grid of learning rates α and momenta β, with and
without batch norm, and shows what came of it; with ``--range`` on batches of several sizes, as ghost batches, and from
several initialisations.

settings.py says what is studied; digits.py, networks.py and training.py are one trial. study.py shares the trials out
over processes and machines, through a storage of Optuna's. results.py holds what was measured, analysis.py counts and
compares it, pictures.py draws it, ranges.py does both for a study of several networks; those four need neither torch
nor Optuna nor bnext.
"""
