"""The benchmark on an NVIDIA GPU: ``python -m benchmarks --device cuda``.

device.py finds and describes the GPU; measure.py is the device that benchmarks/measure.py runs on. rotation.py keeps
the L2 cache cold, stopwatch.py times by events and graphs, and providers.py has the providers that only a GPU has.
Without a GPU, predict.py shows the predictions of model.py (docs/cuda-model.md).
"""
