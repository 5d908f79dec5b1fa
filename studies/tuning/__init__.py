"""The tuning study: ``python -m benchmarks tuning`` trains over a grid of learning rates α and momenta β, with and
without batch norm, and reports the results; with ``--range`` on batches of several sizes, in ghost batches, and from
several initialisations.

settings.py defines what is studied; digits.py, networks.py and training.py run one trial. study.py distributes the
trials over processes and machines, through an Optuna storage. results.py holds the measurements, analysis.py counts and
compares them, pictures.py draws them, and ranges.py does both for a study of several networks; these four need neither
torch nor Optuna nor bnext.
"""
