// Stands in for the toolkit's header of this name where g++ compiles kernels for the emulator.
#pragma once

#include "simt_device.h"
#include "simt_host.h"
