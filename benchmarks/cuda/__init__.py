"""The benchmark on an NVIDIA GPU: ``python -m benchmarks --device cuda``.

device.py says whether there is one and which; runtime.py is all that is asked of torch.cuda while measuring, so that
the rest runs, and is tested, without a GPU. rotation.py keeps the L2 cache cold, stopwatch.py times by events and
graphs, providers.py has what is compared on a GPU alone, and measure.py is the device that benchmarks/measure.py runs
on. Without any GPU predict.py tells what model.py expects (docs/cuda-model.md).
"""
