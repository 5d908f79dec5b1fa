from tiny_suites import run, tiny  # noqa: F401, fixtures
