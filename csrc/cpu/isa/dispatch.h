// The instruction sets that the kernels are compiled for, and the choice among them at run time.
#pragma once

#include <vector>

#include "../kernels.h"

namespace bnext::cpu {

enum class Isa { kDefault, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// The instruction sets that this build holds and this processor runs, slowest first.
std::vector<Isa> available_isas();

// The one in use: the fastest available, unless BNEXT_CPU_ISA or use_isa chose another.
Isa current_isa();

// `isa` must be one of available_isas(). Calls already under way finish with the old one.
void use_isa(Isa isa);

const KernelTable& current_kernels();

}  // namespace bnext::cpu
