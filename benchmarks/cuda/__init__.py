"""The benchmark on an NVIDIA GPU: ``python -m benchmarks --device cuda``.

device.py says whether there is one and which; measure.py is the device that benchmarks/measure.py runs on. rotation.py
keeps the L2 cache cold, stopwatch.py times by events and graphs, and providers.py has what is compared on a GPU alone.
Without any GPU predict.py tells what model.py expects (docs/cuda-model.md).
"""
