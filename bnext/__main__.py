"""``python -m bnext``: how bnext was built, and what it uses on this machine."""

import platform

import torch

from bnext import _C, __version__


def main() -> None:
    """Print one fact a line."""
    facts = {
        "bnext": __version__,
        "torch": f"{torch.__version__} (built against {_C.torch_version})",
        "Python": platform.python_version(),
        "compiler": _C.compiler,
        "CUDA kernels": f"built for {_C.cuda_architectures}" if _C.cuda else "not built",
        "CPU instruction set": f"{_C.cpu_isa()} (of {', '.join(_C.cpu_isas())}; BNEXT_CPU_ISA chooses)",
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "threads": str(torch.get_num_threads()),
        "huge pages": ("on for large outputs" if _C.huge_pages_enabled() else "off")
        + " (BNEXT_HUGE_PAGES=0 turns them off)",
        "freed outputs": f"kept up to {_C.max_cached_bytes() >> 20} MB for the next of their size (BNEXT_CACHE_MB)",
    }
    for name, fact in facts.items():
        print(f"{name + ':':<22}{fact}")


if __name__ == "__main__":
    main()
